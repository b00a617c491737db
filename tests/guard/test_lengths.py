"""What is usual, and what becomes of the rest."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.config import parse_config
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.guard import LengthGuard, believed_losses, believed_samples, root_mean_square, scaled

LENGTHS = st.lists(st.floats(1e-20, 1e30), min_size=3, max_size=12)


def bounded(lengths: list[float], clip: float | None = 1.0) -> list[float]:
    """Every length as it is after a round of its own."""
    factors = LengthGuard(clip).factors({client: (length,) for client, length in enumerate(lengths)})
    return [length * factors[client][0] for client, length in enumerate(lengths)]


@given(LENGTHS, st.floats(0.5, 4.0))
def test_nobody_is_longer_than_the_median_and_nobody_grows(lengths: list[float], clip: float) -> None:
    bound = clip * statistics.median_low(lengths)
    for before, after in zip(lengths, bounded(lengths, clip), strict=True):
        assert after == pytest.approx(min(before, bound), rel=1e-12)


@given(LENGTHS, st.floats(1.0, 1e30))
def test_fewer_than_half_cannot_raise_the_bound(honest: list[float], lie: float) -> None:
    liars = [max(honest) * lie] * (len(honest) - 1)
    assert max(bounded([*honest, *liars])) <= max(honest) * (1 + 1e-12)


def test_without_a_bound_everything_is_believed() -> None:
    guard = LengthGuard(None)
    assert not guard.is_on
    assert bounded([1.0, 2.0, 1e30], None) == [1.0, 2.0, 1e30]


def test_who_sends_nothing_of_a_part_is_not_asked_what_is_usual() -> None:
    factors = LengthGuard(1.0).factors({1: (0.0, 1.0), 2: (0.0, 3.0), 3: (4.0, 2.0), 4: (8.0, 2.0), 5: (4.0, 9.0)})
    assert factors == {1: (1.0, 1.0), 2: (1.0, 2 / 3), 3: (1.0, 1.0), 4: (0.5, 1.0), 5: (1.0, 2 / 9)}


def test_a_round_without_company_is_held_against_earlier_ones() -> None:
    guard = LengthGuard(1.0)
    first = [guard.factors({1: (length,)})[1][0] for length in (1.0, 1.2, 0.8)]
    assert first == [1.0, 1.0, 1.0]  # nothing to compare with
    assert guard.factors({1: (0.9,)})[1] == (1.0,)
    assert guard.factors({1: (1e30,)})[1][0] == pytest.approx(0.9 / 1e30)


def test_before_there_is_anything_to_compare_with_the_method_knows_a_bound() -> None:
    guard = LengthGuard(1.0)
    assert guard.factors({1: (10.0,)}, most=(4.0,))[1] == (0.4,)
    assert guard.factors({1: (3.0,)}, most=(4.0,))[1] == (1.0,)


def test_a_liar_alone_does_not_raise_the_bound() -> None:
    """What was shortened is remembered as it was believed."""
    guard = LengthGuard(1.0)
    for _ in range(16):
        guard.factors({1: (1.0,)})
    believed = [1e30 * guard.factors({2: (1e30,)})[2][0] for _ in range(7)]
    assert believed == pytest.approx([1.0] * 7)


def test_a_guard_goes_on_where_it_was() -> None:
    one, other = LengthGuard(1.0), LengthGuard(1.0)
    for length in (1.0, 5.0, 2.0, 1e9):
        one.factors({1: (length, length / 2)})
    other.load_state(one.state())
    for length in (7.0, 0.1, 1e5):
        assert one.factors({1: (length, length)}) == other.factors({1: (length, length)})
    assert one.state() == other.state()


@pytest.mark.parametrize("count", [0, 1, 5, (1 << 20) + 3])
def test_root_mean_square_is_that_of_all_numbers(count: int) -> None:
    values = np.random.default_rng(1).standard_normal(count).astype(np.float32)
    wanted = math.sqrt(math.fsum(float(value) ** 2 for value in values) / count) if count else 0.0
    assert root_mean_square(values) == np.float32(wanted)
    assert root_mean_square(values[: count // 3], values[count // 3 :]) == np.float32(wanted)


def test_the_largest_numbers_have_a_length_and_can_be_shortened() -> None:
    values = np.full((1 << 20) + 7, np.finfo(np.float32).max, dtype=np.float32)
    length = root_mean_square(values)
    assert length == np.finfo(np.float32).max
    np.testing.assert_allclose(scaled(values, 1.0 / length), 1.0)
    assert scaled(values, 1.0) is values


def test_one_loss_is_not_all_that_a_run_has_to_show() -> None:
    assert believed_losses({1: 0.5, 2: 1e30, 3: -1e30, 4: 9.0}) == {1: 0.5, 2: 10.0, 3: -10.0, 4: 9.0}
    assert believed_losses({1: 30.0, 2: 200.0, 3: 400.0}) == {1: 30.0, 2: 200.0, 3: 400.0}
    assert believed_losses({}) == {}


@given(st.dictionaries(st.integers(1, 9), st.integers(1, 1 << 62), min_size=1))
def test_samples_are_at_most_what_steps_hold_and_what_is_usual(reported: dict[int, int]) -> None:
    most = {client: 100 * client for client in reported}
    held = believed_samples(reported, most, None)
    assert held == {client: min(reported[client], most[client]) for client in reported}
    median = statistics.median_low(held.values())
    believed = believed_samples(reported, most, 2.0)
    assert believed == {client: min(samples, 2 * median) for client, samples in held.items()}


@pytest.mark.parametrize(
    ("given_value", "times"), [("median_norm", 1.0), ("none", None), (2, 2.0), (0.5, 0.5), ("3", 3.0)]
)
def test_the_key_takes_words_and_numbers(given_value: object, times: float | None) -> None:
    robust = parse_config({"fwdllm": {"robust": {"clip": given_value}}}).fwdllm.robust
    assert robust.times_median == times
    assert isinstance(robust.clip, str)


@pytest.mark.parametrize("given_value", ["median", 0, -1, "nan", True, [], "1e999"])
def test_other_values_of_the_key_are_refused(given_value: object) -> None:
    with pytest.raises(ConfigError, match=r"fwdllm\.robust\.clip: allowed are median_norm, none, or a number above 0"):
        parse_config({"fwdllm": {"robust": {"clip": given_value}}})


def test_samples_may_be_believed() -> None:
    assert parse_config({"fwdllm": {"robust": {"samples": 0}}}).fwdllm.robust.samples_times_median is None
    assert parse_config({}).fwdllm.robust.samples_times_median == 10.0
