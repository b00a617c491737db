"""The server's half of methods whose clients step: every client's steps, unrolled and replayed at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fs_fwdllm.core.learning_rate import decay_factor
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.wire import Assignment, ClientUpdate, Participant, RoundUpdate, ScalarUpdate
from fs_fwdllm.method.direction_sets import merged
from fs_fwdllm.method.mezo.client import Coefficients, by_part
from fs_fwdllm.method.replay_server import ReplayServer
from fs_fwdllm.method.replica import apply_round_update, contributions_of, later_decay, probe_spreads
from fs_fwdllm.method.server import ServerSettings
from fs_fwdllm.method.update_norms import ScalarChange, scalar_distances
from fs_fwdllm.method.weights import part_shares

__all__ = ["SteppingServer"]


class SteppingServer(ReplayServer):
    """Turns the slopes of local steps into one replayable step: the weighted mean of where the clients end.

    Args:
        coefficients: how far a client's step is; the workers' own.
    """

    answer = ScalarUpdate

    def __init__(self, replayer: Replayer, settings: ServerSettings, coefficients: Coefficients) -> None:
        super().__init__(replayer, settings)
        self._coefficients = coefficients

    def expected_values(self, assignment: Assignment) -> int:
        return assignment.steps * sum(assignment.probes)

    def distances(self, accepted: list[ClientUpdate]) -> list[float]:
        return scalar_distances(self.replayer, [self._change(update) for update in accepted])

    def _step(self, accepted: list[ClientUpdate], weights: np.ndarray) -> RoundUpdate:
        values, decay = [], 0.0
        shares = self._part_shares(accepted, weights)
        for update, weight, own in zip(accepted, weights, shares, strict=True):
            values.append(self._scaled(update, own))
            decay += float(weight) * self._own_factor(update) ** self.settings.plans[update.client].steps
        participants, values = merged([self._participant(update) for update in accepted], values)
        factors = {self.settings.sets.owner(update.client): self._own_factor(update) for update in accepted}
        record = RoundUpdate(
            round_index=self.round_index,
            digest_before=self.digest,
            digest_after=self.digest,
            decay=decay,
            step_decay=tuple(factors[owner] for _, owner, *_ in participants) if self._decays else (),
            momentum=0.0,
            rate=self.settings.schedule(self.round_index),
            participants=tuple(participants),
            values=np.concatenate([block.ravel() for block in values]),
        )
        apply_round_update(self.replayer, record)
        return record

    @property
    def _decays(self) -> bool:
        """Whether what is added early in a round has decayed at its end."""
        return self.settings.weight_decay != 0.0

    def _participant(self, update: ClientUpdate) -> Participant:
        plan = self.settings.plans[update.client]
        return self.round_index, self.settings.sets.owner(update.client), plan.steps, *plan.probes

    def _part_shares(self, accepted: list[ClientUpdate], weights: np.ndarray) -> list[list[float]]:
        """Every client's weight in each part; where all send equally many slopes, the share of the samples."""
        counts = {update.client: self.settings.plans[update.client].probes for update in accepted}
        if len(set(counts.values())) <= 1:
            return [[float(weight)] * self.replayer.division.parts for weight in weights]
        samples = {update.client: update.samples for update in accepted}
        by_client: dict[int, list[float]] = {client: [] for client in samples}
        for part, spread in enumerate(probe_spreads(self.replayer)):
            slopes = {client: probes[part] for client, probes in counts.items()}
            known = spread if self.settings.weigh_by_precision else None
            shares = part_shares(samples, slopes, known, equal=self.settings.equal_weights)
            for client, share in shares.items():
                by_client[client].append(share)
        return [by_client[update.client] for update in accepted]

    def _scaled(self, update: ClientUpdate, weights: list[float] | None = None) -> np.ndarray:
        """A client's coefficients ``[steps, directions]``, each part's times the client's weight in it."""
        plan = self.settings.plans[update.client]
        slopes = np.asarray(update.values, dtype=np.float64).reshape(plan.steps, plan.directions)
        rate, division = self._own_rate(update), self.replayer.division
        return by_part(self._coefficients, slopes, rate, plan.probes, division, weights)

    def _own_rate(self, update: ClientUpdate) -> float:
        """The rate of the client's local steps."""
        return self.assigned[update.client].learning_rate

    def _own_factor(self, update: ClientUpdate) -> float:
        return decay_factor(self._own_rate(update), self.settings.weight_decay)

    def _change(self, update: ClientUpdate) -> ScalarChange:
        """The client's local steps, unrolled."""
        plan, factor = self.settings.plans[update.client], self._own_factor(update)
        coefficients = self._scaled(update).ravel()
        decayed = coefficients * later_decay(plan.steps, plan.directions, factor) if self._decays else None
        contributions = contributions_of(self.replayer, [self._participant(update)], coefficients)
        return ScalarChange(replace(contributions, decayed=decayed), decay=factor**plan.steps)
