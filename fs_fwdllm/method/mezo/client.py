"""The client's half of methods whose clients step: look, step, look again.

The last local step of a round need not be taken unless the change itself is sent: one local step moves nothing and
copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fs_fwdllm.core.division import Division
from fs_fwdllm.core.learning_rate import decay_factor
from fs_fwdllm.core.replay import Contributions
from fs_fwdllm.core.wire import Assignment, ClientUpdate
from fs_fwdllm.data.types import Batch
from fs_fwdllm.estimator import Slopes
from fs_fwdllm.method.client import BatchSettings
from fs_fwdllm.method.direction_sets import OWN, DirectionSets
from fs_fwdllm.method.probing import Measuring, ProbingWorker
from fs_fwdllm.method.replica import Replica
from fs_fwdllm.model.objective import Objective

__all__ = ["Coefficients", "SteppingWorker", "by_part"]

#: From the slopes of steps, float64 ``[..., probes]``, and a learning rate, to what each direction is multiplied with
#: (the same shape). Linear in the rate: the server weighs clients by it.
Coefficients = Callable[[np.ndarray, float], np.ndarray]


def by_part(
    coefficients: Coefficients,
    slopes: np.ndarray,
    rate: float,
    probes: Sequence[int],
    division: Division,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """``coefficients`` of each part's slopes, at the part's own rate.

    Args:
        slopes: float64 ``[steps, directions]``, part after part.
        weights: per part, what the client counts in it; 1 unless told.
    """
    pieces, start = [], 0
    for part, count in enumerate(probes):
        own = rate if division.rates[part] == 1.0 else rate * division.rates[part]
        if weights is not None:
            own = own * weights[part]
        if count:
            pieces.append(coefficients(slopes[:, start : start + count], own))
        start += count
    return np.concatenate(pieces, axis=1)


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
        measuring: Measuring,
        coefficients: Coefficients,
        *,
        weight_decay: float = 0.0,
        dense_upload: bool = False,
        sets: DirectionSets = OWN,
    ) -> None:
        super().__init__(objective, replica, batches, measuring, dense_upload=dense_upload, sets=sets)
        self._coefficients = coefficients
        self._weight_decay = weight_decay

    def train(self, assignment: Assignment, batches: Sequence[Batch]) -> ClientUpdate:
        if len(batches) == 1 and not self._dense_upload:
            return self.answer(assignment, batches, [self.look(assignment, 0, batches[0])])
        with self._excursion() as start:
            measured = self.descend(assignment, batches, last_move=self._dense_upload)
            change = self._change_since(start) if self._dense_upload else None
        return self.answer(assignment, batches, measured, change)

    def descend(self, assignment: Assignment, batches: Sequence[Batch], *, last_move: bool) -> list[Slopes]:
        """Measure the slopes of every step; the trainables move after each, after the last only if asked."""
        measured: list[Slopes] = []
        for step, batch in enumerate(batches):
            measured.append(self.look(assignment, step, batch))
            if last_move or step + 1 < len(batches):
                self._move(assignment, step, measured[-1])
        return measured

    def _move(self, assignment: Assignment, step: int, slopes: Slopes) -> None:
        """One local step, taken on the device with the same arithmetic as a replay."""
        rate, replayer = assignment.learning_rate, self.replica.replayer
        values = slopes.values.astype(np.float64)[None]
        coefficients = by_part(self._coefficients, values, rate, assignment.probes, replayer.division).ravel()
        covered = (
            None if len(assignment.probes) == 1 else np.repeat(np.arange(len(assignment.probes)), assignment.probes)
        )
        replayer.apply(
            Contributions(self.seeds(assignment, step), coefficients.astype(np.float32), parts=covered),
            decay=decay_factor(rate, self._weight_decay),
            momentum=0.0,
            rate=0.0,
        )
