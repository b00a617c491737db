"""The pooled step of the forward-gradient methods: collect slopes, ask the gate, step on what they estimate.

A server step begins with the first round that puts an answer into the empty pool and ends with the round in which the
gate lets it through (or the repeat limit, or the end of training does). The rounds between are *waiting*: parameters
and digest stay as they are, so clients need no record of them. What is carried from round to round is the pool."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fs_fwdllm.core.learning_rate import Schedule, decay_factor
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.wire import Assignment, ClientUpdate, RoundUpdate
from fs_fwdllm.method.direction_sets import OWN, DirectionSets
from fs_fwdllm.method.forward.gate import Decision
from fs_fwdllm.method.forward.pacing import Pacing
from fs_fwdllm.method.forward.pool import Pool, PoolEntry
from fs_fwdllm.method.forward.server_optimizer import ServerOptimizer
from fs_fwdllm.method.forward.step_control import norm_of
from fs_fwdllm.method.replica import apply_round_update, probe_spreads

__all__ = ["PooledStep", "TakenStep"]


@dataclass(frozen=True)
class TakenStep:
    """A step as it was taken, for comparison with backpropagation.

    Attributes:
        start: the parameters it was estimated at.
        estimate: the pooled gradient estimate, before step control and optimiser.
        weights: of the clients whose mini-batches it is about.
        batch_index: the round that names those mini-batches.
    """

    start: list[torch.Tensor]
    estimate: list[torch.Tensor]
    weights: dict[int, float]
    batch_index: int


class PooledStep:
    """Paces and takes the steps of a server whose clients do not move.

    Args:
        replayer: the server's own.
        schedule, weight_decay, equal_weights, weigh_by_precision: as in
            :class:`~fs_fwdllm.method.server.ServerSettings`.
        optimizer: what the server steps with on the pooled estimate.
        pacing: gate, sampling and step control.
        sets: whose directions clients look along.
    """

    def __init__(
        self,
        replayer: Replayer,
        schedule: Schedule,
        *,
        weight_decay: float,
        equal_weights: bool,
        optimizer: ServerOptimizer,
        pacing: Pacing,
        weigh_by_precision: bool = True,
        sets: DirectionSets = OWN,
    ) -> None:
        spreads = probe_spreads(replayer) if weigh_by_precision else None
        self.pool = Pool(equal_weights, replayer.division.rates, spreads, sets)
        self.server_steps = 0
        self.taken: TakenStep | None = None
        self._replayer = replayer
        self._schedule = schedule
        self._weight_decay = weight_decay
        self._optimizer = optimizer
        self.pacing = pacing
        self._initial_norm = norm_of(replayer.trainables.tensors)

    def equip(self, assigned: Mapping[int, Assignment]) -> dict[int, Assignment]:
        """Assignments that say where to look, where directions are sampled discriminatively."""
        sign = 1.0 if self._optimizer.takes_gradient else -1.0
        return self.pacing.sampling.equip(assigned, self._replayer, server_step=self.server_steps, sign=sign)

    def collect(self, accepted: Sequence[ClientUpdate], assigned: Mapping[int, Assignment]) -> None:
        """Put a round's answers into the pool."""
        self.taken = None
        self.pool.add([_entry(update, assigned[update.client]) for update in accepted])

    def decide(self, round_index: int, *, answered: bool) -> Decision | None:
        """What the gate says after a round; ``None`` where there is nothing (new) to judge."""
        last = round_index + 1 >= self._schedule.rounds
        if not self.pool.entries or not (answered or last):
            return None
        return self.pacing.decide(self.pool, self._replayer, last=last)

    def take(self, round_index: int, digest: bytes) -> tuple[RoundUpdate, float | None]:
        """Step on the pool. Returns the record (digests as before the step) and, if asked for, the step's norm."""
        record = self._record(round_index, digest)
        trainables = self._replayer.trainables
        start = trainables.copy_values() if self.pacing.report_norms or self.pacing.report_cosine else []
        if self.pacing.report_cosine:
            estimate, weights = self.pool.estimate(self._replayer), self.pool.client_weights()
            assert self.pool.first_round is not None
            self.taken = TakenStep(start, estimate, weights, self.pool.first_round)
        apply_round_update(self._replayer, record)
        self.server_steps += 1
        if not self.pacing.report_norms:
            return record, None
        return record, norm_of(here.detach() - there for here, there in zip(trainables.tensors, start, strict=True))

    def _record(self, round_index: int, digest: bytes) -> RoundUpdate:
        rate = self._schedule(round_index)
        numbers = self._optimizer.numbers(self.server_steps + 1)
        scale = (1.0 if self._optimizer.takes_gradient else -rate) * self.pacing.control(self.pool, self._replayer)
        participants, coefficients = self.pool.merged(scale)
        return RoundUpdate(
            round_index=round_index,
            digest_before=digest,
            digest_after=digest,
            decay=decay_factor(rate, self._weight_decay),
            step_decay=(),
            momentum=numbers.momentum,
            rate=rate,
            adam=numbers.adam,
            participants=tuple(participants),
            keeps_reference=self.pacing.sampling.keeps_reference,
            reference=self.pool.reference_coefficient(self._replayer.trainables.count, scale),
            choices=self.pool.choices,
            values=np.concatenate([block.ravel() for block in coefficients]),
        )

    def columns(self, decision: Decision | None, step_norm: float | None) -> dict[str, object]:
        """What to say about a round: nothing for the plain method.

        ``server_step`` counts steps taken so far, ``repeats`` the pool's rounds beyond the first, ``pooled_probes`` the
        random directions in it; ``gate`` is ``accepted``, ``waiting``, ``limit`` or ``end`` (see
        :class:`~fs_fwdllm.method.forward.gate.Decision`), its statistic ``None`` while it is infinite; ``norm_growth``
        is ``|theta| / |theta_0|``; ``step_norm``, where asked for, how far the parameters moved.
        """
        if not self.pacing.reports:
            return {}
        growth = norm_of(self._replayer.trainables.tensors) / self._initial_norm if self._initial_norm else math.nan
        gated = decision is not None and self.pacing.gate is not None
        columns: dict[str, object] = {
            "server_step": self.server_steps,
            "repeats": max(0, self.pool.exchanges - 1),
            "pooled_probes": self.pool.directions,
            "gate": "waiting" if decision is None else decision.outcome,
            "norm_growth": growth,
        }
        if self.pacing.gate is not None:
            finite = gated and decision is not None and math.isfinite(decision.statistic)
            columns["gate_statistic"] = decision.statistic if finite and decision is not None else None
            columns["gate_threshold"] = self.pacing.gate.threshold
        return columns if step_norm is None else columns | {"step_norm": step_norm}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return self.pool.state_tensors()

    def state_numbers(self) -> dict[str, object]:
        return {"server_steps": self.server_steps, "initial_norm": self._initial_norm} | self.pool.state_numbers()

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        """Inverse of :meth:`state_tensors` and :meth:`state_numbers`."""
        self.server_steps = int(str(numbers["server_steps"]))
        self._initial_norm = float(str(numbers["initial_norm"]))
        self.pool.load_state(tensors, numbers)


def _entry(update: ClientUpdate, work: Assignment) -> PoolEntry:
    slopes = np.asarray(update.values, dtype=np.float32).reshape(work.steps, -1)
    entry = PoolEntry(
        update.round_index, update.client, update.samples, slopes, choices=work.choices, probes=work.probes
    )
    if not work.reference_scale:
        return entry
    drawn, along = np.ascontiguousarray(slopes[:, :-1]), np.ascontiguousarray(slopes[:, -1])
    return replace(entry, slopes=drawn, along_reference=along, scale=work.reference_scale, probes=())
