"""The server's half of methods whose clients step: every client's steps, unrolled and replayed at once."""

from __future__ import annotations

import numpy as np

from fs_fwdllm.core.learning_rate import decay_factor
from fs_fwdllm.core.replay import Contributions, Replayer
from fs_fwdllm.core.wire import Assignment, ClientUpdate, Participant, RoundUpdate, ScalarUpdate
from fs_fwdllm.method.mezo.client import Coefficients
from fs_fwdllm.method.replay_server import ReplayServer
from fs_fwdllm.method.replica import apply_round_update, later_decay, seeds_of
from fs_fwdllm.method.server import ServerSettings
from fs_fwdllm.method.update_norms import ScalarChange, scalar_distances

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
        return assignment.steps * assignment.probes

    def distances(self, accepted: list[ClientUpdate]) -> list[float]:
        return scalar_distances(self.replayer, [self._change(update) for update in accepted])

    def _step(self, accepted: list[ClientUpdate], weights: np.ndarray) -> RoundUpdate:
        values, decay = [], 0.0
        for update, weight in zip(accepted, weights, strict=True):
            values.append(self._coefficients(self._slopes(update), self._own_rate(update) * float(weight)))
            decay += float(weight) * self._own_factor(update) ** self.settings.plans[update.client].steps
        record = RoundUpdate(
            round_index=self.round_index,
            digest_before=self.digest,
            digest_after=self.digest,
            decay=decay,
            step_decay=tuple(map(self._own_factor, accepted)) if self._decays else (),
            momentum=0.0,
            rate=self.settings.schedule(self.round_index),
            participants=tuple(self._participant(update) for update in accepted),
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
        return self.round_index, update.client, plan.steps, plan.probes

    def _slopes(self, update: ClientUpdate) -> np.ndarray:
        """What a client measured, float64 ``[steps, probes]``."""
        plan = self.settings.plans[update.client]
        return np.asarray(update.values, dtype=np.float64).reshape(plan.steps, plan.probes)

    def _own_rate(self, update: ClientUpdate) -> float:
        """The rate of the client's local steps."""
        return self.assigned[update.client].learning_rate

    def _own_factor(self, update: ClientUpdate) -> float:
        return decay_factor(self._own_rate(update), self.settings.weight_decay)

    def _change(self, update: ClientUpdate) -> ScalarChange:
        """The client's local steps, unrolled."""
        plan, factor = self.settings.plans[update.client], self._own_factor(update)
        coefficients = self._coefficients(self._slopes(update), self._own_rate(update)).ravel()
        decayed = coefficients * later_decay(plan.steps, plan.probes, factor) if self._decays else None
        seeds = seeds_of([self._participant(update)])
        return ScalarChange(Contributions(seeds, coefficients, decayed), decay=factor**plan.steps)
