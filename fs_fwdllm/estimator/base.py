"""Estimators: how steep is the loss in a given direction?

Given a batch and ``P`` direction seeds, an estimator returns ``P`` *slopes* ``g_p ~ z_p . grad L``, the scalars that
travel. Whoever knows the seeds turns them into the gradient estimate ``1/P sum_p g_p z_p``. With Rademacher directions
and exact slopes that estimate is unbiased, has ``E||.||^2 = (d + P - 1)/P ||grad||^2`` (MeZO, arXiv 2305.17333,
Lemma 2) and cosine about ``sqrt(P / (P + d - 1))`` to the gradient; ``d`` is the number of trainable parameters.

Per-probe losses stay on the device until all probes of a step are queued; one transfer fetches them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from fs_fwdllm.config.own_sections import FwdllmConfig
from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.core.arrays import arrays_of
from fs_fwdllm.core.direction import DirectionKey, Distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.model.objective import BatchLoss

__all__ = ["Estimator", "Footprint", "Passes", "Slopes", "make_estimator", "stack_directions"]


@dataclass(frozen=True)
class Slopes:
    """What one step measured.

    Attributes:
        values: float32 ``[probes]``, the slope along each direction.
        loss: training loss of the batch (of the clean point where the estimator evaluates it, else the mean over the
            perturbed points).
        forward_passes: evaluations of the model this took; a forward-mode tangent counts as one.
        backward_passes: gradients this took by backpropagation.
    """

    values: np.ndarray
    loss: float
    forward_passes: int
    backward_passes: int = 0


@dataclass(frozen=True)
class Footprint:
    """What an estimator holds while the model runs once.

    Attributes:
        points: parameter points that the forward pass evaluates together (a forward-mode tangent counts as one).
        copies: copies of the trainables, as perturbed points or as directions.
        by_layer: whether one layer at a time is copied where all of a model is trained.
        backpropagates: whether a graph is kept for a backward pass, with all activations.
    """

    points: int = 1
    copies: int = 1
    by_layer: bool = False
    backpropagates: bool = False


class Passes(NamedTuple):
    """Forward and backward passes of a step."""

    forward: int
    backward: int = 0

    @property
    def in_forwards(self) -> int:
        """What they take, in forward passes: a backward pass computes two products for every one of a forward pass."""
        return self.forward + 2 * self.backward


class Estimator(ABC):
    """Measures slopes; leaves the parameters bitwise as they were.

    A class states its own facts, which configuration, loading and forecasts ask for; the registry is
    :data:`fs_fwdllm.config.registries.ESTIMATORS`.
    """

    #: Whether slopes are differences over ``fwdllm.radius``, so that a base's rounding can hide them.
    has_radius: ClassVar[bool] = True
    #: The radius below which differences over a base that computes in bfloat16 mostly measure its rounding; infinite
    #: where a larger one mostly measures curvature.
    least_bfloat16_radius: ClassVar[float] = 0.0
    #: Whether slopes follow from a gradient of the batch, so that any number of them takes the same passes.
    exact: ClassVar[bool] = False
    #: Whether it runs the model where it stands, a pass that estimators of other parts need not repeat.
    runs_here: ClassVar[bool] = False
    #: Whether a single probe runs through fused attention kernels.
    works_with_fused_attention: ClassVar[bool] = True
    #: Whether ``fwdllm.probes_per_batch`` may be above one where all of a model is trained.
    batches_whole_models: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def of(
        cls, model: nn.Module, trainables: Trainables, distribution: Distribution, config: FwdllmConfig, *, full: bool
    ) -> Estimator:
        """The estimator as configured.

        Args:
            distribution: what the directions are drawn from.
            full: whether the model's own weights are trained.
        """

    @classmethod
    @abstractmethod
    def passes(cls, probes: int, probes_per_batch: int) -> int:
        """Forward passes of a step with so many probes; a forward-mode tangent counts as one."""

    @classmethod
    def passes_as(cls, config: FwdllmConfig, probes: int) -> Passes:
        """Passes of a step with so many probes, as configured."""
        return Passes(cls.passes(probes, config.probes_per_batch))

    @classmethod
    def reads(cls, config: FwdllmConfig, probes: int) -> int:
        """How often a step with so many probes reads a base on the disk: once a pass, unless passes share."""
        return sum(cls.passes_as(config, probes))

    @classmethod
    def footprint(cls, probes: int, probes_per_batch: int) -> Footprint:
        """What is held while the model runs once."""
        return Footprint()

    @classmethod
    def side_by_side(cls, probes: int, probes_per_batch: int) -> int:
        """Runs of the model in a step that may go side by side, with other clients' too; 0 where none may."""
        return 0

    @classmethod
    def largest_batch(cls, probes: int) -> int:
        """Up to which ``fwdllm.probes_per_batch`` more probes can be batched."""
        return probes

    @classmethod
    def default_attention(cls, probes_per_batch: int) -> str | None:
        """The attention kernel of ``fwdllm.attention: auto``, ``None`` for the model's own.

        Fused kernels have no batching rule, and no forward-mode derivative.
        """
        return "eager" if probes_per_batch > 1 or not cls.works_with_fused_attention else None

    @abstractmethod
    def slopes(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey]) -> Slopes:
        """The slopes of ``batch_loss`` along the directions ``keys`` at the model's current parameters."""


def make_estimator(
    model: nn.Module, trainables: Trainables, distribution: Distribution, config: FwdllmConfig, *, full: bool
) -> Estimator:
    """The estimator a configuration asks for.

    Args:
        distribution: the one the updates are replayed with, so that a direction's bits are generated once per step.
        full: whether the model's own weights are trained.
    """
    made: Estimator = ESTIMATORS[config.estimator].of(model, trainables, distribution, config, full=full)
    return made


def stack_directions(
    batch_loss: BatchLoss, keys: Sequence[DirectionKey], distribution: Distribution
) -> Iterator[torch.Tensor]:
    """Whole directions as float32 tensors, one ``[len(keys), *shape]`` stack per trainable in turn."""
    for tensor_id, tensor in enumerate(batch_loss.trainables.tensors):
        if not distribution.covers(tensor_id):
            yield torch.zeros((), device=tensor.device).expand(len(keys), *tensor.shape)
            continue
        values = distribution.values(keys, tensor_id, 0, tensor.numel(), arrays_of(tensor))
        yield values.to(torch.float32).view(len(keys), *tensor.shape)


def in_groups(keys: Sequence[DirectionKey], size: int) -> list[Sequence[DirectionKey]]:
    """``keys`` cut into runs of at most ``size``."""
    return [keys[first : first + size] for first in range(0, len(keys), size)]
