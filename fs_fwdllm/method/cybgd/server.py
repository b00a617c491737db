"""The server's half: who visits which block next, what they are sent, and what becomes of their deltas.

The server keeps the float32 blocks with their versions (:mod:`.server_blocks`), the queue of due visits
(:mod:`.visit_queue`), and for every client the versions it holds (:mod:`.holdings`). A visit that nobody answered
usably goes back to the queue with other clients, so that a round without any answer costs nothing but its time. Deltas
of the clients that visited one block together are averaged by samples; deltas of different blocks are simply added,
since they touch different parameters. The model is complete at any time: it can be evaluated and saved after every
round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fs_fwdllm.core.seeding import seeded_permutation
from fs_fwdllm.core.wire import Assignment, ClientUpdate, decode, frame_bytes
from fs_fwdllm.errors import UpdateRejected, WireError
from fs_fwdllm.guard import root_mean_square
from fs_fwdllm.method.cybgd.client import delta_encoding
from fs_fwdllm.method.cybgd.codec import Encoding, decode_tensors, raw_bytes
from fs_fwdllm.method.cybgd.holdings import Holdings
from fs_fwdllm.method.cybgd.optimiser import OptimizerSettings
from fs_fwdllm.method.cybgd.records import BlockAssignment, BlockDelta, OptimizerState
from fs_fwdllm.method.cybgd.schedule import CycleSchedule
from fs_fwdllm.method.cybgd.server_blocks import ServerBlocks
from fs_fwdllm.method.cybgd.state_bytes import TensorState, average_states, most_bytes, pack_states, unpack_states
from fs_fwdllm.method.cybgd.store import BlockStore
from fs_fwdllm.method.cybgd.visit_queue import OpenVisit, VisitQueue
from fs_fwdllm.method.server import LARGEST, RoundServer, ServerSettings, sample_weights

__all__ = ["BlockServer", "BlockServerSettings"]

#: The most that the length of a carried frame takes in a header.
_STATE_LENGTH_BYTES = 9


@dataclass(frozen=True)
class BlockServerSettings:
    """What a block server needs besides the trainables.

    Attributes:
        parallel_blocks: visits in one round.
        view: how inactive blocks are sent.
        send_all: send every block in every visit, not only what the client lacks.
        drop_ratio: share of the other layers that a client skips.
        optimizer, upload, optimizer_state, compress: as the clients'
            :class:`~fs_fwdllm.method.cybgd.client.VisitSettings`.
    """

    parallel_blocks: int
    view: Encoding
    send_all: bool
    drop_ratio: float
    optimizer: OptimizerSettings
    upload: str
    optimizer_state: str
    compress: bool


class BlockServer(RoundServer):
    """Cycles through the blocks.

    Attributes:
        blocks: the float32 blocks and their versions.
        queue: open and due visits.
        visits: per block of the cycle, how many visits it has had.
    """

    answer = BlockDelta
    reassigns = True

    def __init__(
        self, store: BlockStore, settings: ServerSettings, schedule: CycleSchedule, blocks: BlockServerSettings
    ) -> None:
        super().__init__(store.trainables, settings)
        self.store = store
        self.plan = store.plan
        self._settings = blocks
        self._digest = self._base_digest = store.digest()
        self.blocks = ServerBlocks(store, blocks.view, compress=blocks.compress)
        self.queue = VisitQueue(schedule, sorted(settings.plans), blocks.parallel_blocks)
        self.visits = [0] * len(self.plan.blocks)
        self._holdings = Holdings(len(self.plan.parts), self._base_digest)
        self._decoded: dict[int, list[torch.Tensor]] = {}

    def _largest_answer_bytes(self, assignment: Assignment) -> int:
        assert isinstance(assignment, BlockAssignment)
        active = self.plan.active(assignment.block)
        shapes = [shape for part in active for shape in self.store.shapes(part)]
        delta = BlockDelta(
            **LARGEST,
            block=assignment.block,
            versions=assignment.versions,
            digest_start=assignment.digest_base,
            form=self._settings.upload,
            compressed=True,
            states=(),
            values=_stand_in(raw_bytes(shapes, delta_encoding(self._settings.upload))),
        )
        states = [_STATE_LENGTH_BYTES + self._state_frame_bytes(part) for part in self._parts_with_states(active)]
        return frame_bytes(delta) + sum(states)

    def _parts_with_states(self, active: Sequence[int]) -> Sequence[int]:
        """The parts of a visit whose optimiser's state travels."""
        return active if self._settings.optimizer_state == "server" else ()

    def _state_frame_bytes(self, part: int) -> int:
        longest = most_bytes(self.store.shapes(part), self._settings.optimizer.keeps)
        return frame_bytes(OptimizerState(part, values=_stand_in(longest)))

    @property
    def versions(self) -> list[int]:
        """Per part, how often it has changed."""
        return self.blocks.versions

    @property
    def digest(self) -> bytes:
        return self._digest

    def wanted_clients(self, available: Sequence[int]) -> list[int]:
        """The clients of the round's visits, in ascending order; :meth:`assign` expects them."""
        return self.queue.plan(available)

    def assign(self, round_index: int, clients: Sequence[int]) -> dict[int, Assignment]:
        """Open a round: visits for ``clients``, whom :meth:`wanted_clients` named or whom the host chose."""
        self.round_index = round_index
        rate = self.settings.schedule(round_index)
        self._decoded.clear()
        self.assigned = {
            client: self._assignment(visit, client, rate)
            for visit in self.queue.begin(clients)
            for client in visit.clients
        }
        return dict(sorted(self.assigned.items()))

    def reassign(self, client: int) -> Assignment:
        """The open round's visit anew, with what ``client`` lacks by now (see :meth:`note_holds`)."""
        rate = self.assigned[client].learning_rate
        self.assigned[client] = self._assignment(self.queue.visit_of(client), client, rate)
        return self.assigned[client]

    def _assignment(self, visit: OpenVisit, client: int, rate: float) -> BlockAssignment:
        cycle = self.queue.schedule.cycle(visit.visit.number)
        active, dropped = self.plan.active(visit.block), self.dropped_layers(visit.block, cycle, client)
        frames, held = self.blocks.for_visit(
            self._holdings.of(client), active, dropped, send_all=self._settings.send_all
        )
        visit.sent[client] = held
        return BlockAssignment(
            round_index=self.round_index,
            client=client,
            digest=self._digest,
            learning_rate=rate,
            steps=self.settings.plans[client].steps,
            probes=(),
            batch_index=self.round_index,
            catch_up=tuple(frames),
            block=visit.block,
            versions=tuple(self.versions[part] for part in active),
            cycle=cycle,
            held=tuple(version + 1 if part in held else 0 for part, version in enumerate(self.versions)),
            dropped=dropped,
            digest_base=self._base_digest,
        )

    def dropped_layers(self, block: int, cycle: int, client: int) -> tuple[int, ...]:
        """Layers the client skips, drawn for (run, cycle, client); never one the target has a part in."""
        own = set(self.plan.blocks[block].layers)
        others = [layer for layer in range(len(self.plan.layer_names)) if layer not in own]
        count = math.floor(self._settings.drop_ratio * len(others))
        order = seeded_permutation(len(others), "dropped layers", self.queue.schedule.seed, cycle, client)
        return tuple(sorted(others[index] for index in order[:count]))

    def _lacking(self, client: int) -> tuple[bytes, ...]:
        """Every block that ``client`` lacks, in the form of inactive blocks."""
        frames = self.blocks.missing(self._holdings.of(client))
        self._holdings.note_told(client, self._digest, self.versions)
        return tuple(frames)

    def note_holds(self, client: int, digest: bytes) -> None:
        """``client`` says that it is at ``digest`` (see :mod:`.holdings`)."""
        self._holdings.note_holds(client, digest)

    def note_parameters_changed(self) -> None:
        self.store.forget_digests()
        self._digest = self.store.digest()

    def _close(self, accepted: list[ClientUpdate]) -> dict[str, object]:
        """Move the visited blocks; those that nobody visited usably are due again. The columns count visits."""
        start, before = self._digest, list(self.versions)
        if accepted:
            self._step(accepted, sample_weights(accepted, equal=self.settings.equal_weights))
            self._require_finite()
            self._digest = self.store.digest()
        clients, unvisited = {update.client for update in accepted}, []
        for visit in self.queue.open:
            answered = [client for client in visit.clients if client in clients]
            for client in answered:
                self._holdings.note_answered(client, start, visit.sent[client], before)
            if answered:
                self.visits[visit.block] += 1
            else:
                unvisited.append(visit.block)
                self.queue.failed(visit)
        self._decoded.clear()
        opened = self.queue.open
        return {
            "blocks": {str(client): visit.block for visit in opened for client in visit.clients},
            "cycle": max((self.queue.schedule.cycle(visit.visit.number) for visit in opened), default=0),
            "block_visits": list(self.visits),
            "reassigned_blocks": unvisited,
        }

    def _block_of(self, client: int) -> int:
        assignment = self.assigned[client]
        assert isinstance(assignment, BlockAssignment)
        return assignment.block

    def _judge_values(self, update: ClientUpdate, assignment: Assignment) -> None:
        assert isinstance(update, BlockDelta) and isinstance(assignment, BlockAssignment)
        _require_visit(update, assignment)
        active = self.plan.active(update.block)
        client = update.client
        if update.digest_start != self.store.digest_of_values(active, [self.store.values(part) for part in active]):
            raise UpdateRejected("foreign_version", f"client {client} started block {update.block} from other values")
        if update.form != self._settings.upload:
            raise UpdateRejected("other_form", f"client {client} sent a delta in form {update.form!r}")
        try:
            shapes = [shape for part in active for shape in self.store.shapes(part)]
            encoding = delta_encoding(update.form)
            delta = decode_tensors(np.asarray(update.values), shapes, encoding, compressed=update.compressed)
            states = self._received_states(update)
        except WireError as error:
            raise UpdateRejected("malformed", f"client {client}: {error}") from error
        values = [*delta, *(value for own in states.values() for state in own for value in state.values())]
        if not (math.isfinite(update.loss) and all(bool(torch.isfinite(value).all()) for value in values)):
            raise UpdateRejected("not_finite", f"client {client} sent NaN or infinity")
        self._decoded[client] = [value.float() for value in delta]

    def lengths_of(self, update: ClientUpdate) -> tuple[float, ...]:
        """Of the block's delta and of what every visit trains, for a step at the rate of one."""
        work = self.assigned[update.client]
        per_step = work.steps * work.learning_rate or 1.0
        return tuple(
            root_mean_square(*(change.numpy() for change in part)) / per_step for part in self._by_place(update)
        )

    def _by_place(self, update: ClientUpdate) -> list[list[torch.Tensor]]:
        """The delta of the visited block, and behind it that of what is always trained, if there is such."""
        delta = self._decoded[update.client]
        own = len(self.store.shapes(self._block_of(update.client)))
        return [delta[:own], delta[own:]] if self.plan.always is not None else [delta]

    def shortened(self, update: ClientUpdate, factors: Sequence[float]) -> ClientUpdate:
        """As it was sent; the delta that it stands for is shortened in place."""
        for part, factor in zip(self._by_place(update), factors, strict=True):
            for change in part:
                change.mul_(factor)
        return update

    def longest(self) -> tuple[float, ...]:
        return (self._settings.optimizer.longest_step,) * (1 if self.plan.always is None else 2)

    def _received_states(self, update: BlockDelta) -> dict[int, list[TensorState]]:
        """The optimiser's state for every part of the visit, where the server keeps it. Raises ``WireError``."""
        wanted = self._parts_with_states(self.plan.active(update.block))
        records = [decode(frame, OptimizerState) for frame in update.states]
        if [record.block for record in records] != list(wanted):
            raise WireError(f"{len(records)} optimiser states, but the visit trains {len(wanted)} parts")
        received = {}
        for part, record in zip(wanted, records, strict=True):
            received[part] = unpack_states(np.asarray(record.values), self.store.shapes(part))
            self._settings.optimizer.require_own(received[part])
        return received

    def _step(self, accepted: list[ClientUpdate], weights: np.ndarray) -> None:
        for block in sorted({self._block_of(update.client) for update in accepted}):
            members = [index for index, update in enumerate(accepted) if self._block_of(update.client) == block]
            self._move(block, 0, [accepted[index] for index in members], weights[members])
        if self.plan.always is not None:
            self._move(len(self.plan.blocks), 1, accepted, weights)

    @torch.no_grad()
    def _move(self, part: int, place: int, updates: Sequence[ClientUpdate], weights: np.ndarray) -> None:
        """Add the weighted mean of the deltas of one part, which is the ``place``-th that their visits trained."""
        shares = weights / weights.sum()
        values = self.store.values(part)
        total = [torch.zeros(value.shape) for value in values]
        for update, share in zip(updates, shares, strict=True):
            delta = self._decoded[update.client]
            own = delta[: len(values)] if place == 0 else delta[-len(values) :]
            for sum_, change in zip(total, own, strict=True):
                sum_ += change * float(np.float32(share))
        self.blocks.change(part, [value + change.to(value.device) for value, change in zip(values, total, strict=True)])
        if self._settings.optimizer_state == "server":
            received = [self._received_states(update)[part] for update in updates if isinstance(update, BlockDelta)]
            averaged = average_states(received, list(shares))
            self.blocks.states[part] = pack_states(averaged, compress=self._settings.compress)

    def dense_frame(self) -> bytes:
        """Everything that has changed since the start, as clients that lack nothing hold it."""
        return self.blocks.model_frame(self.round_index, self._digest)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The float32 blocks that have changed, and optimiser states."""
        return self.blocks.state_tensors()

    def state_numbers(self) -> dict[str, object]:
        return {
            "failed_rounds": self.failed_rounds,
            **self._guard_numbers(),
            **self.blocks.state_numbers(),
            "visits": self.visits,
            **self.queue.state_numbers(),
            **self._holdings.state_numbers(),
        }

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        """Inverse of :meth:`state_tensors` and :meth:`state_numbers`."""
        visits = numbers["visits"]
        assert isinstance(visits, list)
        self.failed_rounds = int(str(numbers["failed_rounds"]))
        self._load_guard(numbers)
        self.visits = list(visits)
        self.queue.load_state(numbers)
        self._holdings.load_state(numbers)
        self.blocks.load_state(tensors, numbers)
        self._digest = self.store.digest()


def _stand_in(length: int) -> np.ndarray:
    """That many bytes, of which only the number counts; they occupy no memory."""
    return np.broadcast_to(np.uint8(0), length)


def _require_visit(update: BlockDelta, assignment: BlockAssignment) -> None:
    """Raises ``UpdateRejected`` if another block, or another version of it, was visited than was asked for."""
    if update.block != assignment.block:
        raise UpdateRejected("other_block", f"client {update.client} visited block {update.block}")
    if update.versions != assignment.versions:
        raise UpdateRejected(
            "stale_version",
            f"client {update.client} visited version {update.versions} of block {update.block}, which is at "
            f"{assignment.versions}",
        )
