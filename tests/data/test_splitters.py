"""Laws of a partition: disjoint, complete, a function of the seed; and every edge case ends with a defined outcome."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_fwdllm.data.splitters import divide_shares, split_iid, split_lda, split_meta, split_natural
from fs_fwdllm.errors import ConfigError

CODES = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(lambda codes: np.array(codes, dtype=np.int64))
CLIENTS = st.integers(1, 25)
SEEDS = st.integers(0, 2**63 - 1)
# Raw Philox words decide the first; the second also goes through the Dirichlet draw.
GOLDEN_IID = [[0, 1, 3, 5, 7], [2, 4, 6, 8]]
GOLDEN_LDA = [[6, 8, 10], [7], [0, 1, 2, 3, 4, 5, 9, 11]]

ALPHAS = st.sampled_from([1e-300, 1e-3, 0.1, 0.5, 10.0, 1e9])


def assert_partition(parts: list[np.ndarray], rows: int) -> None:
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)


@given(rows=st.integers(0, 200), clients=CLIENTS, seed=SEEDS)
def test_iid_is_a_balanced_partition(rows: int, clients: int, seed: int) -> None:
    parts = split_iid(rows, clients, seed)
    assert len(parts) == clients
    assert_partition(parts, rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(deadline=None)
@given(codes=CODES, clients=CLIENTS, alpha=ALPHAS, seed=SEEDS)
def test_lda_is_a_partition_that_leaves_nobody_empty_where_possible(codes, clients, alpha, seed) -> None:
    parts = split_lda(codes, clients, alpha, seed)
    assert len(parts) == clients
    assert_partition(parts, len(codes))
    assert sum(len(part) > 0 for part in parts) >= min(clients, len(codes))


@given(codes=CODES, clients=CLIENTS, seed=SEEDS)
def test_meta_gives_whole_categories_or_shares_them_evenly(codes, clients, seed) -> None:
    parts = split_meta(codes, clients, seed)
    assert len(parts) == clients
    assert_partition(parts, len(codes))
    sizes = Counter(codes.tolist())
    if len(sizes) >= clients:
        for code in sizes:
            assert sum(code in codes[part] for part in parts) == 1
    else:
        for part in parts:
            assert len(set(codes[part].tolist())) <= 1
        for code, size in sizes.items():
            shares = [len(part) for part in parts if len(part) and codes[part[0]] == code]
            assert max(shares) - min(shares) <= 1 or size < clients


@given(codes=CODES)
def test_natural_gives_each_owner_its_rows_in_order(codes) -> None:
    parts = split_natural(codes, 0)
    assert_partition(parts, len(codes))
    assert [set(codes[part].tolist()) for part in parts] == [{code} for code in sorted(set(codes.tolist()))]


@given(codes=CODES, data=st.data())
def test_natural_merges_whole_owners(codes, data) -> None:
    clients = data.draw(st.integers(1, len(set(codes.tolist()))))
    parts = split_natural(codes, clients)
    assert_partition(parts, len(codes))
    assert all(len(part) > 0 for part in parts)
    for code in set(codes.tolist()):
        assert sum(code in codes[part] for part in parts) == 1


def test_natural_with_more_clients_than_owners_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"federate\.client_num: 3 is more than the 2 clients"):
        split_natural(np.array([0, 0, 1]), 3)


def test_meta_deals_the_largest_categories_first() -> None:
    codes = np.repeat([0, 1, 2, 3, 4], [1, 50, 20, 5, 10])
    parts = split_meta(codes, 3, seed=0)
    assert [sorted(set(codes[part].tolist())) for part in parts] == [[1, 3], [0, 2], [4]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_splitter_is_a_function_of_its_seed(seed: int) -> None:
    codes = np.arange(300) % 3
    splits = {
        "iid": lambda s: split_iid(300, 7, s),
        "lda": lambda s: split_lda(codes, 7, 0.5, s),
        "meta": lambda s: split_meta(codes, 7, s),
    }
    for name, split in splits.items():
        same = [a.tolist() for a in split(seed)] == [b.tolist() for b in split(seed)]
        other = [a.tolist() for a in split(seed)] == [b.tolist() for b in split(seed + 1)]
        assert same and not other, name


def test_the_partition_is_the_same_on_every_machine() -> None:
    assert [part.tolist() for part in split_iid(9, 2, seed=5)] == GOLDEN_IID
    assert [part.tolist() for part in split_lda(np.arange(12) % 2, 3, 0.5, seed=5)] == GOLDEN_LDA


def test_small_alpha_is_more_skewed_than_large_alpha() -> None:
    codes = np.arange(4000) % 4

    def skew(alpha: float) -> float:
        shares = [np.bincount(codes[part], minlength=4) / len(part) for part in split_lda(codes, 10, alpha, seed=3)]
        return float(np.mean([share.max() for share in shares]))

    assert skew(0.05) > 0.7 > 0.4 > skew(100.0)


def test_lda_proportions_have_the_moments_of_a_dirichlet() -> None:
    clients, alpha, rows = 4, 2.0, 1000  # so that few draws leave a client empty and are drawn again
    codes = np.zeros(rows, dtype=np.int64)
    draws = np.array([[len(part) for part in split_lda(codes, clients, alpha, seed)] for seed in range(400)])
    mean, variance = 1 / clients, (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    shares = draws / rows
    assert np.allclose(shares.mean(axis=0), mean, atol=4 * np.sqrt(variance / 400))
    assert np.allclose(shares.var(axis=0), variance, rtol=0.3)  # four standard errors of a variance


SHARES = st.sampled_from([(0.8, 0.1, 0.1), (0.998, 0.001, 0.001), (0.99, 0.0, 0.01), (1.0, 0.0, 0.0), (0.1, 0.4, 0.5)])


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), shares=SHARES, seed=SEEDS)
def test_shares_partition_every_client_and_leave_it_something_to_train_on(sizes, shares, seed) -> None:
    ends = np.cumsum([0, *sizes])
    parts = [np.arange(first, last) for first, last in pairwise(ends)]
    divided = divide_shares(parts, shares, seed)
    for part, splits in zip(parts, divided, strict=True):
        assert sorted(np.concatenate(splits).tolist()) == part.tolist()
        assert len(splits[0]) >= min(1, len(part))
    for position in (1, 2):
        given_rows = sum(len(splits[position]) for splits in divided)
        assert given_rows <= np.ceil(shares[position] * sum(sizes) + 1e-9)
        if all(size >= 20 for size in sizes) and shares[0] > 0.5:
            assert given_rows == np.ceil(round(shares[position] * sum(sizes), 9))
        if shares[position] == 0:
            assert given_rows == 0


def test_a_training_share_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.splits"):
        divide_shares([np.arange(4)], (0.0, 0.5, 0.5), seed=0)
