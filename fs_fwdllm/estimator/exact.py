"""Exact slopes from a gradient: once the gradient of a batch is at hand, a slope is a product of two vectors.

A probe pays forward passes for one number. Where a device knows a gradient ``G`` anyway, any number of slopes ``<G,
z_p>`` costs no further pass, and they travel, are pooled and replayed as probes' slopes are. That is sketching a
gradient by shared random directions (Ferret, ICML 2025, arXiv 2409.06277) in the form in which this package sends
everything. The estimate that ``P`` slopes rebuild is unbiased for ``G`` with relative variance ``(d - 1)/P``; nothing
else is lost, and ``d`` is small where a part of the trainables is.

:class:`Projected` takes the gradient from backpropagation, for devices that have it; the closed form of an output layer
is in :mod:`fs_fwdllm.estimator.closed_form`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fs_fwdllm.config.own_sections import FwdllmConfig
from fs_fwdllm.core.arrays import arrays_of
from fs_fwdllm.core.direction import DirectionKey, Distribution
from fs_fwdllm.core.replay import DEFAULT_CHUNK
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.estimator.backprop import Backprop
from fs_fwdllm.estimator.base import Estimator, Footprint, Passes, Slopes
from fs_fwdllm.model.objective import BatchLoss

__all__ = ["ExactSlopes", "Gradient", "Projected", "project"]

#: Elements of the block of directions that is held at once.
BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Gradient:
    """The gradient of a batch's loss.

    Attributes:
        loss: of the batch.
        tensors: float32 in the shapes of the trainables, by tensor id; of one that is not named it is zero.
        passes: what it took.
    """

    loss: float
    tensors: dict[int, torch.Tensor]
    passes: Passes


@torch.no_grad()
def project(tensors: dict[int, torch.Tensor], keys: Sequence[DirectionKey], distribution: Distribution) -> np.ndarray:
    """``<G, z_p>`` of a gradient by tensor id, float64 ``[len(keys)]``; directions exist one block at a time."""
    sums = np.zeros(len(keys))
    for tensor_id, tensor in sorted(tensors.items()):
        if not distribution.covers(tensor_id):
            continue
        arrays, flat = arrays_of(tensor), tensor.detach().reshape(-1)
        for start in range(0, len(flat), DEFAULT_CHUNK):
            part = flat[start : start + DEFAULT_CHUNK]
            rows = max(1, BLOCK_ELEMENTS // len(part))
            for first in range(0, len(keys), rows):
                block = distribution.values(keys[first : first + rows], tensor_id, start, len(part), arrays)
                sums[first : first + rows] += arrays.products(block, part)[0]
    return sums


class ExactSlopes(Estimator):
    """Slopes as products of a gradient with directions.

    Args:
        distribution: what directions are drawn from; the gradient of tensors that it does not cover is not needed.
    """

    has_radius = False
    exact = True
    batches_whole_models = True

    def __init__(self, distribution: Distribution) -> None:
        self.distribution = distribution

    @classmethod
    def passes(cls, probes: int, probes_per_batch: int) -> int:
        return 1

    @classmethod
    def largest_batch(cls, probes: int) -> int:
        return max(probes, 1)

    @classmethod
    def default_attention(cls, probes_per_batch: int) -> str | None:
        return None

    @abstractmethod
    def gradient(self, batch_loss: BatchLoss) -> Gradient:
        """The gradient of the tensors that directions cover, and of others where it is known at no cost."""

    def slopes(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey]) -> Slopes:
        gradient = self.gradient(batch_loss)
        values = project(gradient.tensors, keys, self.distribution).astype(np.float32)
        return Slopes(values, gradient.loss, *gradient.passes)


class Projected(ExactSlopes):
    """Backpropagation, of which only the slopes are sent.

    Args:
        backprop: takes the gradient; with checkpointing it runs the layers twice.
    """

    def __init__(self, distribution: Distribution, backprop: Backprop) -> None:
        super().__init__(distribution)
        self._backprop = backprop

    @classmethod
    def of(
        cls, model: nn.Module, trainables: Trainables, distribution: Distribution, config: FwdllmConfig, *, full: bool
    ) -> Estimator:
        return cls(distribution, Backprop(model, gradient_checkpointing=config.gradient_checkpointing))

    @classmethod
    def passes_as(cls, config: FwdllmConfig, probes: int) -> Passes:
        return Passes(Backprop.passes(gradient_checkpointing=config.gradient_checkpointing), 1)

    @classmethod
    def footprint(cls, probes: int, probes_per_batch: int) -> Footprint:
        return Footprint(backpropagates=True)

    def gradient(self, batch_loss: BatchLoss) -> Gradient:
        tensors = batch_loss.trainables.tensors
        for tensor in tensors:
            tensor.grad = None  # backpropagation adds to what is there
        try:
            loss = self._backprop.gradient(batch_loss)
            found = {index: tensor.grad for index, tensor in enumerate(tensors) if tensor.grad is not None}
        finally:  # work that failed half-way must not leave a gradient to the next client
            for tensor in tensors:
                tensor.grad = None
        return Gradient(loss, found, Passes(self._backprop.forward_passes, 1))
