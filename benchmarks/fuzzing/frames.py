"""Frames that no encoder makes."""

from __future__ import annotations

import random
import zlib
from contextlib import suppress
from functools import cache
from typing import Any

import msgpack
import numpy as np
import torch

from fs_fwdllm.core.direction import Rademacher
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.core.wire import (
    Assignment,
    ClientUpdate,
    DenseState,
    DenseUpdate,
    Record,
    RoundUpdate,
    ScalarUpdate,
    decode,
    encode,
)
from fs_fwdllm.errors import FwdLLMError
from fs_fwdllm.method.cybgd.codec import FORMS, Encoding, decode_tensors
from fs_fwdllm.method.cybgd.records import BlockAssignment, BlockDelta, BlockModel, BlockValues, OptimizerState
from fs_fwdllm.method.cybgd.state_bytes import pack_states, unpack_states
from fs_fwdllm.method.replica import Replica

from .damage import damaged

__all__ = ["frame", "records", "try_frame"]

_DIGEST = bytes(range(16))
_SHAPES = [(3, 4), (5,)]


def _trainables() -> Trainables:
    return Trainables({f"tensor {index}": np.ones(shape, np.float32) for index, shape in enumerate(_SHAPES)})


def _replica() -> Replica:
    return Replica(Replayer(_trainables(), 7, Rademacher()))


@cache
def _start() -> bytes:
    return _replica().digest


def _states() -> np.ndarray:
    states = [{"step": torch.tensor(3.0), "exp_avg": torch.ones(shape)} for shape in _SHAPES]
    return pack_states(states, compress=False)


@cache
def records() -> tuple[Record, ...]:
    """One record of every kind, those that lead somewhere starting from what the replica here holds."""
    start = _start()
    update = dict(round_index=3, client=4, digest=_DIGEST, samples=8, loss=0.5, forward_passes=6, backward_passes=0)
    state = encode(OptimizerState(1, values=_states()))
    block = np.arange(68, dtype=np.uint8)
    values = BlockValues(2, 5, "float32", 1.0, False, False, values=block)
    return (
        Assignment(3, 4, start, 1e-5, 6, (7,), (state, state), batch_index=2, choices=b"1234"),
        ScalarUpdate(**update, values=np.arange(6)),
        DenseUpdate(**update, values=np.arange(17)),
        RoundUpdate(3, start, _DIGEST, 0.5, (0.5, 1.0), 0.9, 1e-3, ((3, 1, 2, 3), (3, 9, 1, 3)), values=np.ones(9)),
        RoundUpdate(
            3, start, _DIGEST, 1.0, (), 0.9, 1e-3, ((3, 1, 2, 1),), True, 0.5, bytes(16), (0.9, 1e-8, 2.0, 9.0),
            values=np.ones(2),
        ),
        DenseState(1, _DIGEST, True, values=np.arange(34)),
        BlockAssignment(
            3, 4, _DIGEST, 1e-5, 6, (), (encode(values), state), batch_index=3, block=2, versions=(5, 1), cycle=7,
            held=(6, 0), dropped=(0, 9), digest_base=_DIGEST,
        ),
        values,
        OptimizerState(2, values=_states()),
        BlockModel(9, _DIGEST, (encode(values), encode(values))),
        BlockDelta(**update, block=2, versions=(5,), digest_start=_DIGEST, form="float32", compressed=False,
                   states=(state,), values=block),
    )  # fmt: skip


def sealed(header: bytes, payload: bytes = b"", announced: int | None = None) -> bytes:
    """A frame with a right checksum around any header and payload."""
    covered = (len(header) if announced is None else announced).to_bytes(4, "little") + header + payload
    return b"FF\x05" + zlib.crc32(covered).to_bytes(4, "little") + covered


@cache
def _opened() -> tuple[tuple[bytes, bytes], ...]:
    """Header and payload of every example."""
    frames = [encode(record) for record in records()]
    ends = [11 + int.from_bytes(frame[7:11], "little") for frame in frames]
    return tuple((frame[11:end], frame[end:]) for frame, end in zip(frames, ends, strict=True))


#: Values that a field may be given instead of its own.
_ODD: tuple[Any, ...] = (
    0, 1, -1, 2**31, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), True, False, None, 0.0, -0.0, 0.5,
    1e39,
    1e308, float("nan"), float("inf"), -float("inf"), "", "x", "int8", "int4", "float32", "\0", "x" * 300, b"", b"x",
    bytes(16), bytes(300), [], [[]], [[[]]], [[[[]]]], {}, {"a": 1}, {1: {2: 3}}, [0], [2**62], [1, 2, 3, 4],
    [[0, 1, 2**61, 0]], [[0, 1, 0, 2**61]], [[0, 1, 2, 3]], [[2**61, 2**62 - 1, 1, 9]], [[0] * 40], [0.5, 0.5], [1e39],
    [float("nan")] * 4, list(range(500)), msgpack.ExtType(5, b"abc"),
)  # fmt: skip


