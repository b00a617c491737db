"""Records of block methods: a block on its way down, a delta on its way up, an optimiser's state both ways.

They are framed like all records (:mod:`~fs_fwdllm.core.wire`), with bytes instead of float32 as payload: what the bytes
mean follows from the block, which both ends know, and the form named in the header. A block has a *version*, the number
of times the server has changed it, and an upload names the version, and the digest of the float32 values, that its
delta was taken against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fs_fwdllm.core.wire import Assignment, ClientUpdate, Record, register_record

__all__ = ["BlockAssignment", "BlockDelta", "BlockModel", "BlockValues", "OptimizerState"]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 16


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _are_numbers(value: object) -> bool:
    return isinstance(value, tuple) and all(type(number) is int and 0 <= number < 1 << 32 for number in value)


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= 1


@register_record
@dataclass(frozen=True)
class BlockAssignment(Assignment):
    """Server to client: visit a block. ``catch_up`` holds :class:`BlockValues` and :class:`OptimizerState` frames.

    Attributes:
        block: the target.
        versions: of what the visit trains, in the plan's order (the target, then what is always active).
        cycle: number of the cycle the visit belongs to.
        held: for every part of the plan one more than the version the client must hold by now, 0 where it matters not.
        dropped: transformer layers the client skips in this visit.
        digest_base: of the model before the first round; client and server must have started from the same.
    """

    kind: ClassVar[int] = 16
    checks: ClassVar[Mapping[str, Callable[[object], bool]]] = {
        "versions": _are_numbers, "held": _are_numbers, "dropped": _are_numbers
    }  # fmt: skip
    block: int = field(kw_only=True)
    versions: tuple[int, ...] = field(kw_only=True)
    cycle: int = field(kw_only=True)
    held: tuple[int, ...] = field(kw_only=True)
    dropped: tuple[int, ...] = field(kw_only=True)
    digest_base: bytes = field(kw_only=True)


@register_record
@dataclass(frozen=True)
class BlockValues(Record):
    """Server to client: the values of one block.

    Attributes:
        block: index into the plan's parts.
        version: which version they are.
        form: how matrices are written (:data:`fs_fwdllm.method.cybgd.codec.FORMS`).
        keep_ratio: share of a matrix that survived pruning.
        active: the exact float32 values of a block that this visit trains.
        compressed: whether the payload is a zstandard frame.
    """

    kind: ClassVar[int] = 17
    payload_dtype: ClassVar[str] = "|u1"
    checks: ClassVar[Mapping[str, Callable[[object], bool]]] = {
        "form": _is_text, "keep_ratio": _is_share, "active": _is_flag, "compressed": _is_flag
    }  # fmt: skip
    block: int
    version: int
    form: str
    keep_ratio: float
    active: bool
    compressed: bool


@register_record
@dataclass(frozen=True)
class OptimizerState(Record):
    """Either way: the optimiser's state for one block, as :mod:`fs_fwdllm.method.cybgd.state_bytes` writes it."""

    kind: ClassVar[int] = 18
    payload_dtype: ClassVar[str] = "|u1"
    block: int


@register_record
@dataclass(frozen=True)
class BlockModel(Record):
    """Server to client: every block that has changed since the start, as frames of :class:`BlockValues`."""

    kind: ClassVar[int] = 19
    carries: ClassVar[str] = "frames"
    round_index: int
    digest: bytes
    frames: tuple[bytes, ...]


@register_record
@dataclass(frozen=True)
class BlockDelta(ClientUpdate):
    """Client to server: how far a visit moved what it trained.

    Attributes:
        block, versions: the visit's target, and what the delta was taken against.
        digest_start: of the float32 values the visit started from.
        form: ``float32``, ``bfloat16`` or ``int8``.
        compressed: whether the payload is a zstandard frame.
        states: frames of :class:`OptimizerState`, where the server keeps it.
    """

    kind: ClassVar[int] = 20
    payload_dtype: ClassVar[str] = "|u1"
    checks: ClassVar[Mapping[str, Callable[[object], bool]]] = {
        "versions": _are_numbers, "form": _is_text, "compressed": _is_flag
    }  # fmt: skip
    carries: ClassVar[str] = "states"
    block: int
    versions: tuple[int, ...]
    digest_start: bytes
    form: str
    compressed: bool
    states: tuple[bytes, ...] = ()
