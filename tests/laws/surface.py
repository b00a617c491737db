"""Losses that are formulas, so that gradients and Hessians are known on paper; everything else is the real code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch

from fs_fwdllm.core.direction import DirectionKey, Distribution, Rademacher
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.estimator import Estimator, ForwardMode
from fs_fwdllm.estimator.base import stack_directions
from fs_fwdllm.model.objective import BatchLoss

__all__ = ["Surface", "estimates", "flat_directions", "quadratic"]

T = TypeVar("T")
#: One of the two tensors has two dimensions, so that a mix-up of tensor ids or of element order cannot cancel.
SHAPES = ((3, 5), (7,))
DIMENSIONS = 22


class Surface(BatchLoss):
    """``formula(x)`` of the concatenated trainables ``x``; :meth:`at` and :meth:`at_stack` are the inherited ones."""

    def __init__(self, formula: Callable[[torch.Tensor], torch.Tensor], start: Sequence[torch.Tensor]) -> None:
        self._formula = formula
        self._trainables = Trainables({f"t{index}": tensor.contiguous() for index, tensor in enumerate(start)})

    @property
    def trainables(self) -> Trainables:
        return self._trainables

    def function(self, differentiable: bool = True) -> Callable[[tuple[torch.Tensor, ...]], torch.Tensor]:
        return lambda values: self._formula(torch.cat([value.reshape(-1) for value in values]))

    def here(self) -> torch.Tensor:
        return self.function()(self._trainables.tensors)

    def together(self, passes: Sequence[Callable[[], T]]) -> list[T]:
        return [one() for one in passes]

    def _replayed(self) -> Any:
        return nullcontext()


def quadratic(seed: int = 0, dimensions: int = DIMENSIONS) -> tuple[Surface, torch.Tensor, torch.Tensor]:
    """``(surface, gradient, Hessian)`` of ``x' A x / 2 + b' x`` at a random point, the last two in float64."""
    generator = torch.Generator().manual_seed(seed)
    a, b, x = (torch.randn(shape, generator=generator) for shape in ((dimensions, dimensions), dimensions, dimensions))
    hessian = (a + a.T) / 2
    start = [x]
    if dimensions == DIMENSIONS:
        start = [part.view(shape) for part, shape in zip(x.split((15, 7)), SHAPES, strict=True)]
    surface = Surface(lambda point: point @ hessian @ point / 2 + b @ point, start)
    return surface, hessian.double() @ x.double() + b.double(), hessian.double()


def flat_directions(surface: BatchLoss, keys: Sequence[DirectionKey], distribution: Distribution) -> np.ndarray:
    """float64 ``[len(keys), d]``."""
    return torch.cat([part.flatten(1) for part in stack_directions(surface, keys, distribution)], 1).double().numpy()


def estimates(
    surface: BatchLoss,
    probes: int,
    repeats: int,
    distribution: Distribution | None = None,
    estimator: Estimator | None = None,
    run_seed: int = 1,
) -> np.ndarray:
    """``repeats`` independent gradient estimates ``1/K sum_k g_k z_k``, float64 ``[repeats, d]``."""
    distribution = distribution or Rademacher()
    estimator = estimator or ForwardMode(distribution, probes_per_batch=2000)
    rows = []
    group = max(1, 20_000 // probes)
    for first in range(0, repeats, group):
        count = min(group, repeats - first)
        keys = [DirectionKey(run_seed, seed) for seed in range(first * probes, (first + count) * probes)]
        slopes = estimator.slopes(surface, keys).values.astype(np.float64)
        weighted = slopes[:, None] * flat_directions(surface, keys, distribution)
        rows.append(weighted.reshape(count, probes, -1).mean(1))
    return np.concatenate(rows)
