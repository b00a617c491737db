"""A run without its work: the real server is played through its rounds, with answers that say nothing.

Who is asked, what every client is sent and when a step is taken are the server's own doing, so nothing of it is
rebuilt here. Three things make it cheap. The server's parameters take no memory: every tensor is one number, repeated.
Its replayer does not move them; it only takes a new digest. And a frame's length is asked for without building the
frame. What only slopes can decide is given: whether the variance gate lets every step through at once, or makes each
wait to the limit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from fs_fwdllm.core.arrays import Array
from fs_fwdllm.core.replay import Contributions, Replayer
from fs_fwdllm.core.server_step import server_step
from fs_fwdllm.core.trainables import DIGEST_BYTES, Trainables
from fs_fwdllm.core.wire import Assignment, ClientUpdate, DenseUpdate, frame_bytes
from fs_fwdllm.data.batches import visited_samples
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method import Parts, RoundServer, assemble_server
from fs_fwdllm.method.believing import Belief, RobustSettings
from fs_fwdllm.method.cybgd.forecast import BlockAnswers
from fs_fwdllm.method.cybgd.server import BlockServer
from fs_fwdllm.method.forward.gate import GateStatistic
from fs_fwdllm.method.forward.pacing import DirectedSampling, Pacing
from fs_fwdllm.method.forward.pool import Pool
from fs_fwdllm.method.forward.server import PooledServer
from fs_fwdllm.method.parts import passes_of_client
from fs_fwdllm.method.replay_server import ReplayServer
from fs_fwdllm.running.driver import choose_clients
from fs_fwdllm.running.sampling import clients_per_round
from fs_fwdllm.running.session import Session

__all__ = ["MAX_DRY_ROUNDS", "Cost", "dry_rounds"]

#: Rounds that are played one by one.
MAX_DRY_ROUNDS = 500
#: Numbers in dense messages after which no further round is played: a few seconds.
_MAX_DENSE_NUMBERS = 5_000_000_000


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


def dry_rounds(session: Session, *, gate_waits: bool = False) -> Iterator[list[Cost]]:
    """For each round that is played, what each of its clients costs.

    Args:
        gate_waits: every server step takes as many rounds as the variance gate may ask for, instead of one.

    Raises:
        ConfigError: the method comes from another package, with a server of a kind of its own.
    """
    server, answer, rounds = _prepare(session, gate_waits)
    available = sorted(session.client_samples)
    for client in available:
        server.note_holds(client, server.digest)
    for round_index in range(min(rounds, session.config.federate.total_round_num)):
        assigned = server.assign(round_index, choose_clients(server, session.config, round_index, available))
        answers = {client: answer(assignment) for client, assignment in assigned.items()}
        yield [_cost(assignment, answers[client]) for client, assignment in assigned.items()]
        server.absorb(answers.values())


def _cost(assignment: Assignment, update: ClientUpdate) -> Cost:
    return Cost(frame_bytes(update), frame_bytes(assignment), update.forward_passes, update.backward_passes)


def _prepare(session: Session, gate_waits: bool) -> tuple[RoundServer, Callable[[Assignment], ClientUpdate], int]:
    """The server, who answers it, and how many rounds to play."""
    server = assemble_server(_WeightlessParts.around(session.parts), session.client_samples)
    server.belief = Belief(RobustSettings())  # the answers say nothing
    if isinstance(server, BlockServer):
        blocks = BlockAnswers(server, session.config)
        return server, blocks.answer, blocks.rounds
    if not isinstance(server, ReplayServer):
        raise ConfigError(
            f"federate.method {session.config.federate.method!r}: its server, a {type(server).__name__}, cannot be "
            "forecast; fs-fwdllm plan knows servers that are a ReplayServer or a BlockServer"
        )
    if isinstance(server, PooledServer):
        server.pooled.pacing = _decided(server.pooled.pacing, gate_waits)
    rounds = MAX_DRY_ROUNDS
    if issubclass(server.answer, DenseUpdate):
        per_round = clients_per_round(session.config, len(session.client_samples))
        rounds = min(rounds, max(3, _MAX_DENSE_NUMBERS // (server.trainables.count * per_round)))
    return server, _NoNews(server, session).answer, rounds


class _NoNews:
    """Answers of the right length and passes, whose values are all zero."""

    def __init__(self, server: ReplayServer, session: Session) -> None:
        self._server = server
        self._session = session

    def answer(self, assignment: Assignment) -> ClientUpdate:
        forward, backward = passes_of_client(self._session.config, assignment.client, assignment.steps)
        return self._server.answer(
            round_index=assignment.round_index,
            client=assignment.client,
            digest=assignment.digest,
            samples=self._samples(assignment),
            loss=1.0,
            forward_passes=forward,
            backward_passes=backward,
            values=np.broadcast_to(np.float32(0.0), (self._server.expected_values(assignment),)),
        )

    def _samples(self, assignment: Assignment) -> int:
        batches = self._session.parts.batches
        return visited_samples(
            self._session.client_samples[assignment.client],
            client=assignment.client,
            round_index=assignment.batch_index,
            steps=assignment.steps,
            batch_size=batches.batch_size,
            seed=batches.seed,
            shuffle=batches.shuffle,
        )


class _WeightlessParts(Parts):
    """Parts whose server moves nothing."""

    @classmethod
    def around(cls, parts: Parts) -> Parts:
        """The same parts; as they are where what is sent depends on the values of blocks."""
        if parts.config.method.trains_blocks:
            return parts
        return cls(**{item.name: getattr(parts, item.name) for item in fields(Parts)})

    def server_replayer(self) -> Replayer:
        return _CountingReplayer(self)


def _repeated(value: float, like: Array) -> np.ndarray:
    """One number for every element of an array of that shape."""
    return np.broadcast_to(np.float32(value), tuple(like.shape))


class _Weightless(Trainables):
    """Trainables of the same names, shapes and count, that take no memory: one zero for all elements of a tensor."""

    def __init__(self, trainables: Trainables) -> None:
        self.names = trainables.names
        self.tensors = tuple(_repeated(0.0, tensor) for tensor in trainables.tensors)
        self.count = trainables.count
        self.bytes = trainables.bytes


class _CountingReplayer(Replayer):
    """Takes note of steps without taking them: after each the digest is new, and the buffers that would be are."""

    def __init__(self, parts: Parts) -> None:
        mine = parts.replica.replayer
        super().__init__(_Weightless(parts.trainables), mine.run_seed, mine.distribution, division=mine.division)
        self._steps = 0

    def digest(self) -> bytes:
        return hashlib.blake2b(str(self._steps).encode(), digest_size=DIGEST_BYTES).digest()

    def apply(
        self,
        contributions: Contributions,
        *,
        decay: float,
        momentum: float,
        rate: float,
        adam: Sequence[float] = (),
        keep_reference: bool = False,
    ) -> None:
        self._steps += 1
        self.moments |= {name: list(self.trainables.tensors) for name in server_step(momentum, rate, adam).keeps}
        if keep_reference:  # not zero, so that directed sampling takes it for one
            self.reference = [_repeated(1.0, tensor) for tensor in self.trainables.tensors]

    def move(self, action: Callable[[], None]) -> None:
        self._steps += 1

    def total(self, contributions: Contributions, tensor_ids: object = None) -> list[Array]:
        return list(self.trainables.tensors)


def _decided(pacing: Pacing, gate_waits: bool) -> Pacing:
    """The same pacing, with decisions that need no arithmetic."""
    gate = pacing.gate
    if gate is not None:
        gate = replace(gate, statistic=_Always(math.inf if gate_waits else -math.inf))
    sampling = _AnyCandidates(pacing.sampling.kind, pacing.sampling.candidates, pacing.sampling.every)
    return Pacing(gate=gate, sampling=sampling)


@dataclass(frozen=True)
class _Always(GateStatistic):
    """The same number for every pool."""

    value: float

    def __call__(self, pool: Pool, replayer: Replayer) -> float:
        return self.value

    def default_threshold(self, dimensions: int) -> float:
        return 0.0


@dataclass(frozen=True)
class _AnyCandidates(DirectedSampling):
    """Deals out as many candidates as are chosen, without looking which are best."""

    def choose(self, round_index: int, count: int, wanted: Sequence[Array], replayer: Replayer) -> np.ndarray:
        return np.zeros((count, len(wanted)), dtype="<u4")
