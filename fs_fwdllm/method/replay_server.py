"""Servers whose clients follow by replay: every step is a record, or, where it has none, the parameters themselves.

:class:`ReplayServer` holds what these methods share: the trainables with the moments and the reference of their
replays, who knows which round, and each client's learning rate. A method adds how accepted updates become new
parameters, and the record that lets every replica follow.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fs_fwdllm.core.replay import BUFFERS, Replayer
from fs_fwdllm.core.trainables import Trainables, flatten
from fs_fwdllm.core.wire import (
    Assignment,
    ClientUpdate,
    DenseState,
    RoundUpdate,
    ScalarUpdate,
    decode,
    encode,
    frame_bytes,
)
from fs_fwdllm.errors import CheckpointError, TrainingStalledError, UpdateRejected
from fs_fwdllm.guard import root_mean_square, scaled
from fs_fwdllm.method.catch_up import CatchUpLog
from fs_fwdllm.method.client_rates import ClientRates
from fs_fwdllm.method.replica import apply_round_update
from fs_fwdllm.method.server import LARGEST, PARAMETERS, RoundServer, ServerSettings, numbered, sample_weights

__all__ = ["ReplayServer"]


class ReplayServer(RoundServer):
    """A server that says how it moved, so that clients move alike.

    Args:
        replayer: the server's own trainables and moments.
        settings: see :class:`~fs_fwdllm.method.server.ServerSettings`.
    """

    def __init__(self, replayer: Replayer, settings: ServerSettings) -> None:
        super().__init__(replayer.trainables, settings)
        self.replayer = replayer
        self._digest = replayer.digest()
        self._next_round = 0
        self._rates = ClientRates(settings.strategy)
        self._catch_up = CatchUpLog(self.trainables.bytes)
        self._dense_frame: bytes | None = None

    @property
    def digest(self) -> bytes:
        return self._digest

    def assign(self, round_index: int, clients: Sequence[int]) -> dict[int, Assignment]:
        self.round_index = self._next_round = round_index
        rates = self._rates.rates(self.settings.schedule(round_index), round_index, clients)
        given = {client: self._assignment(client, rates[client]) for client in sorted(clients)}
        self.assigned = self._equip(given)
        return dict(self.assigned)

    def _assignment(self, client: int, learning_rate: float) -> Assignment:
        plan = self.settings.plans[client]
        return Assignment(
            round_index=self.round_index,
            client=client,
            digest=self._digest,
            learning_rate=learning_rate,
            steps=plan.steps,
            probes=plan.probes,
            batch_index=self.sampling_index_for(self.round_index),
            catch_up=self._lacking(client),
        )

    def _equip(self, assigned: dict[int, Assignment]) -> dict[int, Assignment]:
        """Say more in the assignments of a round, where a method has more to say."""
        return assigned

    def reassign(self, client: int) -> Assignment:
        given = self.assigned[client]
        self.assigned[client] = replace(given, catch_up=self._lacking(client))
        return self.assigned[client]

    def _lacking(self, client: int) -> tuple[bytes, ...]:
        return self._catch_up.frames_for(client, self.dense_frame)

    def note_holds(self, client: int, digest: bytes) -> None:
        self._catch_up.note_holds(client, digest, self._digest, self._next_round)

    def note_parameters_changed(self) -> None:
        self._digest = self.replayer.digest()
        self._dense_frame = None

    @abstractmethod
    def expected_values(self, assignment: Assignment) -> int:
        """Payload length of a correct answer."""

    def _largest_answer_bytes(self, assignment: Assignment) -> int:
        values = np.broadcast_to(np.float32(0), self.expected_values(assignment))
        return frame_bytes(self.answer(**LARGEST, values=values))

    @abstractmethod
    def distances(self, accepted: list[ClientUpdate]) -> list[float]:
        """How far each client's change is from the mean change (see :mod:`fs_fwdllm.method.update_norms`)."""

    @abstractmethod
    def _step(self, accepted: list[ClientUpdate], weights: np.ndarray) -> RoundUpdate | None:
        """Move the trainables by the accepted updates (ordered by client; float64 weights that sum to one).

        Returns:
            The record by which replicas rebuild the step (digests are filled in later), or ``None`` if they need the
            parameters themselves.
        """

    def _step_is_due(self, accepted: list[ClientUpdate]) -> bool:
        """Take in the accepted updates; whether the server steps at the end of this round."""
        return bool(accepted)

    def _columns(self) -> dict[str, object]:
        """The method's columns of the round that is being closed."""
        return {}

    def _close(self, accepted: list[ClientUpdate]) -> dict[str, object]:
        # Only an answer proves that a client holds the round's parameters: what was sent may never have arrived.
        self._catch_up.note_started([update.client for update in accepted], self.round_index)
        self._next_round = self.round_index + 1
        if self._step_is_due(accepted):
            reports = self._client_reports(accepted)  # of changes from where the round started, so before the step
            self._publish(self._step(accepted, self._weights(accepted)))
            self._rates.complete_round(reports)
        return self._columns()

    def _weights(self, accepted: Sequence[ClientUpdate]) -> np.ndarray:
        return sample_weights(accepted, equal=self.settings.equal_weights) if accepted else np.zeros(0)

    def _publish(self, record: RoundUpdate | None) -> None:
        """Let clients know of a step that was taken."""
        self._require_finite()
        before, self._digest = self._digest, self.replayer.digest()
        self._dense_frame = None
        if record is None:
            self._catch_up.forget_until(self.round_index)
            return
        finished = replace(record, digest_before=before, digest_after=self._digest)
        self._catch_up.append(self.round_index, encode(finished))

    def _require_finite(self) -> None:
        super()._require_finite()
        arrays = self.trainables.arrays
        if not all(arrays.is_finite(buffer) for buffers in self.replayer.moments.values() for buffer in buffers):
            raise TrainingStalledError(
                f"round {self.round_index}: the gradient estimate, or its square for fwdllm.server_optimizer 'adam', "
                "left the range of float32; lower train.optimizer.lr, or find out whose slopes are that large"
            )

    def _client_reports(self, accepted: list[ClientUpdate]) -> dict[int, float]:
        """What the learning-rate strategy looks back on. A single change is the mean change: that says nothing."""
        if not self._rates.needs_distances:
            return {update.client: update.loss for update in accepted}
        if len(accepted) == 1:
            return {}
        clients = [update.client for update in accepted]
        return dict(zip(clients, self.distances(accepted), strict=True))

    def _judge_values(self, update: ClientUpdate, assignment: Assignment) -> None:
        if len(update.values) != self.expected_values(assignment):
            raise UpdateRejected("wrong_length", f"client {update.client} sent {len(update.values)} values")
        if not (np.isfinite(update.values).all() and math.isfinite(update.loss)):
            raise UpdateRejected("not_finite", f"client {update.client} sent NaN or infinity")

    def _columns_of_parts(self, update: ClientUpdate) -> list[slice]:
        """Where each part's numbers stand in a row of the update's values (:meth:`_rows`)."""
        if not isinstance(update, ScalarUpdate):
            return [slice(None)]
        ends = list(itertools.accumulate(self.assigned[update.client].probes))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _rows(self, update: ClientUpdate) -> np.ndarray:
        """The values with a row for every step, where they are slopes; one row otherwise."""
        return update.values.reshape(self.assigned[update.client].steps if isinstance(update, ScalarUpdate) else 1, -1)

    def lengths_of(self, update: ClientUpdate) -> tuple[float, ...]:
        rows = self._rows(update)
        return tuple(root_mean_square(rows[:, columns]) for columns in self._columns_of_parts(update))

    def shortened(self, update: ClientUpdate, factors: Sequence[float]) -> ClientUpdate:
        rows, places = self._rows(update), self._columns_of_parts(update)
        pieces = [scaled(rows[:, columns], factor) for columns, factor in zip(places, factors, strict=True)]
        return replace(update, values=(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)).reshape(-1))

    def dense_frame(self) -> bytes:
        """The frame with the current parameters (moments, reference), for clients that are new or far behind."""
        if self._dense_frame is None:
            buffers = self.replayer.buffers()
            state = DenseState(
                round_index=self.round_index,
                digest=self._digest,
                **{f"has_{name}": name in buffers for name in BUFFERS},
                values=flatten([*self.trainables.tensors, *itertools.chain(*buffers.values())]),
            )
            self._dense_frame = encode(state)
        return self._dense_frame

    def parameters(self) -> dict[str, torch.Tensor]:
        tensors = {f"trainable.{index}": tensor.detach() for index, tensor in enumerate(self.trainables.tensors)}
        for name, buffers in self.replayer.buffers().items():
            tensors |= {f"{name}.{index}": buffer for index, buffer in enumerate(buffers)}
        return tensors

    def records_since(self, round_index: int) -> tuple[bytes, ...] | None:
        return self._catch_up.frames_since(round_index)

    def rebuilt(self, tensors: dict[str, torch.Tensor], records: Sequence[bytes], digest: bytes) -> Trainables:
        own = self.replayer
        other = Replayer(own.trainables.clone(), own.run_seed, own.distribution, own.chunk, own.division)
        _place(other, tensors)
        _replay(other, records, digest)
        return other.trainables

    def state_tensors(self) -> dict[str, torch.Tensor]:
        kept = self._catch_up.state_arrays()
        return self.parameters() | {name: torch.from_numpy(array.copy()) for name, array in kept.items()}

    def state_numbers(self) -> dict[str, object]:
        own = {"failed_rounds": self.failed_rounds} | self._guard_numbers()
        return own | self._rates.state_numbers() | self._catch_up.state_numbers()

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        self.failed_rounds = int(str(numbers["failed_rounds"]))
        self._load_guard(numbers)
        self._rates.load_state(numbers)
        self._catch_up.load_state(tensors, numbers)
        _place(self.replayer, tensors)
        reference: Any = numbers.get(PARAMETERS)
        if reference is not None:  # they are of an earlier round
            _replay(self.replayer, self._catch_up.frames_since(int(reference[1])) or (), bytes.fromhex(reference[2]))
        self.note_parameters_changed()


def _place(replayer: Replayer, tensors: dict[str, torch.Tensor]) -> None:
    """Let it stand at what :meth:`ReplayServer.parameters` once were."""
    replayer.trainables.load_values(numbered(tensors, "trainable"))
    device = replayer.trainables.device
    buffers = {name: [buffer.to(device) for buffer in numbered(tensors, name)] for name in BUFFERS}
    replayer.hold({name: held for name, held in buffers.items() if held})


def _replay(replayer: Replayer, records: Sequence[bytes], digest: bytes) -> None:
    """Take the steps of ``records``, which lead to ``digest``.

    Raises:
        CheckpointError: they do not.
    """
    for frame in records:
        apply_round_update(replayer, decode(frame, RoundUpdate))
    if replayer.digest() != digest:
        raise CheckpointError(
            "the records of a checkpoint do not lead from its file of parameters to those of its round: one of the two "
            "is of another run, or damaged; start a new run"
        )
