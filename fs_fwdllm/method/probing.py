"""What all clients that measure slopes have in common: they look along seeded directions, and answer with the slopes.

Where they differ is what happens between the measurements. A client of MeZO moves after every step
(:mod:`fs_fwdllm.method.mezo.client`); one of the forward-gradient methods stays where it is
(:mod:`fs_fwdllm.method.forward.client`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from fs_fwdllm.core.direction import DirectionKey
from fs_fwdllm.core.wire import Assignment, ClientUpdate, DenseUpdate, ScalarUpdate
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import WireError
from fs_fwdllm.estimator import PartedEstimator, Slopes
from fs_fwdllm.method.client import BatchSettings, ClientWorker
from fs_fwdllm.method.direction_sets import OWN, DirectionSets, directions_seeds
from fs_fwdllm.method.replica import Replica
from fs_fwdllm.model.objective import Objective

__all__ = ["Measuring", "ProbingWorker"]

#: From a client's number to what measures its slopes.
Measuring = Callable[[int], PartedEstimator]


class ProbingWorker(ClientWorker):
    """Measures slopes.

    Args:
        measuring: by client, how its slopes are measured.
        sets: whose directions clients look along.
        dense_upload: send the change (or the gradient estimate) instead of the slopes, as the published systems do.
    """

    def __init__(
        self,
        objective: Objective,
        replica: Replica,
        batches: BatchSettings,
        measuring: Measuring,
        *,
        dense_upload: bool = False,
        sets: DirectionSets = OWN,
    ) -> None:
        super().__init__(objective, replica, batches)
        self._sets = sets
        self.replica: Replica = replica
        self._measuring = measuring
        self._dense_upload = dense_upload

    def seeds(self, assignment: Assignment, step: int) -> list[int]:
        """The seeds of a step's directions, in order."""
        owner = self._sets.owner(assignment.client)
        return directions_seeds(assignment.round_index, owner, step, assignment.probes)

    def keys(self, assignment: Assignment, step: int) -> list[list[DirectionKey]]:
        """What names a step's directions, part by part."""
        run_seed = self.replica.replayer.run_seed
        keys = [DirectionKey(run_seed, seed) for seed in self.seeds(assignment, step)]
        ends = list(itertools.accumulate(assignment.probes))
        return [keys[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def look(self, assignment: Assignment, step: int, batch: Batch) -> Slopes:
        """The slopes of a step where the model stands."""
        return self.measured_by(assignment).slopes(self.objective.on(batch), self.keys(assignment, step))

    def measured_by(self, assignment: Assignment) -> PartedEstimator:
        """How the assignment's client measures.

        Raises:
            WireError: the server asks for other numbers of slopes than this client's configuration says.
        """
        estimator = self._measuring(assignment.client)
        if assignment.probes != estimator.probes:
            raise WireError(
                f"client {assignment.client} is asked for {list(assignment.probes)} slopes a step, part by part, but "
                f"its configuration says {list(estimator.probes)}; server and clients must agree on fwdllm.probes, "
                "fwdllm.parts and fwdllm.fleet"
            )
        return estimator

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
            backward_passes=sum(slopes.backward_passes for slopes in measured),
            values=np.concatenate([slopes.values for slopes in measured]) if dense is None else dense,
        )
