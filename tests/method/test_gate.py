"""Pool and gate against dense sums, and the decisions of the gate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_fwdllm.config.own_sections import GateConfig
from fs_fwdllm.core.direction import Gaussian, Rademacher
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.forward.gate import PublishedStatistic, RelativeVariance, VarianceGate, tensor_ids
from fs_fwdllm.method.forward.pacing import make_gate
from fs_fwdllm.method.forward.pool import Pool
from fs_fwdllm.method.replica import probe_spreads
from tests.method.pools import dense_directions, dense_estimate, flat, pool_of, replayer_for

SIZES = (15, 7, 33)
DIMENSIONS = sum(SIZES)


def gradients_of(count: int, seed: int = 0, common: float = 1.0) -> dict[int, np.ndarray]:
    """Clients' gradients: ``common`` times a shared part, and a part of their own."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=DIMENSIONS)
    return {client: common * shared + rng.normal(size=DIMENSIONS) for client in range(1, count + 1)}


def dense_published(replayer: Replayer, pool: Pool, columns: slice) -> float:
    """The half means of a list of whole gradients."""
    rows = []
    for entry in pool.entries:
        z = dense_directions(replayer, entry.round_index, entry.client, entry.slopes.size)
        rows += list(entry.slopes.astype(np.float64).ravel()[:, None] * z[:, columns])
    half = len(rows) // 2
    means = np.mean(rows[:half], axis=0), np.mean(rows[half:], axis=0)
    return float(np.var(means, axis=0, ddof=1).mean())


@settings(deadline=None, max_examples=30)
@given(
    clients=st.integers(1, 4), probes=st.integers(1, 5), rounds=st.integers(1, 3), data=st.data(),
    gaussian=st.booleans(),
)  # fmt: skip
def test_replay_equals_the_dense_computation(
    clients: int, probes: int, rounds: int, data: st.DataObject, gaussian: bool
) -> None:
    """Estimate and both statistics, for ragged weights and clients that missed a repeat."""
    replayer = replayer_for(SIZES, Gaussian() if gaussian else Rademacher(), chunk=13)
    samples = {client: data.draw(st.integers(1, 50)) for client in range(1, clients + 1)}
    absent = [(round_index, 1) for round_index in range(1, rounds) if data.draw(st.booleans())]
    gradients = gradients_of(clients)
    pool = pool_of(replayer, gradients, probes, range(rounds), samples=samples, absent=absent)
    expected = dense_estimate(replayer, pool)
    estimate = flat(pool.estimate(replayer))
    np.testing.assert_allclose(estimate, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    if pool.directions > 1:
        for tensors, columns in ((None, slice(None)), ([1], slice(15, 22))):
            expected_variance = dense_published(replayer, pool, columns)
            assert PublishedStatistic(tensors)(pool, replayer) == pytest.approx(expected_variance, rel=1e-4)

    counts = pool.client_probes()
    noise = sum(
        (samples[e.client] / sum(samples.values()) / counts[e.client] * float(slope)) ** 2 * probe_spreads(replayer)[0]
        for e in pool.entries
        for slope in e.slopes.ravel()
    )
    signal = float(expected @ expected) - noise
    assert pool.noise(probe_spreads(replayer)) == pytest.approx(noise, rel=1e-6)
    measured = RelativeVariance()(pool, replayer)
    if abs(signal) > 1e-4 * noise:
        assert measured == pytest.approx(noise / signal if signal > 0 else math.inf, rel=1e-2)


def test_a_client_that_missed_a_repeat_keeps_its_weight() -> None:
    """Weights follow samples, not answers: else the estimate would lean towards whoever answers often."""
    replayer = replayer_for(SIZES)
    gradients = gradients_of(3)
    absent = [(1, 2), (2, 2), (2, 3)]
    pool = pool_of(replayer, gradients, 4, range(3), {1: 10, 2: 30, 3: 60}, absent)
    assert pool.client_weights() == pytest.approx({1: 0.1, 2: 0.3, 3: 0.6})
    assert pool.client_probes() == {1: 12, 2: 4, 3: 8}
    assert pool.exchanges == 3 and pool.first_round == 0 and pool.directions == 24


def test_relative_variance_does_not_know_the_scale_of_the_loss() -> None:
    replayer = replayer_for(SIZES)
    gate = VarianceGate(RelativeVariance(), 3.0, 5)
    published = VarianceGate(PublishedStatistic(), 3.0, 5)
    values, outcomes = [], []
    for scale in (1e-3, 1.0, 1e4):
        gradients = {client: scale * gradient for client, gradient in gradients_of(4).items()}
        pool = pool_of(replayer, gradients, 20)
        values.append(gate.decide(pool, replayer, last=False).statistic)
        outcomes.append(published.decide(pool, replayer, last=False).outcome)
    np.testing.assert_allclose(values, values[0], rtol=1e-4)
    assert outcomes == ["accepted", "waiting", "waiting"]


def test_disagreement_among_clients_raises_the_relative_variance() -> None:
    replayer = replayer_for(SIZES)
    agreeing, disagreeing = (
        RelativeVariance()(pool_of(replayer, gradients_of(10, common=common), 200), replayer) for common in (3.0, 0.3)
    )
    assert agreeing < disagreeing / 2


def test_so_does_noise_of_the_losses() -> None:
    replayer = replayer_for(SIZES)
    clean, noisy = (
        RelativeVariance()(pool_of(replayer, gradients_of(4), 100, noise=noise), replayer) for noise in (0.0, 30.0)
    )
    assert clean < noisy / 3


def test_outcomes() -> None:
    replayer = replayer_for(SIZES)
    gradients = gradients_of(2)

    def outcome(gate: VarianceGate, rounds: int, last: bool = False) -> str:
        return gate.decide(pool_of(replayer, gradients, 4, range(rounds)), replayer, last=last).outcome

    never, always = (VarianceGate(RelativeVariance(), threshold, 2) for threshold in (1e-9, math.inf))
    assert [outcome(never, rounds) for rounds in (1, 2, 3, 4)] == ["waiting", "waiting", "limit", "limit"]
    assert outcome(never, 1, last=True) == "end"
    assert outcome(always, 1) == outcome(always, 1, last=True) == "accepted"
    assert outcome(VarianceGate(RelativeVariance(), 1e-9, 0), 1) == "limit"


def test_a_single_probe_has_no_halves() -> None:
    replayer = replayer_for(SIZES)
    assert PublishedStatistic()(pool_of(replayer, gradients_of(1), 1), replayer) == math.inf


def test_thresholds_and_tensors_of_a_configuration() -> None:
    trainables = replayer_for(SIZES).trainables
    assert make_gate(GateConfig(), trainables) is None
    relative = make_gate(GateConfig(kind="relative"), trainables)
    assert relative is not None and relative.threshold == math.sqrt(DIMENSIONS / 8) and relative.max_repeats == 10
    published = make_gate(GateConfig(kind="published", tensor="t1"), trainables)
    assert published == VarianceGate(PublishedStatistic([1]), 0.1, 10)
    assert make_gate(GateConfig(kind="published", threshold=0.3), trainables) == VarianceGate(
        PublishedStatistic(), 0.3, 10
    )
    with pytest.raises(ConfigError, match=r"fwdllm.gate.tensor 't9'.*'all'"):
        tensor_ids(trainables, "t9")
