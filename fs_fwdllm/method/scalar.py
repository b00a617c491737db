"""Forward-only methods: probes on the client, replay on the server.

One worker and one server serve every method whose uploads are slopes. They differ in one switch:

* **local steps** (MeZO): the client moves after every step, ``theta <- f theta - lr/P sum_p g_p z_p`` with decay factor
  ``f = 1 - lr * weight_decay``, and the server averages where the clients end. Unrolled, client ``k``'s end point is
  ``f^K theta - lr/P sum_s f^(K-1-s) sum_p g_sp z_sp``, so the weighted mean over clients is one decay factor and one
  coefficient per probe: the decay is exact although no parameter was sent.
* **pooled** (forward gradient): the client stays; all probes of all clients estimate one gradient at one point, and the
  server takes the step (:mod:`.pooled_step`), with momentum if asked, and may look several times first.

The last local step of a round never needs to be taken on the client: one local step moves nothing and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fs_fwdllm.core.direction import REFERENCE_SEED, AimedDirections, DirectionKey, direction_seed
from fs_fwdllm.core.replay import Contributions, Replayer, add_contributions
from fs_fwdllm.core.trainables import flatten
from fs_fwdllm.core.wire import Assignment, ClientUpdate, DenseUpdate, Participant, RoundUpdate, ScalarUpdate
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import DivergenceError
from fs_fwdllm.estimator import Estimator, Slopes
from fs_fwdllm.method.client import BatchSettings, ClientWorker
from fs_fwdllm.method.forward.directed_sampling import residual_slopes
from fs_fwdllm.method.forward.gate import Decision
from fs_fwdllm.method.forward.pacing import Pacing
from fs_fwdllm.method.forward.pooled_step import PooledStep, TakenStep, decay_factor
from fs_fwdllm.method.replica import Replica, apply_round_update, chosen_seeds, later_decay, seeds_of
from fs_fwdllm.method.server import RoundReport, RoundServer, ServerSettings
from fs_fwdllm.method.update_norms import ScalarChange, scalar_distances
from fs_fwdllm.model.objective import Objective

__all__ = ["ScalarServer", "ScalarSettings", "ScalarWorker", "decay_factor"]


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
    """Measures slopes along seeded directions.

    Args:
        directions: what ``estimator`` takes directions from, where assignments may say which; ``None`` where directions
            are as drawn.
    """

    def __init__(
        self,
        objective: Objective,
        replica: Replica,
        batches: BatchSettings,
        estimator: Estimator,
        settings: ScalarSettings,
        directions: AimedDirections | None = None,
    ) -> None:
        super().__init__(objective, replica, batches)
        self._estimator = estimator
        self._directions = directions
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
        self._aim(assignment)
        for step, batch in enumerate(batches):
            seeds = self._seeds(assignment, step)
            keys = [DirectionKey(self.replica.replayer.run_seed, seed) for seed in seeds]
            measured.append(self._slopes(assignment, batch, keys))
            if self._settings.local_steps and (last_move or step + 1 < len(batches)):
                self._move(assignment, seeds, measured[-1])
        return measured

    def _aim(self, assignment: Assignment) -> None:
        """Let the estimator's directions be those of the assignment."""
        if self._directions is None:
            return
        self._directions.chosen = {}
        if assignment.choices:
            participant = (assignment.round_index, assignment.client, assignment.steps, assignment.probes)
            tensors = len(self.trainables.tensors)
            self._directions.chosen = chosen_seeds([participant], assignment.choices, tensors)
        if assignment.reference_scale:
            self._directions.look_along(self._reference(), assignment.reference_scale)

    def _slopes(self, assignment: Assignment, batch: Batch, keys: list[DirectionKey]) -> Slopes:
        """The slopes of a step; with a reference, the last probe looks along it and the others get what it leaves."""
        if not assignment.reference_scale:
            return self._estimator.slopes(self.objective.on(batch), keys)
        drawn, scale = keys[:-1], assignment.reference_scale
        along = DirectionKey(self.replica.replayer.run_seed, REFERENCE_SEED)
        slopes = self._estimator.slopes(self.objective.on(batch), [*drawn, along])
        distribution = self.replica.replayer.distribution
        return replace(slopes, values=residual_slopes(slopes.values, drawn, self._reference(), scale, distribution))

    def _reference(self) -> list[torch.Tensor]:
        reference = self.replica.replayer.reference
        if reference is None:
            raise DivergenceError("the server asks for a look along a reference that this client does not have")
        return reference

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
        self,
        replayer: Replayer,
        settings: ServerSettings,
        *,
        local_steps: bool,
        momentum: float = 0.0,
        pacing: Pacing | None = None,
    ) -> None:
        super().__init__(replayer, settings)
        self._local_steps = local_steps
        #: Of the methods whose clients do not move.
        self.pooled = PooledStep(
            replayer,
            settings.schedule,
            weight_decay=settings.weight_decay,
            equal_weights=settings.equal_weights,
            momentum=momentum,
            pacing=pacing or Pacing(),
        )
        self._decision: Decision | None = None
        self._step_norm: float | None = None

    @property
    def taken(self) -> TakenStep | None:
        return self.pooled.taken

    def sampling_index_for(self, round_index: int) -> int:
        first = self.pooled.pool.first_round
        return round_index if first is None else first

    def assign(self, round_index: int, clients: Sequence[int]) -> dict[int, Assignment]:
        """As :meth:`RoundServer.assign`; with discriminative sampling, assignments say where to look."""
        self._assigned = self.pooled.equip(super().assign(round_index, clients))
        return dict(self._assigned)

    def _expected_values(self, assignment: Assignment) -> int:
        return assignment.steps * assignment.probes

    def _step_due(self, accepted: list[ClientUpdate]) -> bool:
        if self._local_steps:
            return bool(accepted)
        self.pooled.collect(accepted, self._assigned)
        self._decision = self.pooled.decide(self.round_index, answered=bool(accepted))
        return self._decision is not None and self._decision.steps

    def _step(self, accepted: list[ClientUpdate], weights: np.ndarray) -> RoundUpdate:
        if not self._local_steps:
            record, self._step_norm = self.pooled.take(self.round_index, self.digest)
            return record
        rate = self.settings.schedule(self.round_index)
        coefficients, decay = [], 0.0
        for update, weight in zip(accepted, weights, strict=True):
            plan = self.settings.plans[update.client]
            slopes = np.asarray(update.values, dtype=np.float64).reshape(plan.steps, plan.probes)
            coefficients.append(-self._own_rate(update) * weight / plan.probes * slopes)
            decay += float(weight) * self._own_factor(update) ** plan.steps
        record = RoundUpdate(
            round_index=self.round_index,
            digest_before=self.digest,
            digest_after=self.digest,
            decay=decay,
            step_decay=tuple(map(self._own_factor, accepted)) if self._decays_within_rounds else (),
            momentum=0.0,
            rate=rate,
            participants=tuple(self._participant(update) for update in accepted),
            values=np.concatenate([block.ravel() for block in coefficients]),
        )
        apply_round_update(self.replayer, record)
        return record

    def _participant(self, update: ClientUpdate) -> Participant:
        plan = self.settings.plans[update.client]
        return self.round_index, update.client, plan.steps, plan.probes

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
        seeds = seeds_of([self._participant(update)])
        return ScalarChange(Contributions(seeds, coefficients, decayed), decay=factor**plan.steps)

    def _report(self, accepted: list[ClientUpdate], rejected: dict[int, str]) -> RoundReport:
        report = super()._report(accepted, rejected)
        if self._local_steps:
            return report
        decision, step_norm = self._decision, self._step_norm
        self._decision = self._step_norm = None
        report.pooling = self.pooled.report(decision, step_norm)
        if decision is not None and decision.steps:
            self.pooled.pool.clear()
        return report

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return super().state_tensors() | self.pooled.state_tensors()

    def state_numbers(self) -> dict[str, object]:
        return super().state_numbers() | self.pooled.state_numbers()

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        super().load_state(tensors, numbers)
        self.pooled.load_state(tensors, numbers)
