"""The client's half of methods whose clients step: look, step, look again.

The last local step of a round need not be taken unless the change itself is sent: one local step moves nothing and
copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fs_fwdllm.core.learning_rate import decay_factor
from fs_fwdllm.core.replay import Contributions
from fs_fwdllm.core.wire import Assignment, ClientUpdate
from fs_fwdllm.data.types import Batch
from fs_fwdllm.estimator import Estimator, Slopes
from fs_fwdllm.method.client import BatchSettings
from fs_fwdllm.method.probing import ProbingWorker
from fs_fwdllm.method.replica import Replica
from fs_fwdllm.model.objective import Objective

__all__ = ["Coefficients", "SteppingWorker"]

#: From the slopes of steps, float64 ``[..., probes]``, and a learning rate, to what each direction is multiplied with
#: (the same shape). Linear in the rate: the server weighs clients by it.
Coefficients = Callable[[np.ndarray, float], np.ndarray]


class SteppingWorker(ProbingWorker):
    """Takes local steps along the directions it looked along.

    Args:
        coefficients: how far a step is.
        weight_decay: decoupled decay of the local steps, per unit of learning rate.
    """

    def __init__(
        self,
        objective: Objective,
        replica: Replica,
        batches: BatchSettings,
        estimator: Estimator,
        coefficients: Coefficients,
        *,
        weight_decay: float = 0.0,
        dense_upload: bool = False,
    ) -> None:
        super().__init__(objective, replica, batches, estimator, dense_upload=dense_upload)
        self._coefficients = coefficients
        self._weight_decay = weight_decay

    def train(self, assignment: Assignment, batches: Sequence[Batch]) -> ClientUpdate:
        if len(batches) == 1 and not self._dense_upload:
            return self.answer(assignment, batches, [self._look(assignment, 0, batches[0])])
        with self._excursion() as start:
            measured = self.descend(assignment, batches, last_move=self._dense_upload)
            change = self._change_since(start) if self._dense_upload else None
        return self.answer(assignment, batches, measured, change)

    def descend(self, assignment: Assignment, batches: Sequence[Batch], *, last_move: bool) -> list[Slopes]:
        """Measure the slopes of every step; the trainables move after each, after the last only if asked."""
        measured: list[Slopes] = []
        for step, batch in enumerate(batches):
            measured.append(self._look(assignment, step, batch))
            if last_move or step + 1 < len(batches):
                self._move(assignment, step, measured[-1])
        return measured

    def _look(self, assignment: Assignment, step: int, batch: Batch) -> Slopes:
        return self._estimator.slopes(self.objective.on(batch), self.keys(assignment, step))

    def _move(self, assignment: Assignment, step: int, slopes: Slopes) -> None:
        """One local step, taken on the device with the same arithmetic as a replay."""
        rate = assignment.learning_rate
        coefficients = self._coefficients(slopes.values.astype(np.float64), rate)
        self.replica.replayer.apply(
            Contributions(self.seeds(assignment, step), coefficients.astype(np.float32)),
            decay=decay_factor(rate, self._weight_decay),
            momentum=0.0,
            rate=0.0,
        )
