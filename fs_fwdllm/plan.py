"""What a run will cost, before it is run: parameters, passes, bytes and peak memory. Nothing is trained.

**Passes and bytes are counted, not estimated.** Who takes part in a round is a pure function of the seed, and the
length of a frame depends only on counts. So the rounds are walked through with the server's own sampling and its own
rule of who is sent what, one example of every kind of frame is really encoded, and the sums are what the run's
``metrics.jsonl`` will say, provided that every asked client answers. (A checksum below 2^16, one in 65,536, makes a
frame two bytes shorter.) Of a run longer than :data:`MAX_WALKED_ROUNDS` the later rounds count as much as the second
half of the walked ones did on average. Block training is a dry run of its server over two cycles instead
(:mod:`fs_fwdllm.method.cybgd.forecast`), whose uploads are upper bounds.

Passes per client and round, for ``K`` steps and ``P`` probes: central ``2 K P``, one-sided ``K (1 + P)``, forward mode
``K (ceil(P / probes_per_batch) + P)``, backpropagation ``K`` forward and ``K`` backward, ``2 K`` forward with
checkpointing.

**Memory is an estimate**; :mod:`fs_fwdllm.memory_estimate` has its formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgpack
import numpy as np

from fs_fwdllm.config import Config
from fs_fwdllm.data import client_batches
from fs_fwdllm.host.sampling import clients_per_round, sample_clients
from fs_fwdllm.host.session import Session
from fs_fwdllm.memory_estimate import MemoryEstimate, estimate_memory, resident_bytes
from fs_fwdllm.method import resolve_method
from fs_fwdllm.method.assembly import work_plans
from fs_fwdllm.method.catch_up import CatchUpLog
from fs_fwdllm.method.cybgd.forecast import dry_rounds
from fs_fwdllm.report.units import format_bytes, format_count
from fs_fwdllm.trainables import DIGEST_BYTES
from fs_fwdllm.wire import Assignment, DenseState, DenseUpdate, Record, RoundUpdate, ScalarUpdate, encode

__all__ = ["MAX_WALKED_ROUNDS", "Cost", "Plan", "assignment_bytes", "frame_bytes", "make_plan"]

#: Rounds that are walked through one by one.
MAX_WALKED_ROUNDS = 500

_DIGEST = bytes(DIGEST_BYTES)
#: Magic number, version and header length, which precede the header of every frame.
_FRAME_PREFIX_BYTES = 5


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


@dataclass(frozen=True)
class Plan:
    """The forecast of a run.

    Attributes:
        adapter: which parameters are trained.
        clients, clients_with_data, clients_per_round: all; those that can be asked; those that are asked.
        steps: fewest and most local steps of a client in a round.
        probes: directions per step; 0 for methods that backpropagate.
        costliest_client: the largest of each number over the clients of the first round.
        first_round, last_round, run: sums over clients; of the last round that was walked through.
        memory: predicted peak, part by part.
    """

    method: str
    model: str
    adapter: str
    trainable_parameters: int
    total_parameters: int
    clients: int
    clients_with_data: int
    clients_per_round: int
    rounds: int
    steps: tuple[int, int]
    probes: int
    costliest_client: Cost
    first_round: Cost
    last_round: Cost
    run: Cost
    memory: MemoryEstimate

    def rows(self) -> list[tuple[str, str]]:
        """``(name, value)`` pairs to print."""
        share = self.trainable_parameters / self.total_parameters
        steps = " to ".join(str(steps) for steps in sorted(set(self.steps)))
        probes = f", {self.probes} probes each" if self.probes else ""
        clients = f"{self.clients_per_round} a round of {self.clients_with_data} with data ({self.clients} in all)"
        client, memory = self.costliest_client, self.memory
        copies = f"{format_bytes(memory.replicas_bytes)} + {format_bytes(memory.messages_bytes)}"
        return [
            ("method", self.method),
            ("model", self.model),
            ("trained", f"{self.adapter}: {self.trainable_parameters:,} of {self.total_parameters:,} ({share:.2%})"),
            ("clients", clients),
            ("rounds", format_count(self.rounds)),
            ("steps per client and round", f"{steps}{probes}"),
            ("passes per client and round", _passes(client)),
            ("passes per round", _passes(self.first_round)),
            ("passes of the run", _passes(self.run)),
            ("upload per client and round", format_bytes(client.upload_bytes)),
            ("download per client, first round", format_bytes(client.download_bytes)),
            ("first round, all clients", _traffic(self.first_round)),
            ("a late round, all clients", _traffic(self.last_round)),
            ("the run, if all clients answer", _traffic(self.run)),
            ("peak memory (estimate)", format_bytes(memory.peak_bytes)),
            ("  process and model", f"{format_bytes(memory.process_bytes)} + {format_bytes(memory.model_bytes)}"),
            ("  replicas and messages", copies),
            ("  work, or evaluation", f"{format_bytes(memory.work_bytes)}, {format_bytes(memory.evaluation_bytes)}"),
            ("  prefix cache", format_bytes(memory.prefix_cache_bytes)),
        ]


def _passes(cost: Cost) -> str:
    return f"{cost.forward_passes:,} forward, {cost.backward_passes:,} backward"


def _traffic(cost: Cost) -> str:
    return f"{format_bytes(cost.upload_bytes)} up, {format_bytes(cost.download_bytes)} down"


def make_plan(config: Config) -> Plan:
    """Load what ``config`` names and forecast its run.

    Raises:
        FwdLLMError: whatever a run would raise while it loads; see the subtypes.
    """
    before_loading_bytes = resident_bytes()
    session = Session.open(config)
    own = config.fwdllm.blocks
    blocks = resolve_method(config).name == "cybgd"
    available = len(session.client_samples)
    per_round = own.parallel_blocks * own.clients_per_block if blocks else clients_per_round(config, available)
    plans = work_plans(config, session.client_samples)
    steps = min(plan.steps for plan in plans.values()), max(plan.steps for plan in plans.values())
    memory = estimate_memory(session, per_round, steps[1], before_loading_bytes)
    rounds = list(_rounds(session, per_round))
    sums = [sum(clients, Cost()) for clients in rounds]
    late = sums[len(sums) // 2 :]
    unwalked = config.federate.total_round_num - len(sums)
    return Plan(
        method=resolve_method(config).name,
        model=config.model.type,
        adapter=session.loaded.peft_method,
        trainable_parameters=session.parts.trainables.count,
        total_parameters=sum(parameter.numel() for parameter in session.loaded.model.parameters()),
        clients=len(session.data.clients),
        clients_with_data=len(session.client_samples),
        clients_per_round=per_round,
        rounds=config.federate.total_round_num,
        steps=steps,
        probes=next(iter(plans.values())).probes,
        costliest_client=_largest(rounds[0]),
        first_round=sums[0],
        last_round=sums[-1],
        run=sum(sums, Cost()) + sum(late, Cost()).times(unwalked / len(late)),
        memory=memory,
    )


def _rounds(session: Session, per_round: int) -> Iterator[list[Cost]]:
    """For each round that is walked through, what each of its clients costs."""
    if resolve_method(session.config).name != "cybgd":
        yield from _Walk(session, per_round).rounds()
        return
    passes = 2 if session.config.fwdllm.gradient_checkpointing else 1
    for clients in dry_rounds(session.parts, session.client_samples):
        yield [Cost(up, down, passes * assignment.steps, assignment.steps) for assignment, down, up in clients]


def _largest(costs: Sequence[Cost]) -> Cost:
    return Cost(
        max(cost.upload_bytes for cost in costs),
        max(cost.download_bytes for cost in costs),
        max(cost.forward_passes for cost in costs),
        max(cost.backward_passes for cost in costs),
    )


def frame_bytes(record: Record, count: int) -> int:
    """Length of the frame of ``record`` with ``count`` values in the place of its own; the first is really encoded."""
    if not count:
        return len(encode(record))
    with_one = len(encode(replace(record, values=np.ones(1, dtype=np.float32))))
    return with_one + 4 * (count - 1) + _integer_bytes(count) - _integer_bytes(1)


def assignment_bytes(assignment: Assignment, carried: Sequence[int]) -> int:
    """Length of the frame of ``assignment``, which carries nothing, if it carried frames of these lengths."""
    bare = len(encode(assignment))
    header = bare - _FRAME_PREFIX_BYTES + sum(map(_binary_bytes, carried)) + _array_header_bytes(len(carried)) - 1
    # A header of 64 KiB and more announces its length in four more bytes.
    return _FRAME_PREFIX_BYTES + header + (4 if header >= 1 << 16 else 0)


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


class _Walk:
    """A run without its work: who is asked, and what is sent."""

    def __init__(self, session: Session, per_round: int) -> None:
        self._session = session
        self._config = session.config
        self._per_round = per_round
        self._plans = work_plans(session.config, session.client_samples)
        self._count = session.parts.trainables.count
        method = resolve_method(session.config)
        self._forward_only = method.forward_only
        self._decays_within_rounds = method.local_steps and session.config.train.optimizer.weight_decay != 0.0
        self._scalars = self._forward_only and session.config.fwdllm.upload == "scalars"
        self._catch_up = CatchUpLog(session.parts.trainables.bytes)

    def rounds(self) -> Iterator[list[Cost]]:
        """For each round, what each of its clients costs."""
        clients = sorted(self._session.client_samples)
        self._catch_up.note_started(clients, 0)
        for round_index in range(min(self._config.federate.total_round_num, MAX_WALKED_ROUNDS)):
            chosen = sample_clients(self._config.seed, round_index, clients, self._per_round)
            yield [self._client(round_index, client) for client in chosen]
            self._catch_up.note_started(chosen, round_index)
            if self._scalars:
                self._catch_up.append(round_index, _FrameOfLength.of(self._step_bytes(round_index, chosen)))
            else:
                self._catch_up.forget_until(round_index)

    def _client(self, round_index: int, client: int) -> Cost:
        forward, backward = self._passes(client)
        plan = self._plans[client]
        count = plan.steps * plan.probes if self._scalars else self._count
        kind = ScalarUpdate if self._scalars else DenseUpdate
        upload = kind(round_index, client, _DIGEST, self._samples(round_index, client), 1.0, forward, backward)
        frames = self._catch_up.frames_for(client, lambda: _FrameOfLength.of(self._state_bytes(round_index)))
        assignment = Assignment(round_index, client, _DIGEST, 0.0, plan.steps, plan.probes, batch_index=round_index)
        download_bytes = assignment_bytes(assignment, [len(frame) for frame in frames])
        return Cost(frame_bytes(upload, count), download_bytes, forward, backward)

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
        """Samples the client will report; which batches it visits matters only where that changes a length."""
        held, steps = self._session.data.clients[client].train, self._plans[client].steps
        batches = self._session.parts.batches
        most = steps * min(len(held), batches.batch_size)
        if _integer_bytes(steps) == _integer_bytes(most):
            return most
        visited = client_batches(
            held, client=client, round_index=round_index, steps=steps, batch_size=batches.batch_size,
            seed=batches.seed, pad_token_id=batches.pad_token_id, shuffle=batches.shuffle,
        )  # fmt: skip
        return sum(map(len, visited))

    def _state_bytes(self, round_index: int) -> int:
        has_momentum = self._scalars and bool(self._config.fwdllm.server_momentum) and round_index > 0
        state = DenseState(round_index, _DIGEST, has_momentum)
        return frame_bytes(state, (2 if has_momentum else 1) * self._count)

    def _step_bytes(self, round_index: int, clients: Sequence[int]) -> int:
        plans = {client: self._plans[client] for client in clients}
        participants = tuple((round_index, client, plan.steps, plan.probes) for client, plan in plans.items())
        step_decay = (1.0,) * len(participants) if self._decays_within_rounds else ()
        record = RoundUpdate(round_index, _DIGEST, _DIGEST, 1.0, step_decay, 0.0, 0.0, participants)
        return frame_bytes(record, sum(steps * probes for *_, steps, probes in participants))


def _integer_bytes(value: int) -> int:
    return len(msgpack.packb(value))


def _array_header_bytes(items: int) -> int:
    return len(msgpack.Packer().pack_array_header(items))


def _binary_bytes(length: int) -> int:
    """Length of ``length`` bytes in msgpack, header included."""
    return length + (2 if length < 1 << 8 else 3 if length < 1 << 16 else 5)
