"""Votes among clients, against slow ones."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fs_fwdllm.config import parse_config
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.guard import outvoted_by_distance, vote

VALUES = st.integers(1, 9).flatmap(
    lambda clients: arrays(np.float32, (clients, 4), elements=st.floats(-8, 8, width=16).map(float))
)


@given(VALUES, st.sampled_from([0.0, 0.2, 0.4]))
def test_number_by_number(values: np.ndarray, liars: float) -> None:
    count = len(values)
    cut = min(int(liars * count), (count - 1) // 2)
    columns = [sorted(float(value) for value in column) for column in values.T]
    expected = {
        "mean": [statistics.fmean(column) for column in columns],
        "median": [statistics.median(column) for column in columns],
        "trimmed": [statistics.fmean(column[cut : count - cut]) for column in columns],
    }
    for kind, wanted in expected.items():
        said, left_out = vote(kind, values, liars)  # type: ignore[arg-type]
        np.testing.assert_allclose(said, wanted, rtol=1e-6, atol=1e-6)
        assert said.dtype == np.float32 and left_out == []


@given(st.integers(4, 9), st.data())
def test_the_farthest_are_left_out(count: int, data: st.DataObject) -> None:
    values = np.random.default_rng(count).standard_normal((count, 3))
    liars = data.draw(st.integers(0, (count - 1) // 2))
    scores = []
    for row in range(count):
        others = sorted(float(np.square(values[row] - values[other]).sum()) for other in range(count) if other != row)
        scores.append(sum(others[: max(1, count - liars - 2)]))
    expected = sorted(sorted(range(count), key=lambda row: scores[row])[count - liars :])
    assert outvoted_by_distance(values, liars) == expected
    said, left_out = vote("krum", values.astype(np.float32), (liars + 0.5) / count)
    assert left_out == expected
    kept = [row for row in range(count) if row not in expected]
    np.testing.assert_allclose(said, values[kept].mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["median", "trimmed", "krum"])
def test_a_fifth_of_liars_cannot_lead_the_others_away(kind: str) -> None:
    rng = np.random.default_rng(1)
    honest = rng.standard_normal((16, 30)) + 5.0
    for lie in (-1e3, 1e30, float(np.finfo(np.float32).max)):
        values = np.concatenate([np.full((4, 30), lie), honest]).astype(np.float32)
        said, left_out = vote(kind, values, 0.2)  # type: ignore[arg-type]
        assert (said > honest.min(axis=0) - 1e-6).all() and (said < honest.max(axis=0) + 1e-6).all()
        assert left_out == ([0, 1, 2, 3] if kind == "krum" else [])


@pytest.mark.parametrize("kind", ["mean", "median", "trimmed", "krum"])
def test_one_client_has_its_say(kind: str) -> None:
    values = np.array([[1.0, -2.0]], dtype=np.float32)
    said, left_out = vote(kind, values, 0.4)  # type: ignore[arg-type]
    assert said.tolist() == [1.0, -2.0] and left_out == []


def test_the_order_of_clients_makes_no_difference_to_what_is_said() -> None:
    values = np.random.default_rng(3).standard_normal((5, 6)).astype(np.float32)
    for kind, order in itertools.product(("median", "trimmed", "krum"), ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3])):
        one, other = vote(kind, values, 0.2)[0], vote(kind, values[order], 0.2)[0]  # type: ignore[arg-type]
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_liars_are_counted_only_where_a_vote_asks_for_it(statistic: str) -> None:
    with pytest.raises(ConfigError, match=r"liars 0\.3 .* trimmed or krum"):
        parse_config({"fwdllm": {"robust": {"statistic": statistic, "liars": 0.3}}})
