"""Replay: same bits in any chunking, and the same numbers as a reference that adds whole directions one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_fwdllm.core.direction import DirectionKey, Gaussian, Rademacher
from fs_fwdllm.core.replay import Contributions, Replayer, add_contributions, perturb
from fs_fwdllm.core.trainables import Trainables

SHAPES = [(7, 11), (5,), (64, 3), (1, 1), (300,)]


def some_trainables(seed: int = 0) -> Trainables:
    generator = torch.Generator().manual_seed(seed)
    return Trainables({f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(SHAPES)})


def some_contributions(count: int, seed: int = 0) -> Contributions:
    rng = np.random.default_rng(seed)
    return Contributions(list(range(100, 100 + count)), rng.normal(size=count).astype(np.float32) * 1e-3)


@pytest.mark.parametrize("count", [1, 2, 70])
def test_every_chunk_size_gives_the_same_bits(count):
    digests = set()
    for chunk in (1, 7, 4096, 1 << 18):
        trainables = some_trainables()
        add_contributions(trainables.tensors, some_contributions(count), 5, Rademacher(), chunk)
        digests.add(trainables.digest())
    assert len(digests) == 1
    assert digests != {some_trainables().digest()}


@given(count=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_equals_the_slow_reference(count, seed):
    """Reference: float64 sum of whole directions."""
    contributions = some_contributions(count, seed)
    trainables, distribution = some_trainables(), Rademacher()
    add_contributions(trainables.tensors, contributions, 5, distribution)
    for tensor_id, (moved, start) in enumerate(zip(trainables.tensors, some_trainables().tensors, strict=True)):
        expected = start.double().flatten()
        for direction_seed, coefficient in zip(contributions.seeds, contributions.coefficients, strict=True):
            z = distribution.values([DirectionKey(5, direction_seed)], tensor_id, 0, start.numel())[0]
            expected += float(coefficient) * torch.from_numpy(z).double()
        torch.testing.assert_close(moved.double().flatten(), expected, rtol=0, atol=2e-6)


def test_one_contribution_is_one_rounding():
    """p + (+-c): exactly what float32 addition of the exact product gives."""
    trainables = some_trainables()
    add_contributions(trainables.tensors, Contributions([3], np.array([1e-3], np.float32)), 5, Rademacher())
    for tensor_id, (moved, start) in enumerate(zip(trainables.tensors, some_trainables().tensors, strict=True)):
        z = Rademacher().values([DirectionKey(5, 3)], tensor_id, 0, start.numel())[0].reshape(start.shape)
        expected = (start.numpy() + np.float32(1e-3) * z.astype(np.float32)).astype(np.float32)
        np.testing.assert_array_equal(moved.numpy(), expected)


def test_perturb_equals_adding_and_leaves_the_source():
    source = torch.randn(513)
    before, target = source.clone(), torch.empty_like(source)
    perturb(source, target, 0.25, DirectionKey(5, 3), 0, Rademacher(), chunk=100)
    expected = source.clone()
    add_contributions([expected], Contributions([3], np.array([0.25], np.float32)), 5, Rademacher())
    assert torch.equal(target, expected)
    assert torch.equal(source, before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_replica_that_sees_the_same_updates_holds_the_same_bits(momentum):
    one, two = (Replayer(some_trainables(), 5, Rademacher(), chunk) for chunk in (3, 1 << 18))
    for round_index in range(5):
        for replayer in (one, two):
            replayer.apply(some_contributions(4, round_index), decay=0.99, momentum=momentum, rate=0.1)
        assert one.trainables.digest() == two.trainables.digest()


def test_momentum_follows_the_heavy_ball_recursion():
    """m <- beta m + u; p <- decay p - rate m, against float64."""
    replayer = Replayer(some_trainables(), 5, Rademacher())
    velocity = [torch.zeros_like(t).double() for t in replayer.trainables.tensors]
    expected = [t.double().clone() for t in replayer.trainables.tensors]
    for round_index in range(6):
        contributions = some_contributions(3, round_index)
        replayer.apply(contributions, decay=0.98, momentum=0.9, rate=0.5)
        step = [torch.zeros_like(t) for t in replayer.trainables.tensors]
        add_contributions(step, contributions, 5, Rademacher())
        for index, change in enumerate(step):
            velocity[index] = 0.9 * velocity[index] + change.double()
            factor = 0.98 if change.dim() > 1 else 1.0
            expected[index] = factor * expected[index] - 0.5 * velocity[index]
    for moved, reference in zip(replayer.trainables.tensors, expected, strict=True):
        torch.testing.assert_close(moved.double(), reference, rtol=1e-5, atol=1e-6)


def test_decay_spares_vectors():
    replayer = Replayer(some_trainables(), 5, Rademacher())
    replayer.apply(Contributions([], np.zeros(0, np.float32)), decay=0.5, momentum=0.0, rate=0.0)
    for moved, start in zip(replayer.trainables.tensors, some_trainables().tensors, strict=True):
        assert torch.equal(moved, start * 0.5 if start.dim() > 1 else start)


def test_gaussian_replay_agrees_to_rounding():
    one, two = some_trainables(), some_trainables()
    add_contributions(one.tensors, some_contributions(5), 5, Gaussian(), 7)
    add_contributions(two.tensors, some_contributions(5), 5, Gaussian())
    for left, right in zip(one.tensors, two.tensors, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 seeds but 1 coefficients"):
        Contributions([1, 2], np.zeros(1, np.float32))
