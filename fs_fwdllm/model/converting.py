"""Reading weights that are converted while they are loaded, without the file's own copy of them beside the model.

transformers maps a safetensors file into memory. Where the model computes in the file's dtype, the mapped pages *are*
its parameters: nothing is copied, and processes of one machine share them. Where it does not, every parameter is a
converted copy, and the pages that it was made from stay in memory until the last one is done: 1.5 times the model for
float32 from bfloat16. Such a file is read tensor by tensor instead, and memory holds the model and a few tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import modeling_utils

from fs_fwdllm.model.base.packed import packed_layers
from fs_fwdllm.model.folder import checkpoint_dtype
from fs_fwdllm.model.source import ModelSource

__all__ = ["mapped_embedding", "reading_what_is_converted"]


@contextmanager
def reading_what_is_converted(dtype: torch.dtype) -> Iterator[None]:
    """While transformers loads a model in ``dtype``, let it read files of another dtype instead of mapping them."""
    loader: Any = modeling_utils
    stock = loader.safe_open
    wanted = str(dtype).removeprefix("torch.")

    def opening(file: Any, *given: Any, **named: Any) -> Any:
        if checkpoint_dtype(Path(file).parent) != wanted:
            try:
                return stock(file, *given, **{**named, "backend": "pread"})
            except TypeError:  # a release of safetensors that can only map
                pass
        return stock(file, *given, **named)

    loader.safe_open = opening
    try:
        yield
    finally:
        loader.safe_open = stock


def mapped_embedding(model: Any, source: ModelSource) -> torch.Tensor | None:
    """The embedding table of a loaded model, where it is frozen pages of its file and only looked up in: rows that
    nobody looks up take no memory. ``None`` for one that is trained, converted, packed or multiplied with."""
    if not source.is_local or packed_layers(model):
        return None
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(table, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.requires_grad or weight is getattr(head, "weight", None):
        return None
    stored = checkpoint_dtype(Path(source.transformer))
    return weight if stored == str(weight.dtype).removeprefix("torch.") else None
