"""Forward-mode differentiation: exact slopes ``z . grad L`` without a backward pass (Jacobian-vector products).

A dual number ``theta + epsilon z`` is pushed through the model, so there is no radius to choose and no difference of
nearly equal losses. With ``vmap`` over the directions only the tangents are repeated: the primal pass is computed once
for all probes of a batch, and ``P`` probes cost about ``1 + P`` forward passes instead of ``2 P``.

The price: fused attention kernels have no forward-mode rule, so the model must run ``fwdllm.attention: eager`` (the
default for this estimator).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import jvp, vmap

from fs_fwdllm.config.own_sections import FwdllmConfig
from fs_fwdllm.core.direction import DirectionKey, Distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import EstimatorError, ModelError
from fs_fwdllm.estimator.base import Estimator, Footprint, Slopes, in_groups, stack_directions
from fs_fwdllm.model.objective import BatchLoss
from fs_fwdllm.model.trial import foreign_code

__all__ = ["ForwardMode"]

#: What PyTorch's messages about operations it cannot differentiate or batch have in common.
_OF_DIFFERENTIATION = ("forward ad", "forward-mode", "forward mode", "functorch", "vmap", "transform", "batching rule")


class ForwardMode(Estimator):
    """Exact directional derivatives, ``probes_per_batch`` tangents to one primal pass.

    Raises:
        EstimatorError: an operation of the model has no forward-mode rule.
    """

    has_radius = False
    works_with_fused_attention = False
    batches_whole_models = True

    def __init__(self, distribution: Distribution, probes_per_batch: int = 1) -> None:
        self._distribution = distribution
        self._probes_per_batch = probes_per_batch

    @classmethod
    def of(
        cls, model: nn.Module, trainables: Trainables, distribution: Distribution, config: FwdllmConfig, *, full: bool
    ) -> Estimator:
        return cls(distribution, config.probes_per_batch)

    @classmethod
    def passes(cls, probes: int, probes_per_batch: int) -> int:
        return math.ceil(probes / probes_per_batch) + probes

    @classmethod
    def reads(cls, config: FwdllmConfig, probes: int) -> int:
        return math.ceil(probes / config.probes_per_batch)

    @classmethod
    def footprint(cls, probes: int, probes_per_batch: int) -> Footprint:
        return Footprint(points=1 + probes_per_batch, copies=probes_per_batch)

    @torch.no_grad()
    def slopes(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey]) -> Slopes:
        groups = in_groups(keys, self._probes_per_batch)
        measured = []
        for group in groups:
            with batch_loss.replayed():
                measured.append(self._group(batch_loss, group))
        losses = torch.cat([loss.reshape(1) for loss, _ in measured]).cpu().numpy()
        passes = self.passes(len(keys), self._probes_per_batch)
        values = torch.cat([slopes for _, slopes in measured]).cpu().numpy()
        return Slopes(values.astype(np.float32), float(losses.astype(np.float64).mean()), passes)

    def _group(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey]) -> tuple[torch.Tensor, torch.Tensor]:
        tangents = tuple(stack_directions(batch_loss, keys, self._distribution))
        point = tuple(tensor.detach() for tensor in batch_loss.trainables.tensors)
        loss = batch_loss.function()
        try:
            with foreign_code("forward-mode differentiation failed"):
                if len(keys) == 1:  # also for models whose operations cannot be batched
                    value, slope = jvp(loss, (point,), (tuple(stack[0] for stack in tangents),))[:2]
                    return value, slope.reshape(1)
                return vmap(lambda tangent: jvp(loss, (point,), (tangent,)), out_dims=(None, 0))(tangents)  # type: ignore
        except ModelError as error:
            reason = str(error)
            if not any(word in reason.lower() for word in _OF_DIFFERENTIATION):
                raise
            raise EstimatorError(
                "fwdllm.estimator 'forward_mode': an operation of this model has no forward-mode derivative "
                f"({reason:.240}); {_advice(batch_loss.model)}"
            ) from error


def _advice(model: Any) -> str:
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    other = "use fwdllm.estimator: central"
    return other if kernel == "eager" else f"set fwdllm.attention: eager, or {other}"
