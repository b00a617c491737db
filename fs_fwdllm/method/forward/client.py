"""The client's half of the forward-gradient methods: all probes of a round at the one point where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fs_fwdllm.core.arrays import Array
from fs_fwdllm.core.direction import REFERENCE_SEED, AimedDirections, DirectionKey
from fs_fwdllm.core.replay import add_contributions
from fs_fwdllm.core.trainables import flatten
from fs_fwdllm.core.wire import Assignment, ClientUpdate
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import DivergenceError, WireError
from fs_fwdllm.estimator import Slopes
from fs_fwdllm.method.client import BatchSettings
from fs_fwdllm.method.direction_sets import OWN, DirectionSets
from fs_fwdllm.method.forward.directed_sampling import residual_slopes
from fs_fwdllm.method.probing import Measuring, ProbingWorker
from fs_fwdllm.method.replica import Replica, chosen_seeds, contributions_of
from fs_fwdllm.model.objective import Objective

__all__ = ["LookingWorker"]


class LookingWorker(ProbingWorker):
    """Measures slopes without moving.

    Args:
        directions: what ``measuring`` takes directions from, where assignments may say which; ``None`` where directions
            are as drawn.
    """

    def __init__(
        self,
        objective: Objective,
        replica: Replica,
        batches: BatchSettings,
        measuring: Measuring,
        directions: AimedDirections | None = None,
        *,
        dense_upload: bool = False,
        sets: DirectionSets = OWN,
    ) -> None:
        super().__init__(objective, replica, batches, measuring, dense_upload=dense_upload, sets=sets)
        self.directions = directions

    def train(self, assignment: Assignment, batches: Sequence[Batch]) -> ClientUpdate:
        measured = self.measure(assignment, batches)
        dense = self._dense_estimate(assignment, measured) if self._dense_upload else None
        return self.answer(assignment, batches, measured, dense)

    def side_by_side(self, clients: Sequence[int]) -> int:
        runs = [self._measuring(client).side_by_side for client in clients]
        if self.directions is not None or not all(runs):  # directions are chosen for a client at a time
            return 1
        return max(1, self.objective.meeting.largest // max(runs))

    def measure(self, assignment: Assignment, batches: Sequence[Batch]) -> list[Slopes]:
        """The slopes of every batch, all at the same point."""
        self.aim(assignment)
        return [self._slopes(assignment, step, batch) for step, batch in enumerate(batches)]

    def aim(self, assignment: Assignment) -> None:
        """Let the estimator's directions be those of the assignment."""
        if self.directions is None:
            if assignment.choices or assignment.reference_scale:
                raise WireError(
                    f"client {assignment.client} is asked for chosen directions, but its configuration has none; "
                    "server and clients must agree on fwdllm.sampling"
                )
            return
        self.directions.chosen = {}
        if assignment.choices:
            participant = (assignment.round_index, assignment.client, assignment.steps, *assignment.probes)
            tensors = len(self.trainables.tensors)
            self.directions.chosen = chosen_seeds([participant], assignment.choices, tensors)
        if assignment.reference_scale:
            self.directions.look_along(self._reference(), assignment.reference_scale)

    def _slopes(self, assignment: Assignment, step: int, batch: Batch) -> Slopes:
        """The slopes of a step; with a reference, the last probe looks along it and the others get what it leaves."""
        if not assignment.reference_scale:
            return self.look(assignment, step, batch)
        estimator = self.measured_by(assignment)
        (keys,), scale = self.keys(assignment, step), assignment.reference_scale  # of the one part that there is
        drawn, along = keys[:-1], DirectionKey(self.replica.replayer.run_seed, REFERENCE_SEED)
        slopes = estimator.slopes(self.objective.on(batch), [[*drawn, along]])
        distribution = self.replica.replayer.distribution
        return replace(slopes, values=residual_slopes(slopes.values, drawn, self._reference(), scale, distribution))

    def _reference(self) -> list[Array]:
        reference = self.replica.replayer.reference
        if reference is None:
            raise DivergenceError("the server asks for a look along a reference that this client does not have")
        return reference

    def _dense_estimate(self, assignment: Assignment, measured: Sequence[Slopes]) -> np.ndarray:
        """The pooled gradient estimate as one vector."""
        replayer = self.replica.replayer
        estimate = self.trainables.zeros_like()
        participant = (assignment.round_index, assignment.client, len(measured), *assignment.probes)
        divisors = np.repeat(assignment.probes, assignment.probes) * len(measured)
        rates = np.repeat(replayer.division.rates, assignment.probes)
        values = np.concatenate([slopes.values.astype(np.float64) / divisors * rates for slopes in measured])
        contributions = contributions_of(replayer, [participant], values.astype(np.float32))
        add_contributions(estimate, contributions, replayer.run_seed, replayer.distribution, division=replayer.division)
        return flatten(estimate)
