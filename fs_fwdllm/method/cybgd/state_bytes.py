"""An optimiser's state as bytes: for every tensor its named float32 arrays (moments) and scalars (step counts).

``payload = header length (uint32) + msgpack [compressed, [[[name, is scalar], ...] per tensor]] + values``

Arrays have the shape of the parameter they belong to. Any torch optimiser whose state is of that kind can travel.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
import torch

from fs_fwdllm.core.header import described, unpack
from fs_fwdllm.errors import WireError
from fs_fwdllm.method.cybgd.codec import Encoding, decode_tensors, encode_tensors, raw_bytes

__all__ = ["TensorState", "average_states", "most_bytes", "pack_states", "unpack_states"]

#: What an optimiser keeps for one tensor.
TensorState = dict[str, torch.Tensor]

_LENGTH = struct.Struct("<I")
_FLOAT32 = Encoding("float32", "float32")
_MOST_NAMES = 8
#: What a name and what belongs to it may take in the header.
_NAME_BYTES = 40


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
    raw = np.ascontiguousarray(payload).data
    start = _LENGTH.size
    length = int.from_bytes(raw[:start], "little")
    if not start <= start + length <= min(len(raw), start + _NAME_BYTES * (_MOST_NAMES * len(shapes) + 1)):
        raise WireError(f"an optimiser state of {len(raw)} bytes announces a header of {length} bytes")
    compressed, index = _checked(unpack(raw[start : start + length], deepest=4), len(shapes))
    wanted = [() if scalar else tuple(shape) for shape, names in zip(shapes, index, strict=True) for _, scalar in names]
    values = iter(decode_tensors(raw[start + length :], wanted, _FLOAT32, compressed=compressed))
    return [{name: next(values) for name, _ in names} for names in index]


def most_bytes(shapes: Sequence[Sequence[int]], keeps: Mapping[str, bool]) -> int:
    """The most bytes that the state of tensors of ``shapes`` takes, for an optimiser that ``keeps`` these arrays (or
    single numbers) of each."""
    header = msgpack.packb([True, [[[name, scalar] for name, scalar in keeps.items()]] * len(shapes)])
    values = [() if scalar else shape for shape in shapes for scalar in keeps.values()]
    return _LENGTH.size + len(header) + raw_bytes(values, _FLOAT32)


def _checked(header: tuple[Any, ...], tensors: int) -> tuple[bool, Any]:
    """Whether the values are compressed, and the index. Raises ``WireError`` if they are something else."""
    compressed, index = header if len(header) == 2 else (None, None)
    if not isinstance(compressed, bool) or not isinstance(index, tuple) or len(index) != tensors:
        raise WireError(f"an optimiser state is not of {tensors} tensors")
    for names in index:
        if not (isinstance(names, tuple) and len(names) <= _MOST_NAMES and all(map(_is_entry, names))):
            raise WireError(f"an optimiser state has {described(names)} for a tensor's entries")
        if len({name for name, _ in names}) != len(names):
            raise WireError("an optimiser state has two entries of one name")
    return compressed, index


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], bool)


def average_states(states: Sequence[Sequence[TensorState]], weights: Sequence[float]) -> list[TensorState]:
    """Weighted mean over clients of the arrays; of scalars (counts of steps) the largest.

    A client whose optimiser never moved a tensor (an expert that saw no token) keeps nothing for it, and has no say.

    Raises:
        WireError: the clients' states have different names.
    """
    merged: list[TensorState] = []
    for own in zip(*states, strict=True):
        heard = [(state, weight) for state, weight in zip(own, weights, strict=True) if state]
        shares = [weight for _, weight in heard]
        if len(heard) < len(own):
            shares = [weight / sum(shares) for weight in shares]
        names = sorted(heard[0][0]) if heard else []
        if any(sorted(state) != names for state, _ in heard):
            raise WireError("the clients' optimiser states have different names")
        merged.append({name: _mean([state[name] for state, _ in heard], shares) for name in names})
    return merged


def _mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    if values[0].dim() == 0:
        return torch.stack(list(values)).max()
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += value * float(np.float32(weight))
    return total
