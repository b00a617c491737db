"""What the gate's numbers estimate, and how the pool improves the direction.

On a quadratic with gradient ``grad``, ``n`` pooled probes in ``d`` dimensions, signs as directions::

    E V = 2 |grad|^2 / n * (d - 1)/d      E N = (d - 1) |grad|^2 / n      E S = |grad|^2      E cos^2 = n / (n + d - 1)

since an element of ``g z`` has variance ``|grad|^2 - grad_i^2``, on average ``|grad|^2 (d - 1) / d``.
Tolerances are five standard errors of the sample unless said otherwise.
"""

from __future__ import annotations

import numpy as np
import pytest

from fs_fwdllm.core.direction import Rademacher
from fs_fwdllm.method.forward.gate import PublishedStatistic, RelativeVariance
from tests.laws.surface import quadratic
from tests.method.pools import dense_estimate, pool_of, replayer_for

pytestmark = pytest.mark.slow

DIMENSIONS = 200
REPETITIONS = 60


def gradient_of(dimensions: int = DIMENSIONS) -> np.ndarray:
    return quadratic(5, dimensions)[1].numpy()


def pools(probes: int, repetitions: int = REPETITIONS, clients: int = 1, spread: float = 0.0):
    """Independent pools of one round each (``clients`` share the probes), with a replayer."""
    gradient = gradient_of()
    rng = np.random.default_rng(2)
    gradients = {client: gradient + spread * rng.normal(size=DIMENSIONS) for client in range(clients)}
    replayer = replayer_for((120, 80), Rademacher())
    for repetition in range(repetitions):
        yield replayer, pool_of(replayer, gradients, probes // clients, rounds=[repetition]), gradients


def assert_mean(values: list[float], expected: float) -> None:
    sample = np.array(values)
    assert abs(sample.mean() - expected) < 5 * sample.std(ddof=1) / np.sqrt(len(sample))
    assert sample.std(ddof=1) < expected * np.sqrt(len(sample)) / 10, "too noisy to say anything"


@pytest.mark.parametrize("probes", [10, 40, 160])
def test_published_variance_times_probes_is_twice_the_squared_gradient(probes: int) -> None:
    squared = float(gradient_of() @ gradient_of())
    values = [PublishedStatistic()(pool, replayer) * probes for replayer, pool, _ in pools(probes)]
    assert_mean(values, 2 * squared * (DIMENSIONS - 1) / DIMENSIONS)
    assert np.mean(values) == pytest.approx(2 * squared, rel=0.1)


@pytest.mark.parametrize("clients", [1, 8])
def test_noise_and_signal_are_estimated_without_bias(clients: int) -> None:
    """Clients disagree: noise counts every client's own gradient, signal only what remains in their mean."""
    noises, signals = [], []
    for replayer, pool, gradients in pools(400, clients=clients, spread=3.0):
        estimate = dense_estimate(replayer, pool)
        noise = pool.noise([DIMENSIONS - 1])
        mean = np.mean(list(gradients.values()), axis=0)
        noises.append(noise - float((estimate - mean) @ (estimate - mean)))
        signals.append(float(estimate @ estimate) - noise - float(mean @ mean))
    for errors in (noises, signals):
        assert abs(np.mean(errors)) < 5 * np.std(errors, ddof=1) / np.sqrt(len(errors))


def test_relative_variance_is_the_squared_tangent_of_the_angle() -> None:
    """``cos^2 = 1 / (1 + N/S)``, pool by pool.

    ``N`` varies around the pool's own ``|G - grad|^2`` by ``sqrt(2/d)``, a tenth; five of those are allowed.
    """
    for replayer, pool, gradients in pools(4000, repetitions=5):
        estimate, gradient = dense_estimate(replayer, pool), gradients[0]
        cosine = estimate @ gradient / np.linalg.norm(estimate) / np.linalg.norm(gradient)
        assert RelativeVariance()(pool, replayer) == pytest.approx(1 / cosine**2 - 1, rel=5 * np.sqrt(2 / DIMENSIONS))


@pytest.mark.parametrize("statistic", [PublishedStatistic(), RelativeVariance()], ids=["published", "relative"])
def test_pooling_more_rounds_lowers_the_statistic(statistic) -> None:
    """Doubling the pool halves it in expectation; doublings are far enough apart to be monotone in every sample."""
    replayer = replayer_for((120, 80))
    gradients = {client: gradient_of() for client in range(4)}
    rounds = [2, 4, 8, 16, 32]
    values = [statistic(pool_of(replayer, gradients, 50, range(count)), replayer) for count in rounds]
    assert values == sorted(values, reverse=True)
    assert np.polyfit(np.log(rounds), np.log(values), 1)[0] == pytest.approx(-1, abs=0.15)


def test_more_probes_follow_the_cosine_law() -> None:
    """``E cos^2 = n / (n + d - 1)``, from far fewer probes than parameters to far more."""
    for probes in (2, 20, 200, 2000):
        cosines = []
        for replayer, pool, gradients in pools(probes, repetitions=60 if probes < 1000 else 15):
            estimate, gradient = dense_estimate(replayer, pool), gradients[0]
            cosines.append((estimate @ gradient) ** 2 / (estimate @ estimate) / (gradient @ gradient))
        error = np.std(cosines, ddof=1) / np.sqrt(len(cosines))
        assert abs(np.mean(cosines) - probes / (probes + DIMENSIONS - 1)) < 5 * error
