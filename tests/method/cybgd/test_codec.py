"""Blocks as bytes: exact forms exact, lossy ones within their bound, nothing but a typed error for other bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.errors import WireError
from fs_fwdllm.method.cybgd.codec import (
    FORMS,
    Encoding,
    decode_tensors,
    encode_tensors,
    group_of,
    kept_count,
    raw_bytes,
)
from fs_fwdllm.method.cybgd.state_bytes import average_states, pack_states, unpack_states

SHAPES = st.lists(st.lists(st.integers(1, 17), min_size=1, max_size=3), min_size=1, max_size=4)
ENCODINGS = st.builds(Encoding, st.sampled_from(FORMS), st.sampled_from(["float32", "bfloat16", "float16"]),
                      st.sampled_from([1.0, 0.5, 0.01]))  # fmt: skip


def draw(shapes: list[list[int]], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]


def there_and_back(tensors: list[torch.Tensor], encoding: Encoding, *, compress: bool) -> list[torch.Tensor]:
    data, compressed = encode_tensors(tensors, encoding, compress=compress)
    assert compressed or len(data) == raw_bytes([tensor.shape for tensor in tensors], encoding)
    return decode_tensors(data, [tensor.shape for tensor in tensors], encoding, compressed=compressed)


@given(shapes=SHAPES, form=st.sampled_from(["float32", "bfloat16", "float16"]), compress=st.booleans())
def test_dense_forms_are_exact(shapes: list[list[int]], form: str, compress: bool) -> None:
    tensors = [tensor.to(getattr(torch, form)) for tensor in draw(shapes)]
    for value, back in zip(tensors, there_and_back(tensors, Encoding(form, form), compress=compress), strict=True):
        assert back.dtype == value.dtype and torch.equal(back, value)


@given(shapes=SHAPES, encoding=ENCODINGS, compress=st.booleans())
def test_lossy_forms_stay_within_their_bound(shapes: list[list[int]], encoding: Encoding, compress: bool) -> None:
    tensors = draw(shapes)
    for value, back in zip(tensors, there_and_back(tensors, encoding, compress=compress), strict=True):
        error = (back.float() - value).abs().flatten()
        if value.dim() == 1:
            assert torch.equal(back, value.to(back.dtype))
            continue
        kept = back.flatten() != 0 if encoding.keep_ratio < 1 else torch.ones(value.numel(), dtype=torch.bool)
        assert int(kept.sum()) <= kept_count(value.numel(), encoding.keep_ratio)
        step = {"int8": 1 / 254, "int4": 1 / 14, "bfloat16": 2**-8, "float16": 2**-11, "float32": 0}[encoding.form]
        largest = value.abs().max()
        assert bool((error[kept] <= step * largest * 1.0001 + 1e-7).all())


@given(seed=st.integers(0, 20), ratio=st.sampled_from([0.1, 0.5, 0.9]))
def test_pruning_keeps_the_largest(seed: int, ratio: float) -> None:
    (value,) = draw([[13, 11]], seed)
    (back,) = there_and_back([value], Encoding("float32", "float32", ratio), compress=False)
    count = kept_count(value.numel(), ratio)
    smallest = value.abs().flatten().sort(descending=True).values[count - 1]
    assert torch.equal(back, torch.where(value.abs() >= smallest, value, 0.0))


def test_a_quantised_group_reaches_its_largest_value_exactly_and_scales_per_group() -> None:
    for form, levels in (("int8", 127), ("int4", 7)):
        value = torch.zeros(2, group_of(form))
        value[0, 3], value[1, 5] = levels * 0.5, levels * 2.0
        (back,) = there_and_back([value], Encoding(form, "float32"), compress=False)
        assert torch.equal(back, value)


def test_zstandard_pays_on_weights_and_is_left_out_where_it_does_not() -> None:
    weights = draw([[512, 512]])
    small, compressed = encode_tensors(weights, Encoding("bfloat16", "bfloat16"), compress=True)
    assert compressed and len(small) < 0.75 * raw_bytes([(512, 512)], Encoding("bfloat16", "bfloat16"))
    noise = [torch.from_numpy(np.random.default_rng(0).integers(0, 2**31, 64).astype(np.int32)).view(torch.float32)]
    assert not encode_tensors(noise, Encoding("float32", "float32"), compress=True)[1]


@given(encoding=ENCODINGS, data=st.binary(max_size=300), compressed=st.booleans())
def test_random_bytes_are_refused(encoding: Encoding, data: bytes, compressed: bool) -> None:
    shapes = [[60, 60], [60]]  # more than 300 bytes in every form
    with pytest.raises(WireError):
        decode_tensors(data, shapes, encoding, compressed=compressed)


def test_a_decompression_bomb_is_refused_before_it_is_opened() -> None:
    bomb = zstandard.compress(bytes(50_000_000))
    with pytest.raises(WireError, match="another length"):
        decode_tensors(bomb, [[4, 4]], Encoding("float32", "float32"), compressed=True)


def test_every_truncation_and_every_addition_is_refused() -> None:
    tensors = draw([[9, 9], [5]])
    for encoding in (Encoding("int4", "float32"), Encoding("int8", "bfloat16", 0.3), Encoding("float32", "float32")):
        for compress in (False, True):
            data, compressed = encode_tensors(tensors, encoding, compress=compress)
            for length in range(len(data)):
                with pytest.raises(WireError):
                    decode_tensors(data[:length], [[9, 9], [5]], encoding, compressed=compressed)
            for more in (b"\0", bytes(9), data):
                with pytest.raises(WireError):
                    decode_tensors(data + more, [[9, 9], [5]], encoding, compressed=compressed)


def test_optimiser_states_survive_and_malformed_ones_are_refused() -> None:
    shapes = [(3, 4), (5,)]
    states = [{"step": torch.tensor(7.0), "exp_avg": torch.randn(shape)} for shape in shapes]
    packed = pack_states(states, compress=True)
    for back, state in zip(unpack_states(packed, shapes), states, strict=True):
        assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    for wrong in (
        packed[:-1],
        packed[3:],
        np.append(packed, packed),
        np.zeros(9, np.uint8),
        np.frombuffer(b"\x02\0\0\0\x92\xc3", np.uint8),
    ):
        with pytest.raises(WireError):
            unpack_states(wrong, shapes)
    with pytest.raises(WireError):
        unpack_states(packed, [(3, 4)])
    with pytest.raises(WireError, match="different names"):
        average_states([states, [{"step": torch.tensor(1.0)} for _ in states]], [0.5, 0.5])
    for heard, own in zip(average_states([states, [{}, {}]], [0.25, 0.75]), states, strict=True):
        assert all(torch.equal(heard[name], own[name]) for name in own), "who keeps nothing has no say"
    (mean, _) = average_states([states, states], [0.25, 0.75])
    assert torch.allclose(mean["exp_avg"], states[0]["exp_avg"]) and mean["step"] == 7
