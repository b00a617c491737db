"""Frames: exact round trips, small headers, and nothing but a typed error for bytes that are not ours."""

from __future__ import annotations

import math
import re
import tracemalloc
import zlib
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fs_fwdllm.core.wire import (
    Assignment,
    ByteLedger,
    ClientUpdate,
    DenseState,
    DenseUpdate,
    Record,
    RoundUpdate,
    ScalarUpdate,
    decode,
    encode,
    frame_bytes,
    from_text,
    text_bytes,
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
    Assignment(3, 4, DIGEST, 1e-5, 6, (7,), (b"frame", b""), batch_index=2, reference_scale=0.5, choices=b"1234"),
    RoundUpdate(
        1, DIGEST, DIGEST[::-1], 0.5, (0.75, 1.0), 0.9, 1e-3, ((1, 1, 2, 3), (0, 9, 1, 3)), values=np.arange(9)
    ),
    RoundUpdate(1, DIGEST, DIGEST, 1.0, (), 0.9, 1e-3, (), adam=(0.999, 1e-8, 10.0, 1000.0)),
    DenseState(1, DIGEST, True, has_second_moment=True, values=np.arange(4)),
]


def same(left, right) -> bool:
    if type(left) is not type(right) or left.values.tobytes() != right.values.tobytes():
        return False
    return all(getattr(left, name) == getattr(right, name) for name in left.__dataclass_fields__ if name != "values")


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_round_trip(record):
    assert same(decode(encode(record)), record)
    assert from_text(to_text(encode(record))) == encode(record)


@given(data=st.binary(max_size=400))
def test_the_length_of_a_frame_s_text_is_known(data):
    assert text_bytes(len(data)) == len(to_text(data))


@given(values=PAYLOADS)
def test_scalars_survive_bit_for_bit(values):
    assert decode(encode(an_update(values))).values.tobytes() == values.tobytes()


@given(count=st.integers(0, 5000))
def test_a_scalar_upload_is_four_bytes_a_probe_and_at_most_100_around_them(count):
    """With every number in the header as large as it can get."""
    assert len(encode(an_update(np.ones(count)))) <= 4 * count + 100


def test_a_long_catch_up_fits():
    frames = tuple(bytes([index % 256]) * 1000 for index in range(200))
    assert decode(encode(Assignment(0, 1, DIGEST, 0.1, 1, (1,), frames, batch_index=0))).catch_up == frames


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


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_every_single_flipped_bit_is_refused(record):
    """In the prefix, the header, the values and the carried frames alike."""
    frame = bytearray(encode(record))
    for position in range(8 * len(frame)):
        frame[position // 8] ^= 1 << position % 8
        with pytest.raises(WireError):
            decode(bytes(frame))
        frame[position // 8] ^= 1 << position % 8


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_the_length_of_a_frame_is_known_without_building_it(record):
    assert frame_bytes(record) == len(encode(record))


def test_equal_values_may_stand_for_any_number_of_them():
    """A broadcast array is neither copied nor looked at before it is encoded, and then its bytes are all there."""
    zeros = np.broadcast_to(np.float32(0.5), 300_000_000)
    huge = DenseState(1, DIGEST, False, values=zeros)
    assert huge.values.strides == (0,) and np.shares_memory(huge.values, zeros)
    assert frame_bytes(huge) == 1_200_000_000 + frame_bytes(replace(huge, values=zeros[:0]))
    assert decode(encode(replace(huge, values=zeros[:5]))).values.tolist() == [0.5] * 5
    assert decode(encode(replace(huge, values=np.arange(9)[::2]))).values.tolist() == [0, 2, 4, 6, 8]


def test_a_scalar_upload_of_one_probe_takes_no_more_than_in_the_second_version():
    """There it was 5 bytes of prefix, and a count (1) and a checksum (5) in the header; here 11 bytes of prefix."""
    header = msgpack.packb([2, 2**40, 2**40, DIGEST, 2**40, -1e300, 2**40, 0], use_bin_type=True)
    assert frame_bytes(an_update([1.0])) == 4 + len(header) + 5 + 1 + 5


def around(header, payload=b""):
    """A frame with a right checksum around the bytes of a header."""
    covered = len(header).to_bytes(4, "little") + header + payload
    return b"FF\x05" + zlib.crc32(covered).to_bytes(4, "little") + covered


def framed(*header, payload=b""):
    """A frame with a right checksum around whatever is given."""
    return around(msgpack.packb(header, use_bin_type=True), payload)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (framed(99), "not one of ours"),
        (framed(), "not one of ours"),
        (framed([]), "not one of ours"),
        (framed(2, 1, 1), "2 header fields, not 7"),
        (framed(5, 1, DIGEST, False, False, False, payload=b"12345"), "5 bytes of values"),
        (framed(1, 1, 1, DIGEST, 0.1, 1, [1], [b"frame"], 0, 0.0, b""), "unusable catch_up"),
        (framed(1, 1, 1, DIGEST, 0.1, 1, [1], [-1], 0, 0.0, b""), "unusable catch_up"),
        (framed(1, 1, 1, DIGEST, 0.1, 1, [1], [3, 4], 0, 0.0, b"", payload=b"123456"), "frames of 7 bytes in 6"),
    ],
)
def test_frames_with_a_right_checksum_around_something_else_are_refused(frame, message):
    with pytest.raises(WireError, match=message):
        decode(frame)


