"""Frames of blocks: exact round trips, and nothing but a typed error for bytes that are not ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fs_fwdllm.core.wire import Record, decode, encode, frame_bytes, register_record
from fs_fwdllm.errors import WireError
from fs_fwdllm.method.cybgd.records import BlockAssignment, BlockDelta, BlockModel, BlockValues, OptimizerState

DIGEST = bytes(range(16))
BYTES = np.arange(37, dtype=np.uint8)
EXAMPLES: list[Record] = [
    BlockAssignment(
        3,
        4,
        DIGEST,
        1e-5,
        6,
        (),
        (b"frame", b""),
        batch_index=3,
        block=2,
        versions=(5, 1),
        cycle=7,
        held=(6, 0),
        dropped=(0, 9),
        digest_base=DIGEST,
    ),
    BlockValues(2, 5, "int4", 0.25, False, True, values=BYTES),
    OptimizerState(2, values=BYTES),
    BlockModel(9, DIGEST, (b"one", b"two")),
    BlockDelta(3, 4, DIGEST, 10, 0.5, 3, 3, 2, (5,), DIGEST, "int8", True, (b"state",), values=BYTES),
]
every_record = pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)


@every_record
def test_round_trip(record: Record) -> None:
    back = decode(encode(record))
    assert type(back) is type(record) and back.values.tobytes() == record.values.tobytes()
    assert back.values.dtype == record.values.dtype
    for item in dataclasses.fields(record):
        if item.name != "values":
            assert getattr(back, item.name) == getattr(record, item.name)


@every_record
def test_every_truncation_and_addition_is_refused(record: Record) -> None:
    frame = encode(record)
    for length in range(len(frame)):
        with pytest.raises(WireError):
            decode(frame[:length])
    with pytest.raises(WireError):
        decode(frame + b"\0")


@every_record
def test_a_flipped_bit_of_the_payload_is_refused(record: Record) -> None:
    frame = bytearray(encode(record))
    frame[-5] ^= 4
    with pytest.raises(WireError, match="corrupted"):
        decode(bytes(frame))


@every_record
def test_the_length_of_a_frame_is_known_without_building_it(record: Record) -> None:
    assert frame_bytes(record) == len(encode(record))


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"versions": (1.5,)}), (0, {"versions": 3}), (0, {"dropped": (-1,)}), (0, {"digest_base": b"short"}),
        (0, {"block": -1}), (1, {"form": 7}), (1, {"form": "x" * 99}), (1, {"keep_ratio": 2.0}), (1, {"keep_ratio": 1}),
        (1, {"active": 1}), (4, {"versions": (True,)}),
        (4, {"compressed": None}), (4, {"digest_start": b""}), (4, {"loss": 3}),
    ],
)  # fmt: skip
def test_fields_of_the_wrong_type_are_refused(number: int, change: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="unusable"):
        decode(encode(dataclasses.replace(EXAMPLES[number], **change)))


def test_a_delta_costs_little_beside_its_payload() -> None:
    assert len(encode(EXAMPLES[-1])) - len(BYTES) < 120


def test_two_records_cannot_share_a_number() -> None:
    class Impostor(Record):
        kind = BlockDelta.kind

    with pytest.raises(ValueError, match="BlockDelta"):
        register_record(Impostor)
