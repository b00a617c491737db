"""The weights of a model by name, also those that are on the disk.

``named_parameters`` knows only what is in memory. Whoever divides a model into parts, counts it or writes it needs the
others too, in the places and the shapes they would have.
"""

from __future__ import annotations

import torch
from torch import nn

from fs_fwdllm.model.base.checkpoint import Entry
from fs_fwdllm.model.base.codecs import Plain
from fs_fwdllm.model.base.packed import PackedLinear
from fs_fwdllm.model.base.tables import StreamedEmbedding

__all__ = ["entry_of", "is_turned", "named_weights"]


def named_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """As ``named_parameters``, with the matrices that stay on the disk: shape and dtype, no numbers. Ties count once.

    Shapes are those of the checkpoint, as they are of a model in memory (GPT-2's are ``[in, out]``).
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for place, inner in module.named_modules():
        start = f"{place}." if place else ""
        entry = entry_of(inner)
        if entry is not None and id(entry) not in seen:
            seen.add(id(entry))
            found[f"{start}weight"] = inner.weight.T if is_turned(inner) else inner.weight
        for name, parameter in inner.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{start}{name}"] = parameter
    return found


def entry_of(module: nn.Module) -> Entry | None:
    """Where the one tensor of a module lies that is on the disk as floats; ``None`` for any other module."""
    if isinstance(module, StreamedEmbedding):
        return module.entry if module.entry.codec is None else None
    if isinstance(module, PackedLinear) and module.streamed is not None and isinstance(module.codec, Plain):
        return module.streamed.entries[0]
    return None


def is_turned(module: nn.Module) -> bool:
    """Whether the file has the matrix as ``[in, out]``."""
    return isinstance(module, PackedLinear) and isinstance(module.codec, Plain) and module.codec.transposed
