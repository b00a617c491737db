"""The server's half of every method: assign work, judge what comes back, take one step.

:class:`RoundServer` holds what all methods share: the trainables, who knows which round, and the rules by which an
update is believed. A method adds one thing, :meth:`RoundServer._step`: how accepted updates become new parameters, and
the record that lets every replica follow.

An update is used only if it was asked for, answers this round, refers to the digest the round started from, has the
right length and is finite; the first answer counts. Anything else is left out and named in the report, and the round
goes on with the rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables, flatten
from fs_fwdllm.core.wire import Assignment, ClientUpdate, DenseState, RoundUpdate, encode
from fs_fwdllm.errors import ConfigError, TrainingStalledError, UpdateRejected
from fs_fwdllm.method.catch_up import CatchUpLog
from fs_fwdllm.method.client_rates import ClientRates, StrategySettings
from fs_fwdllm.method.forward.pacing import PoolingReport
from fs_fwdllm.method.forward.pooled_step import TakenStep

__all__ = ["RoundReport", "RoundServer", "ServerSettings", "WorkPlan"]


@dataclass(frozen=True)
class WorkPlan:
    """How much a client does in a round: ``steps`` batches with ``probes`` directions each (0 without directions)."""

    steps: int
    probes: int


@dataclass(frozen=True)
class ServerSettings:
    """What a server needs besides the trainables.

    Attributes:
        plans: per client, the work of one round.
        schedule: learning rate of a round.
        weight_decay: decoupled decay per unit of learning rate.
        equal_weights: weigh clients equally instead of by samples.
        max_failed_rounds: rounds in a row without a usable update before training stops.
        strategy: how each client's learning rate follows from the schedule's.
    """

    plans: dict[int, WorkPlan]
    schedule: Schedule
    weight_decay: float = 0.0
    equal_weights: bool = False
    max_failed_rounds: int = 3
    strategy: StrategySettings = field(default_factory=StrategySettings)


@dataclass
class RoundReport:
    """What a round did.

    Attributes:
        digest: of the server's trainables (and momentum and reference, where there are such) after the round.
        train_loss: sample-weighted mean of the accepted clients' losses; NaN without any.
        losses, learning_rates: per accepted client.
        rejected: ``{client: reason}`` of updates that were left out, and of clients that did not answer.
        zero_share: share of accepted values that are exactly zero; near one for slopes, the radius is below what the
            base's dtype resolves.
        pooling: of a server step that is paced (gate, sampling, step control).
        details: further columns of the round's line in ``metrics.jsonl`` (JSON values).
    """

    round_index: int
    digest: bytes
    train_loss: float
    losses: dict[int, float] = field(default_factory=dict)
    learning_rates: dict[int, float] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    zero_share: float = 0.0
    forward_passes: int = 0
    backward_passes: int = 0
    pooling: PoolingReport | None = None
    details: dict[str, object] = field(default_factory=dict)


class RoundServer(ABC):
    """Two verbs: :meth:`assign` and :meth:`absorb`.

    Args:
        replayer: the server's own trainables and momentum.
        settings: see :class:`ServerSettings`.
    """

    #: The record a client of this method answers with.
    answer: type[ClientUpdate]
    #: Whether work that nobody answered is given to others, so that a round may close without any answer.
    reassigns = False

    @property
    def taken(self) -> TakenStep | None:
        """The step of the round that was closed last, where it is kept for a diagnosis."""
        return None

    def __init__(self, replayer: Replayer, settings: ServerSettings) -> None:
        self.replayer = replayer
        self.settings = settings
        self.round_index = 0
        self.failed_rounds = 0
        self._next_round = 0
        self._digest = self.replayer.digest()
        self._assigned: dict[int, Assignment] = {}
        self._rates = ClientRates(settings.strategy)
        self._catch_up = CatchUpLog(self.trainables.bytes)
        self._dense_frame: bytes | None = None

    @property
    def trainables(self) -> Trainables:
        return self.replayer.trainables

    @property
    def digest(self) -> bytes:
        return self._digest

    def sampling_index_for(self, round_index: int) -> int:
        """The round whose sample of clients (and whose mini-batches) ``round_index`` uses.

        It is ``round_index`` itself unless a server step that began earlier is still looking.
        """
        return round_index

    def wanted_clients(self, round_index: int, available: Sequence[int]) -> list[int] | None:
        """Whom the method itself wants to ask in a round; ``None`` leaves the choice to the host's sampling."""
        return None

    def assign(self, round_index: int, clients: Sequence[int]) -> dict[int, Assignment]:
        """Open a round. Each client's assignment carries what it needs to reach the server's current parameters."""
        self.round_index = self._next_round = round_index
        rates = self._rates.rates(self.settings.schedule(round_index), round_index, clients)
        self._assigned = {
            client: Assignment(
                round_index=round_index,
                client=client,
                digest=self._digest,
                learning_rate=rates[client],
                steps=self.settings.plans[client].steps,
                probes=self.settings.plans[client].probes,
                batch_index=self.sampling_index_for(round_index),
                catch_up=self._catch_up.frames_for(client, self.dense_frame),
            )
            for client in sorted(clients)
        }
        return dict(self._assigned)

    def current_state_for(self, client: int) -> Assignment:
        """An assignment of no work: what ``client`` needs to hold the server's present parameters."""
        return Assignment(
            round_index=self.round_index,
            client=client,
            digest=self._digest,
            learning_rate=0.0,
            steps=0,
            probes=0,
            batch_index=self.round_index,
            catch_up=self._catch_up.frames_for(client, self.dense_frame),
        )

    def reassign(self, client: int) -> Assignment:
        """The open round's assignment anew, for a client that asks again (it may have been restarted)."""
        given = self._assigned[client]
        self._assigned[client] = replace(given, catch_up=self._catch_up.frames_for(client, self.dense_frame))
        return self._assigned[client]

    def note_holds(self, client: int, digest: bytes) -> None:
        """``client`` says that it holds the parameters of ``digest``: from there it needs only the records since."""
        self._catch_up.note_holds(client, digest, self._digest, self._next_round)

    def note_parameters_changed(self) -> None:
        """The trainables were set from outside (before the first round): take the digest anew."""
        self._digest = self.replayer.digest()
        self._dense_frame = None

    def absorb(self, updates: Iterable[ClientUpdate]) -> RoundReport:
        """Close the round with the answers that came, in any order; missing ones are reported as ``no_answer``.

        Raises:
            TrainingStalledError: no usable update for ``max_failed_rounds`` rounds in a row, or a step of finite
                values that leaves parameters that are not.
        """
        accepted: dict[int, ClientUpdate] = {}
        rejected: dict[int, str] = {}
        for update in updates:
            try:
                self._judge(update, accepted)
            except UpdateRejected as refusal:
                rejected.setdefault(update.client, refusal.reason)
            else:
                accepted[update.client] = update
        for client in self._assigned:
            if client not in accepted:
                rejected.setdefault(client, "no_answer")
        # Only an answer proves that a client holds the round's parameters: what was sent may never have arrived.
        self._catch_up.note_started(accepted, self.round_index)
        self._next_round = self.round_index + 1
        ordered = [accepted[client] for client in sorted(accepted)]
        self._count_failures(ordered, rejected)
        if self._step_due(ordered):
            reports = self._client_reports(ordered)  # of changes from where the round started, so before the step
            self._advance(ordered)
            self._rates.complete_round(reports)
        return self._report(ordered, rejected)

    def _step_due(self, accepted: list[ClientUpdate]) -> bool:
        """Take in the accepted updates; whether the server steps at the end of this round."""
        return bool(accepted)

    @abstractmethod
    def _step(self, accepted: list[ClientUpdate], weights: np.ndarray) -> RoundUpdate | None:
        """Move the trainables by the accepted updates (ordered by client; float64 weights that sum to one).

        Returns:
            The record by which replicas rebuild the step (digests are filled in later), or ``None`` if they need the
            parameters themselves.
        """

    @abstractmethod
    def _expected_values(self, assignment: Assignment) -> int:
        """Payload length of a correct answer."""

    def _distances(self, accepted: list[ClientUpdate]) -> list[float]:
        """How far each client's change is from the mean change (see :mod:`fs_fwdllm.method.update_norms`)."""
        raise ConfigError(
            f"train.train_strategy 'model-diff': a {type(self).__name__} does not learn how far its clients moved; set "
            "round-wise, five-round, random or frozen"
        )

    def _client_reports(self, accepted: list[ClientUpdate]) -> dict[int, float]:
        """What the learning-rate strategy looks back on. A single change is the mean change: that says nothing."""
        if not self._rates.needs_distances:
            return {update.client: update.loss for update in accepted}
        if len(accepted) == 1:
            return {}
        clients = [update.client for update in accepted]
        return dict(zip(clients, self._distances(accepted), strict=True))

    def _judge(self, update: ClientUpdate, accepted: dict[int, ClientUpdate]) -> None:
        client = update.client
        assignment = self._assigned.get(client)
        if assignment is None:
            raise UpdateRejected("not_assigned", f"client {client} has no work in round {self.round_index}")
        if client in accepted:
            raise UpdateRejected("duplicate", f"client {client} answered round {self.round_index} twice")
        if update.round_index != self.round_index:
            raise UpdateRejected("other_round", f"client {client} answered round {update.round_index}")
        if update.digest != self._digest:
            raise UpdateRejected("other_digest", f"client {client} started from other parameters")
        if not isinstance(update, self.answer):
            raise UpdateRejected("other_kind", f"client {client} sent a {type(update).__name__}")
        if update.samples < 1:
            raise UpdateRejected("no_samples", f"client {client} reports {update.samples} samples")
        self._judge_values(update, assignment)

    def _judge_values(self, update: ClientUpdate, assignment: Assignment) -> None:
        """Length and finiteness of what was sent."""
        if len(update.values) != self._expected_values(assignment):
            raise UpdateRejected("wrong_length", f"client {update.client} sent {len(update.values)} values")
        if not (np.isfinite(update.values).all() and math.isfinite(update.loss)):
            raise UpdateRejected("not_finite", f"client {update.client} sent NaN or infinity")

    def _count_failures(self, accepted: list[ClientUpdate], rejected: dict[int, str]) -> None:
        self.failed_rounds = 0 if accepted else self.failed_rounds + 1
        if self.failed_rounds >= self.settings.max_failed_rounds:
            raise TrainingStalledError(
                f"round {self.round_index}: no usable update for {self.failed_rounds} rounds in a row "
                f"(last reasons: {rejected}); with 'not_finite' lower train.optimizer.lr or raise fwdllm.radius. "
                f"The last checkpoint is intact; fwdllm.max_failed_rounds is {self.settings.max_failed_rounds}"
            )

    def _advance(self, accepted: list[ClientUpdate]) -> None:
        before = self._digest
        record = self._step(accepted, self._weights(accepted))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.trainables.tensors):
            raise TrainingStalledError(
                f"round {self.round_index}: the step left the range of float32; lower train.optimizer.lr. The last "
                "checkpoint is intact"
            )
        self._digest = self.replayer.digest()
        self._dense_frame = None
        if record is None:
            self._catch_up.forget_until(self.round_index)
            return
        finished = replace(record, digest_before=before, digest_after=self._digest)
        self._catch_up.append(self.round_index, encode(finished))

    def _weights(self, accepted: list[ClientUpdate]) -> np.ndarray:
        samples = np.array([update.samples for update in accepted], dtype=np.float64)
        if self.settings.equal_weights:
            samples = np.ones_like(samples)
        weights: np.ndarray = samples / samples.sum()
        return weights

    def _report(self, accepted: list[ClientUpdate], rejected: dict[int, str]) -> RoundReport:
        samples = sum(update.samples for update in accepted)
        # Weights first: whatever finite losses and counts clients report, a weighted mean of them is finite.
        train_loss = math.fsum(update.samples / samples * update.loss for update in accepted) if samples else math.nan
        return RoundReport(
            round_index=self.round_index,
            digest=self._digest,
            train_loss=train_loss,
            losses={update.client: update.loss for update in accepted},
            learning_rates={update.client: self._assigned[update.client].learning_rate for update in accepted},
            rejected=rejected,
            zero_share=float(np.mean([(update.values == 0).mean() for update in accepted])) if accepted else 0.0,
            forward_passes=sum(update.forward_passes for update in accepted),
            backward_passes=sum(update.backward_passes for update in accepted),
        )

    def dense_frame(self) -> bytes:
        """The frame with the current parameters (momentum, reference), for clients that are new or far behind."""
        if self._dense_frame is None:
            momentum, reference = self.replayer.momentum, self.replayer.reference
            values = [*self.trainables.tensors, *(momentum or ()), *(reference or ())]
            state = DenseState(
                round_index=self.round_index,
                digest=self._digest,
                has_momentum=momentum is not None,
                has_reference=reference is not None,
                values=flatten(values),
            )
            self._dense_frame = encode(state)
        return self._dense_frame

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Everything tensor-valued that a resumed server needs."""
        tensors = {f"trainable.{index}": tensor.detach() for index, tensor in enumerate(self.trainables.tensors)}
        for index, buffer in enumerate(self.replayer.momentum or ()):
            tensors[f"momentum.{index}"] = buffer
        for index, buffer in enumerate(self.replayer.reference or ()):
            tensors[f"reference.{index}"] = buffer
        return tensors | self._catch_up.state_tensors()

    def state_numbers(self) -> dict[str, object]:
        """Everything else, as JSON values."""
        return {"failed_rounds": self.failed_rounds} | self._rates.state_numbers() | self._catch_up.state_numbers()

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        """Inverse of :meth:`state_tensors` and :meth:`state_numbers`."""
        self.trainables.load_values(numbered(tensors, "trainable"))
        device = self.trainables.device
        self.replayer.momentum = [buffer.to(device) for buffer in numbered(tensors, "momentum")] or None
        self.replayer.reference = [buffer.to(device) for buffer in numbered(tensors, "reference")] or None
        self.failed_rounds = int(str(numbers["failed_rounds"]))
        self._rates.load_state(numbers)
        self._catch_up.load_state(tensors, numbers)
        self._digest = self.replayer.digest()
        self._dense_frame = None


def numbered(tensors: dict[str, torch.Tensor], prefix: str) -> list[torch.Tensor]:
    """The tensors ``prefix.0``, ``prefix.1``, ... in order."""
    count = sum(name.startswith(f"{prefix}.") for name in tensors)
    return [tensors[f"{prefix}.{index}"] for index in range(count)]
