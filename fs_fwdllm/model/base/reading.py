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
from fs_fwdllm.model.base.codecs import Plain
from fs_fwdllm.model.base.packed import PackedLinear, packed_layers, unpack
from fs_fwdllm.model.base.packing import Form, group_of, pack
from fs_fwdllm.model.base.recognise import codec_of
from fs_fwdllm.model.base.streaming import Reader, StreamedEmbedding
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
        if matrix_shape(module) is None:
            continue
        inside = name in in_blocks
        if reader is not None and inside:
            packed = _streamed(checkpoint, named[name], module, settings, reader, dtype)
        else:
            packed = _packed(checkpoint, named[name], module, settings, form if inside else None, dtype)
        if packed is not None:
            _put(model, name, packed)
    unpack(model, (name for name, _ in packed_layers(model) if name not in in_blocks))  # heads are looked into
    if reader is not None:
        _stream_tables(model, checkpoint, reader, dtype, keep_head)
    _fill(model, checkpoint, dtype)
    missing = _tie(model)
    if experts := sorted(name for name in missing if "expert" in name):
        raise ModelError(
            f"{checkpoint.folder}: a mixture of experts ({experts[0]}) is saved under other names than the model has; "
            "packed bases are not read from it; load it as floats (fwdllm.base.quantise none)"
        )
    return model, missing


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


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


def _plain(entry: Entry | None, shape: tuple[int, int], *, transposed: bool) -> Plain | None:
    if entry is None or entry.shape != (shape[::-1] if transposed else shape):
        return None
    return Plain(*shape, transposed=transposed, element_bits=8 * entry.dtype.itemsize)


def _stream_tables(model: Any, checkpoint: Checkpoint, reader: Reader, dtype: torch.dtype, keep_head: bool) -> None:
    """The table of input embeddings, by rows, and the head of a language model, tied to it or not."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    entry = checkpoint.entries.get(f"{saved_name(checkpoint, model, names[id(table)])}.weight")
    if type(table) is not nn.Embedding or entry is None or entry.shape != tuple(table.weight.shape):
        return  # a table that is more than one is read as it is
    _put(model, names[id(table)], StreamedEmbedding(reader, entry, dtype, table.padding_idx))
    if not isinstance(head, nn.Linear):
        return
    own = checkpoint.entries.get(f"{saved_name(checkpoint, model, names[id(head)])}.weight")
    if own is None and not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return  # a head that the checkpoint lacks is not the table
    entry = entry if own is None else own
    plain = _plain(entry, (head.out_features, head.in_features), transposed=False)
    if plain is None:
        return
    assert entry is not None
    layer = PackedLinear(plain, reader.add_table(entry), head.bias, dtype)
    _put(model, names[id(head)], layer)
    if keep_head:
        unpack(model, [names[id(head)]])


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
            raise ModelError(f"{checkpoint.folder}: {weight} {error}; it cannot be packed as {form.name}") from error
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
            if not parameter.is_meta or name not in checkpoint or checkpoint.entries[name].shape != parameter.shape:
                continue
            wanted = torch.float32 if any(word in name.split(".") for word in kept) else dtype
            value = checkpoint.read(name)
            value = value.to(wanted) if value.is_floating_point() else value
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for leaf, buffer in module.named_buffers(recurse=False):
            name = saved_name(checkpoint, model, start + leaf)
            if name in checkpoint and checkpoint.entries[name].shape == buffer.shape:
                buffer.copy_(checkpoint.read(name))


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