SIZE = 1 << 16
#: Long headers, or payloads, that took up to 79 times their length, or announced what is not there.
HOSTILE = {
    "empty maps": around(b"\xdd" + (SIZE - 5).to_bytes(4, "big") + b"\x80" * (SIZE - 5)),
    "empty arrays": around(b"\xdd" + (SIZE - 5).to_bytes(4, "big") + b"\x90" * (SIZE - 5)),
    "arrays of one": around(b"\xdd" + (SIZE // 2 - 3).to_bytes(4, "big") + b"\x91\x01" * (SIZE // 2 - 3) + b"\x01"),
    "arrays in arrays": around(b"\x91" * SIZE),
    "arrays in arrays that announce more": around((b"\xdd" + (SIZE // 2).to_bytes(4, "big")) * (SIZE // 5)),
    "short texts": around(b"\xdd" + (SIZE // 3 - 2).to_bytes(4, "big") + b"\xa2ab" * (SIZE // 3 - 2)),
    "one text": around(b"\x92\x02\xdb" + (SIZE - 7).to_bytes(4, "big") + b"x" * (SIZE - 7)),
    "one piece of bytes": around(b"\x92\x02\xc6" + (SIZE - 7).to_bytes(4, "big") + b"x" * (SIZE - 7)),
    "an extension": around(b"\xc9" + (SIZE - 6).to_bytes(4, "big") + b"x" * (SIZE - 5)),
    "a text as a kind": around(b"\x91\xd9\xff" + b"x" * 255),
    "a thousand arrays as a kind": around(b"\x91" * 1000 + b"\x01"),
    "a thousand arrays in a field": around(b"\x98\x02\x01\x01" + b"\x91" * 990 + b"\x01" * 6),
    "a short header announced as long": around(b"\x98\x02")[:7] + (1 << 31).to_bytes(4, "little") + bytes(SIZE),
    "values": encode(an_update(np.zeros(SIZE // 4))),
    "values of another kind": encode(DenseState(1, DIGEST, False, values=np.zeros(SIZE // 4))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_client_s_frame_is_read_in_three_times_its_memory_or_refused(name):
    assert memory_of_reading(HOSTILE[name], ClientUpdate) <= 3 * len(HOSTILE[name]) + (64 << 10)


@pytest.mark.parametrize("name", HOSTILE)
def test_any_frame_is_read_in_forty_times_its_memory_or_refused(name):
    """Where long headers are expected; what is announced and not there takes nothing."""
    assert memory_of_reading(HOSTILE[name], Record) <= 40 * len(HOSTILE[name]) + (64 << 10)


def memory_of_reading(frame, expected):
    """The most bytes that reading a frame takes. If it is refused, then in few words."""
    tracemalloc.start()
    try:
        decode(frame, expected)
    except WireError as error:
        assert len(str(error)) < 200
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize(("kind", "shown"), [(True, "True"), (2.0, "2.0"), (None, "None"), ("ab", "a str of 2")])
def test_the_number_of_a_record_is_an_integer(kind, shown):
    """In Python ``True`` and ``2.0`` are keys of the dictionary, too."""
    with pytest.raises(WireError, match=f"there is no record {shown}"):
        decode(framed(kind, 1, 1, DIGEST, 1, 0.5, 1, 1))


def test_a_receiver_says_what_it_expects():
    assert isinstance(decode(encode(EXAMPLES[0]), ClientUpdate), ScalarUpdate)
    with pytest.raises(WireError, match="a DenseState came instead of a ClientUpdate"):
        decode(encode(EXAMPLES[-1]), ClientUpdate)
    with pytest.raises(WireError, match="a ScalarUpdate came instead of an Assignment"):
        decode(encode(EXAMPLES[0]), Assignment)


def test_a_record_of_ten_thousand_clients_is_read_and_what_would_be_refused_is_not_written():
    many = tuple((7, client, 1, 1) for client in range(10_000))
    record = RoundUpdate(1, DIGEST, DIGEST, 0.5, (), 0.9, 1e-3, many, values=np.ones(10_000))
    assert same(decode(encode(record)), record)
    with pytest.raises(WireError, match="would be refused by its receiver"):
        encode(an_update([1.0], digest=bytes(2000)))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, -1e39])
@pytest.mark.parametrize("name", ["learning_rate", "reference_scale"])
def test_numbers_that_are_none_in_float32_are_refused_in_an_assignment(name, value):
    record = replace(EXAMPLES[2], **{name: value})
    with pytest.raises(WireError, match=re.escape(f"unusable {name}: {value!r}")):
        decode(encode(record))


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e39])
@pytest.mark.parametrize("name", ["decay", "momentum", "rate", "reference", "step_decay", "adam"])
def test_numbers_that_are_none_in_float32_are_refused_in_a_round_s_step(name, value):
    held = {"step_decay": (0.5, value), "adam": (0.9, 1e-8, value, 1.0)}.get(name, value)
    with pytest.raises(WireError, match=f"unusable {name}"):
        decode(encode(replace(EXAMPLES[3], **{name: held})))


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


@pytest.mark.parametrize("adam", [0.5, [0.9, 1e-8, 1.0], [0.9, 1e-8, 1, 1.0], [0.9, 1e-8, 1.0, True], ["b"] * 4])
def test_the_numbers_of_adam_are_four(adam):
    record = RoundUpdate(1, DIGEST, DIGEST, 0.5, (), 0.9, 1e-3, ((1, 1, 2, 3),), adam=adam, values=np.arange(6))
    with pytest.raises(WireError, match="unusable adam"):
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
