"""The server's half of the forward-gradient methods: slopes into the pool, and a step when the gate lets it through."""

from __future__ import annotations

import numpy as np
import torch

from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.wire import Assignment, ClientUpdate, RoundUpdate, ScalarUpdate
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.forward.gate import Decision
from fs_fwdllm.method.forward.pacing import Pacing
from fs_fwdllm.method.forward.pooled_step import PooledStep, TakenStep
from fs_fwdllm.method.forward.server_optimizer import ServerOptimizer, Sgd
from fs_fwdllm.method.replay_server import ReplayServer
from fs_fwdllm.method.server import ServerSettings

__all__ = ["PooledServer"]


class PooledServer(ReplayServer):
    """Steps on what all clients' probes estimate together.

    Args:
        optimizer: what the server steps with on the pooled estimate; plain SGD unless told.
        pacing: gate, directed sampling and step control; the plain step unless told.

    Attributes:
        pooled: the pool and its step.
    """

    answer = ScalarUpdate

    def __init__(
        self,
        replayer: Replayer,
        settings: ServerSettings,
        *,
        optimizer: ServerOptimizer | None = None,
        pacing: Pacing | None = None,
    ) -> None:
        super().__init__(replayer, settings)
        self.pooled = PooledStep(
            replayer,
            settings.schedule,
            weight_decay=settings.weight_decay,
            equal_weights=settings.equal_weights,
            weigh_by_precision=settings.weigh_by_precision,
            optimizer=optimizer or Sgd(),
            pacing=pacing or Pacing(),
            sets=settings.sets,
        )
        self._decision: Decision | None = None
        self._step_norm: float | None = None

    @property
    def taken(self) -> TakenStep | None:
        """The step of the round that was closed last, where it is kept for a comparison with backpropagation."""
        return self.pooled.taken

    def sampling_index_for(self, round_index: int) -> int:
        first = self.pooled.pool.first_round
        return round_index if first is None else first

    def expected_values(self, assignment: Assignment) -> int:
        return assignment.steps * sum(assignment.probes)

    def distances(self, accepted: list[ClientUpdate]) -> list[float]:
        raise ConfigError(
            "train.train_strategy 'model-diff': clients of this method do not move; set train.train_strategy: frozen"
        )

    def _equip(self, assigned: dict[int, Assignment]) -> dict[int, Assignment]:
        return self.pooled.equip(assigned)

    def _step_is_due(self, accepted: list[ClientUpdate]) -> bool:
        self.pooled.collect(accepted, self.assigned)
        self._decision = self.pooled.decide(self.round_index, answered=bool(accepted))
        return self._decision is not None and self._decision.steps

    def _step(self, accepted: list[ClientUpdate], weights: np.ndarray) -> RoundUpdate:
        record, self._step_norm = self.pooled.take(self.round_index, self.digest)
        return record

    def _columns(self) -> dict[str, object]:
        decision, step_norm = self._decision, self._step_norm
        self._decision = self._step_norm = None
        columns = self.pooled.columns(decision, step_norm)
        if decision is not None and decision.steps:
            self.pooled.pool.clear()
        return columns

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return super().state_tensors() | self.pooled.state_tensors()

    def state_numbers(self) -> dict[str, object]:
        return super().state_numbers() | self.pooled.state_numbers()

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        super().load_state(tensors, numbers)
        self.pooled.load_state(tensors, numbers)
