"""Schedules against closed forms, and their laws for any length."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.core.learning_rate import Schedule

SHAPES = ("constant", "linear", "cosine")
BASES = st.floats(0, 1e3)
ROUNDS = st.integers(1, 500)
RATIOS = st.floats(0, 0.99)


def values(shape, rounds, base=1.0, warmup_ratio=0.0):
    schedule = Schedule(base, shape, rounds, warmup_ratio)
    return [schedule(index) for index in range(rounds)]


def test_closed_forms():
    assert values("constant", 4, 0.5) == [0.5] * 4
    assert values("linear", 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert values("cosine", 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_warm_up_rises_linearly_and_the_rest_follows():
    assert values("constant", 8, 2.0, 0.5) == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2, 2])
    assert values("linear", 8, 2.0, 0.5) == pytest.approx([0.5, 1, 1.5, 2, 2, 1.5, 1, 0.5])
    assert values("cosine", 8, 1.0, 0.5)[4:] == pytest.approx(values("cosine", 4))
    assert values("linear", 3, 1.0, 0.01)[0] == 1.0, "a started round of warm-up is a round, which ends at the base"


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_would_reach_zero_after_the_last_round(shape):
    schedule = Schedule(0.3, shape, 10)
    assert schedule(9) > 0
    assert schedule(10) == pytest.approx(0, abs=1e-15)


@given(shape=st.sampled_from(SHAPES), base=BASES, rounds=ROUNDS, ratio=RATIOS)
def test_laws(shape, base, rounds, ratio):
    """Never negative, never above the base, rising up to its peak and not rising after it."""
    found = values(shape, rounds, base, ratio)
    assert all(0 <= value <= base for value in found)
    warmup = math.ceil(rounds * ratio)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert max(found) == base
    if shape != "constant" and base > 1e-300:
        assert all(value > 0 for value in found), "every round of a run learns something"


@given(shape=st.sampled_from(SHAPES), base=BASES, rounds=ROUNDS, ratio=RATIOS, index=st.integers(0, 499))
def test_a_schedule_is_a_pure_function(shape, base, rounds, ratio, index):
    """A resumed run asks for round 7 without having asked for rounds 0 to 6."""
    index = min(index, rounds - 1)
    assert Schedule(base, shape, rounds, ratio)(index) == values(shape, rounds, base, ratio)[index]


@given(shape=st.sampled_from(SHAPES), rounds=ROUNDS, ratio=RATIOS, factor=st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_scaling_the_base_scales_every_round(shape, rounds, ratio, factor):
    assert values(shape, rounds, factor, ratio) == [factor * value for value in values(shape, rounds, 1.0, ratio)]
