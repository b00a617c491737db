"""Dealing rows: every row once, sizes and mixtures as promised, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_fwdllm.data.h5.partitioning import deal_natural, deal_uniform, label_skew, method_name, quantity_skew
from fs_fwdllm.errors import ConfigError


def once(parts, rows):
    return sorted(np.concatenate(parts).tolist()) == list(range(rows))


def shares_of(codes, labels):
    return np.bincount(codes, minlength=labels) / len(codes)


@settings(max_examples=60)
@given(st.data())
def test_label_skew_deals_every_row_once_in_equal_parts(data):
    labels = data.draw(st.integers(1, 6))
    codes = np.array(data.draw(st.lists(st.integers(0, labels - 1), min_size=1, max_size=120)))
    clients = data.draw(st.integers(1, len(codes)))
    alpha = data.draw(st.sampled_from([1e-3, 0.1, 1.0, 100.0, 1e6]))
    parts = label_skew(codes, clients, alpha, shares_of(codes, labels), data.draw(st.integers(0, 5)))
    assert once(parts, len(codes)) and len(parts) == clients
    assert [len(part) for part in parts[:-1]] == [len(codes) // clients] * (clients - 1)
    assert len(parts[-1]) == len(codes) - (clients - 1) * (len(codes) // clients)


def test_alpha_sets_the_skew():
    """Small alpha: nearly one label each. Large alpha: the mixture of the data, to within a row."""
    codes = np.arange(4000) % 4
    shares = shares_of(codes, 4)

    def largest(alpha):
        parts = label_skew(codes, 40, alpha, shares, 3)
        return np.median([shares_of(codes[part], 4).max() for part in parts])

    assert largest(1e6) == pytest.approx(0.25, abs=0.02)
    assert largest(0.01) > 0.95
    assert largest(0.01) > largest(1.0) > largest(100.0)


def test_shares_scatter_as_a_dirichlet_distribution():
    """Var of a share of Dirichlet(a p) is p (1 - p) / (a + 1); 400 clients drawn before any label is used up."""
    codes = np.arange(80_000) % 4
    parts = label_skew(codes, 800, 3.0, shares_of(codes, 4), 0)[:400]
    held = np.array([shares_of(codes[part], 4)[0] for part in parts])
    assert held.mean() == pytest.approx(0.25, abs=0.04)
    assert held.var() == pytest.approx(0.25 * 0.75 / 4, rel=0.2)


@settings(max_examples=60)
@given(
    rows=st.integers(0, 200),
    clients=st.integers(1, 60),
    beta=st.sampled_from([1e-3, 0.5, 5.0, 1e5]),
    seed=st.integers(0, 3),
)
def test_quantity_skew_deals_every_row_once_and_leaves_nobody_empty(rows, clients, beta, seed):
    parts = quantity_skew(rows, clients, beta, seed)
    assert once(parts, rows) and len(parts) == clients
    assert rows < clients or min(map(len, parts)) >= 1


def test_beta_sets_the_skew():
    def spread(beta):
        return np.std([len(part) for part in quantity_skew(5000, 50, beta, 1)])

    assert spread(1e6) < 2 < spread(5.0) < spread(0.1)


def test_owners_keep_their_test_rows_and_strangers_are_dealt_evenly():
    train, test = deal_natural(np.array([5, 2, 5, 9]), np.array([2, 7, 7, 7, 5, 7]))
    assert [part.tolist() for part in train] == [[1], [0, 2], [3]]
    assert once(test, 6)
    assert 0 in test[0] and 4 in test[1]
    assert sorted(map(len, test)) == [1, 2, 3]


@pytest.mark.parametrize(
    "deal",
    [
        lambda seed: deal_uniform(50, 7, seed),
        lambda seed: label_skew(np.arange(50) % 3, 7, 0.5, np.full(3, 1 / 3), seed),
        lambda seed: quantity_skew(50, 7, 1.0, seed),
    ],
)
def test_the_seed_decides(deal):
    def listed(seed):
        return [part.tolist() for part in deal(seed)]

    assert listed(4) == listed(4) != listed(5)


def test_more_clients_than_rows_is_refused():
    with pytest.raises(ConfigError, match="allowed are 1 to 3"):
        label_skew(np.array([0, 1, 0]), 4, 1.0, np.array([0.6, 0.4]), 0)


@pytest.mark.parametrize(
    ("method", "clients", "parameter", "name"),
    [
        ("uniform", 1000, 1.0, "uniform_client_1000"),
        ("niid_label", 100, 1.0, "niid_label_clients=100_alpha=1.0"),
        ("niid_label", 10, 0.05, "niid_label_clients=10_alpha=0.05"),
        ("niid_quantity", 100, 5.0, "niid_quantity_clients=100_beta=5.0"),
        ("natural", 3, 1.0, "natural"),
    ],
)
def test_the_published_names(method, clients, parameter, name):
    assert method_name(method, clients, parameter) == name
