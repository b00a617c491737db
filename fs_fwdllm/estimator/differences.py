"""Finite differences: slopes from losses at perturbed points, by ordinary forward passes.

* **Central** ``(L(theta + h z) - L(theta - h z)) / 2h`` (SPSA; MeZO, algorithm 1; FwdLLM). Two passes a probe; the
  error is ``h^2/6 * D^3 L[z, z, z]``, second order in the radius ``h``.
* **One-sided** ``(L(theta + h z) - L(theta)) / h``. One pass a probe and one clean pass shared by all probes of the
  step. It adds ``h/2 * z^T H z``, which is even in ``z``: over symmetric directions it is extra variance rather than
  bias, and for Rademacher directions its mean part ``h/2 * tr(H)`` is the same for every probe.

The radius is absolute, or **relative** to the parameters: ``h = radius * |theta| / sqrt(d)``, so that ``|h z| = radius
|theta|``. An absolute radius moves ``d`` parameters by ``h sqrt(d)`` together: the published ``h = 0.01`` displaces
DistilBERT's 450,000 adapter weights by half their norm. Only the slope's value depends on it, never a replay.

Both evaluate probes one by one (lowest memory) or several in one batched pass (``probes_per_batch``), which reads the
frozen weights once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from fs_fwdllm.config.own_sections import FwdllmConfig
from fs_fwdllm.core.direction import DirectionKey, Distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.estimator.base import Estimator, Footprint, Slopes, in_groups
from fs_fwdllm.estimator.points import Points, ResidentPoints, make_points
from fs_fwdllm.model.base.packed import reader_of
from fs_fwdllm.model.objective import BatchLoss
from fs_fwdllm.model.perturbation import Perturbation, make_perturbation

__all__ = ["CentralDifference", "OneSidedDifference", "Radius"]


@dataclass(frozen=True)
class Radius:
    """Distance of a perturbed point per element of a direction; ``relative`` ones follow the parameters' norm."""

    value: float
    relative: bool = False

    def at(self, trainables: Trainables, distribution: Distribution) -> float:
        """The radius where the trainables that directions cover stand, as float32 sees it.

        It is absolute where all of them are zero.
        """
        scale = 1.0
        if self.relative:
            moved = [tensor for index, tensor in enumerate(trainables.tensors) if distribution.covers(index)]
            squared = math.fsum(float(tensor.detach().double().square().sum()) for tensor in moved)
            scale = math.sqrt(squared / sum(tensor.numel() for tensor in moved)) or 1.0
        return _float32(self.value * scale)


@dataclass
class _PerturbedLosses:
    """Losses at ``theta + s * h * z`` for every probe and sign, one by one or batched."""

    perturbation: Perturbation
    points: Points
    probes_per_batch: int

    @torch.no_grad()
    def evaluate(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey], offsets: tuple[float, ...]) -> torch.Tensor:
        """Float32 ``[len(offsets), len(keys)]`` on the device; an offset is ``s * h``."""
        if self.probes_per_batch == 1:
            single = [partial(self.perturbation.loss, batch_loss, key, offset) for key in keys for offset in offsets]
            return torch.stack(batch_loss.together(single)).view(len(keys), len(offsets)).T
        steps = tuple(map(_float32, offsets))
        groups = [
            partial(self.points.losses, batch_loss, group, steps) for group in in_groups(keys, self.probes_per_batch)
        ]
        return torch.cat([group.view(len(offsets), -1) for group in batch_loss.together(groups)], dim=1)


