"""Frames: exact round trips, small headers, and nothing but a typed error for bytes that are not ours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fs_fwdllm.core.wire import (
    Assignment,
    ByteLedger,
    DenseState,
    DenseUpdate,
    RoundUpdate,
    ScalarUpdate,
    decode,
    encode,
    from_text,
    to_text,
)
from fs_fwdllm.errors import WireError

DIGEST = bytes(range(16))
PAYLOADS = arrays.arrays(np.float32, st.integers(0, 300), elements=st.floats(width=32))


def an_update(values=(), kind=ScalarUpdate, **changes):
    fields = dict(round_index=2**40, client=2**40, digest=DIGEST, samples=2**40, loss=-1e300)
    return kind(**{**fields, "forward_passes": 2**40, "backward_passes": 0, **changes}, values=np.array(values))


EXAMPLES = [
    an_update([1.5, -2.0, np.inf, np.nan]),
    an_update([0.0] * 9, DenseUpdate),
    Assignment(3, 4, DIGEST, 1e-5, 6, 7, (b"frame", b""), batch_index=2, reference_scale=0.5, choices=b"1234"),
    RoundUpdate(
        1, DIGEST, DIGEST[::-1], 0.5, (0.75, 1.0), 0.9, 1e-3, ((1, 1, 2, 3), (0, 9, 1, 3)), values=np.arange(9)
    ),
    DenseState(1, DIGEST, True, values=np.arange(4)),
]


def same(left, right) -> bool:
    if type(left) is not type(right) or left.values.tobytes() != right.values.tobytes():
        return False
    return all(getattr(left, name) == getattr(right, name) for name in left.__dataclass_fields__ if name != "values")


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_round_trip(record):
    assert same(decode(encode(record)), record)
    assert from_text(to_text(encode(record))) == encode(record)


@given(values=PAYLOADS)
def test_scalars_survive_bit_for_bit(values):
    assert decode(encode(an_update(values))).values.tobytes() == values.tobytes()


@given(count=st.integers(0, 5000))
def test_a_scalar_upload_is_four_bytes_a_probe_and_at_most_100_around_them(count):
    """With every number in the header as large as it can get."""
    assert len(encode(an_update(np.ones(count)))) <= 4 * count + 100


def test_a_long_catch_up_fits():
    frames = tuple(bytes([index % 256]) * 1000 for index in range(200))
    assert decode(encode(Assignment(0, 1, DIGEST, 0.1, 1, 1, frames, batch_index=0))).catch_up == frames


@given(data=st.binary(max_size=400))
def test_random_bytes_are_refused(data):
    with pytest.raises(WireError):
        decode(data)


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_every_truncation_is_refused(record):
    frame = encode(record)
    for length in range(len(frame)):
        with pytest.raises(WireError):
            decode(frame[:length])
    with pytest.raises(WireError):
        decode(frame + b"\0\0\0\0")


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_never_passes_as_other_scalars(position, bit):
    record = an_update([1.0, 2.0, 3.0])
    frame = bytearray(encode(record))
    frame[position % len(frame)] ^= 1 << bit
    try:
        received = decode(bytes(frame))
    except WireError:
        return
    assert received.values.tobytes() == record.values.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": b"short"}, "unusable digest"),
        ({"client": -1}, "unusable client"),
        ({"client": "seven"}, "unusable client"),
        ({"samples": True}, "unusable samples"),
        ({"loss": 3}, "unusable loss"),
    ],
)
def test_fields_of_the_wrong_type_are_refused(change, message):
    with pytest.raises(WireError, match=message):
        decode(encode(an_update([1.0], **change)))


@pytest.mark.parametrize("step_decay", [0.5, [1], ["f"], [0.5, True]])
def test_decay_factors_are_a_list_of_numbers(step_decay):
    record = RoundUpdate(1, DIGEST, DIGEST, 0.5, step_decay, 0.9, 1e-3, ((1, 2, 3),), values=np.arange(6))
    with pytest.raises(WireError, match="unusable step_decay"):
        decode(encode(record))


def test_other_versions_and_oversized_frames_are_refused():
    frame = bytearray(encode(an_update([1.0])))
    with pytest.raises(WireError, match="over the limit of 20 bytes"):
        decode(bytes(frame), limit_bytes=20)
    frame[2] = 9
    with pytest.raises(WireError, match="version 9"):
        decode(bytes(frame))


@pytest.mark.parametrize("text", ["not base64!", "AAA", "ü"])
def test_text_that_is_not_base64_is_refused(text):
    with pytest.raises(WireError, match="base64"):
        from_text(text)


def test_the_ledger_counts_frames():
    ledger = ByteLedger()
    ledger.download(2, b"12345")
    ledger.upload(2, b"123")
    ledger.upload(1, b"1")
    assert ledger.close_round() == {1: (0, 1), 2: (5, 3)}
    assert ledger.close_round() == {}
    assert (ledger.download_bytes, ledger.upload_bytes) == (5, 4)