def frame(seed: int) -> bytes:
    """Bytes that may come instead of a frame."""
    draw = random.Random(seed)
    return draw.choice(_FRAMES)(draw)


def _random_bytes(draw: random.Random) -> bytes:
    return draw.randbytes(draw.randrange(400))


def _random_inside(draw: random.Random) -> bytes:
    return sealed(draw.randbytes(draw.randrange(60)), draw.randbytes(draw.randrange(60)))


def _other_bytes(draw: random.Random) -> bytes:
    """A frame whose header and payload were meddled with, and are told to be right."""
    header, payload = draw.choice(_opened())
    if draw.random() < 0.8:
        header = damaged(header, draw, most=draw.choice((1, 1, 3)))
    if draw.random() < 0.4:
        payload = damaged(payload, draw, most=3)
    announced = None if draw.random() < 0.9 else draw.choice((0, 1, len(header) + 1, 2**31, 2**32 - 1))
    return sealed(header, payload, announced)


def _other_fields(draw: random.Random) -> bytes:
    header, payload = draw.choice(_opened())
    fields = msgpack.unpackb(header)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = draw.randrange(len(fields)) if fields else 0
        change = draw.random()
        if change < 0.7 and fields:
            fields[place] = _odd(draw, fields[place])
        elif change < 0.8 and fields:
            del fields[place]
        elif change < 0.9:
            fields.insert(place, draw.choice(_ODD))
        else:
            draw.shuffle(fields)
    if draw.random() < 0.3:
        payload = payload[: draw.randrange(len(payload) + 1)] + bytes(4 * draw.randrange(5))
    return sealed(msgpack.packb(fields), payload)


def _odd(draw: random.Random, value: Any) -> Any:
    """An odd value; of a list sometimes the same list with one odd value in it."""
    if isinstance(value, list) and value and draw.random() < 0.6:
        changed, place = list(value), draw.randrange(len(value))
        changed[place] = _odd(draw, changed[place])
        return changed if draw.random() < 0.8 else changed * draw.randrange(4)
    alike = [odd for odd in _ODD if type(odd) is type(value)]
    return draw.choice(alike if alike and draw.random() < 0.7 else _ODD)


def _structure(draw: random.Random) -> bytes:
    """Headers that take much more than their length, or announce what is not there."""
    size = draw.choice((3, 30, 300, 1000, 3000))
    start = draw.choice((b"", b"\x98\x02", b"\x9b\x01\x03", b"\x9e\x04\x03"))
    item = draw.choice((b"\x91", b"\x90", b"\x80", b"\x81\xa1a", b"\xc0", b"\x92\x01", b"\xd9\xff", b"\xca", b"\xcb",
                        b"\xdc\xff\xff", b"\xdd\x00\x10\x00\x00", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
                        b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x05", b"\xc1",
                        b"\xd4\x05x", b"\xa2ab", b"\xa2\xff\xfe", b"\x01"))  # fmt: skip
    return sealed(start + item * size + draw.choice((b"", b"\x01" * size, b"\xc0")), b"")


def _other_prefix(draw: random.Random) -> bytes:
    return damaged(encode(draw.choice(records())), draw, most=3)


_FRAMES = (_random_bytes, _random_inside, _other_bytes, _other_bytes, _other_fields, _other_fields, _structure,
           _other_prefix)  # fmt: skip


def try_frame(data: bytes) -> str:
    """Read a frame as a server and as a client does, and do what it says as far as a model is not needed."""
    with suppress(FwdLLMError):
        decode(data, ClientUpdate)
    try:
        record = decode(data)
        _use(record)
        return type(record).__name__
    except FwdLLMError as error:
        return type(error).__name__


def _use(record: Record) -> None:
    if encode(record) and isinstance(record, RoundUpdate | DenseState):
        with np.errstate(all="ignore"):  # values of any size are replayed; the digest tells
            _replica().follow([encode(record)], _DIGEST)
    elif isinstance(record, OptimizerState):
        unpack_states(np.asarray(record.values), _SHAPES)
    elif isinstance(record, BlockDelta | BlockValues) and record.form in FORMS:
        encoding = Encoding(record.form, "float32", getattr(record, "keep_ratio", 1.0))
        decode_tensors(np.asarray(record.values), _SHAPES, encoding, compressed=record.compressed)
    for carried in getattr(record, record.carries) if record.carries else ():
        _use(decode(carried))
