"""First and second moments of the gradient estimate, and its angle to the gradient.

``g_k = z_k . grad`` and ``e = 1/K sum_k g_k z_k`` (MeZO, arXiv 2305.17333, Lemma 2). With Rademacher directions::

    E e = grad          Cov(g z) = |grad|^2 I + grad grad' - 2 diag(grad^2)        E|e|^2 = (d + K - 1)/K |grad|^2

With Gaussian directions the last term of the covariance is absent and ``E|e|^2 = (d + K + 1)/K |grad|^2``. The squared
cosine between ``e`` and ``grad`` is then Beta(K/2, (d - 1)/2) exactly, with mean ``K/(K + d - 1)``.

Tolerances: five standard errors, of the theory where it gives them and of the sample otherwise; a correct estimator
fails such a line once in a million seeds. The seeds were fixed before the first run.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fs_fwdllm.core.direction import Gaussian, Rademacher
from fs_fwdllm.core.trainables import Trainables, flatten
from fs_fwdllm.estimator import Backprop, CentralDifference, ForwardMode, OneSidedDifference
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.perturbation import ResidentPerturbation
from tests.laws.surface import DIMENSIONS, estimates, quadratic
from tests.model.tiny import save_tiny_model, tiny_batch, tiny_config

#: Two-sided probability of a false alarm, of each test as a whole.
FALSE_ALARM = 1e-6
PROBES = 50_000


def covariance(gradient, gaussian):
    outer = np.outer(gradient, gradient)
    full = gradient @ gradient * np.eye(len(gradient)) + outer
    return full if gaussian else full - 2 * np.diag(gradient**2)


def assert_mean_is(sample, expected, spread):
    """Every coordinate, a random projection and the whole vector (chi-squared) agree with ``expected``."""
    count, dimensions = sample.shape
    error = sample.mean(0) - expected
    scores = error / np.sqrt(np.diag(spread) / count)
    assert np.abs(scores).max() < stats.norm.isf(FALSE_ALARM / 2 / dimensions)
    projection = np.random.default_rng(7).normal(size=dimensions)
    projected = projection @ error / np.sqrt(projection @ spread @ projection / count)
    assert abs(projected) < stats.norm.isf(FALSE_ALARM / 2)
    assert count * error @ np.linalg.solve(spread, error) < stats.chi2.isf(FALSE_ALARM, dimensions)


def estimator_named(name, surface, distribution):
    """Radius 1: on a quadratic the central difference is exact at any radius, so take the one with least rounding."""
    perturbation = ResidentPerturbation(surface.trainables, distribution)
    if name == "forward_mode":
        return ForwardMode(distribution, 2000)
    return {"central": CentralDifference, "one_sided": OneSidedDifference}[name](perturbation, 1.0, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("distribution", [Rademacher(), Gaussian()], ids=lambda d: d.name)
@pytest.mark.parametrize("name", ["forward_mode", "central"])
def test_the_estimate_is_unbiased_with_the_covariance_of_the_theory(name, distribution):
    surface, gradient, _ = quadratic()
    gradient = gradient.numpy()
    sample = estimates(surface, 1, PROBES, distribution, estimator_named(name, surface, distribution))
    spread = covariance(gradient, distribution.name == "gaussian")
    assert_mean_is(sample, gradient, spread)
    products = np.einsum("ni,nj->nij", sample - gradient, sample - gradient)
    errors = products.std(0) / np.sqrt(len(sample))
    assert (np.abs(products.mean(0) - spread) / errors).max() < stats.norm.isf(FALSE_ALARM / DIMENSIONS**2)


def test_one_sided_curvature_is_variance_not_bias():
    """``h/2 (z'Hz) z`` is odd in z: its mean is zero, its variance is what the larger spread consists of."""
    surface, gradient, hessian = quadratic()
    radius = 1.0
    sample = estimates(surface, 1, PROBES, Rademacher(), estimator_named("one_sided", surface, Rademacher()))
    off_diagonal = hessian - torch.diag(torch.diag(hessian))
    # z'Hz = tr H + (a sum over pairs); pairs of signs are uncorrelated with one another.
    curvature = (radius / 2) ** 2 * (float(torch.trace(hessian)) ** 2 + 2 * float(off_diagonal.square().sum()))
    spread = np.cov(sample.T)
    assert_mean_is(sample, gradient.numpy(), spread)
    expected = DIMENSIONS * (float(gradient @ gradient) + curvature)
    squares = (sample**2).sum(1)
    assert abs(squares.mean() - expected) < 5 * squares.std() / np.sqrt(len(squares))


def test_a_biased_estimate_is_noticed():
    """The yardstick itself: ten per cent too long is enough to fail it."""
    surface, gradient, _ = quadratic()
    with pytest.raises(AssertionError):
        assert_mean_is(1.1 * estimates(surface, 1, PROBES), gradient.numpy(), covariance(gradient.numpy(), False))


@pytest.mark.slow
@pytest.mark.parametrize("distribution", [Rademacher(), Gaussian()], ids=lambda d: d.name)
@pytest.mark.parametrize(("dimensions", "probes"), [(4, 1), (4, 3), (4, 8), (30, 1), (30, 7)])
def test_mean_squared_length(distribution, dimensions, probes):
    """Few dimensions tell -1 from +1: they differ by 2/K, which is far more than the tolerance there."""
    surface, gradient, _ = quadratic(3, dimensions)
    sample = estimates(surface, probes, 60_000 // probes, distribution)
    ratios = (sample**2).sum(1) / float(gradient @ gradient)
    offset = -1 if distribution.name == "rademacher" else 1
    tolerance = 5 * ratios.std() / np.sqrt(len(ratios))
    assert abs(ratios.mean() - (dimensions + probes + offset) / probes) < tolerance
    if dimensions == 4:
        assert abs(ratios.mean() - (dimensions + probes - offset) / probes) > tolerance


@pytest.mark.parametrize("distribution", [Rademacher(), Gaussian()], ids=lambda d: d.name)
@pytest.mark.parametrize("probes", [1, 4, 16, 64, 256])
def test_cosine_to_the_gradient(distribution, probes):
    """Root mean square ``sqrt(K/(K+d-1))``: exact for a Gaussian; for signs exact at K = 1, else to about 1/2d."""
    dimensions, repeats = 100, 12_800 // probes
    surface, gradient, _ = quadratic(4, dimensions)
    sample = estimates(surface, probes, repeats, distribution)
    squared = (sample @ gradient.numpy()) ** 2 / (sample**2).sum(1) / float(gradient @ gradient)
    law = stats.beta(probes / 2, (dimensions - 1) / 2)
    assert law.mean() == pytest.approx(probes / (probes + dimensions - 1))
    slack = law.mean() / dimensions if distribution.name == "rademacher" else 0.0
    assert abs(squared.mean() - law.mean()) < 5 * law.std() / np.sqrt(repeats) + slack


@pytest.mark.parametrize(("architecture", "method"), [("bert", "head"), ("llama", "lora")])
def test_many_probes_approach_backpropagation_on_a_model(tmp_path, architecture, method):
    """``E|e - grad|^2 = (d - 1)/K |grad|^2``. The relative spread of ``|e - grad|^2`` is about ``sqrt(2/d)``."""
    classifier = architecture == "bert"
    arguments = {} if classifier else {"r": 1, "target_modules": ["v_proj"], "layers_to_transform": [1]}
    config = tiny_config(save_tiny_model(tmp_path / "m", architecture), method, classifier=classifier, **arguments)
    config.fwdllm.attention = "eager"
    loaded = load_model(config, load_tokenizer(config), 3)
    trainables = Trainables.of_model(loaded.model)
    with torch.no_grad():  # LoRA starts with B = 0, where half of the gradient vanishes
        for tensor in trainables.tensors:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)))
    batch_loss = Objective(loaded.model, trainables, loaded.task, 1 << 20, conduct=loaded.conduct).on(
        tiny_batch(classifier=classifier)
    )
    Backprop(loaded.model).gradient(batch_loss)
    gradient = flatten([tensor.grad for tensor in trainables.tensors]).astype(np.float64)
    probes, dimensions = 3000, trainables.count
    sample = estimates(batch_loss, 1, probes, estimator=ForwardMode(Rademacher(), 500))
    square = gradient @ gradient
    spread = covariance(gradient, False)
    assert_mean_is(sample, gradient, spread)
    errors = [((sample[:count].mean(0) - gradient) ** 2).sum() / square for count in (probes // 16, probes)]
    for error, count in zip(errors, (probes // 16, probes), strict=True):
        assert error * count / (dimensions - 1) == pytest.approx(1, abs=5 * np.sqrt(2 / dimensions))
    cosine = sample.mean(0) @ gradient / np.sqrt(square * (sample.mean(0) ** 2).sum())
    assert cosine == pytest.approx(np.sqrt(probes / (probes + dimensions - 1)), abs=0.01)
    assert cosine > 0.97
