"""What all forward-only clients have in common: they measure slopes along seeded directions, and answer with them.

Where they differ is what happens between the measurements. A client of MeZO moves after every step
(:mod:`fs_fwdllm.method.mezo.client`); one of the forward-gradient methods stays where it is
(:mod:`fs_fwdllm.method.forward.client`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fs_fwdllm.core.direction import DirectionKey, direction_seed
from fs_fwdllm.core.wire import Assignment, ClientUpdate, DenseUpdate, ScalarUpdate
from fs_fwdllm.data.types import Batch
from fs_fwdllm.estimator import Estimator, Slopes
from fs_fwdllm.method.client import BatchSettings, ClientWorker
from fs_fwdllm.method.replica import Replica
from fs_fwdllm.model.objective import Objective

__all__ = ["ProbingWorker"]


class ProbingWorker(ClientWorker):
    """Measures slopes with forward passes only.

    Args:
        estimator: how a slope is measured.
        dense_upload: send the change (or the gradient estimate) instead of the slopes, as the published systems do.
    """

    def __init__(
        self,
        objective: Objective,
        replica: Replica,
        batches: BatchSettings,
        estimator: Estimator,
        *,
        dense_upload: bool = False,
    ) -> None:
        super().__init__(objective, replica, batches)
        self.replica: Replica = replica
        self._estimator = estimator
        self._dense_upload = dense_upload

    def seeds(self, assignment: Assignment, step: int) -> list[int]:
        """The seeds of a step's directions, in order."""
        return [
            direction_seed(assignment.round_index, assignment.client, step, probe) for probe in range(assignment.probes)
        ]

    def keys(self, assignment: Assignment, step: int) -> list[DirectionKey]:
        """What names a step's directions."""
        run_seed = self.replica.replayer.run_seed
        return [DirectionKey(run_seed, seed) for seed in self.seeds(assignment, step)]

    def answer(
        self,
        assignment: Assignment,
        batches: Sequence[Batch],
        measured: Sequence[Slopes],
        dense: np.ndarray | None = None,
    ) -> ClientUpdate:
        """The update that says what was measured: the slopes, or ``dense`` where that is sent instead."""
        record = ScalarUpdate if dense is None else DenseUpdate
        return record(
            round_index=assignment.round_index,
            client=assignment.client,
            digest=assignment.digest,
            samples=sum(len(batch) for batch in batches),
            loss=float(np.mean([slopes.loss for slopes in measured])),
            forward_passes=sum(slopes.forward_passes for slopes in measured),
            backward_passes=0,
            values=np.concatenate([slopes.values for slopes in measured]) if dense is None else dense,
        )
