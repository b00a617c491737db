"""Rows of one signed Hadamard matrix in turn: calibrated for any dimension, and as noisy as the law says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.core.arrays import arrays_of
from fs_fwdllm.core.direction import DirectionKey
from fs_fwdllm.core.division import Division
from fs_fwdllm.core.orthogonal import OrthogonalRows, order_of

SHAPES = [(3, 5), (7,), (2, 2, 2)]


def rows_of(sizes: list[int], rows: int, *, first: int = 0, run_seed: int = 5) -> np.ndarray:
    """Whole rows, int8 ``[rows, sum of sizes]``, of tensors that make one part."""
    tensors = [np.zeros(size, dtype=np.float32) for size in sizes]
    made = OrthogonalRows(tensors, Division.whole(len(sizes)))
    keys = [DirectionKey(run_seed, first + row) for row in range(rows)]
    return np.concatenate([made.values(keys, index, 0, size) for index, size in enumerate(sizes)], axis=1)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), cycle=st.integers(0, 3))
def test_a_cycle_looks_everywhere_equally(sizes: list[int], cycle: int) -> None:
    """``sum_j z_j z_j^T = N I`` for any dimension, so the mean estimate of a cycle is the gradient."""
    d = sum(sizes)
    order = order_of(d)
    z = rows_of(sizes, order, first=cycle * order).astype(np.int64)
    assert set(np.unique(z)) <= {-1, 1}
    np.testing.assert_array_equal(z.T @ z, order * np.eye(d, dtype=np.int64))
    gradient = np.random.default_rng(1).normal(size=d)
    np.testing.assert_allclose(z.T @ (z @ gradient) / order, gradient, rtol=1e-12, atol=1e-12)


def test_rows_of_a_power_of_two_are_orthogonal() -> None:
    z = rows_of([64], 64).astype(np.int64)
    np.testing.assert_array_equal(z @ z.T, 64 * np.eye(64, dtype=np.int64))


def test_cycles_and_seeds_have_other_orders() -> None:
    first, second, other = rows_of([33], 64), rows_of([33], 64, first=64), rows_of([33], 64, run_seed=6)
    assert not (first == second).all() and not (first == other).all()
    assert {row.tobytes() for row in first} == {row.tobytes() for row in second}, "the same rows in another order"


@pytest.mark.parametrize(("d", "count"), [(16, 4), (16, 16), (20, 5), (20, 32), (33, 60), (5, 1)])
def test_the_error_is_as_the_law_says(d: int, count: int) -> None:
    """``E|estimate - g|^2 / |g|^2`` over many run seeds and cycles."""
    gradient = np.random.default_rng(2).normal(size=d)
    errors = []
    for seed in range(400):
        z = rows_of([d], count, first=seed % 7 * order_of(d), run_seed=seed).astype(np.float64)
        errors.append(np.square(z.T @ (z @ gradient) / count - gradient).sum() / np.square(gradient).sum())
    law = OrthogonalRows([np.zeros(d, dtype=np.float32)], Division.whole(1)).relative_variance(d, count)
    assert np.mean(errors) == pytest.approx(law, rel=0.15, abs=1e-9)
    assert law <= (d - 1) / count + 1e-12, "never worse than independent signs"


def test_slices_libraries_and_parts_agree() -> None:
    tensors = [np.zeros(shape, dtype=np.float32) for shape in SHAPES]
    keys = [DirectionKey(9, seed) for seed in (0, 3, 40)]
    made = OrthogonalRows(tensors, Division.whole(3))
    whole = made.values(keys, 0, 0, 15)
    pieces = [made.values(keys, 0, start, 5) for start in (0, 5, 10)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    there = made.values(keys, 0, 0, 15, arrays_of(torch.zeros(1)))
    np.testing.assert_array_equal(there.numpy(), whole)
    # A part's rows are those of the part alone, whatever else is trained.
    parted = OrthogonalRows(tensors, Division((0, 1, 0), (1.0, 1.0)))
    alone = OrthogonalRows([tensors[1]], Division.whole(1))
    z = parted.values([DirectionKey(9, row) for row in range(8)], 1, 0, 7).astype(np.int64)
    assert z.shape == alone.values([DirectionKey(9, 0)] * 8, 0, 0, 7).shape
    np.testing.assert_array_equal(z.T @ z, 8 * np.eye(7, dtype=np.int64))
