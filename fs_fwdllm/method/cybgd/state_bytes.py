"""An optimiser's state as bytes: for every tensor its named float32 arrays (moments) and scalars (step counts).

``payload = header length (uint32) + msgpack [compressed, [[[name, is scalar], ...] per tensor]] + values``

Arrays have the shape of the parameter they belong to. Any torch optimiser whose state is of that kind can travel.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import torch

from fs_fwdllm.errors import WireError
from fs_fwdllm.method.cybgd.codec import Encoding, decode_tensors, encode_tensors

__all__ = ["TensorState", "average_states", "pack_states", "unpack_states"]

#: What an optimiser keeps for one tensor.
TensorState = dict[str, torch.Tensor]

_LENGTH = struct.Struct("<I")
_FLOAT32 = Encoding("float32", "float32")
_MOST_NAMES = 8


def pack_states(states: Sequence[TensorState], *, compress: bool) -> np.ndarray:
    """The state of a block's tensors, in order, as bytes (uint8)."""
    index = [[[name, value.dim() == 0] for name, value in sorted(state.items())] for state in states]
    values = [value for state in states for _, value in sorted(state.items())]
    data, compressed = encode_tensors(values, _FLOAT32, compress=compress)
    header = msgpack.packb([compressed, index])
    return np.frombuffer(_LENGTH.pack(len(header)) + header + data, np.uint8)


def unpack_states(payload: np.ndarray, shapes: Sequence[Sequence[int]]) -> list[TensorState]:
    """Inverse of :func:`pack_states` for tensors of ``shapes``.

    Raises:
        WireError: the bytes are not such a state, or one of other tensors.
    """
    raw = payload.tobytes()
    try:
        (length,) = _LENGTH.unpack_from(raw)
        compressed, index = msgpack.unpackb(raw[4 : 4 + length], strict_map_key=True)
        _check_index(compressed, index, len(shapes))
    except (struct.error, ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"an optimiser state is malformed ({error})") from error
    wanted = [() if scalar else tuple(shape) for shape, names in zip(shapes, index, strict=True) for _, scalar in names]
    values = iter(decode_tensors(raw[4 + length :], wanted, _FLOAT32, compressed=compressed))
    return [{name: next(values) for name, _ in names} for names in index]


def _check_index(compressed: Any, index: Any, tensors: int) -> None:
    if not isinstance(compressed, bool) or not isinstance(index, list) or len(index) != tensors:
        raise ValueError(f"it is not of {tensors} tensors")
    for names in index:
        if not isinstance(names, list) or len(names) > _MOST_NAMES:
            raise ValueError("a tensor's entry is not a short list")
        for entry in names:
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
                raise ValueError(f"an entry is {entry!r:.40}")
            if not isinstance(entry[1], bool):
                raise ValueError(f"an entry is {entry!r:.40}")


def average_states(states: Sequence[Sequence[TensorState]], weights: Sequence[float]) -> list[TensorState]:
    """Weighted mean over clients of the arrays; of scalars (counts of steps) the largest.

    Raises:
        WireError: the clients' states have different names.
    """
    merged: list[TensorState] = []
    for own in zip(*states, strict=True):
        names = sorted(own[0])
        if any(sorted(state) != names for state in own):
            raise WireError("the clients' optimiser states have different names")
        merged.append({name: _mean([state[name] for state in own], weights) for name in names})
    return merged


def _mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    if values[0].dim() == 0:
        return torch.stack(list(values)).max()
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += value * float(np.float32(weight))
    return total
