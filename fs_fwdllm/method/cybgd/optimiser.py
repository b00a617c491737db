"""The block optimiser: float32 masters of what a visit trains, and of nothing else.

Only the active parameters require a gradient, so autograd records nothing below them and keeps no gradient of anything
else. If the model is in half precision, each active tensor has a float32 *master* for the whole visit: a gradient is
cast, added to the master's and dropped as soon as autograd has finished it, the optimiser steps on the masters, and the
model shows their rounding. With a learning rate of 1e-6 a bfloat16 weight of 0.02 moves only once some sixty such steps
have added up; without a master it never would. In a float32 model the parameters are their own masters.

Per parameter of the block: 4 bytes master, 4 gradient, 8 AdamW state: 16 ``P_b`` beside the model's ``2 P``. The start
of the visit, against which the upload is a difference, is kept beside them in the form it came in: a frame's bytes (at
most 4 a parameter), or a copy in the model's dtype (2).

Weight decay is decoupled for every optimiser, ``p <- (1 - lr w) p`` before the step as AdamW has it, and applies to
matrices only. A parameter that no gradient reached (an expert that saw no token) is left alone in that step, as
PyTorch's optimisers do. float16 has its loss scaled by a power of two, halved and tried again when a gradient
overflows, so that no step is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import EstimatorError, WireError
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.method.cybgd.state_bytes import TensorState
from fs_fwdllm.model.objective import Objective

__all__ = ["BlockOptimizer", "OptimizerSettings", "visit_steps"]

_FIRST_SCALE = 2.0**15
_SMALLEST_SCALE = 2.0**-15


@dataclass(frozen=True)
class OptimizerSettings:
    """How a block is trained.

    Attributes:
        kind: name of a class in ``torch.optim``.
        momentum: of SGD and RMSprop.
        weight_decay: decoupled, per unit of learning rate, on matrices.
        clip: largest norm of the active gradient; not above 0 is off.
        accumulate: batches per step.
        shape, warmup_ratio: the learning rate over the visit's steps, as :class:`.Schedule`.
    """

    kind: str
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float = -1.0
    accumulate: int = 1
    shape: str = "constant"
    warmup_ratio: float = 0.0

    def schedule(self, base: float, steps: int) -> Schedule:
        """The learning rate of each of ``steps`` optimiser steps."""
        return Schedule(base=base, shape=self.shape, rounds=steps, warmup_ratio=self.warmup_ratio)  # type: ignore[arg-type]

    @property
    def longest_step(self) -> float:
        """How far a step at the rate of one moves the parameters of a block, as a root mean square, at most: Adam's
        steps do not follow the gradient's length, and are one while a gradient keeps its size and sign."""
        return 1.0 if self.kind in ("Adam", "AdamW") else math.inf

    @cached_property
    def keeps(self) -> dict[str, bool]:
        """What the optimiser keeps for a parameter once it has moved it, by name; whether that is a single number."""
        parameter = torch.zeros(1)
        parameter.grad = torch.zeros(1)
        optimizer = self.make([parameter])
        optimizer.step()
        return {name: torch.as_tensor(value).dim() == 0 for name, value in _kept(optimizer, parameter).items()}

    def require_own(self, states: Sequence[TensorState]) -> None:
        """Whether states that were received are this optimiser's; those of parameters it never moved are empty.

        Raises:
            WireError: they have other names, or a single number where there is one for every value.
        """
        for state in states:
            if state and {name: value.dim() == 0 for name, value in state.items()} != self.keeps:
                raise WireError(f"an optimiser state has {len(state)} entries that are not those of {self.kind}")

    def make(self, masters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """The optimiser on ``masters``; the learning rate is set before each step."""
        arguments = {"momentum": self.momentum} if self.kind in ("SGD", "RMSprop") else {}
        if self.kind == "AdamW":
            arguments["weight_decay"] = 0.0  # decay is ours, and the same for all
        # One tensor at a time: the batched kernels copy the whole block.
        optimiser: torch.optim.Optimizer = getattr(torch.optim, self.kind)(
            list(masters), lr=0.0, foreach=False, **arguments
        )
        return optimiser


def visit_steps(batches: int, accumulate: int) -> int:
    """Optimiser steps that ``batches`` batches give."""
    return -(-batches // accumulate)


class BlockOptimizer:
    """Trains some parameters of a model from exact float32 values.

    Args:
        parameters: the model's tensors.
        start: float32 values to start from (kept, not changed).
        settings: see :class:`OptimizerSettings`.
        state: what the optimiser kept of an earlier visit, per parameter.

    Attributes:
        masters: the float32 values that the optimiser steps on.
        loss_scale: what losses are multiplied with before backpropagation; 1 except in float16.
        steps: optimiser steps taken.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        start: Sequence[torch.Tensor],
        settings: OptimizerSettings,
        state: Sequence[TensorState] | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self._settings = settings
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
            self.masters = [
                parameter if parameter.dtype == torch.float32 else value.clone()
                for parameter, value in zip(parameters, start, strict=True)
            ]
        self._optimizer = settings.make(self.masters)
        self._load_state(state)
        self.loss_scale = _FIRST_SCALE if any(p.dtype == torch.float16 for p in parameters) else 1.0
        self.steps = 0

    def state(self) -> list[TensorState]:
        """The optimiser's tensors and counts, per parameter."""
        return [
            {
                name: torch.as_tensor(value, dtype=torch.float32).detach()
                for name, value in _kept(self._optimizer, master).items()
            }
            for master in self.masters
        ]

    def _load_state(self, state: Sequence[TensorState] | None) -> None:
        self._settings.require_own(state or ())
        for master, own in zip(self.masters, state or [{}] * len(self.masters), strict=True):
            for name, value in own.items():
                self._optimizer.state[master][name] = value.clone().to(master.device if value.dim() else "cpu")

    def train(
        self, objective: Objective, backprop: Backprop, batches: Sequence[Batch], learning_rate: float
    ) -> list[float]:
        """Take ``ceil(len(batches) / accumulate)`` steps, exactly; returns the losses of the batches."""
        size = self._settings.accumulate
        groups = [batches[first : first + size] for first in range(0, len(batches), size)]
        schedule = self._settings.schedule(learning_rate, len(groups))
        losses: list[float] = []
        with self._active():
            for index, group in enumerate(groups):
                losses += self._gradients(objective, backprop, group)
                self.take_step(schedule(index))
        return losses

    def _gradients(self, objective: Objective, backprop: Backprop, batches: Sequence[Batch]) -> list[float]:
        """Leave the mean gradient of ``batches`` in the masters."""
        while True:
            scale = self.loss_scale / len(batches)
            losses = [backprop.gradient(objective.on(batch), scale) for batch in batches]
            gradients = [master.grad for master in self.masters if master.grad is not None]
            if self.loss_scale == 1.0 or all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
                break
            if self.loss_scale <= _SMALLEST_SCALE or not all(math.isfinite(loss) for loss in losses):
                raise EstimatorError(
                    "a float16 gradient is not finite at any loss scale; set fwdllm.base.compute_dtype to bfloat16 "
                    "or float32"
                )
            self.loss_scale /= 2
            self._forget()
        if self.loss_scale != 1.0:
            for gradient in gradients:
                gradient.mul_(1.0 / self.loss_scale)
        return losses

    @torch.no_grad()
    def take_step(self, learning_rate: float) -> None:
        """One step on the gradients that the masters hold, which are dropped."""
        trained = [master for master in self.masters if master.grad is not None]
        if self._settings.clip > 0 and trained:
            torch.nn.utils.clip_grad_norm_(trained, self._settings.clip, foreach=False)
        factor = 1.0 - learning_rate * self._settings.weight_decay
        for master in trained:
            if factor != 1.0 and master.dim() > 1:
                master.mul_(factor)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._forget()
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
        self.steps += 1

    def _forget(self) -> None:
        for master in self.masters:
            master.grad = None

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Gradients of the active parameters, and of nothing else, go to the masters."""
        handles = []
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            parameter.requires_grad_(True)
            if parameter is not master:
                handles.append(parameter.register_post_accumulate_grad_hook(_hand_to(master)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in self._parameters:
                parameter.requires_grad_(False)
                parameter.grad = None


def _kept(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    return {name: value for name, value in optimizer.state.get(parameter, {}).items() if value is not None}


def _hand_to(master: torch.Tensor):  # type: ignore[no-untyped-def]
    def hand(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            cast = parameter.grad.float()
            master.grad = cast if master.grad is None else master.grad.add_(cast)
            parameter.grad = None

    return hand
