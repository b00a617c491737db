"""A whole model written without ever being in memory: shard by shard, a tensor read when its turn comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.errors import ModelError, nearest
from fs_fwdllm.model.base.packed import PackedLinear
from fs_fwdllm.model.base.shards import INDEX_FILE, SINGLE_FILE, shard_file, shard_index, split_into_shards
from fs_fwdllm.model.base.tables import StreamedEmbedding
from fs_fwdllm.model.base.weights import named_weights

__all__ = ["Unread", "unread_state", "write_unread"]


@dataclass(frozen=True)
class Unread:
    """A tensor that :attr:`read` gives; its bytes are known before."""

    bytes: int
    read: Callable[[], torch.Tensor]


def unread_state(model: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, Unread]:
    """The tensors of a model, of which some are on the disk, by public name and in the model's dtypes; ties once.

    Args:
        values: in place of the model's own; looked at one at a time.

    Raises:
        ModelError: a name in ``values`` is not a parameter of the model.
    """
    given = {public_name(name): name for name in values}
    modules = dict(model.named_modules())
    state = {}
    for name, weight in named_weights(model).items():
        public = public_name(name)
        if public in given:
            read = _reader_of_value(values, given[public], weight.dtype)
        else:
            read = _reader_of_module(modules[name.rpartition(".")[0]], weight)
        state[public] = Unread(weight.numel() * weight.element_size(), read)
    if strangers := sorted(set(given) - set(state)):
        raise ModelError(f"{strangers[0]!r} is not a parameter of the model{nearest(strangers[0], state)}")
    held = set(model.state_dict()) - set(dict(model.named_parameters(remove_duplicate=False)))
    for name, buffer in model.named_buffers():
        if name in held:
            state[name] = Unread(buffer.nbytes, lambda buffer=buffer: buffer)  # type: ignore[misc]
    return state


def _reader_of_value(values: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: values[name].detach().to(dtype)


def _reader_of_module(module: nn.Module, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    if isinstance(module, StreamedEmbedding):
        return module.dequantised
    if isinstance(module, PackedLinear) and weight is not module.bias:
        turned = weight.shape != module.weight.shape
        return lambda: module.dequantised(weight.dtype).T if turned else module.dequantised(weight.dtype)
    return lambda: weight


def write_unread(state: Mapping[str, Unread], folder: Path) -> None:
    """Write tensors as the weights of a model's folder.

    Raises:
        ModelError: a file of the base cannot be read any more.
        OSError: the disk is full.
    """
    shards = split_into_shards({name: tensor.bytes for name, tensor in state.items()})
    for number, names in enumerate(shards):
        held = {name: state[name].read().detach().cpu().contiguous() for name in names}
        file = SINGLE_FILE if len(shards) == 1 else shard_file(number, len(shards))
        save_file(held, folder / file, metadata={"format": "pt"})
        del held  # before the next shard is read
    if len(shards) > 1:
        index = shard_index(shards, sum(tensor.bytes for tensor in state.values()))
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
