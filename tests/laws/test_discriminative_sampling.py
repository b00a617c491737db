"""Bias and variance of discriminative sampling, measured on a quadratic through worker and server arithmetic.

``corrected``: the mean is the gradient, whatever the reference; the variance falls from ``(d - 1)/P |grad|^2`` to
``(d - 1)/P (1 - rho^2) |grad|^2``. ``published``: the kept directions' squared component along the reference is that of
the best tenth of normal scores, 3.25 instead of 1, so the estimate is that much longer there.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fs_fwdllm.core.direction import (
    REFERENCE_SEED,
    AimedDirections,
    DirectionKey,
    Gaussian,
    Rademacher,
    candidate_seed,
)
from fs_fwdllm.estimator import CentralDifference
from fs_fwdllm.method.forward.directed_sampling import choose_candidates, reference_scale, residual_slopes
from fs_fwdllm.method.forward.pool import Pool, PoolEntry
from fs_fwdllm.method.replica import seeds_of
from fs_fwdllm.model.perturbation import ResidentPerturbation
from tests.laws.surface import quadratic
from tests.method.pools import RUN_SEED, replayer_for

DIMENSIONS, PROBES, REPETITIONS = 40, 5, 800


def reference_with_cosine(gradient: np.ndarray, cosine: float) -> np.ndarray:
    """A vector of norm 7 at this cosine to the gradient."""
    along = gradient / np.linalg.norm(gradient)
    other = np.random.default_rng(4).normal(size=len(gradient))
    other -= other @ along * along
    return 7 * (cosine * along + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other))


def corrected_estimates(cosine: float) -> tuple[np.ndarray, np.ndarray]:
    """``(estimates [repetitions, d], gradient)``: the worker's slopes, pooled as the server pools them."""
    surface, gradient, _ = quadratic(5, DIMENSIONS)
    reference = reference_with_cosine(gradient.numpy(), cosine).astype(np.float32)
    replayer = replayer_for((DIMENSIONS,))
    replayer.reference = [torch.from_numpy(reference)]
    scale = reference_scale(replayer.reference)
    aimed = AimedDirections(Rademacher())
    aimed.look_along(replayer.reference, scale)
    # On a quadratic the central difference is exact at any radius.
    estimator = CentralDifference(ResidentPerturbation(surface.trainables, aimed), 1.0, 2000)
    rows = []
    for repetition in range(REPETITIONS):
        pool = Pool(equal_weights=False)
        keys = [DirectionKey(RUN_SEED, seed) for seed in seeds_of([(repetition, 1, 1, PROBES)])]
        slopes = estimator.slopes(surface, [*keys, DirectionKey(RUN_SEED, REFERENCE_SEED)]).values
        left = residual_slopes(slopes, keys, replayer.reference, scale, Rademacher())
        pool.add([PoolEntry(repetition, 1, 1, left[None, :-1], left[-1:], scale)])
        rows.append(torch.cat(pool.estimate(replayer)).double().numpy())
    return np.stack(rows), gradient.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("cosine", [0.0, 0.6, -0.9])
def test_corrected_sampling_is_unbiased_and_has_the_variance_of_the_theory(cosine: float) -> None:
    sample, gradient = corrected_estimates(cosine)
    errors = sample - gradient
    scores = errors.mean(0) / (errors.std(0, ddof=1) / np.sqrt(len(errors)))
    along = reference_with_cosine(gradient, cosine) / 7
    assert np.abs(scores).max() < stats.norm.isf(1e-6 / DIMENSIONS)
    squares = (errors**2).sum(1)
    rest = gradient - gradient @ along * along
    expected = (DIMENSIONS - 1) / PROBES * float(rest @ rest)
    assert abs(squares.mean() - expected) < 5 * squares.std() / np.sqrt(len(squares))
    assert squares.std() / np.sqrt(len(squares)) < 0.04 * expected


@pytest.mark.parametrize("distribution", [Rademacher(), Gaussian()], ids=lambda d: d.name)
def test_published_choice_is_the_best_of_all_candidates_whatever_the_blocks(
    distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to ranking all candidates at once, for more of them than the published code could rank."""
    sizes, count, candidates = (300, 41), 150, 10
    generator = torch.Generator().manual_seed(1)
    reference = [torch.randn(size, generator=generator) for size in sizes]
    monkeypatch.setattr("fs_fwdllm.method.forward.directed_sampling.DEFAULT_CHUNK", 128)
    monkeypatch.setattr("fs_fwdllm.method.forward.directed_sampling.BLOCK_ELEMENTS", 128 * 64)
    chosen = choose_candidates(3, count, candidates, reference, RUN_SEED, distribution)
    assert chosen.shape == (count, 2)
    keys = [DirectionKey(RUN_SEED, candidate_seed(3, index)) for index in range(count * candidates)]
    for tensor_id, part in enumerate(reference):
        z = distribution.values(keys, tensor_id, 0, part.numel()).astype(np.float64)
        cosines = z @ part.double().numpy() / np.linalg.norm(z, axis=1)
        best = np.sort(cosines)[::-1][:count]
        np.testing.assert_allclose(cosines[chosen[:, tensor_id].astype(int)], best, rtol=0, atol=1e-4)
        assert len(set(chosen[:, tensor_id].tolist())) == count


def test_published_choice_lengthens_the_estimate_along_the_reference() -> None:
    """By ``E c^2`` of the best tenth of normal scores, 3.25 (1.755 is its mean), where signs have 1.

    Standard errors: of the kept scores' mean 0.41/sqrt(400), of the sample decile 0.3/(0.175 sqrt(4000)), together
    0.034; of the squares about ``2 * 1.755`` times that.
    """
    size, count = 2000, 400
    reference = torch.randn(size, generator=torch.Generator().manual_seed(2))
    chosen = choose_candidates(0, count, 10, [reference], RUN_SEED, Rademacher())
    keys = [DirectionKey(RUN_SEED, candidate_seed(0, int(index))) for index in chosen[:, 0]]
    z = Rademacher().values(keys, 0, 0, size).astype(np.float64)
    scores = z @ (reference / reference.norm()).double().numpy()
    lowest = stats.norm.isf(0.1)
    mean = stats.norm.pdf(lowest) / 0.1
    assert scores.mean() == pytest.approx(mean, abs=5 * 0.034)
    assert (scores**2).mean() == pytest.approx(1 + lowest * mean, abs=5 * 0.12)
