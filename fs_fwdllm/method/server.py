"""The server's half of every method: assign work, judge what comes back, take one step.

:class:`RoundServer` is what a run asks of any server, and the rules by which an update is believed. Methods whose
clients follow by replaying records share :class:`~fs_fwdllm.method.replay_server.ReplayServer`; block training keeps
blocks and versions instead (:mod:`fs_fwdllm.method.cybgd.server`).

An update is used only if it was asked for, answers this round, refers to the digest the round started from, is what the
method's clients send and is finite; the first answer counts. Anything else is left out and named in the report, and the
round goes on with the rest. Of those that are used nobody is longer, or counts for more samples, than is usual among
them (:mod:`fs_fwdllm.guard`).
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.core.trainables import DIGEST_BYTES, Trainables
from fs_fwdllm.core.wire import Assignment, ClientUpdate
from fs_fwdllm.errors import TrainingStalledError, UpdateRejected
from fs_fwdllm.guard import believed_losses
from fs_fwdllm.method.believing import Belief, RobustSettings
from fs_fwdllm.method.client_rates import StrategySettings
from fs_fwdllm.method.direction_sets import OWN, DirectionSets
from fs_fwdllm.method.weights import client_shares

__all__ = [
    "LARGEST", "PARAMETERS", "RoundReport", "RoundServer", "ServerSettings", "WorkPlan", "numbered", "sample_weights"
]  # fmt: skip

#: The fields of a :class:`~fs_fwdllm.core.wire.ClientUpdate` where they take the most bytes in a header.
LARGEST: dict[str, Any] = {
    **dict.fromkeys(("round_index", "client", "samples", "forward_passes", "backward_passes"), (1 << 63) - 1),
    "digest": bytes(DIGEST_BYTES),
    "loss": 0.0,
}

#: Where the tensors of :meth:`RoundServer.parameters` are of an earlier round, the numbers of a state name it under
#: this key: the file that holds them, the round that started from them, and the digest, in hex, of where records lead.
PARAMETERS = "parameters"


@dataclass(frozen=True)
class WorkPlan:
    """How much a client does in a round: ``steps`` batches with ``probes`` directions each for every part.

    Methods without directions have no parts. ``samples`` is what the steps can hold at most.
    """

    steps: int
    probes: tuple[int, ...] = ()
    samples: int = 1 << 62

    @property
    def directions(self) -> int:
        """Directions of a step, of all parts together."""
        return sum(self.probes)


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
        weigh_by_precision: clients that send different numbers of slopes weigh by the noise each brings.
        folder: of files for what does not fit in memory; without one they go with the process.
        robust: how far a single client is believed; without settings, any length is.
        sets: whose directions clients look along.
    """

    plans: dict[int, WorkPlan]
    schedule: Schedule
    weight_decay: float = 0.0
    equal_weights: bool = False
    max_failed_rounds: int = 3
    strategy: StrategySettings = field(default_factory=StrategySettings)
    weigh_by_precision: bool = True
    folder: Path | None = None
    robust: RobustSettings = field(default_factory=RobustSettings)
    sets: DirectionSets = OWN


@dataclass
class RoundReport:
    """What a round did.

    Attributes:
        digest: of the server's trainables (and momentum and reference, where there are such) after the round.
        train_loss: sample-weighted mean of the accepted clients' losses, as far as they are believed; NaN without any.
        losses, learning_rates: per accepted client.
        rejected: ``{client: reason}`` of updates that were left out, and of clients that did not answer.
        clipped: ``{client: factor}`` of updates that were longer than is usual, by what they were shortened to.
        capped: ``{client: samples}`` of clients that reported more samples than were believed.
        outvoted: clients whose numbers a vote among those of the same directions left out.
        zero_share: share of accepted float values that are exactly zero; near one for slopes, the radius is below what
            the base's dtype resolves.
        columns: what the method adds to the round's line in ``metrics.jsonl`` (JSON values).
    """

    round_index: int
    digest: bytes
    train_loss: float
    losses: dict[int, float] = field(default_factory=dict)
    learning_rates: dict[int, float] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    clipped: dict[int, float] = field(default_factory=dict)
    capped: dict[int, int] = field(default_factory=dict)
    outvoted: list[int] = field(default_factory=list)
    zero_share: float = 0.0
    forward_passes: int = 0
    backward_passes: int = 0
    columns: dict[str, object] = field(default_factory=dict)

    @property
    def typical_loss(self) -> float:
        """The median of the accepted clients' losses, which one client cannot move; NaN without any."""
        return statistics.median_low(self.losses.values()) if self.losses else math.nan


