"""Directions are pure functions of (run seed, direction seed, tensor, element): the laws that make replay possible."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_fwdllm.core.direction import (
    DIRECTIONS,
    DirectionKey,
    Rademacher,
    direction_seed,
    make_distribution,
    raw_words,
)
from fs_fwdllm.core.torch_arrays import TorchArrays, signs_from_octets
from fs_fwdllm.errors import ConfigError

U64 = st.integers(0, 2**64 - 1)
#: A distribution joins by its row in the registry.
every_distribution = pytest.mark.parametrize(
    "distribution", [make_distribution(name) for name in DIRECTIONS.names()], ids=DIRECTIONS.names()
)
GOLDEN_SEED = 0x2E9F436DCD03ED3E
GOLDEN_KEY = DirectionKey(2024, direction_seed(3, 7, 1, 2))
GOLDEN_SIGNS = "----+++---+--+-+-++-++-+-++---++-+-+--+++-+---++++-+---++++---+-"
GOLDEN_SHA256 = "be5284448bef44bb0584eaf5511d8c7fafce45d8bcb357686972a197bc4d58be"


def independent_signs(key: DirectionKey, tensor_id: int, count: int) -> np.ndarray:
    """The definition, written down again with numpy's generator and Python integers."""
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array([0, 0, tensor_id, 0], np.uint64))
    words = [int(word) for word in generator.random_raw(-(-count // 64))]
    return np.array([2 * (words[e // 64] >> (e % 64) & 1) - 1 for e in range(count)], dtype=np.int8)


def test_golden_bits():
    """These constants must never change: adapters trained from seeds and scalars depend on them."""
    assert GOLDEN_KEY.seed == GOLDEN_SEED
    signs = Rademacher().values([GOLDEN_KEY], 5, 0, 64)[0]
    assert "".join("+" if sign > 0 else "-" for sign in signs.tolist()) == GOLDEN_SIGNS
    many = Rademacher().values([GOLDEN_KEY], 5, 0, 100_000)[0]
    assert hashlib.sha256(many.tobytes()).hexdigest() == GOLDEN_SHA256


@given(run_seed=U64, seed=U64, tensor_id=st.integers(0, 2**32), count=st.integers(1, 700))
def test_signs_equal_an_independent_use_of_philox(run_seed, seed, tensor_id, count):
    key = DirectionKey(run_seed, seed)
    ours = Rademacher().values([key], tensor_id, 0, count)[0]
    np.testing.assert_array_equal(ours, independent_signs(key, tensor_id, count))


@given(seeds=st.lists(U64, min_size=2, max_size=5), first=st.integers(0, 2000), count=st.integers(1, 300))
def test_vectorised_words_equal_numpys(seeds, first, count):
    keys = [DirectionKey(9, seed) for seed in seeds]
    together = raw_words(keys, 3, first, count)
    for row, key in zip(together, keys, strict=True):
        np.testing.assert_array_equal(row, raw_words([key], 3, first, count)[0])


@given(seed=U64, words=st.integers(1, 40))
def test_signs_unpacked_on_a_device_equal_those_unpacked_on_the_host(seed, words):
    """Accelerators unpack the bits themselves; here with the same operations on the CPU."""
    key = DirectionKey(11, seed)
    octets = torch.from_numpy(raw_words([key], 4, 0, words).view(np.uint8))
    assert np.array_equal(signs_from_octets(octets).numpy(), Rademacher().values([key], 4, 0, 64 * words))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_an_accelerator_holds_the_same_signs():
    here, there = (
        Rademacher().values([GOLDEN_KEY], 5, 3, 70_001, TorchArrays(torch.device(device))) for device in ("cpu", "cuda")
    )
    assert torch.equal(here, there.cpu())


@every_distribution
@given(start=st.integers(0, 5000), count=st.integers(1, 400))
def test_any_slice_equals_the_slice_of_the_whole(distribution, start, count):
    whole = distribution.values([GOLDEN_KEY], 1, 0, start + count)[0]
    part = distribution.values([GOLDEN_KEY], 1, start, count)[0]
    np.testing.assert_allclose(part, whole[start:], rtol=1e-6, atol=1e-7)
    if distribution.portable:
        assert np.array_equal(part, whole[start:])


@every_distribution
def test_first_two_moments(distribution):
    """Mean 0 and E[z z^T] = I: every entry of the sample moments within five standard errors."""
    keys = [DirectionKey(1, seed) for seed in range(4000)]
    z = distribution.values(keys, 0, 0, 20).astype(np.float64)
    assert np.abs(z.mean(0)).max() < 5 / len(keys) ** 0.5
    second = z.T @ z / len(keys)
    variance = max(1.0, distribution.spread(20) - 19)  # of a product of two elements, of the square of one
    assert np.abs(second - np.eye(20)).max() < 5 * (variance / len(keys)) ** 0.5


def test_tensors_seeds_and_runs_are_independent_streams():
    def stream(run_seed, seed, tensor_id):
        return Rademacher().values([DirectionKey(run_seed, seed)], tensor_id, 0, 4096)[0].astype(np.float64)

    streams = [stream(0, 0, 0), stream(0, 0, 1), stream(0, 1, 0), stream(1, 0, 0)]
    for first in range(4):
        for second in range(first):
            assert abs(float(streams[first] @ streams[second])) / 4096 < 5 / 64


def test_direction_seeds_do_not_collide():
    seeds = {direction_seed(r, c, s, p) for r in range(8) for c in range(8) for s in range(8) for p in range(8)}
    assert len(seeds) == 8**4


@settings(max_examples=20)
@given(count=st.integers(1, 3000))
def test_the_memory_of_recent_bits_changes_nothing(count):
    remembering = Rademacher()
    first = remembering.values([GOLDEN_KEY], 2, 0, count)
    again = remembering.values([GOLDEN_KEY], 2, 0, count)
    other = remembering.values([DirectionKey(1, 1)], 2, 0, count)
    assert np.array_equal(first, again)
    assert np.array_equal(other, Rademacher().values([DirectionKey(1, 1)], 2, 0, count))


def test_unknown_distribution_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'rademacher'"):
        make_distribution("rademcher")
