"""The rounds of a run without their work: who is asked, and how long every frame is that would be sent.

Who takes part is a pure function of the seed, and the length of a frame depends only on counts, so one example of every
kind of frame is really encoded and the rest is arithmetic. What only slopes can decide is given: how many rounds the
variance gate lets a server step take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fs_fwdllm.core import wire
from fs_fwdllm.core.trainables import DIGEST_BYTES
from fs_fwdllm.core.wire import (
    Assignment,
    DenseState,
    DenseUpdate,
    Participant,
    Record,
    RoundUpdate,
    ScalarUpdate,
)
from fs_fwdllm.data.batches import visited_samples
from fs_fwdllm.method import resolve_method
from fs_fwdllm.method.catch_up import CatchUpLog
from fs_fwdllm.method.parts import work_plans
from fs_fwdllm.run.sampling import sample_clients
from fs_fwdllm.run.session import Session

__all__ = ["Cost", "Walk", "assignment_bytes", "frame_bytes"]

_DIGEST = bytes(DIGEST_BYTES)


@dataclass(frozen=True)
class Cost:
    """Traffic and passes, of a client, a round or a run."""

    upload_bytes: int = 0
    download_bytes: int = 0
    forward_passes: int = 0
    backward_passes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.upload_bytes + other.upload_bytes,
            self.download_bytes + other.download_bytes,
            self.forward_passes + other.forward_passes,
            self.backward_passes + other.backward_passes,
        )

    def times(self, factor: float) -> Cost:
        """This cost ``factor`` times, rounded."""
        return Cost(
            round(factor * self.upload_bytes),
            round(factor * self.download_bytes),
            round(factor * self.forward_passes),
            round(factor * self.backward_passes),
        )


def frame_bytes(record: Record, count: int) -> int:
    """Length of the frame of ``record`` with ``count`` values in the place of its own."""
    return wire.frame_bytes(replace(record, values=np.broadcast_to(np.float32(0), count)))


def assignment_bytes(assignment: Assignment, carried: Sequence[int]) -> int:
    """Length of the frame of ``assignment`` if it carried frames of these lengths."""
    return wire.frame_bytes(replace(assignment, catch_up=tuple(map(_FrameOfLength.of, carried))))


class _FrameOfLength(bytes):
    """A frame of which only the length is known."""

    length: int

    @classmethod
    def of(cls, length: int) -> _FrameOfLength:
        frame = cls()
        frame.length = length
        return frame

    def __len__(self) -> int:
        return self.length


class Walk:
    """A run without its work.

    Args:
        per_round: clients that are asked in a round.
        rounds_per_step: that the variance gate lets every server step take; 1 without a gate.
    """

    def __init__(self, session: Session, per_round: int, rounds_per_step: int = 1) -> None:
        self._session = session
        self._config = session.config
        self._sampling = session.config.fwdllm.sampling
        self._per_round = per_round
        self._rounds_per_step = rounds_per_step
        self._plans = work_plans(session.config, session.client_samples)
        self._count = session.parts.trainables.count
        method = resolve_method(session.config)
        self._forward_only = method.forward_only
        self._decays_within_rounds = method.local_steps and session.config.train.optimizer.weight_decay != 0.0
        self._scalars = self._forward_only and session.config.fwdllm.upload == "scalars"
        self._catch_up = CatchUpLog(session.parts.trainables.bytes)
        self._pool: list[Participant] = []

    def rounds(self, count: int) -> Iterator[list[Cost]]:
        """For each of the first ``count`` rounds, what each of its clients costs."""
        clients = sorted(self._session.client_samples)
        self._catch_up.note_started(clients, 0)
        for round_index in range(count):
            step, repeat = divmod(round_index, self._rounds_per_step)
            chosen = sample_clients(self._config.seed, round_index - repeat, clients, self._per_round)
            yield [self._client(round_index, client) for client in chosen]
            self._catch_up.note_started(chosen, round_index)
            if not self._scalars:
                self._catch_up.forget_until(round_index)
                continue
            self._pool += [self._participant(round_index, client) for client in sorted(chosen)]
            if repeat + 1 == self._rounds_per_step:
                self._catch_up.append(round_index, _FrameOfLength.of(self._step_bytes(round_index, step)))
                self._pool.clear()

    def _client(self, round_index: int, client: int) -> Cost:
        forward, backward = self._passes(client)
        plan, first_of_pool = self._plans[client], round_index - round_index % self._rounds_per_step
        count = plan.steps * plan.probes if self._scalars else self._count
        kind = ScalarUpdate if self._scalars else DenseUpdate
        upload = kind(round_index, client, _DIGEST, self._samples(round_index, client), 1.0, forward, backward)
        frames = self._catch_up.frames_for(client, lambda: _FrameOfLength.of(self._state_bytes(round_index)))
        assignment = Assignment(
            round_index, client, _DIGEST, 0.0, plan.steps, plan.probes, batch_index=first_of_pool,
            choices=self._choices(round_index // self._rounds_per_step, plan.steps * plan.probes),
        )  # fmt: skip
        download_bytes = assignment_bytes(assignment, [len(frame) for frame in frames])
        return Cost(frame_bytes(upload, count), download_bytes, forward, backward)

    def _looks_along_reference(self, server_step: int) -> bool:
        """Whether discriminative sampling has a reference and its turn."""
        sampled = self._scalars and self._sampling.kind != "none"
        return sampled and server_step > 0 and (server_step + 1) % self._sampling.every == 0

    def _choices(self, server_step: int, probes: int) -> bytes:
        """As many bytes as name the chosen candidates of so many probes: a uint32 for each and each tensor."""
        if self._sampling.kind != "published" or not self._looks_along_reference(server_step):
            return b""
        return bytes(4 * probes * len(self._session.parts.trainables.tensors))

    def _participant(self, round_index: int, client: int) -> Participant:
        """The client's entry in the record of a step: of its probes, one may look along the reference."""
        plan, step = self._plans[client], round_index // self._rounds_per_step
        spent = self._sampling.kind == "corrected" and self._looks_along_reference(step)
        return round_index, client, plan.steps, plan.probes - spent

    def _passes(self, client: int) -> tuple[int, int]:
        steps, probes, own = self._plans[client].steps, self._plans[client].probes, self._config.fwdllm
        if not self._forward_only:
            return steps * (2 if own.gradient_checkpointing else 1), steps
        per_step = {
            "central": 2 * probes,
            "one_sided": 1 + probes,
            "forward_mode": math.ceil(probes / own.probes_per_batch) + probes,
        }
        return steps * per_step[own.estimator], 0

    def _samples(self, round_index: int, client: int) -> int:
        """Samples the client will report."""
        batches = self._session.parts.batches
        return visited_samples(
            len(self._session.data.clients[client].train), client=client, round_index=round_index,
            steps=self._plans[client].steps, batch_size=batches.batch_size, seed=batches.seed, shuffle=batches.shuffle,
        )  # fmt: skip

    def _state_bytes(self, round_index: int) -> int:
        stepped = self._scalars and round_index >= self._rounds_per_step
        has_momentum = stepped and bool(self._config.fwdllm.server_momentum)
        has_reference = stepped and self._sampling.kind != "none"
        state = DenseState(round_index, _DIGEST, has_momentum, has_reference)
        return frame_bytes(state, (1 + has_momentum + has_reference) * self._count)

    def _step_bytes(self, round_index: int, server_step: int) -> int:
        count = sum(steps * probes for *_, steps, probes in self._pool)
        step_decay = (1.0,) * len(self._pool) if self._decays_within_rounds else ()
        choices = self._choices(server_step, count)
        record = RoundUpdate(
            round_index, _DIGEST, _DIGEST, 1.0, step_decay, 0.0, 0.0, tuple(self._pool), choices=choices
        )
        return frame_bytes(record, count)