class RoundServer(ABC):
    """Two verbs: :meth:`assign` and :meth:`absorb`.

    Attributes:
        trainables: the server's own.
        round_index: the round that is open, or was closed last.
        failed_rounds: rounds in a row without a usable update.
        assigned: the assignments of that round, by client.
        belief: how far updates are believed.
    """

    #: The record a client of this method answers with.
    answer: ClassVar[type[ClientUpdate]]
    #: Whether work that nobody answered is given to others, so that a round may close without any answer.
    reassigns: ClassVar[bool] = False

    def __init__(self, trainables: Trainables, settings: ServerSettings) -> None:
        self.trainables = trainables
        self.settings = settings
        self.round_index = 0
        self.failed_rounds = 0
        self.assigned: dict[int, Assignment] = {}
        self.belief = Belief(settings.robust, settings.sets)

    @property
    @abstractmethod
    def digest(self) -> bytes:
        """Names the bits that clients must hold before they work."""

    def sampling_index_for(self, round_index: int) -> int:
        """The round whose sample of clients (and whose mini-batches) ``round_index`` uses.

        It is ``round_index`` itself unless a server step that began earlier is still looking.
        """
        return round_index

    def wanted_clients(self, available: Sequence[int]) -> list[int] | None:
        """Whom the method itself wants to ask in the next round; ``None`` leaves the choice to the host's sampling."""
        return None

    @abstractmethod
    def assign(self, round_index: int, clients: Sequence[int]) -> dict[int, Assignment]:
        """Open a round. Each client's assignment carries what it needs to reach the server's current parameters."""

    @abstractmethod
    def reassign(self, client: int) -> Assignment:
        """The open round's assignment anew, for a client that asks again (it may have been restarted)."""

    def current_state_for(self, client: int) -> Assignment:
        """An assignment of no work: what ``client`` needs to hold the server's present parameters."""
        return Assignment(
            round_index=self.round_index,
            client=client,
            digest=self.digest,
            learning_rate=0.0,
            steps=0,
            probes=(),
            batch_index=self.round_index,
            catch_up=self._lacking(client),
        )

    def answer_limit_bytes(self, client: int) -> int:
        """Length of the longest frame with which ``client`` may answer what it was asked in the open round; 0 if it was
        asked nothing. Whoever receives frames reads no longer ones."""
        assignment = self.assigned.get(client)
        return 0 if assignment is None else self._largest_answer_bytes(assignment)

    @abstractmethod
    def _largest_answer_bytes(self, assignment: Assignment) -> int:
        """Length of a frame that no right answer to ``assignment`` is longer than (:data:`LARGEST` has the numbers that
        all answers have)."""

    @abstractmethod
    def _lacking(self, client: int) -> tuple[bytes, ...]:
        """The frames that bring ``client`` to the present parameters, given what it is known to hold."""

    @abstractmethod
    def dense_frame(self) -> bytes:
        """The frame with everything that a client which holds only the base model lacks."""

    @abstractmethod
    def note_holds(self, client: int, digest: bytes) -> None:
        """``client`` says that it holds the parameters of ``digest``: from there it needs only what has changed."""

    @abstractmethod
    def note_parameters_changed(self) -> None:
        """The trainables were set from outside (before the first round): take the digest anew."""

    def absorb(self, updates: Iterable[ClientUpdate]) -> RoundReport:
        """Close the round with the answers that came, in any order; missing ones are reported as ``no_answer``.

        Raises:
            TrainingStalledError: no usable update for ``max_failed_rounds`` rounds in a row, or a step of finite
                values that leaves parameters that are not.
        """
        accepted, rejected = self._sort(updates)
        self._count_failures(accepted, rejected)
        most = {update.client: self.settings.plans[update.client].samples for update in accepted}
        believed = self.belief.of(accepted, most, self)
        columns = self._close(believed.updates)
        report = self._report(believed.updates, rejected, columns)
        report.clipped, report.capped, report.outvoted = believed.clipped, believed.capped, believed.outvoted
        return report

    def lengths_of(self, update: ClientUpdate) -> tuple[float, ...]:
        """How long an update is, part by part, in what is usual for every client alike: root mean squares, of changes
        for a step at the rate of one. Of a method that says nothing, no update is too long."""
        return ()

    def shortened(self, update: ClientUpdate, factors: Sequence[float]) -> ClientUpdate:
        """The update with its parts, as :meth:`lengths_of` has them, multiplied by ``factors``."""
        return update

    def longest(self) -> tuple[float, ...]:
        """What the lengths of an honest update cannot be beyond, part by part; nothing where that is not known."""
        return ()

    @abstractmethod
    def _close(self, accepted: list[ClientUpdate]) -> dict[str, object]:
        """Move by the accepted updates (ordered by client; there may be none), if a step is due.

        Returns:
            The method's columns of the round's line.
        """

    @abstractmethod
    def _judge_values(self, update: ClientUpdate, assignment: Assignment) -> None:
        """Whether what was sent is what was asked for, and finite. Raises ``UpdateRejected`` if not."""

    @abstractmethod
    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Everything tensor-valued that a resumed server needs."""

    def parameters(self) -> dict[str, torch.Tensor]:
        """Those of :meth:`state_tensors` that records rebuild from an earlier round's; none without records."""
        return {}

    def records_since(self, round_index: int) -> tuple[bytes, ...] | None:
        """The frames that lead from the parameters at the start of ``round_index`` to those of now; ``None`` where they
        are not kept, or a step had none."""
        return None

    def rebuilt(self, tensors: dict[str, torch.Tensor], records: Sequence[bytes], digest: bytes) -> Trainables:
        """A replica that stands where ``records`` lead to from what :meth:`parameters` once were.

        Raises:
            CheckpointError: that is not where ``digest`` says.
        """
        raise TypeError("the steps of this method have no records")

    @abstractmethod
    def state_numbers(self) -> dict[str, object]:
        """Everything else, as JSON values."""

    @abstractmethod
    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        """Inverse of :meth:`state_tensors` and :meth:`state_numbers`."""

    def _sort(self, updates: Iterable[ClientUpdate]) -> tuple[list[ClientUpdate], dict[int, str]]:
        """The updates that are believed, by client, and why the others are not."""
        accepted: dict[int, ClientUpdate] = {}
        rejected: dict[int, str] = {}
        for update in updates:
            try:
                self.judge(update, accepted)
            except UpdateRejected as refusal:
                rejected.setdefault(update.client, refusal.reason)
            else:
                accepted[update.client] = update
        for client in self.assigned:
            if client not in accepted:
                rejected.setdefault(client, "no_answer")
        return [accepted[client] for client in sorted(accepted)], rejected

    def judge(self, update: ClientUpdate, accepted: Mapping[int, ClientUpdate]) -> None:
        """Whether to believe an update, beside those accepted so far.

        Raises:
            UpdateRejected: not; its ``reason`` is a word for reports.
        """
        client = update.client
        assignment = self.assigned.get(client)
        if assignment is None:
            raise UpdateRejected("not_assigned", f"client {client} has no work in round {self.round_index}")
        if client in accepted:
            raise UpdateRejected("duplicate", f"client {client} answered round {self.round_index} twice")
        if update.round_index != self.round_index:
            raise UpdateRejected("other_round", f"client {client} answered round {update.round_index}")
        if update.digest != self.digest:
            raise UpdateRejected("other_digest", f"client {client} started from other parameters")
        if not isinstance(update, self.answer):
            raise UpdateRejected("other_kind", f"client {client} sent a {type(update).__name__}")
        if update.samples < 1:
            raise UpdateRejected("no_samples", f"client {client} reports {update.samples} samples")
        self._judge_values(update, assignment)

    def _guard_numbers(self) -> dict[str, object]:
        """What the guard remembers, for a checkpoint."""
        return {"lengths": self.belief.lengths.state()}

    def _load_guard(self, numbers: Mapping[str, object]) -> None:
        """Inverse of :meth:`_guard_numbers`; a checkpoint of a version without a guard has none."""
        lengths = numbers.get("lengths", [])
        assert isinstance(lengths, list)
        self.belief.lengths.load_state(lengths)

    def _count_failures(self, accepted: Sequence[ClientUpdate], rejected: Mapping[int, str]) -> None:
        self.failed_rounds = 0 if accepted else self.failed_rounds + 1
        if self.failed_rounds >= self.settings.max_failed_rounds:
            raise TrainingStalledError(
                f"round {self.round_index}: no usable update for {self.failed_rounds} rounds in a row "
                f"(last reasons: {rejected}); with 'not_finite' lower train.optimizer.lr or raise fwdllm.radius; "
                f"fwdllm.max_failed_rounds is {self.settings.max_failed_rounds}"
            )

    def _require_finite(self) -> None:
        """Raises :class:`~fs_fwdllm.errors.TrainingStalledError` if a step has left the range of float32."""
        if not self.trainables.is_finite():
            raise TrainingStalledError(
                f"round {self.round_index}: the step left the range of float32; lower train.optimizer.lr"
            )

    def _report(
        self, accepted: Sequence[ClientUpdate], rejected: dict[int, str], columns: dict[str, object]
    ) -> RoundReport:
        samples = sum(update.samples for update in accepted)
        losses = believed_losses({update.client: update.loss for update in accepted})
        shares = {update.client: update.samples / samples for update in accepted}
        train_loss = math.fsum(shares[client] * losses[client] for client in losses) if losses else math.nan
        zeros = [(update.values == 0).mean() for update in accepted if update.values.dtype == np.float32]
        return RoundReport(
            round_index=self.round_index,
            digest=self.digest,
            train_loss=train_loss,
            losses={update.client: update.loss for update in accepted},
            learning_rates={update.client: self.assigned[update.client].learning_rate for update in accepted},
            rejected=rejected,
            zero_share=float(np.mean(zeros)) if zeros else 0.0,
            forward_passes=sum(update.forward_passes for update in accepted),
            backward_passes=sum(update.backward_passes for update in accepted),
            columns=columns,
        )


def sample_weights(updates: Sequence[ClientUpdate], *, equal: bool) -> np.ndarray:
    """Every update's share of the samples (or an equal one), float64, in order; they sum to one."""
    return client_shares([update.samples for update in updates], equal=equal)


def numbered(tensors: dict[str, torch.Tensor], prefix: str) -> list[torch.Tensor]:
    """The tensors ``prefix.0``, ``prefix.1``, ... in order."""
    count = sum(name.startswith(f"{prefix}.") for name in tensors)
    return [tensors[f"{prefix}.{index}"] for index in range(count)]
