"""A frame's header: parsed in bounded memory, and field by field what its record says it is.

What a msgpack text costs is not in its length. An empty map is one byte and takes 64 in memory, five bytes announce an
array of any number of places, and arrays within arrays end in a ``RecursionError`` wherever somebody prints them. A
header of ours is one array of numbers, flags, texts, bytes and arrays, which hold numbers or, at most, arrays of
numbers. So :func:`unpack` walks over the bytes before they are parsed: nothing else may be in them, nothing deeper, and
all that is announced must be there. What is left takes at most some forty bytes of memory for each of its own, and
receivers cap how long it may be (:attr:`fs_fwdllm.core.wire.Record.header_limit_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgpack
import numpy as np

from fs_fwdllm.core.trainables import DIGEST_BYTES
from fs_fwdllm.errors import WireError

__all__ = ["Check", "check_of", "described", "unpack"]

#: Whether a value may stand in a field.
Check = Callable[[object], bool]

#: How many bytes follow the first of an item: nothing, flags, float64, and integers.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
#: In how many bytes bytes and texts, and arrays, say their length.
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_ARRAYS = {0xDC: 2, 0xDD: 4}

#: Beyond it a number is infinite where it is used.
_LARGEST = float(np.finfo(np.float32).max)


def unpack(header: memoryview, deepest: int = 3) -> tuple[object, ...]:
    """The fields of a header, the record's number first.

    Args:
        deepest: arrays within one another, the header's own included: the fields, a field's items, an item's numbers.

    Raises:
        WireError: it is not one array of what headers are made of.
    """
    _walk(header, deepest)
    try:
        fields = msgpack.unpackb(header, raw=False, use_list=False)
    except (ValueError, msgpack.UnpackException) as error:  # a text that is not UTF-8
        raise WireError(f"a frame's header is not one of ours ({type(error).__name__})") from error
    if not isinstance(fields, tuple) or not fields:
        raise WireError(f"a frame's header is not one of ours: {described(fields)}")
    return fields


def _walk(header: memoryview, deepest: int) -> None:
    """Raises :class:`~fs_fwdllm.errors.WireError` unless ``header`` is one item of the kinds that are allowed."""
    place, due = 0, [1]  # items that are still to come, of every array that is open
    while due:
        if not due[-1]:
            due.pop()
            continue
        due[-1] -= 1
        if place >= len(header):
            raise WireError("a frame's header is not one of ours: it ends too early")
        code = header[place]
        place += 1
        if code < 0x80 or code >= 0xE0:  # small integers, the most frequent
            continue
        if code in _FIXED:
            place += _FIXED[code]
        elif 0xA0 <= code < 0xC0:
            place += code & 31
        elif code in _SIZED:
            place += _SIZED[code] + _number(header, place, _SIZED[code])
        elif 0x90 <= code < 0xA0 or code in _ARRAYS:
            count = code & 15 if code < 0xA0 else _number(header, place, _ARRAYS[code])
            place += _ARRAYS.get(code, 0)
            if count > len(header) - place or len(due) > deepest:
                raise WireError("a frame's header is not one of ours: an array is too long, or too deep")
            if count:
                due.append(count)
        else:
            raise WireError(f"a frame's header is not one of ours: no record holds an item that begins with {code:#x}")
    if place != len(header):
        raise WireError("a frame's header is not one of ours: it has another length than its items")


def _number(header: memoryview, place: int, size: int) -> int:
    return int.from_bytes(header[place : place + size], "big")


def described(value: object) -> str:
    """A received value for a message: a number as it is, of anything longer only what and how long it is."""
    if isinstance(value, tuple | str | bytes):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)


def check_of(name: str, own: Mapping[str, Check]) -> Check:
    """What a field of this name may hold: a record's ``own`` checks go first, and a field of no special name is a
    count."""
    if name.startswith("digest"):
        return own.get(name, _is_digest)
    return own.get(name) or _CHECKS.get(name, _is_count)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    """A float that is one in float32, too: neither NaN nor beyond its range."""
    return isinstance(value, float) and abs(value) <= _LARGEST


def _is_digest(value: object) -> bool:
    return isinstance(value, bytes) and len(value) == DIGEST_BYTES


def _are(check: Check) -> Check:
    return lambda value: isinstance(value, tuple) and all(map(check, value))


def _is_participant(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) >= 4
        and all(type(number) is int and 0 <= number < 1 << 62 for number in value)
    )


_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("learning_rate", "decay", "momentum", "rate", "reference", "reference_scale"), _is_number),
    **dict.fromkeys(("has_momentum", "has_second_moment", "has_reference", "keeps_reference"), _is_flag),
    "loss": lambda value: isinstance(value, float),  # a client's may be infinite, which its server judges
    "participants": _are(_is_participant),
    "probes": _are(_is_count),
    "step_decay": _are(_is_number),
    "adam": lambda value: isinstance(value, tuple) and len(value) in (0, 4) and all(map(_is_number, value)),
    "choices": lambda value: isinstance(value, bytes) and len(value) % 4 == 0,
}
