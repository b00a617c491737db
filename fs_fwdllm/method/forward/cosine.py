"""How good was a step? The angle between the pooled estimate and the gradient that backpropagation finds.

A longer step is easily mistaken for a better direction; the cosine tells them apart. It compares like with like: the
estimate of the step that was just taken, and the exact gradient at the same parameters, on the same mini-batches of the
same clients with the same weights. What remains is the error of looking along random directions, nothing of the choice
of data. It needs a backward pass per mini-batch and the clients' data, so it belongs to simulations, on request; its
passes are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from fs_fwdllm.data.types import Example
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.method.forward.server import PooledServer
from fs_fwdllm.method.forward.step_control import norm_of
from fs_fwdllm.method.server import RoundReport, RoundServer

if TYPE_CHECKING:
    from fs_fwdllm.method.parts import Parts

__all__ = ["add_cosine", "cosine_between"]


def cosine_between(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Cosine of two vectors in pieces, in float64; NaN where one is zero."""
    lengths = norm_of(one) * norm_of(other)
    dot = math.fsum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))
    return dot / lengths if lengths else math.nan


def add_cosine(
    parts: Parts, server: RoundServer, report: RoundReport, examples: Mapping[int, Sequence[Example]]
) -> None:
    """Put the cosine, and the passes it takes, into the report of a round that stepped and keeps what it needs."""
    taken = server.taken if isinstance(server, PooledServer) else None
    if taken is None:
        return
    total = [torch.zeros_like(part) for part in taken.estimate]
    backprop = Backprop(parts.model)
    with parts.trainables.holding(taken.start):
        for client, weight in taken.weights.items():
            steps = server.settings.plans[client].steps
            for batch in parts.batches.cut(examples[client], client=client, batch_index=taken.batch_index, steps=steps):
                backprop.gradient(parts.objective.on(batch))
                _collect(parts.trainables.tensors, total, weight / steps)
                report.forward_passes += backprop.forward_passes
                report.backward_passes += 1
    report.columns["cosine"] = cosine_between(taken.estimate, total)


@torch.no_grad()
def _collect(tensors: Sequence[torch.Tensor], total: Sequence[torch.Tensor], weight: float) -> None:
    """Move accumulated gradients, times ``weight``, into ``total``."""
    for tensor, part in zip(tensors, total, strict=True):
        if tensor.grad is not None:
            part.add_(tensor.grad, alpha=weight)
        tensor.grad = None