class _Difference(Estimator):
    """What both differences share: a radius, and losses at perturbed points.

    Attributes:
        perturbation: how a perturbed point is reached.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        radius: float | Radius,
        probes_per_batch: int = 1,
        points: Points | None = None,
    ) -> None:
        self._radius = radius if isinstance(radius, Radius) else Radius(radius)
        self.perturbation = perturbation
        points = points or ResidentPoints(perturbation.trainables, perturbation.distribution)
        self._losses = _PerturbedLosses(perturbation, points, probes_per_batch)

    @classmethod
    def of(
        cls, model: nn.Module, trainables: Trainables, distribution: Distribution, config: FwdllmConfig, *, full: bool
    ) -> Estimator:
        perturbation = make_perturbation(model, trainables, distribution, streamed=full)
        radius = Radius(config.radius, relative=config.radius_scale == "relative")
        points = make_points(model, trainables, distribution, streamed=reader_of(model) is not None)
        return cls(perturbation, radius, config.probes_per_batch, points)

    @classmethod
    def points_of(cls, probes: int) -> int:
        """Perturbed points of so many probes."""
        return probes

    @classmethod
    def reads(cls, config: FwdllmConfig, probes: int) -> int:
        together = config.probes_per_batch
        perturbed = cls.points_of(probes) if together == 1 else math.ceil(probes / together)
        return math.ceil(perturbed / config.base.passes_per_read)  # where there is a clean pass, it goes beside these

    @classmethod
    def footprint(cls, probes: int, probes_per_batch: int) -> Footprint:
        if probes_per_batch == 1:
            return Footprint(by_layer=True)
        together = min(probes, probes_per_batch)
        points = cls.points_of(together)
        return Footprint(points, points + together)


class CentralDifference(_Difference):
    """Two-sided difference; ``radius`` is the papers' epsilon, mu or h."""

    least_bfloat16_radius = 5e-3

    @classmethod
    def points_of(cls, probes: int) -> int:
        return 2 * probes

    @classmethod
    def passes(cls, probes: int, probes_per_batch: int) -> int:
        return 2 * probes

    @classmethod
    def side_by_side(cls, probes: int, probes_per_batch: int) -> int:
        return 2 * probes if probes_per_batch == 1 else math.ceil(probes / probes_per_batch)

    @classmethod
    def largest_batch(cls, probes: int) -> int:
        return max(probes, 2)  # 2 batches both points of a single probe

    def slopes(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey]) -> Slopes:
        radius = self._radius.at(self.perturbation.trainables, self.perturbation.distribution)
        losses = _to_host(self._losses.evaluate(batch_loss, keys, (radius, -radius)))
        values = (losses[0] - losses[1]) / (2.0 * radius)
        passes = self.passes(len(keys), self._losses.probes_per_batch)
        return Slopes(values.astype(np.float32), float(losses.mean()), passes)


class OneSidedDifference(_Difference):
    """Forward difference with one clean loss shared by all probes of a step."""

    runs_here = True
    least_bfloat16_radius = math.inf

    @classmethod
    def passes(cls, probes: int, probes_per_batch: int) -> int:
        return 1 + probes

    @classmethod
    def side_by_side(cls, probes: int, probes_per_batch: int) -> int:
        return 1 + math.ceil(probes / probes_per_batch)

    def slopes(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey]) -> Slopes:
        radius = self._radius.at(self.perturbation.trainables, self.perturbation.distribution)
        perturbed = partial(self._losses.evaluate, batch_loss, keys, (radius,))
        runs: list[Callable[[], torch.Tensor]] = [batch_loss.clean, perturbed]
        clean, moved = batch_loss.together(runs)
        losses = _to_host(torch.cat([clean.reshape(1), moved[0]]))
        values = (losses[1:] - losses[0]) / radius
        passes = self.passes(len(keys), self._losses.probes_per_batch)
        return Slopes(values.astype(np.float32), float(losses[0]), passes)


def _to_host(losses: torch.Tensor) -> np.ndarray:
    """Losses as float64, so that their difference is exact."""
    return losses.detach().to("cpu").numpy().astype(np.float64)


def _float32(value: float) -> float:
    """The radius as the parameters see it, so that the slope is divided by the distance really travelled."""
    return float(np.float32(value))
