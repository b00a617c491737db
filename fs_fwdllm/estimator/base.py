"""Estimators: how steep is the loss in a given direction?

Given a batch and ``P`` direction seeds, an estimator returns ``P`` *slopes* ``g_p ~ z_p . grad L``, the scalars that
travel. Whoever knows the seeds turns them into the gradient estimate ``1/P sum_p g_p z_p``. With Rademacher directions
and exact slopes that estimate is unbiased, has ``E||.||^2 = (d + P - 1)/P ||grad||^2`` (MeZO, arXiv 2305.17333,
Lemma 2) and cosine about ``sqrt(P / (P + d - 1))`` to the gradient; ``d`` is the number of trainable parameters.

Per-probe losses stay on the device until all probes of a step are queued; one transfer fetches them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fs_fwdllm.core.arrays import arrays_of
from fs_fwdllm.core.direction import DirectionKey, Distribution
from fs_fwdllm.model.objective import BatchLoss

__all__ = ["Estimator", "Slopes", "stack_directions"]


@dataclass(frozen=True)
class Slopes:
    """What one step measured.

    Attributes:
        values: float32 ``[probes]``, the slope along each direction.
        loss: training loss of the batch (of the clean point where the estimator evaluates it, else the mean over the
            perturbed points).
        forward_passes: evaluations of the model this took; a forward-mode tangent counts as one.
    """

    values: np.ndarray
    loss: float
    forward_passes: int


class Estimator(ABC):
    """Measures slopes; leaves the parameters bitwise as they were."""

    @abstractmethod
    def slopes(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey]) -> Slopes:
        """The slopes of ``batch_loss`` along the directions ``keys`` at the model's current parameters."""


def stack_directions(
    batch_loss: BatchLoss, keys: Sequence[DirectionKey], distribution: Distribution
) -> list[torch.Tensor]:
    """Whole directions as float32 tensors, one ``[len(keys), *shape]`` stack per trainable (for batched passes)."""
    stacks = []
    for tensor_id, tensor in enumerate(batch_loss.trainables.tensors):
        values = distribution.values(keys, tensor_id, 0, tensor.numel(), arrays_of(tensor))
        stacks.append(values.to(torch.float32).view(len(keys), *tensor.shape))
    return stacks


def in_groups(keys: Sequence[DirectionKey], size: int) -> list[Sequence[DirectionKey]]:
    """``keys`` cut into runs of at most ``size``."""
    return [keys[first : first + size] for first in range(0, len(keys), size)]
