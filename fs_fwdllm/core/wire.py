"""What travels: a few typed records, each one compact binary frame.

    ``frame = b"FF" + version + CRC-32 + header length + msgpack header + payload``

The header is a msgpack *array* (no key strings), so a scalar upload costs 4 bytes a probe and some 50 bytes around
them. The payload is the record's values (raw little-endian float32) and behind them the frames it carries, whose
lengths are in the header: nothing as large as a model passes through msgpack. The checksum covers all that follows it,
so truncated or corrupted bytes are refused before they are used. Nothing is ever unpickled; whatever does not parse
exactly is a :class:`~fs_fwdllm.errors.WireError`. A receiver says what it expects, and how much of it: what reading a
frame costs is bounded before it is read (:mod:`~fs_fwdllm.core.header`).

Downwards a client gets an :class:`Assignment`. It names the digest of the parameters the work must start from and
carries what the client needs to get there: the :class:`RoundUpdate` of every round it missed, or a
:class:`DenseState` when that is smaller. Upwards go :class:`ScalarUpdate` or :class:`DenseUpdate`. Sizes that are
reported are lengths of these frames, nothing else.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, overload

import msgpack
import numpy as np

from fs_fwdllm.core.header import Check, check_of, described, unpack
from fs_fwdllm.errors import WireError

__all__ = [
    "DEFAULT_LIMIT_BYTES",
    "WIRE_VERSION",
    "Assignment",
    "ByteLedger",
    "ClientUpdate",
    "DenseState",
    "DenseUpdate",
    "Participant",
    "Record",
    "RoundUpdate",
    "ScalarUpdate",
    "decode",
    "encode",
    "frame_bytes",
    "from_text",
    "register_record",
    "text_bytes",
    "to_text",
]

_MAGIC = b"FF"
#: Of frames; another one is refused.
WIRE_VERSION = 5
_PREFIX = struct.Struct("<2sBI")
_LENGTH = struct.Struct("<I")
#: Where a header starts.
_OVERHEAD_BYTES = _PREFIX.size + _LENGTH.size
#: A frame larger than this is refused unless the caller allows more (2 GiB holds a full 500 M parameter model).
DEFAULT_LIMIT_BYTES = 1 << 31

_EMPTY = np.zeros(0, dtype=np.float32)

#: ``(round, client, steps, probes of part 0, probes of part 1, ...)``.
Participant = tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """Base of everything that is framed. ``values`` is the payload; all other fields go into the header.

    A record whose values are not float32 says so in ``payload_dtype`` (bytes: ``"|u1"``); one that carries frames names
    the field that holds them in ``carries``; one with header fields of other types than those of this module brings
    their ``checks``. A header takes up to forty times its length in memory once it is parsed, so a record whose header
    is short says how long it may be (``header_limit_bytes``): a receiver that expects it refuses longer ones. Values
    are kept as they are: a broadcast array stands for any number of equal values and occupies no memory before it is
    encoded.
    """

    kind: ClassVar[int]
    payload_dtype: ClassVar[str] = "<f4"
    carries: ClassVar[str] = ""
    checks: ClassVar[Mapping[str, Check]] = {}
    header_limit_bytes: ClassVar[int] = 1 << 26
    values: np.ndarray = field(default_factory=lambda: _EMPTY, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values, dtype=self.payload_dtype))


@dataclass(frozen=True)
class Assignment(Record):
    """Server to client: what to do in a round, and how to get to the parameters it starts from.

    Attributes:
        round_index: the round, counted from 0.
        batch_index: the round whose mini-batches are used: an earlier one where a server step takes several rounds.
        client: who works.
        digest: of the server's trainables; the client must hold the same before it starts.
        learning_rate: local learning rate (unused where the client does not move).
        steps: local steps, or mini-batches evaluated at one point.
        probes: directions per step, a number for each part of the trainables; empty for methods that have none.
        reference_scale: the last probe of a step is measured along the reference times this; 0 for none.
        choices: little-endian uint32 ``[steps, probes, tensors]``: the candidates that were chosen; empty for none.
        catch_up: frames of :class:`RoundUpdate` or :class:`DenseState`, oldest first.
    """

    kind: ClassVar[int] = 1
    carries: ClassVar[str] = "catch_up"
    round_index: int
    client: int
    digest: bytes
    learning_rate: float
    steps: int
    probes: tuple[int, ...]
    catch_up: tuple[bytes, ...] = ()
    batch_index: int = field(kw_only=True)
    reference_scale: float = 0.0
    choices: bytes = b""


@dataclass(frozen=True)
class ClientUpdate(Record):
    """Client to server: the result of a client's work.

    Attributes:
        digest: of the trainables the work started from.
        samples: training samples it processed, its weight in the average.
        loss: mean training loss it saw.
        forward_passes, backward_passes: what the work took.
    """

    header_limit_bytes: ClassVar[int] = 1 << 10
    round_index: int
    client: int
    digest: bytes
    samples: int
    loss: float
    forward_passes: int
    backward_passes: int


@dataclass(frozen=True)
class ScalarUpdate(ClientUpdate):
    """One float32 slope per probe: ``values[step * probes + probe]``."""

    kind: ClassVar[int] = 2


@dataclass(frozen=True)
class DenseUpdate(ClientUpdate):
    """One float32 per trainable parameter: the change the client made, or a gradient."""

    kind: ClassVar[int] = 3


@dataclass(frozen=True)
class RoundUpdate(Record):
    """Server to client: everything needed to rebuild one round's step, for any replica that holds ``digest_before``.

    ``values`` are the float32 coefficients, participant after participant, step after step, probe after probe.

    Attributes:
        participants: ``(round, client, steps, probes of each part ...)``, which give every direction's seed. The rounds
            are those of the evaluations: one record replays what several rounds have pooled.
        decay: as :meth:`fs_fwdllm.core.replay.Replayer.apply` has it.
        momentum, rate: of the server's step (:mod:`fs_fwdllm.core.server_step`); with ``momentum`` zero and no ``adam``
            the contributions are the step, and ``rate`` is not used.
        adam: ``(second beta, epsilon, first correction, second correction)`` of a step of Adam, whose first beta is
            ``momentum``; empty for other steps.
        step_decay: decay factor of one local step, a number per participant; empty where contributions do not decay
            within the round.
        keeps_reference: the sum of the contributions is the reference from now on.
        reference: coefficient of the reference so far.
        choices: as in :class:`Assignment`, for all participants; empty where directions are as drawn.
    """

    kind: ClassVar[int] = 4
    round_index: int
    digest_before: bytes
    digest_after: bytes
    decay: float
    step_decay: tuple[float, ...]
    momentum: float
    rate: float
    participants: tuple[Participant, ...]
    keeps_reference: bool = False
    reference: float = 0.0
    choices: bytes = b""
    adam: tuple[float, ...] = ()


@dataclass(frozen=True)
class DenseState(Record):
    """Server to client: the trainables themselves (behind them momentum, second moment and reference, if any)."""

    kind: ClassVar[int] = 5
    round_index: int
    digest: bytes
    has_momentum: bool
    has_reference: bool = False
    has_second_moment: bool = False


_Expected = TypeVar("_Expected", bound=Record)

_KINDS: dict[int, type[Record]] = {
    record.kind: record for record in (Assignment, ScalarUpdate, DenseUpdate, RoundUpdate, DenseState)
}


def register_record(record_type: type[Record]) -> type[Record]:
    """Let :func:`decode` know a further kind of record. Raises ``ValueError`` if its number is taken."""
    if _KINDS.setdefault(record_type.kind, record_type) is not record_type:
        raise ValueError(f"record kind {record_type.kind} is {_KINDS[record_type.kind].__name__}'s")
    return record_type


def encode(record: Record) -> bytes:
    """The frame of a record."""
    header = _header(record)
    values = np.ascontiguousarray(record.values).view(np.uint8).data
    parts: tuple[bytes | memoryview, ...] = (_LENGTH.pack(len(header)), header, values, *_carried(record))
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join((_PREFIX.pack(_MAGIC, WIRE_VERSION, checksum), *parts))


def frame_bytes(record: Record) -> int:
    """``len(encode(record))``, exactly, without a look at the values or at what is in the frames the record carries.

    Of ``values`` only the size counts (``np.broadcast_to(np.float32(0), count)`` stands for any ``count`` of them), of
    a carried frame its ``len``.
    """
    return _OVERHEAD_BYTES + len(_header(record)) + record.values.nbytes + sum(map(len, _carried(record)))


def _header(record: Record) -> bytes:
    fields = {item.name: getattr(record, item.name) for item in _header_fields(type(record))}
    if record.carries:
        fields[record.carries] = [len(frame) for frame in _carried(record)]
    packed: bytes = msgpack.packb([record.kind, *fields.values()], use_bin_type=True)
    if len(packed) > record.header_limit_bytes:
        raise WireError(
            f"a {type(record).__name__} with a header of {len(packed)} bytes would be refused by its receiver, whose "
            f"limit is {record.header_limit_bytes} bytes; have fewer clients in a round, or fewer rounds in a step"
        )
    return packed


def _carried(record: Record) -> tuple[bytes, ...]:
    frames: tuple[bytes, ...] = getattr(record, record.carries) if record.carries else ()
    return frames


@overload
def decode(frame: bytes, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Record: ...
@overload
def decode(frame: bytes, expected: type[_Expected], *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> _Expected: ...
def decode(frame: bytes, expected: type[Record] = Record, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Record:
    """The record in a frame. Its values are a view of the frame; what it carries is copied.

    So the memory it takes beside the frame is at most the frame's length once more, forty times the header's, and a few
    kibibytes: for a :class:`ClientUpdate`, whose header is short, 64 KiB with both.

    Args:
        expected: the kind that may come. Its :attr:`Record.header_limit_bytes` holds before anything is parsed.
        limit_bytes: longest frame that may come.

    Raises:
        WireError: too long, not ours, another version, truncated, corrupted, of another kind, or a field that is not
            what the record says it is. Nothing else is raised, whatever the bytes.
    """
    if len(frame) > limit_bytes:
        raise WireError(f"a frame of {len(frame)} bytes is over the limit of {limit_bytes} bytes")
    header, payload = _split(frame, expected.header_limit_bytes)
    kind, *values = unpack(header)
    record_type = _KINDS.get(kind) if type(kind) is int else None
    if record_type is None:
        raise WireError(f"a frame's header is not one of ours: there is no record {described(kind)}")
    if not issubclass(record_type, expected):
        raise WireError(f"a {record_type.__name__} came instead of {_with_article(expected)}")
    fields = _header_fields(record_type)
    if len(values) != len(fields):
        raise WireError(f"a {record_type.__name__} frame has {len(values)} header fields, not {len(fields)}")
    named: dict[str, Any] = {item.name: value for item, value in zip(fields, values, strict=True)}
    _check_types(record_type, named)
    if record_type.carries:
        payload, named[record_type.carries] = _take_frames(record_type, named[record_type.carries], payload)
    if len(payload) % np.dtype(record_type.payload_dtype).itemsize:
        raise WireError(f"a {record_type.__name__} frame has {len(payload)} bytes of values")
    return record_type(**named, values=np.frombuffer(payload, dtype=record_type.payload_dtype))


def _with_article(record_type: type[Record]) -> str:
    return f"{'an' if record_type.__name__[0] in 'AEIOU' else 'a'} {record_type.__name__}"


def _split(frame: bytes, header_limit_bytes: int) -> tuple[memoryview, memoryview]:
    """Header and payload, as views: a frame may be as large as the model."""
    try:
        magic, version, checksum = _PREFIX.unpack_from(frame)
        (length,) = _LENGTH.unpack_from(frame, _PREFIX.size)
    except struct.error as error:
        raise WireError(f"{len(frame)} bytes are too few for a frame") from error
    if magic != _MAGIC:
        raise WireError(f"these {len(frame)} bytes are not a frame of ours (they start with {bytes(frame[:4])!r})")
    if version != WIRE_VERSION:
        raise WireError(f"frame version {version} is not supported; this package speaks version {WIRE_VERSION}")
    if length > header_limit_bytes:
        raise WireError(f"a frame's header of {length} bytes is over the limit of {header_limit_bytes} bytes")
    view = memoryview(frame)
    if zlib.crc32(view[_PREFIX.size :]) != checksum:
        raise WireError(f"a frame of {len(frame)} bytes is truncated or corrupted")
    if _OVERHEAD_BYTES + length > len(frame):
        raise WireError("a frame is truncated inside its header")
    return view[_OVERHEAD_BYTES : _OVERHEAD_BYTES + length], view[_OVERHEAD_BYTES + length :]


def _take_frames(
    record_type: type[Record], lengths: Sequence[int], payload: memoryview
) -> tuple[memoryview, tuple[bytes, ...]]:
    """The values' part of a payload, and the frames that stand behind it."""
    end = len(payload) - sum(lengths)
    if end < 0:
        raise WireError(f"a {record_type.__name__} frame carries frames of {sum(lengths)} bytes in {len(payload)}")
    values, frames = payload[:end], []
    for length in lengths:
        frames.append(bytes(payload[end : end + length]))
        end += length
    return values, tuple(frames)


