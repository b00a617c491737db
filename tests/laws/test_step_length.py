"""How steps lengthen the parameters, when they are mostly noise; and what each step control makes of it.

A sum of random signs is nearly orthogonal to anything fixed, so ``|theta|^2`` grows by ``|step|^2``: the relative
error of that is ``2 cos(theta, step) |step| / |theta|`` a step, random in sign, with ``cos ~ 1/sqrt(d)``.
"""

from __future__ import annotations

import numpy as np
import pytest

from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.method.forward.pacing import Pacing
from fs_fwdllm.method.forward.pool import PoolEntry
from fs_fwdllm.method.forward.pooled_step import PooledStep
from fs_fwdllm.method.forward.server_optimizer import Sgd
from fs_fwdllm.method.forward.step_control import STEP_CONTROLS, norm_of
from tests.method.pools import replayer_for

SIZES, STEPS, PROBES = (1500, 500), 100, 4
DIMENSIONS = sum(SIZES)


def walk(control: str, rate: float, growth: float = 1.0) -> list[float]:
    """Norms along a walk on slopes that say nothing, every step's ``growth`` times as large as the last one's."""
    replayer, rng = replayer_for(SIZES), np.random.default_rng(6)
    pacing = Pacing(control=STEP_CONTROLS[control])
    schedule = Schedule(rate, "constant", STEPS)
    step = PooledStep(replayer, schedule, weight_decay=0.0, equal_weights=True, optimizer=Sgd(), pacing=pacing)
    norms = [norm_of(replayer.trainables.tensors)]
    for index in range(STEPS):
        slopes = rng.choice([-1.0, 1.0], size=PROBES).astype(np.float32) * np.float32(growth**index)
        step.pool.add([PoolEntry(index, 1, 1, slopes[None])])
        step.take(index, bytes(16))
        step.pool.clear()
        norms.append(norm_of(replayer.trainables.tensors))
    return norms


def tolerance(rate_over_norm: float) -> float:
    """Five standard errors of ``log |theta|`` over the walk."""
    return 5 * rate_over_norm * np.sqrt(STEPS / DIMENSIONS)


def test_plain_steps_add_their_squared_length() -> None:
    rate = 0.2
    norms = walk("none", rate)
    length = rate * np.sqrt(DIMENSIONS / PROBES)
    expected = np.sqrt(norms[0] ** 2 + STEPS * length**2)
    assert expected > 1.2 * norms[0]
    assert np.log(norms[-1] / expected) == pytest.approx(0, abs=tolerance(length / norms[0]))


def test_a_trust_ratio_fixes_the_rate_of_growth_whatever_the_slopes() -> None:
    rate = 0.1
    expected = np.sqrt(1 + rate**2) ** STEPS
    for growth in (1.0, 1.1):
        norms = walk("trust_ratio", rate, growth)
        assert np.log(norms[-1] / norms[0] / expected) == pytest.approx(0, abs=tolerance(rate))


def test_normalised_steps_do_not_grow_with_the_slopes() -> None:
    steady, growing = (walk("normalised", 0.1, growth) for growth in (1.0, 1.1))
    np.testing.assert_allclose(growing, steady, rtol=1e-5)
    assert walk("none", 0.1, 1.1)[-1] > 100 * steady[-1]
