"""Forward-only methods: probes on the client, replay on the server.

One worker and one server serve every method whose uploads are slopes. They differ in one switch:

* **local steps** (MeZO): the client moves after every step, ``theta <- f theta - lr/P sum_p g_p z_p`` with decay factor
  ``f = 1 - lr * weight_decay``, and the server averages where the clients end. Unrolled, client ``k``'s end point is
  ``f^K theta - lr/P sum_s f^(K-1-s) sum_p g_sp z_sp``, so the weighted mean over clients is one decay factor and one
  coefficient per probe: the decay is exact although no parameter was sent.
* **pooled** (forward gradient): the client stays; all probes of all clients estimate one gradient at one point, and the
  server takes the step, with momentum if asked.

The last local step of a round never needs to be taken on the client: one local step moves nothing and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fs_fwdllm.data.types import Batch
from fs_fwdllm.direction import DirectionKey, direction_seed
from fs_fwdllm.estimator import Estimator, Slopes
from fs_fwdllm.method.client import BatchSettings, ClientWorker
from fs_fwdllm.method.replica import Replica, apply_round_update, later_decay, seeds_of
from fs_fwdllm.method.server import RoundServer, ServerSettings
from fs_fwdllm.method.update_norms import ScalarChange, scalar_distances
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.replay import Contributions, Replayer, add_contributions
from fs_fwdllm.trainables import flatten
from fs_fwdllm.wire import Assignment, ClientUpdate, DenseUpdate, RoundUpdate, ScalarUpdate

__all__ = ["ScalarServer", "ScalarSettings", "ScalarWorker", "decay_factor"]


def decay_factor(learning_rate: float, weight_decay: float) -> float:
    """``1 - lr * weight_decay``, the factor of one step."""
    return 1.0 - learning_rate * weight_decay


@dataclass(frozen=True)
class ScalarSettings:
    """What distinguishes forward-only methods.

    Attributes:
        local_steps: the client moves after every step (MeZO) instead of pooling all probes at one point.
        dense_upload: send the change (or the gradient estimate) instead of the slopes, as the published systems do.
        weight_decay: decoupled decay of the local steps.
    """

    local_steps: bool
    dense_upload: bool = False
    weight_decay: float = 0.0


class ScalarWorker(ClientWorker):
    """Measures slopes along seeded directions."""

    def __init__(
        self,
        objective: Objective,
        replica: Replica,
        batches: BatchSettings,
        estimator: Estimator,
        settings: ScalarSettings,
    ) -> None:
        super().__init__(objective, replica, batches)
        self._estimator = estimator
        self._settings = settings

    def _train(self, assignment: Assignment, batches: Sequence[Batch]) -> ClientUpdate:
        dense = self._settings.dense_upload
        if self._settings.local_steps and (len(batches) > 1 or dense):
            with self._excursion() as start:
                measured = self._measure(assignment, batches, last_move=dense)
                values = self._change_since(start) if dense else _slopes_of(measured)
        else:
            measured = self._measure(assignment, batches, last_move=False)
            values = self._dense_estimate(assignment, measured) if dense else _slopes_of(measured)
        return self._answer(assignment, batches, measured, values)

    def _measure(self, assignment: Assignment, batches: Sequence[Batch], *, last_move: bool) -> list[Slopes]:
        """Slopes of every step; with local steps the trainables move after each (after the last if asked)."""
        measured: list[Slopes] = []
        for step, batch in enumerate(batches):
            seeds = self._seeds(assignment, step)
            keys = [DirectionKey(self.replica.replayer.run_seed, seed) for seed in seeds]
            measured.append(self._estimator.slopes(self.objective.on(batch), keys))
            if self._settings.local_steps and (last_move or step + 1 < len(batches)):
                self._move(assignment, seeds, measured[-1])
        return measured

    def _seeds(self, assignment: Assignment, step: int) -> list[int]:
        return [
            direction_seed(assignment.round_index, assignment.client, step, probe) for probe in range(assignment.probes)
        ]

    def _move(self, assignment: Assignment, seeds: list[int], slopes: Slopes) -> None:
        """One local step, taken on the device with the same arithmetic as a replay."""
        rate = assignment.learning_rate
        coefficients = -rate * slopes.values.astype(np.float64) / len(seeds)
        self.replica.replayer.apply(
            Contributions(seeds, coefficients.astype(np.float32)),
            decay=decay_factor(rate, self._settings.weight_decay),
            momentum=0.0,
            rate=0.0,
        )

    def _dense_estimate(self, assignment: Assignment, measured: list[Slopes]) -> np.ndarray:
        """The pooled gradient estimate as one vector."""
        replayer = self.replica.replayer
        estimate = [torch.zeros_like(tensor.detach()) for tensor in self.trainables.tensors]
        for step, slopes in enumerate(measured):
            coefficients = slopes.values.astype(np.float64) / (len(slopes.values) * len(measured))
            contributions = Contributions(self._seeds(assignment, step), coefficients.astype(np.float32))
            add_contributions(estimate, contributions, replayer.run_seed, replayer.distribution)
        return flatten(estimate)

    def _answer(
        self, assignment: Assignment, batches: Sequence[Batch], measured: list[Slopes], values: np.ndarray
    ) -> ClientUpdate:
        record = DenseUpdate if self._settings.dense_upload else ScalarUpdate
        return record(
            round_index=assignment.round_index,
            client=assignment.client,
            digest=assignment.digest,
            samples=sum(len(batch) for batch in batches),
            loss=float(np.mean([slopes.loss for slopes in measured])),
            forward_passes=sum(slopes.forward_passes for slopes in measured),
            backward_passes=0,
            values=values,
        )


def _slopes_of(measured: list[Slopes]) -> np.ndarray:
    return np.concatenate([slopes.values for slopes in measured])


class ScalarServer(RoundServer):
    """Turns slopes into one replayable step."""

    answer = ScalarUpdate

    def __init__(
        self, replayer: Replayer, settings: ServerSettings, *, local_steps: bool, momentum: float = 0.0
    ) -> None:
        super().__init__(replayer, settings)
        self._local_steps = local_steps
        self._momentum = momentum

    def _expected_values(self, assignment: Assignment) -> int:
        return assignment.steps * assignment.probes

    def _step(self, accepted: list[ClientUpdate], weights: np.ndarray) -> RoundUpdate:
        rate = self.settings.schedule(self.round_index)
        coefficients, decay = [], 0.0
        for update, weight in zip(accepted, weights, strict=True):
            plan = self.settings.plans[update.client]
            slopes = np.asarray(update.values, dtype=np.float64).reshape(plan.steps, plan.probes)
            if self._local_steps:
                coefficients.append(-self._own_rate(update) * weight / plan.probes * slopes)
                decay += float(weight) * self._own_factor(update) ** plan.steps
            else:
                sign = 1.0 if self._momentum else -rate
                coefficients.append(sign * weight / slopes.size * slopes)
        record = RoundUpdate(
            round_index=self.round_index,
            digest_before=self.digest,
            digest_after=self.digest,
            decay=decay if self._local_steps else decay_factor(rate, self.settings.weight_decay),
            step_decay=tuple(map(self._own_factor, accepted)) if self._decays_within_rounds else (),
            momentum=self._momentum,
            rate=rate,
            participants=tuple(self._participant(update) for update in accepted),
            values=np.concatenate([block.ravel() for block in coefficients]),
        )
        apply_round_update(self.replayer, record)
        return record

    def _participant(self, update: ClientUpdate) -> tuple[int, int, int]:
        plan = self.settings.plans[update.client]
        return update.client, plan.steps, plan.probes

    @property
    def _decays_within_rounds(self) -> bool:
        return self._local_steps and self.settings.weight_decay != 0.0

    def _own_rate(self, update: ClientUpdate) -> float:
        """The rate of the client's local steps."""
        return self._assigned[update.client].learning_rate

    def _own_factor(self, update: ClientUpdate) -> float:
        return decay_factor(self._own_rate(update), self.settings.weight_decay)

    def _distances(self, accepted: list[ClientUpdate]) -> list[float]:
        return scalar_distances(self.replayer, [self._change(update) for update in accepted])

    def _change(self, update: ClientUpdate) -> ScalarChange:
        """The client's local steps, unrolled."""
        plan, factor = self.settings.plans[update.client], self._own_factor(update)
        coefficients = -self._own_rate(update) / plan.probes * np.asarray(update.values, dtype=np.float64)
        decayed = coefficients * later_decay(plan.steps, plan.probes, factor) if self._decays_within_rounds else None
        seeds = seeds_of(self.round_index, [self._participant(update)])
        return ScalarChange(Contributions(seeds, coefficients, decayed), decay=factor**plan.steps)
