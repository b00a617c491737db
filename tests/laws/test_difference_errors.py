"""How wrong a finite difference is, against exact slopes, closed forms and explicit Hessians.

    central:    ``h^2/6  D^3 L[z, z, z] + O(h^4)``
    one-sided:  ``h/2  z' H z + O(h^2)``; for signs its mean over directions is ``h/2 tr(H)`` and its variance
                ``(h/2)^2 * 2 sum_{i != j} H_ij^2``

Rounding: a loss ``L`` is known to about ``u |L|`` with ``u = 2^-24``, so a slope is known to about ``u |L| / h`` times
the root of the number of additions; radii are chosen so that this is far below what is measured.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fs_fwdllm.core.direction import DirectionKey, Rademacher
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.estimator import CentralDifference, ForwardMode, OneSidedDifference
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.perturbation import ResidentPerturbation
from tests.laws.surface import SHAPES, Surface, flat_directions, quadratic
from tests.model.tiny import save_tiny_model, tiny_batch, tiny_config

KEYS = [DirectionKey(3, seed) for seed in range(64)]
RADII = (0.4, 0.2, 0.1, 0.05)


def exact(surface, keys=KEYS):
    return ForwardMode(Rademacher(), 4000).slopes(surface, keys).values.astype(np.float64)


def measured(kind, surface, radius, keys=KEYS):
    estimator = kind(ResidentPerturbation(surface.trainables, Rademacher()), radius, 4000)
    return estimator.slopes(surface, keys).values.astype(np.float64)


def waves():
    """``sum cos x_i``: every derivative is known, and none is zero."""
    generator = torch.Generator().manual_seed(8)
    return Surface(lambda x: torch.cos(x).sum(), [torch.randn(shape, generator=generator) for shape in SHAPES])


def order(radii, errors):
    """The exponent ``p`` in ``error ~ h^p``."""
    return np.polyfit(np.log(radii), np.log(errors), 1)[0]


def test_the_central_error_is_the_third_derivative():
    """``cos'' ' = sin`` and ``z^3 = z``; the next term is ``h^2/20`` of it, rounding about ``1e-6/h``."""
    surface = waves()
    z = flat_directions(surface, KEYS, Rademacher())
    third = z @ np.sin(torch.cat([tensor.flatten() for tensor in surface.trainables.tensors]).double().numpy())
    sizes = []
    for radius in RADII:
        error = measured(CentralDifference, surface, radius) - exact(surface)
        expected = radius**2 / 6 * third
        np.testing.assert_allclose(error, expected, rtol=radius**2 / 20, atol=1e-5 / radius)
        sizes.append(np.sqrt((error**2).mean()))
    assert order(RADII, sizes) == pytest.approx(2, abs=0.02)


def test_the_one_sided_error_is_first_order():
    surface = waves()
    sizes = [np.sqrt(((measured(OneSidedDifference, surface, h) - exact(surface)) ** 2).mean()) for h in RADII]
    assert order(RADII, sizes) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("radius", [0.5, 0.05])
def test_the_one_sided_error_is_the_hessian_in_that_direction(radius):
    surface, _, hessian = quadratic(9)
    z = flat_directions(surface, KEYS, Rademacher())
    expected = radius / 2 * np.einsum("ni,ij,nj->n", z, hessian.numpy(), z)
    error = measured(OneSidedDifference, surface, radius) - exact(surface)
    assert np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(error, expected, rtol=0, atol=1e-4)


def test_its_mean_over_directions_is_half_the_trace():
    surface, _, hessian = quadratic(10)
    keys = [DirectionKey(4, seed) for seed in range(20_000)]
    radius = 0.5
    error = measured(OneSidedDifference, surface, radius, keys) - exact(surface, keys)
    off_diagonal = hessian - torch.diag(torch.diag(hessian))
    variance = (radius / 2) ** 2 * 2 * float(off_diagonal.square().sum())
    trace = float(torch.trace(hessian))
    score = (error.mean() - radius / 2 * trace) / np.sqrt(variance / len(keys))
    assert abs(score) < stats.norm.isf(5e-7)
    assert abs(radius / 2 * trace) > 10 * np.sqrt(variance / len(keys)), "the trace must be visible in the noise"
    # Fourth moments of quadratic forms are bounded: a sample variance of 20000 is good to a few per cent.
    assert error.var() == pytest.approx(variance, rel=0.1)


def test_a_central_difference_is_the_mean_of_both_sides():
    """``(L(x+h) - L(x))/h`` and ``(L(x-h) - L(x))/(-h)``: the curvature cancels in the pair."""
    surface = waves()
    both = [measured(OneSidedDifference, surface, sign * 0.2) for sign in (1, -1)]
    np.testing.assert_allclose(np.mean(both, 0), measured(CentralDifference, surface, 0.2), rtol=0, atol=2e-5)


def test_a_central_difference_of_a_quadratic_is_exact_at_any_radius():
    surface, gradient, _ = quadratic(11)
    slopes = flat_directions(surface, KEYS, Rademacher()) @ gradient.numpy()
    for radius in (0.1, 1.0, 4.0):
        np.testing.assert_allclose(measured(CentralDifference, surface, radius), slopes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_orders_on_a_model(tmp_path, architecture):
    """The same exponents where nothing is known on paper; radii between rounding and the end of smoothness."""
    classifier = architecture == "bert"
    arguments = {} if classifier else {"r": 2}
    folder = save_tiny_model(tmp_path / "m", architecture, initializer_range=0.1)
    method = "head" if classifier else "lora"
    config = tiny_config(folder, method, classifier=classifier, **arguments, **{"fwdllm.attention": "eager"})
    loaded = load_model(config, load_tokenizer(config), 3)
    trainables = Trainables.of_model(loaded.model)
    batch_loss = Objective(loaded.model, trainables, loaded.task, 1 << 20, conduct=loaded.conduct).on(
        tiny_batch(classifier=classifier)
    )
    keys = KEYS[:16]
    radii = (0.16, 0.08, 0.04) if classifier else (0.01, 0.005, 0.0025)

    def sizes(kind):
        reference = exact(batch_loss, keys)
        perturbation = ResidentPerturbation(trainables, Rademacher())
        return [
            np.sqrt(((kind(perturbation, h, 16).slopes(batch_loss, keys).values - reference) ** 2).mean())
            for h in radii
        ]

    assert order(radii, sizes(CentralDifference)) == pytest.approx(2, abs=0.25)
    assert order(radii, sizes(OneSidedDifference)) == pytest.approx(1, abs=0.25)