def _header_fields(record_type: type[Record]) -> list[dataclasses.Field[Any]]:
    return [item for item in dataclasses.fields(record_type) if item.name != "values"]


_FLOATS = ("loss", "learning_rate", "decay", "momentum", "rate", "reference", "reference_scale")


def _check_types(record_type: type[Record], named: dict[str, Any]) -> None:
    checks = {record_type.carries: check_of("probes", {}), **record_type.checks}
    for name, value in named.items():
        if not check_of(name, checks)(value):
            raise WireError(f"a {record_type.__name__} frame has an unusable {name}: {described(value)}")


def to_text(frame: bytes) -> str:
    """A frame as base64 text, for hosts whose codec carries only text."""
    return base64.b64encode(frame).decode("ascii")


def text_bytes(length: int) -> int:
    """Length of the text of a frame of ``length`` bytes."""
    return 4 * -(-length // 3)


def from_text(text: str) -> bytes:
    """Inverse of :func:`to_text`. Raises :class:`~fs_fwdllm.errors.WireError` for anything that is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise WireError(f"not base64 text: {error}") from error


class ByteLedger:
    """Bytes per round and client, up and down, counted on frames."""

    def __init__(self) -> None:
        self.upload_bytes = 0
        self.download_bytes = 0
        self._round: dict[int, list[int]] = {}

    def download(self, client: int, frame: bytes) -> None:
        self._round.setdefault(client, [0, 0])[0] += len(frame)
        self.download_bytes += len(frame)

    def upload(self, client: int, frame: bytes) -> None:
        self._round.setdefault(client, [0, 0])[1] += len(frame)
        self.upload_bytes += len(frame)

    def close_round(self) -> dict[int, tuple[int, int]]:
        """``{client: (download bytes, upload bytes)}`` since the last call."""
        rows = {client: (down, up) for client, (down, up) in sorted(self._round.items())}
        self._round = {}
        return rows
