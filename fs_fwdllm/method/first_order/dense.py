"""Dense methods: one float32 per trainable parameter travels, up and down.

The backpropagation baselines live here, and the dense form of the forward-only methods, which exists for parity with
the published systems (they send what could have been a scalar). Two servers' worth of mathematics:

* **average of changes** (FedAvg, McMahan et al. 2017): ``theta <- theta + sum_k w_k delta_k``;
* **gradient** (FedSGD): ``theta <- optimiser(theta, sum_k w_k g_k)``, the optimiser being PyTorch's SGD or AdamW.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables, flatten
from fs_fwdllm.core.wire import Assignment, ClientUpdate, DenseUpdate
from fs_fwdllm.data.types import Batch
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.method.client import BatchSettings, ClientWorker
from fs_fwdllm.method.replay_server import ReplayServer
from fs_fwdllm.method.replica import Replica
from fs_fwdllm.method.server import ServerSettings, numbered
from fs_fwdllm.method.update_norms import dense_distances
from fs_fwdllm.model.objective import Objective

__all__ = ["AverageServer", "BackpropWorker", "GradientServer", "OptimizerFactory", "optimizer_factory"]

OptimizerFactory = Callable[[Trainables, float], torch.optim.Optimizer]


def optimizer_factory(kind: str, *, weight_decay: float, momentum: float) -> OptimizerFactory:
    """Builds PyTorch's ``SGD`` or ``AdamW`` on trainables for a learning rate.

    Decay is decoupled in both (SGD gets it as an exact factor before the step, see :func:`decay_then_step`), and
    vectors are exempt from it, so that the baselines are regularised exactly as the forward-only methods are.
    """

    def make(trainables: Trainables, learning_rate: float) -> torch.optim.Optimizer:
        if kind == "SGD":
            return torch.optim.SGD(trainables.tensors, lr=learning_rate, momentum=momentum)
        decays = trainables.decays()
        groups = [
            {"params": [t for t, d in zip(trainables.tensors, decays, strict=True) if d], "weight_decay": weight_decay},
            {"params": [t for t, d in zip(trainables.tensors, decays, strict=True) if not d], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate)

    return make


@torch.no_grad()
def decay_then_step(
    trainables: Trainables, optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float
) -> None:
    """One optimiser step; for SGD preceded by decoupled decay (AdamW brings its own)."""
    if weight_decay and isinstance(optimizer, torch.optim.SGD):
        for tensor, decays in zip(trainables.tensors, trainables.decays(), strict=True):
            if decays:
                tensor.mul_(1.0 - learning_rate * weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class BackpropWorker(ClientWorker):
    """Local optimiser steps (FedAvg), or the gradient over the round's batches at one point (FedSGD)."""

    def __init__(
        self,
        objective: Objective,
        replica: Replica,
        batches: BatchSettings,
        backprop: Backprop,
        make_optimizer: OptimizerFactory | None,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(objective, replica, batches)
        self._backprop = backprop
        self._make_optimizer = make_optimizer
        self._weight_decay = weight_decay

    def train(self, assignment: Assignment, batches: Sequence[Batch]) -> ClientUpdate:
        try:
            losses, values = self._learn(assignment, batches)
        finally:  # work that failed half-way must not leave a gradient to the next client
            for tensor in self.trainables.tensors:
                tensor.grad = None
        return DenseUpdate(
            round_index=assignment.round_index,
            client=assignment.client,
            digest=assignment.digest,
            samples=sum(len(batch) for batch in batches),
            loss=float(np.mean(losses)),
            forward_passes=self._backprop.forward_passes * len(batches),
            backward_passes=len(batches),
            values=values,
        )

    def _learn(self, assignment: Assignment, batches: Sequence[Batch]) -> tuple[list[float], np.ndarray]:
        """Losses of the batches, and the gradient at one point or the change that local steps made."""
        if self._make_optimizer is None:
            losses = [self._backprop.gradient(self.objective.on(batch)) for batch in batches]
            return losses, self._gradient() / np.float32(len(batches))
        with self._excursion() as start:
            losses = self.descend(assignment.learning_rate, batches)
            return losses, self._change_since(start)

    def descend(self, learning_rate: float, batches: Sequence[Batch]) -> list[float]:
        """An optimiser step on every batch, of a worker that steps; the trainables stay where they end.

        Returns:
            The losses of the batches.
        """
        assert self._make_optimizer is not None
        optimizer = self._make_optimizer(self.trainables, learning_rate)
        losses = []
        for batch in batches:
            losses.append(self._backprop.gradient(self.objective.on(batch)))
            decay_then_step(self.trainables, optimizer, learning_rate, self._weight_decay)
        return losses

    def _gradient(self) -> np.ndarray:
        """What backpropagation accumulated; zero where it did not reach."""
        tensors = self.trainables.tensors
        return flatten([torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors])


class _DenseServer(ReplayServer):
    answer = DenseUpdate

    def expected_values(self, assignment: Assignment) -> int:
        return self.trainables.count

    def distances(self, accepted: list[ClientUpdate]) -> list[float]:
        sizes = [tensor.numel() for tensor in self.trainables.tensors]
        return dense_distances(sizes, [update.values for update in accepted])

    def _weighted_sum(self, accepted: list[ClientUpdate], weights: np.ndarray) -> list[torch.Tensor]:
        """``sum_k w_k v_k``, client after client, every operation rounded on its own."""
        total = np.zeros(self.trainables.count, dtype=np.float32)
        for update, weight in zip(accepted, weights, strict=True):
            total += update.values * np.float32(weight)
        return self.trainables.split_flat(total)

    def _step(self, accepted: list[ClientUpdate], weights: np.ndarray) -> None:
        self.replayer.move(lambda: self._apply(self._weighted_sum(accepted, weights)))

    @abstractmethod
    def _apply(self, mean: Sequence[torch.Tensor]) -> None:
        """Move the trainables by the weighted mean of what clients sent."""


class AverageServer(_DenseServer):
    """Adds the weighted mean of the clients' changes."""

    def lengths_of(self, update: ClientUpdate) -> tuple[float, ...]:
        """Of the change by a step at the rate of one: who takes more steps, or larger ones, comes farther."""
        work = self.assigned[update.client]
        per_step = work.steps * work.learning_rate or 1.0
        return tuple(length / per_step for length in super().lengths_of(update))

    @torch.no_grad()
    def _apply(self, mean: Sequence[torch.Tensor]) -> None:
        for tensor, change in zip(self.trainables.tensors, mean, strict=True):
            tensor.detach().add_(change)


class GradientServer(_DenseServer):
    """Steps an optimiser on the weighted mean of the clients' gradients."""

    def __init__(self, replayer: Replayer, settings: ServerSettings, make_optimizer: OptimizerFactory) -> None:
        super().__init__(replayer, settings)
        self._make_optimizer = make_optimizer

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Made for the first step."""
        return self._make_optimizer(self.trainables, self.settings.schedule(0))

    def _apply(self, mean: Sequence[torch.Tensor]) -> None:
        for tensor, gradient in zip(self.trainables.tensors, mean, strict=True):
            tensor.grad = gradient
        rate = self.settings.schedule(self.round_index)
        decay_then_step(self.trainables, self._optimizer, rate, self.settings.weight_decay)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        tensors = super().state_tensors()
        for index, tensor in enumerate(self.trainables.tensors):
            for name, value in self._optimizer.state[tensor].items():
                if value is not None:
                    tensors[f"optimizer.{name}.{index}"] = torch.as_tensor(value)
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        super().load_state(tensors, numbers)
        names = {key.split(".")[1] for key in tensors if key.startswith("optimizer.")}
        for name in sorted(names):
            values = numbered(tensors, f"optimizer.{name}")
            for tensor, value in zip(self.trainables.tensors, values, strict=True):
                self._optimizer.state[tensor][name] = value.to(tensor.device) if value.dim() else value
