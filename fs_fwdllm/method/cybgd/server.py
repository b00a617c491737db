"""The server's half: who visits which block next, what they are sent, and what becomes of their deltas.

The server keeps the float32 blocks with their versions, the queue of due visits, and for every client the version of
each block it last received. A visit that nobody answered usably goes back to the queue with other clients. Deltas of
the clients that visited one block together are averaged by samples; deltas of different blocks are simply added, since
they touch different parameters. The model is complete at any time: it can be evaluated and saved after every round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fs_fwdllm.data import seeded_permutation
from fs_fwdllm.errors import UpdateRejected, WireError
from fs_fwdllm.method.cybgd.client import delta_encoding
from fs_fwdllm.method.cybgd.codec import Encoding, decode_tensors, encode_tensors
from fs_fwdllm.method.cybgd.schedule import CycleSchedule, Visit
from fs_fwdllm.method.cybgd.state_bytes import TensorState, average_states, pack_states, unpack_states
from fs_fwdllm.method.cybgd.store import FLOAT32, BlockStore
from fs_fwdllm.method.server import RoundReport, RoundServer, ServerSettings
from fs_fwdllm.wire import Assignment, ClientUpdate, decode, encode
from fs_fwdllm.wire_blocks import BlockAssignment, BlockDelta, BlockModel, BlockValues, OptimizerState

__all__ = ["BlockServer", "BlockServerSettings"]


@dataclass(frozen=True)
class BlockServerSettings:
    """What a block server needs besides the trainables.

    Attributes:
        parallel_blocks: visits in one round.
        view: how inactive blocks are sent.
        send_all: send every block in every visit, not only what the client lacks.
        drop_ratio: share of the other layers that a client skips.
        upload, optimizer_state, compress: as the clients' :class:`~fs_fwdllm.method.cybgd.client.VisitSettings`.
    """

    parallel_blocks: int
    view: Encoding
    send_all: bool
    drop_ratio: float
    upload: str
    optimizer_state: str
    compress: bool


@dataclass
class _Open:
    """A visit of the round that is open."""

    visit: Visit
    block: int
    clients: list[int]
    sent: dict[int, list[int]] = field(default_factory=dict)


class BlockServer(RoundServer):
    """Cycles through the blocks."""

    answer = BlockDelta

    def __init__(
        self, store: BlockStore, settings: ServerSettings, schedule: CycleSchedule, blocks: BlockServerSettings
    ) -> None:
        super().__init__(store, settings)
        self.store = store
        self.plan = store.plan
        self._schedule = schedule
        self._blocks = blocks
        self._base_digest = self.digest
        self._clients = sorted(settings.plans)
        self._next_visit = 0
        self._due: list[Visit] = []
        self._planned: list[_Open] = []
        self._open: list[_Open] = []
        #: Per part, how often it has changed. Per block of the cycle, how many visits it has had.
        self.versions = [0] * len(self.plan.parts)
        self.visits = [0] * len(self.plan.blocks)
        self._known: dict[int, list[int]] = {}
        self._states: dict[int, np.ndarray] = {}
        self._decoded: dict[int, list[torch.Tensor]] = {}
        self._views: dict[int, bytes] = {}

    def wanted_clients(self, round_index: int, available: Sequence[int]) -> list[int]:
        """The clients of the round's visits, in ascending order; :meth:`assign` expects them."""
        self._planned = self._plan_round(sorted(available))
        return _clients_of(self._planned)

    def _plan_round(self, available: Sequence[int]) -> list[_Open]:
        """The visits of the next round: failed ones first; no block and no client twice in a round."""
        chosen: list[_Open] = []
        for visit in self._candidates():
            block = self._schedule.block(visit.number, len(self._clients))
            clients = self._schedule.clients(visit, available)
            taken = {client for other in chosen for client in other.clients}
            if block in {other.block for other in chosen} or taken.intersection(clients):
                continue
            chosen.append(_Open(visit, block, clients))
            if len(chosen) == self._blocks.parallel_blocks:
                break
        return chosen

    def _candidates(self) -> Iterable[Visit]:
        yield from self._due
        for number in range(self._next_visit, self._next_visit + len(self.plan.blocks) * len(self._clients)):
            yield Visit(number)

    def assign(self, round_index: int, clients: Sequence[int]) -> dict[int, Assignment]:
        """Open a round: visits for ``clients``, those that :meth:`wanted_clients` named or others of the host's choice.

        A host that asks others gives them the next blocks in turn, ``clients_per_block`` of them each.
        """
        self.round_index = round_index
        planned = self._planned or self._plan_round(self._clients)
        self._open = planned if _clients_of(planned) == sorted(clients) else self._fill(sorted(clients))
        self._planned = []
        rate = self.settings.schedule(round_index)
        self._assigned = {
            client: self._assignment(visit, client, rate) for visit in self._open for client in visit.clients
        }
        self._decoded.clear()
        self._take_from_queue()
        return dict(sorted(self._assigned.items()))

    def _fill(self, clients: Sequence[int]) -> list[_Open]:
        """Visits for clients that the schedule did not ask for."""
        size = self._schedule.clients_per_block
        filled: list[_Open] = []
        candidates = iter(self._candidates())
        for first in range(0, len(clients), size):
            for visit in candidates:
                block = self._schedule.block(visit.number, len(self._clients))
                if block not in {other.block for other in filled}:
                    filled.append(_Open(visit, block, list(clients[first : first + size])))
                    break
        return filled

    def _take_from_queue(self) -> None:
        """What is open is no longer due; visits that were passed over become due."""
        numbers = {visit.visit.number for visit in self._open}
        last = max(numbers, default=-1)
        passed = [Visit(number) for number in range(self._next_visit, last + 1) if number not in numbers]
        self._due = [visit for visit in self._due if visit.number not in numbers] + passed
        self._next_visit = max(self._next_visit, last + 1)

    def _assignment(self, visit: _Open, client: int, rate: float) -> BlockAssignment:
        cycle = self._schedule.cycle(visit.visit.number)
        dropped = self._dropped(visit.block, cycle, client)
        active = self.plan.active(visit.block)
        frames, visit.sent[client] = self._download(client, active, dropped)
        plan = self.settings.plans[client]
        return BlockAssignment(
            round_index=self.round_index,
            client=client,
            digest=self._digest,
            learning_rate=rate,
            steps=plan.steps,
            probes=0,
            batch_index=self.round_index,
            catch_up=tuple(frames),
            block=visit.block,
            versions=tuple(self.versions[part] for part in active),
            cycle=cycle,
            held=tuple(version + 1 if part in visit.sent[client] else 0 for part, version in enumerate(self.versions)),
            dropped=dropped,
            digest_base=self._base_digest,
        )

    def _dropped(self, block: int, cycle: int, client: int) -> tuple[int, ...]:
        """Layers the client skips, drawn for (run, cycle, client); never one the target has a part in."""
        own = set(self.plan.blocks[block].layers)
        others = [layer for layer in range(len(self.plan.layer_names)) if layer not in own]
        count = math.floor(self._blocks.drop_ratio * len(others))
        order = seeded_permutation(len(others), "dropped layers", self._schedule.seed, cycle, client)
        return tuple(sorted(others[index] for index in order[:count]))

    def _download(self, client: int, active: Sequence[int], dropped: Sequence[int]) -> tuple[list[bytes], list[int]]:
        """Frames the client needs, and the parts it holds at their current version afterwards."""
        known = self._known.get(client, [0] * len(self.versions))
        frames, held = [], []
        for part, own in enumerate(self.plan.parts):
            if part not in active and own.layers and set(own.layers) <= set(dropped):
                continue
            held.append(part)
            current = known[part] == self.versions[part] and not self._blocks.send_all
            if part in active:
                if not (current and self._is_exact_when_known(part)):
                    frames.append(self._values_frame(part, FLOAT32, active=True))
                if part in self._states:
                    frames.append(encode(OptimizerState(part, values=self._states[part])))
            elif not current:
                frames.append(self._view_frame(part))
        return frames, held

    def _is_exact_when_known(self, part: int) -> bool:
        """Whether a client that holds the current view of a part has its exact float32 values."""
        return self.versions[part] == 0 or (self.store.is_float32(part) and self._blocks.view == FLOAT32)

    def _view_frame(self, part: int) -> bytes:
        """The frame of an inactive part; kept until the part changes."""
        if part not in self._views:
            self._views[part] = self._values_frame(part, self._blocks.view, active=False)
        return self._views[part]

    def _values_frame(self, part: int, encoding: Encoding, *, active: bool) -> bytes:
        data, compressed = encode_tensors(self.store.values(part), encoding, compress=self._blocks.compress)
        record = BlockValues(
            block=part,
            version=self.versions[part],
            form=encoding.form,
            keep_ratio=encoding.keep_ratio,
            active=active,
            compressed=compressed,
            values=np.frombuffer(data, np.uint8),
        )
        return encode(record)

    def absorb(self, updates: Iterable[ClientUpdate]) -> RoundReport:
        """Close the round. Blocks that nobody visited usably are due again; the report's details count visits."""
        report = super().absorb(updates)
        unvisited = []
        for visit in self._open:
            answered = [client for client in visit.clients if client in report.losses]
            for client in answered:
                self._note_held(client, visit.sent[client], visit.block)
            if answered:
                self.visits[visit.block] += 1
            else:
                unvisited.append(visit.block)
                self._due.append(Visit(visit.visit.number, visit.visit.attempt + 1))
        self._decoded.clear()
        report.zero_share = 0.0
        report.details = {
            "blocks": {str(client): visit.block for visit in self._open for client in visit.clients},
            "cycle": max((self._schedule.cycle(visit.visit.number) for visit in self._open), default=0),
            "block_visits": list(self.visits),
            "reassigned_blocks": unvisited,
        }
        return report

    def _note_held(self, client: int, held: Sequence[int], block: int) -> None:
        """The client holds what it was sent; what the round changed has a newer version by now."""
        known = self._known.setdefault(client, [0] * len(self.versions))
        changed = self._changed_parts()
        for part in held:
            known[part] = self.versions[part] - (1 if part in changed else 0)

    def _changed_parts(self) -> set[int]:
        """Parts that the round's accepted updates have changed."""
        return {part for client in self._decoded for part in self.plan.active(self._block_of(client))}

    def _block_of(self, client: int) -> int:
        assignment = self._assigned[client]
        assert isinstance(assignment, BlockAssignment)
        return assignment.block

    def _expected_values(self, assignment: Assignment) -> int:
        raise NotImplementedError("a block's length depends on what it holds")  # see _judge_values

    def _judge(self, update: ClientUpdate, accepted: dict[int, ClientUpdate]) -> None:
        assignment = self._assigned.get(update.client)
        if isinstance(update, BlockDelta) and isinstance(assignment, BlockAssignment):
            if update.block != assignment.block:
                raise UpdateRejected("other_block", f"client {update.client} visited block {update.block}")
            if update.versions != assignment.versions:
                raise UpdateRejected(
                    "stale_version",
                    f"client {update.client} visited version {update.versions} of block {update.block}, which is at "
                    f"{assignment.versions}",
                )
        super()._judge(update, accepted)

    def _judge_values(self, update: ClientUpdate, assignment: Assignment) -> None:
        assert isinstance(update, BlockDelta)
        active = self.plan.active(update.block)
        client = update.client
        if update.digest_start != self.store.digest_of_values(active, [self.store.values(part) for part in active]):
            raise UpdateRejected("foreign_version", f"client {client} started block {update.block} from other values")
        if update.form != self._blocks.upload:
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

    def _received_states(self, update: BlockDelta) -> dict[int, list[TensorState]]:
        """The optimiser's state for every part of the visit, where the server keeps it. Raises ``WireError``."""
        wanted = self.plan.active(update.block) if self._blocks.optimizer_state == "server" else ()
        records = [decode(frame) for frame in update.states]
        if [getattr(record, "block", None) for record in records] != list(wanted):
            raise WireError(f"{len(records)} optimiser states, but the visit trains {len(wanted)} parts")
        if not all(isinstance(record, OptimizerState) for record in records):
            raise WireError("an optimiser state is a record of another kind")
        return {
            part: unpack_states(np.asarray(record.values), self.store.shapes(part))
            for part, record in zip(wanted, records, strict=True)
        }

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
        self.store.load(part, [value + change.to(value.device) for value, change in zip(values, total, strict=True)])
        self.versions[part] += 1
        self._views.pop(part, None)
        if self._blocks.optimizer_state == "server":
            received = [self._received_states(update)[part] for update in updates if isinstance(update, BlockDelta)]
            self._states[part] = pack_states(average_states(received, list(shares)), compress=self._blocks.compress)

    def dense_frame(self) -> bytes:
        """Everything that has changed since the start, as clients that lack nothing hold it."""
        frames = [self._view_frame(part) for part, version in enumerate(self.versions) if version]
        return encode(BlockModel(round_index=self.round_index, digest=self._digest, frames=tuple(frames)))

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The float32 blocks that have changed (the others are the base model's), and optimiser states."""
        tensors = {
            f"block.{part}.{index}": value
            for part, version in enumerate(self.versions)
            if version
            for index, value in enumerate(self.store.values(part))
        }
        for part, packed in self._states.items():
            tensors[f"optimizer.{part}"] = torch.frombuffer(bytearray(packed.tobytes()), dtype=torch.uint8)
        return tensors

    def state_numbers(self) -> dict[str, object]:
        return {
            "failed_rounds": self.failed_rounds,
            "next_visit": self._next_visit,
            "due": [[visit.number, visit.attempt] for visit in self._due],
            "versions": self.versions,
            "visits": self.visits,
            "known": [[client, known] for client, known in sorted(self._known.items())],
        }

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        """Inverse of :meth:`state_tensors` and :meth:`state_numbers`."""
        own = {name: numbers[name] for name in ("versions", "visits", "due", "known")}
        assert all(isinstance(value, list) for value in own.values())
        self.failed_rounds = int(str(numbers["failed_rounds"]))
        self._next_visit = int(str(numbers["next_visit"]))
        self._due = [Visit(number, attempt) for number, attempt in own["due"]]  # type: ignore[attr-defined]
        self.versions, self.visits = list(own["versions"]), list(own["visits"])  # type: ignore[call-overload]
        self._known = {client: list(known) for client, known in own["known"]}  # type: ignore[attr-defined]
        for part, version in enumerate(self.versions):
            if version:
                count = len(self.store.values(part))
                self.store.load(part, [tensors[f"block.{part}.{index}"] for index in range(count)])
        packed = {name: value for name, value in tensors.items() if name.startswith("optimizer.")}
        self._states = {int(name.rpartition(".")[2]): value.numpy() for name, value in packed.items()}
        self._views.clear()
        self._digest = self.store.digest()


def _clients_of(visits: Iterable[_Open]) -> list[int]:
    return sorted(client for visit in visits for client in visit.clients)
