"""The bounds against Hessians written out, and the rate against descent itself: below it converges, far above not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.core.safe_rate import Curvature, curvature_of, curvature_of_standardised, safe_rate

SEEDS = st.integers(0, 1000)


def with_constant(features: np.ndarray) -> np.ndarray:
    return np.concatenate([features, np.ones((len(features), 1))], axis=1)


def probabilities(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    scores = rows @ weights.T
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def hessian(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Written out, row by row."""
    blocks = [
        np.kron(np.diag(p) - np.outer(p, p), np.outer(row, row))
        for p, row in zip(probabilities(weights, rows), rows, strict=True)
    ]
    return np.mean(blocks, axis=0)


def loss(weights: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(probabilities(weights, rows)[np.arange(len(rows)), labels]).mean())


def gradient(weights: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    errors = probabilities(weights, rows)
    errors[np.arange(len(rows)), labels] -= 1
    return errors.T @ rows / len(rows)


@given(seed=SEEDS, classes=st.integers(2, 4), spread=st.floats(0, 5))
def test_no_hessian_is_above_the_bounds(seed: int, classes: int, spread: float) -> None:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(6, 3)) * [1, 2, 5] + 1
    found = curvature_of(features, classes)
    written_out = hessian(spread * generator.normal(size=(classes, 4)), with_constant(features))
    assert np.linalg.eigvalsh(written_out)[-1] <= found.largest * (1 + 1e-12)
    assert np.trace(written_out) <= found.trace * (1 + 1e-12)


def test_with_two_classes_that_are_undecided_the_bounds_are_reached() -> None:
    features = np.random.default_rng(0).normal(size=(50, 3))
    found, written_out = curvature_of(features, 2), hessian(np.zeros((2, 4)), with_constant(features))
    assert np.linalg.eigvalsh(written_out)[-1] == pytest.approx(found.largest)
    assert np.trace(written_out) == pytest.approx(found.trace)


@given(seed=SEEDS, classes=st.integers(2, 5))
def test_where_a_head_starts_its_curvature_is_known(seed: int, classes: int) -> None:
    features = np.random.default_rng(seed).normal(size=(8, 3))
    found = curvature_of(features, classes, at_start=True)
    written_out = hessian(np.zeros((classes, 4)), with_constant(features))
    assert np.linalg.eigvalsh(written_out)[-1] == pytest.approx(found.largest)
    assert np.trace(written_out) == pytest.approx(found.trace)
    assert found.largest <= curvature_of(features, classes).largest


@given(seed=SEEDS, rows=st.integers(1, 12), classes=st.integers(1, 5))
def test_without_data_the_bounds_hold_for_any_standardised_features(seed: int, rows: int, classes: int) -> None:
    features = np.random.default_rng(seed).normal(size=(rows, 7)) * 3 + 2
    features = (features - features.mean(axis=1, keepdims=True)) / features.std(axis=1, keepdims=True)
    for at_start in (False, True):
        known = curvature_of(features, classes, at_start=at_start)
        bound = curvature_of_standardised(7, classes, at_start=at_start)
        assert known.largest <= bound.largest * (1 + 1e-9)
        assert known.trace == pytest.approx(bound.trace)


def test_the_smaller_matrix_has_the_same_eigenvalue() -> None:
    features = np.random.default_rng(3).normal(size=(4, 9))
    rows = with_constant(features)
    assert curvature_of(features, 2).largest == pytest.approx(np.linalg.eigvalsh(rows.T @ rows / 4)[-1] / 2)


def descended(factor: float, steps: int = 3000) -> list[float]:
    """Losses of gradient descent at ``factor`` times the safe rate, where labels contradict each other."""
    generator = np.random.default_rng(1)
    features = np.repeat(generator.normal(size=(10, 3)), 2, axis=0)
    rows, labels = with_constant(features), np.tile([0, 1], 10)
    rate, weights = factor * safe_rate(curvature_of(features, 2)), 0.1 * generator.normal(size=(2, 4))
    losses = []
    for _ in range(steps):
        losses.append(loss(weights, rows, labels))
        weights = weights - rate * gradient(weights, rows, labels)
    return losses


def test_descent_converges_below_the_rate_and_not_far_above() -> None:
    """The best loss is ln 2, since every text has either label once."""
    losses = descended(0.9)
    assert all(after <= before + 1e-12 for before, after in pairwise(losses))
    assert losses[-1] == pytest.approx(np.log(2), abs=1e-6)
    for factor in (1.5, 4.0):
        assert min(descended(factor)[-100:]) > np.log(2) + 1e-3


def sketched_change(factor: float, clients: int, scalars: int, draws: int = 3000) -> float:
    """Mean change of the loss in one step along signs that clients drew, at ``factor`` times the safe rate."""
    generator = np.random.default_rng(2)
    features = generator.normal(size=(40, 15))
    rows, labels = with_constant(features), generator.integers(0, 2, 40)
    weights = 0.01 * generator.normal(size=(2, 16))
    exact = gradient(weights, rows, labels).ravel()
    rate = factor * safe_rate(curvature_of(features, 2), clients=clients, scalars=scalars)
    changes = []
    for _ in range(draws):
        signs = generator.choice([-1.0, 1.0], size=(clients * scalars, exact.size))
        pooled = (signs @ exact) @ signs / len(signs)
        changes.append(loss(weights - rate * pooled.reshape(weights.shape), rows, labels))
    return float(np.mean(changes)) - loss(weights, rows, labels)


@pytest.mark.parametrize(("clients", "scalars"), [(1, 1), (2, 2), (4, 16)])
def test_sketched_steps_lower_the_loss_below_the_rate_and_raise_it_far_above(clients: int, scalars: int) -> None:
    assert sketched_change(0.9, clients, scalars) < 0
    assert sketched_change(8.0, clients, scalars) > 0


@given(largest=st.floats(1e-3, 1e3), clients=st.integers(1, 50), scalars=st.integers(1, 500))
def test_laws_of_the_rate(largest: float, clients: int, scalars: int) -> None:
    """Between the well-known bound and the exact gradient's, the same for one pool however it is divided."""
    dimensions = 20
    curvature = Curvature(largest, 0.5 * dimensions * largest)
    exact, sketched = safe_rate(curvature), safe_rate(curvature, clients=clients, scalars=scalars)
    assert exact / (1 + dimensions / (clients * scalars)) <= sketched <= exact == pytest.approx(2 / largest)
    assert sketched == pytest.approx(safe_rate(curvature, clients=1, scalars=clients * scalars))
    assert safe_rate(curvature, momentum=0.9) == pytest.approx(0.1 * exact)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[rows, width\]"):
        curvature_of(np.zeros((0, 3)), 2)
    with pytest.raises(ValueError, match="classes must be 1 or more"):
        curvature_of_standardised(3, 0)
    for own in ({"clients": 0}, {"scalars": -1}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match="out of range"):
            safe_rate(Curvature(1, 1), **own)
