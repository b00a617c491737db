"""A model whose frozen matrices are packed: built empty, then filled tensor by tensor from the checkpoint.

Transformers' own loading knows packed layers only through each library's kernels. Here the model is built without
memory for its weights; every linear layer that the checkpoint has packed becomes a
:class:`~fs_fwdllm.model.base.packed.PackedLinear` over the bytes as they are, and, if asked for, every linear layer of
the transformer blocks that it has as floats is packed as it is read. The rest is read in the dtype the base computes
in. One float matrix exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.base.checkpoint import Checkpoint, Entry
from fs_fwdllm.model.base.codecs import Codec, Plain, rows_at_a_time
from fs_fwdllm.model.base.packed import PackedLinear, packed_layers, put, unpack
from fs_fwdllm.model.base.packing import Form, group_of, pack
from fs_fwdllm.model.base.recognise import codec_of
from fs_fwdllm.model.base.streaming import Reader
from fs_fwdllm.model.base.tables import PackedEmbedding, StreamedEmbedding
from fs_fwdllm.model.structure import linear_layers

__all__ = ["matrix_shape", "read_base", "saved_name"]

#: Tensors beside a layer that no product needs.
_NOT_NUMBERS = ("bias", "weight_shape")


@torch.no_grad()
def read_base(
    make_empty: Callable[[], nn.Module],
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    form: Form | None = None,
    reader: Reader | None = None,
    keep_head: bool = False,
) -> tuple[nn.Module, set[str]]:
    """The model, and the names of the parameters that the checkpoint lacks or has in another shape.

    Args:
        make_empty: builds the model, with weights of any value.
        settings: the ``quantization_config`` of the folder; empty for a float checkpoint.
        dtype: of what is not packed.
        form: packs the linear layers of the blocks that the checkpoint has as floats.
        reader: leaves the linear layers of the blocks, the input embeddings and a language model's head on the disk.
        keep_head: reads that head into memory all the same, for whoever looks into it.

    Raises:
        ModelError: a layer is packed in a way that is not known, or its tensors cannot be read or packed.
    """
    with init_empty_weights(include_buffers=False):
        model = make_empty()
    named = {name: saved_name(checkpoint, model, name) for name, _ in model.named_modules()}
    in_blocks = set(_in_blocks(model))
    for name, module in list(model.named_modules()):
        inside = name in in_blocks
        if matrix_shape(module) is None or (checkpoint.packs_tables and not inside):
            continue
        if reader is not None and inside:
            packed = _streamed(checkpoint, named[name], module, settings, reader, dtype)
        else:
            packed = _packed(checkpoint, named[name], module, settings, form if inside else None, dtype)
        if packed is not None:
            put(model, name, packed)
    unpack(model, (name for name, _ in packed_layers(model) if name not in in_blocks))  # heads are looked into
    if reader is not None or checkpoint.packs_tables:
        _replace_tables(model, checkpoint, reader, dtype, keep_head)
    _fill(model, checkpoint, dtype)
    missing = _tie(model)
    if experts := sorted(name for name in missing if "expert" in name):
        raise ModelError(
            f"{checkpoint.place}: a mixture of experts ({experts[0]}) is saved under other names than the model has; "
            "packed bases are not read from it; load it as floats (fwdllm.base.quantise none)"
        )
    return model, missing


def _streamed(
    checkpoint: Checkpoint,
    saved: str,
    module: nn.Module,
    settings: Mapping[str, Any],
    reader: Reader,
    dtype: torch.dtype,
) -> PackedLinear | None:
    """The layer over its bytes on the disk, packed or floats; ``None`` where the checkpoint lacks it."""
    shape = matrix_shape(module)
    assert shape is not None
    codec, entries = codec_of(checkpoint, saved, shape, settings), checkpoint.beside(saved)
    if codec is None:
        codec = _plain(entries.get("weight"), shape, transposed=isinstance(module, Conv1D))
    if codec is None:
        return None
    used = {name: entry for name, entry in entries.items() if name not in _NOT_NUMBERS and "quant_state" not in name}
    bias: Any = module.bias
    return PackedLinear(codec, reader.add(used, shape[0]), bias, dtype)


def _plain(entry: Entry | None, shape: tuple[int, int], *, transposed: bool) -> Codec | None:
    """The codec of a matrix that is kept as floats; ``None`` where it is another matrix."""
    if entry is None or entry.numbers != (shape[::-1] if transposed else shape):
        return None
    return entry.codec or Plain(*shape, transposed=transposed, element_bits=8 * entry.dtype.itemsize)


def _replace_tables(
    model: Any, checkpoint: Checkpoint, reader: Reader | None, dtype: torch.dtype, keep_head: bool
) -> None:
    """The table of input embeddings, by rows, and the head of a language model, tied to it or not.

    Both stay on the disk, or without a reader in packed form in memory. Neither is replaced where the table is more
    than one, nor a head whose numbers somebody looks into.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    weight = f"{saved_name(checkpoint, model, names[id(table)])}.weight"
    entry = checkpoint.entries.get(weight)
    if type(table) is not nn.Embedding or entry is None or entry.numbers != tuple(table.weight.shape):
        return
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    own = None
    if isinstance(head, nn.Linear):
        own = f"{saved_name(checkpoint, model, names[id(head)])}.weight"
        own = (
            own if own in checkpoint else weight if tied else None
        )  # a head that the checkpoint lacks is not the table
    kept = None if reader is not None or entry.is_float or entry.codec is None else checkpoint.read(weight)
    if reader is not None:
        put(model, names[id(table)], StreamedEmbedding(reader, entry, dtype, table.padding_idx))
    elif kept is not None and entry.codec is not None:
        put(model, names[id(table)], PackedEmbedding(entry.codec, kept, dtype, table.padding_idx))
    if own is not None:
        layer = _head(checkpoint, own, head, reader, dtype, kept if own == weight else None)
        if layer is not None:
            put(model, names[id(head)], layer)
            if keep_head:
                unpack(model, [names[id(head)]])


