"""The variance gate: has the pool seen enough to take a step?

After each round the gate looks at everything the server step has pooled. Below its threshold the step is taken; above
it the same clients look in fresh directions at the same mini-batches, and the answers join the pool. After
``max_repeats`` repeats the step is taken with what there is, and the report says so: a gate may slow training, not stop
it.

**published** (FwdLLM, ATC 2024). With ``m1`` and ``m2`` the means of ``g_k z_k`` over the first and second half of the
pool, restricted to one tensor or over all trainables, ``V = mean_i (m1_i - m2_i)^2 / 2``. As every element of ``g z``
has variance ``|grad|^2``, ``V ~ 2 |grad|^2 / n``: a fixed threshold ``tau`` asks for ``n >= 2 |grad|^2 / tau`` probes.
It has the unit of a squared gradient, so it must be found anew for every model, loss scale and stage of training.
Computed by one replay (``m1 - m2`` is a sum of directions with signed coefficients), not from stored gradients.

**relative**. What matters is noise *relative to signal*. For the pooled estimate ``G`` of the mini-batches' mean
gradient, from scalars and seeds alone:

* noise ``N ~ E|G - grad|^2 = (d - 1) sum_c w_c^2/n_c mean_k g_ck^2`` (``d + 1`` for Gaussian directions): each probe's
  variance is known up to ``|grad_c|^2 = E g_ck^2``. What clients disagree about is in it: it counts every client's own
  gradient, however much of it cancels in the mean. So is noise of the losses themselves.
* signal ``S = |G|^2 - N``, unbiased for ``|grad|^2``: the part of ``|G|^2`` that pairs of different probes agree on
  (``sum_{k != l} g_k g_l z_k . z_l``; one replay).

The statistic is the relative variance ``N / S`` (infinite while ``S <= 0``: no agreement is visible yet). It is the
squared tangent of the angle to expect: ``cos(G, grad) = 1 / sqrt(1 + N/S)``. Rescaling the loss changes nothing. Of
order ``d/n`` at first, where all clients agree, it grows by ``mean |grad_c|^2 / |grad|^2`` as gradients become noise:
*that* is what an adaptive pace has to follow. Noise from the choice of clients and mini-batches is left out on purpose:
repeats on the same mini-batches cannot reduce it.

``S`` has a standard error of ``sqrt(2/d) N`` when there is no signal (a sum of ``d`` squares), so the default threshold
is ``sqrt(d/8)``: accept once the squared gradient stands two standard errors above its noise. A threshold in terms of a
cosine ``c`` is ``1/c^2 - 1``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fs_fwdllm.core.arrays import count_of, squared_norm
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables, public_name
from fs_fwdllm.errors import ConfigError, nearest
from fs_fwdllm.method.forward.pool import Pool
from fs_fwdllm.method.replica import probe_spreads

__all__ = [
    "Decision", "GateStatistic", "PublishedStatistic", "RelativeVariance", "VarianceGate", "tensor_ids"
]  # fmt: skip

#: What FwdLLM uses for DistilBERT and ALBERT.
PUBLISHED_THRESHOLD = 0.1


class GateStatistic(ABC):
    """A number that falls as the pool grows."""

    @abstractmethod
    def __call__(self, pool: Pool, replayer: Replayer) -> float:
        """The statistic of a pool that is not empty; infinite where it is not defined yet."""

    @abstractmethod
    def default_threshold(self, dimensions: int) -> float:
        """Used where the configuration names none."""


@dataclass(frozen=True)
class PublishedStatistic(GateStatistic):
    """FwdLLM's ``V``; ``tensors`` are the ids it looks at, ``None`` for all."""

    tensors: Collection[int] | None = None

    def __call__(self, pool: Pool, replayer: Replayer) -> float:
        slopes = pool.slopes()
        half = len(slopes) // 2
        if half == 0:
            return math.inf
        sides = np.concatenate([np.full(half, 1.0 / half), np.full(len(slopes) - half, -1.0 / (len(slopes) - half))])
        difference = replayer.total(pool.contributions(replayer, sides * slopes), self.tensors)
        looked_at = difference if self.tensors is None else [difference[index] for index in self.tensors]
        return squared_norm(looked_at) / sum(map(count_of, looked_at)) / 2.0

    def default_threshold(self, dimensions: int) -> float:
        return PUBLISHED_THRESHOLD


class RelativeVariance(GateStatistic):
    """Noise over signal of the pooled estimate."""

    def __call__(self, pool: Pool, replayer: Replayer) -> float:
        noise = pool.noise(probe_spreads(replayer))
        signal = squared_norm(pool.estimate(replayer)) - noise
        return noise / signal if signal > 0 else math.inf

    def default_threshold(self, dimensions: int) -> float:
        return math.sqrt(dimensions / 8.0)


def tensor_ids(trainables: Trainables, name: str) -> list[int] | None:
    """The id of a named trainable tensor; ``None`` for ``all``.

    Raises:
        ConfigError: there is no such tensor.
    """
    if name == "all":
        return None
    names = [public_name(known) for known in trainables.names]
    if name not in names:
        raise ConfigError(
            f"fwdllm.gate.tensor {name!r}: not among the {len(names)} trainable tensors; allowed are 'all' and, for "
            f"example, {names[0]!r}{nearest(name, names)}"
        )
    return [names.index(name)]


@dataclass(frozen=True)
class Decision:
    """What the gate said.

    Attributes:
        outcome: ``accepted``, ``waiting``; ``limit`` or ``end`` where the step is taken although the statistic is above
            the threshold, because of the repeat limit or because training ends.
    """

    outcome: Literal["accepted", "waiting", "limit", "end"]
    statistic: float
    threshold: float

    @property
    def steps(self) -> bool:
        return self.outcome != "waiting"


@dataclass(frozen=True)
class VarianceGate:
    """Statistic, threshold and repeat limit."""

    statistic: GateStatistic
    threshold: float
    max_repeats: int

    def decide(self, pool: Pool, replayer: Replayer, *, last: bool) -> Decision:
        """Whether to step on ``pool`` (not empty); ``last`` means that there will be no further round."""
        value = self.statistic(pool, replayer)
        if value <= self.threshold:
            return Decision("accepted", value, self.threshold)
        if pool.exchanges > self.max_repeats:
            return Decision("limit", value, self.threshold)
        return Decision("end" if last else "waiting", value, self.threshold)
