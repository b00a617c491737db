"""The tensors of a GGUF file by the model's names for them.

llama.cpp has names of its own (``blk.3.attn_q.weight``), and for some architectures it changed tensors before it wrote
them: rows of queries and keys stand in another order, norms are larger by one. Which name is which, and what was done,
transformers knows for its own loading; here it is asked, and no table is kept. What it does to a matrix is found by
having it done to the numbers of the rows: another order of whole rows can be undone while rows are unpacked, so that
the file stays as it is and a matrix packed. Anything else that is done to a matrix is refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.base.block_codecs import BLOCK_CODECS, Reordered
from fs_fwdllm.model.base.checkpoint import Checkpoint, Entry
from fs_fwdllm.model.base.codecs import Codec, Plain
from fs_fwdllm.model.gguf_file import GgufTensor, read_gguf
from fs_fwdllm.model.quiet import quiet_transformers

__all__ = ["GgufCheckpoint", "gguf_entry"]

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Tensors of factors that stretch positions; with the model's own configuration they are not needed.
_POSITIONS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def gguf_entry(file: Path, tensor: GgufTensor) -> Entry:
    """Where a tensor lies, in rows of bytes if it is packed."""
    rows, columns = int(np.prod(tensor.shape[:-1])), tensor.shape[-1]
    if tensor.form.is_float:
        return Entry(file, tensor.offset, tensor.bytes, _FLOATS[tensor.form.name], tensor.shape)
    codec = BLOCK_CODECS[tensor.form.name](rows, columns)
    return Entry(file, tensor.offset, tensor.bytes, torch.uint8, (rows, tensor.bytes // rows), codec)


class GgufCheckpoint(Checkpoint):
    """The tensors of a file.

    Args:
        file: the file.
        config: the model's configuration, as transformers has it.
        own_config: whether that is the model's own, not what the file says of it.

    Raises:
        ModelError: the file is damaged, of an architecture transformers cannot read from it, or holds tensors that the
            model has no place for.
    """

    packs_tables = True

    def __init__(self, file: Path, config: Any, *, own_config: bool) -> None:
        header = read_gguf(file)
        self._library = _Library(file, header.architecture, config)
        self._kept: dict[str, str] = {}
        entries: dict[str, Entry] = {}
        strangers = []
        for name, tensor in header.tensors.items():
            if name not in self._library.names:
                strangers.append(name)
                continue
            own = self._library.names[name]
            self._kept[own] = name
            entries[own] = self._entry(file, name, tensor)
        if own_config:
            strangers = [name for name in strangers if name not in _POSITIONS]
        if strangers:
            raise ModelError(
                f"{file}: holds {len(strangers)} tensors that a {config.model_type} of its settings has no place for "
                f"({', '.join(strangers[:3])}); put the model's own config.json beside it, or give the folder of the "
                "float model"
            )
        super().__init__(file, entries)

    def _entry(self, file: Path, name: str, tensor: GgufTensor) -> Entry:
        found = gguf_entry(file, tensor)
        if len(tensor.shape) == 1 and found.codec is None:
            return found
        if len(tensor.shape) != 2:
            what = "a stack of matrices (a mixture of experts)" if len(tensor.shape) > 2 else "a packed vector"
            raise ModelError(
                f"{file}: {name} {tensor.shape} is {what}, which is not read from GGUF; give the folder of the float "
                "model"
            )
        order = self._library.order(name, tensor.shape[0])
        if order is None:
            return found
        kept: Codec = found.codec or Plain(*tensor.shape, element_bits=8 * found.dtype.itemsize)
        return replace(found, codec=Reordered(kept.out_features, kept.in_features, kept, order))

    def read(self, name: str) -> torch.Tensor:
        """The tensor: rows of bytes where they are packed, whose codec has them in the model's order."""
        entry = self.entries[name]
        value = _bytes_of(entry).view(entry.dtype).view(entry.shape)
        if len(entry.shape) == 1:
            return self._library.processed(self._kept[name], value)
        return value[entry.codec.order] if entry.is_float and isinstance(entry.codec, Reordered) else value


class _Library:
    """What transformers knows of an architecture's files.

    Attributes:
        names: the model's by the file's.
    """

    def __init__(self, file: Path, architecture: str, config: Any) -> None:
        # here, since it imports the code of several models
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._file = file
        kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = kind(config=config.to_dict())
        with init_empty_weights(include_buffers=False), quiet_transformers():
            model: Any = AutoModelForCausalLM.from_config(config)
            named: Any = get_gguf_hf_weights_map
            self.names: dict[str, str] = named(model, self._processor)

    def order(self, name: str, rows: int) -> torch.Tensor | None:
        """Which of the file's rows is the model's row 0, 1, ...; ``None`` where they are the same.

        Raises:
            ModelError: more is done to the matrix than that.
        """
        numbered = np.arange(2 * rows).reshape(rows, 2)  # two columns, which have to stay beside each other
        done = self._processed(name, numbered)
        order = done[:, 0] // 2 if done is not None and done.shape == (rows, 2) else None
        is_order = order is not None and np.array_equal(np.sort(order), np.arange(rows))
        if done is None or not is_order or not np.array_equal(done, numbered[order]):
            raise ModelError(
                f"{self._file}: {name} is not kept as the model has it (turned, or mixed with others), which is not "
                "read from GGUF; give the folder of the float model"
            )
        return None if np.array_equal(done, numbered) else torch.from_numpy(np.ascontiguousarray(order))

    def processed(self, name: str, vector: torch.Tensor) -> torch.Tensor:
        """A vector as the model has it, in float32."""
        done = self._processed(name, vector.float().numpy())
        if done is None:
            raise ModelError(f"{self._file}: {name} cannot be read as one tensor; give the folder of the float model")
        return torch.from_numpy(np.array(done, dtype=np.float32))

    def _processed(self, name: str, values: Any) -> Any | None:
        try:
            done = self._processor.process(
                weights=values, name=name, tensor_key_mapping=self.names, parsed_parameters={"tensors": {}}
            )
        except (ValueError, KeyError, TypeError, AttributeError):  # of one who expects the matrix itself
            return None
        return done.weights if done.name == name else None


def _bytes_of(entry: Entry) -> torch.Tensor:
    """The bytes of a tensor, in memory of its own."""
    memory = np.empty(entry.bytes, dtype=np.uint8)
    try:
        with entry.file.open("rb") as opened:
            opened.seek(entry.offset)
            count = opened.readinto(memory)  # type: ignore[arg-type]
    except OSError as error:
        raise ModelError(f"{entry.file}: cannot be read ({error.strerror or error})") from error
    if count < entry.bytes:
        raise ModelError(f"{entry.file}: ends at byte {entry.offset + count:,}, in the middle of a tensor")
    return torch.from_numpy(memory)