def _head(
    checkpoint: Checkpoint,
    weight: str,
    head: nn.Linear,
    reader: Reader | None,
    dtype: torch.dtype,
    kept: torch.Tensor | None,
) -> PackedLinear | None:
    """The output layer over its bytes; ``None`` for one of floats in memory. ``kept`` are those of a tied table."""
    entry = checkpoint.entries[weight]
    codec = _plain(entry, (head.out_features, head.in_features), transposed=False)
    if codec is None:
        return None
    if reader is not None:
        streamed = reader.add_table(entry, rows_at_a_time(head.in_features, torch.bfloat16))
        return PackedLinear(codec, streamed, head.bias, dtype)
    if entry.is_float:
        return None
    return PackedLinear(codec, {"weight": checkpoint.read(weight) if kept is None else kept}, head.bias, dtype)


def _in_blocks(model: nn.Module) -> list[str]:
    """The linear layers of the blocks; none where the blocks are of something else."""
    try:
        return linear_layers(model)
    except ModelError:
        return []


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a linear layer, GPT-2's kind included; ``None`` for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (int(module.nf), int(module.nx)) if isinstance(module, Conv1D) else None


def saved_name(checkpoint: Checkpoint, model: Any, name: str) -> str:
    """What the checkpoint calls a module or parameter: with or without the prefix of the architecture's body."""
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    others = [f"{prefix}{name}", name.removeprefix(prefix)] if prefix != "." else []
    for candidate in (name, *others):
        if candidate in checkpoint or any(True for _ in _first(checkpoint, candidate)):
            return candidate
    return name


def _first(checkpoint: Checkpoint, layer: str) -> Iterator[str]:
    start = f"{layer}."
    return (name for name in checkpoint.entries if name.startswith(start))


def _packed(
    checkpoint: Checkpoint,
    saved: str,
    module: nn.Module,
    settings: Mapping[str, Any],
    form: Form | None,
    dtype: torch.dtype,
) -> PackedLinear | None:
    shape = matrix_shape(module)
    assert shape is not None
    codec = codec_of(checkpoint, saved, shape, settings)
    if codec is not None:
        parts = {part: checkpoint.read(f"{saved}.{part}") for part in checkpoint.beside(saved) if part != "bias"}
    else:
        weight = f"{saved}.weight"
        if form is None or weight not in checkpoint or group_of(form, *shape) is None:
            return None
        matrix = checkpoint.read(weight)
        matrix = matrix.T.contiguous() if isinstance(module, Conv1D) else matrix
        if tuple(matrix.shape) != shape:
            return None
        try:
            codec, parts = pack(matrix, form)
        except ValueError as error:
            raise ModelError(f"{checkpoint.place}: {weight} {error}; it cannot be packed as {form.name}") from error
    bias: Any = module.bias
    return PackedLinear(codec, parts, bias, dtype)


def _fill(model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Every tensor that the checkpoint has in the model's shape, in ``dtype`` unless the architecture wants float32."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept += tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for module_name, module in model.named_modules():
        start = f"{module_name}." if module_name else ""
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            name = saved_name(checkpoint, model, start + leaf)
            if not parameter.is_meta or name not in checkpoint or checkpoint.entries[name].numbers != parameter.shape:
                continue
            wanted = torch.float32 if any(word in name.split(".") for word in kept) else dtype
            value = _numbers(checkpoint, name)
            value = value.to(wanted) if value.is_floating_point() else value
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for leaf, buffer in module.named_buffers(recurse=False):
            name = saved_name(checkpoint, model, start + leaf)
            if name in checkpoint and checkpoint.entries[name].shape == buffer.shape:
                buffer.copy_(checkpoint.read(name))


def _numbers(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor that is not kept packed, whether it was saved so or not."""
    entry, value = checkpoint.entries[name], checkpoint.read(name)
    if entry.codec is None or entry.is_float:
        return value
    return PackedLinear(entry.codec, {"weight": value}).dequantised()


def _tie(model: Any) -> set[str]:
    """Tie what the architecture ties; then make room for what is still without, and return its names.

    Norms of a new head start at one, everything else at zero; whoever loads the model draws the matrices.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model.tie_weights()
    missing = set()
    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not parameter.is_meta:
                continue
            missing.add(f"{module_name}.{leaf}" if module_name else leaf)
            if id(parameter) not in made:
                fill = 1.0 if parameter.dim() == 1 and leaf == "weight" else 0.0
                made[id(parameter)] = nn.Parameter(
                    torch.full(parameter.shape, fill, dtype=parameter.dtype), requires_grad=False
                )
            module._parameters[leaf] = made[id(parameter)]
    return missing
