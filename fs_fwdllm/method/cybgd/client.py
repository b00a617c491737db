"""The client's half: take a block, train it, send how far it moved.

A visit follows the server to the assigned versions, trains the target block (and what is always active) from its exact
float32 values for the round's batches, uploads the difference, and leaves the model as the server knows it.

**Error feedback.** An int8 delta loses what falls between its levels. The client adds what it lost at its last visit to
the same block to the delta it sends next, ``sent_t = Q(delta_t + e_t)``, ``e_(t+1) = delta_t + e_t - sent_t``; summed
over visits the server receives ``sum delta_t - e_(T+1)``, so that nothing is lost but the last remainder (Seide et al.
2014; Karimireddy et al. 2019, arXiv 1901.09847). The remainder lives on the client: the server cannot know it, and 4
bytes a parameter for it would be more than the delta. A client that is replaced starts without one.

**Optimiser state** is fresh at each visit (reset), or the client's own of its last visit to the block (client), or
travels with the block (server; AdamW's doubles the download and triples the upload).

One worker serves many simulated clients, so what is kept is keyed by (client, part); :meth:`BlockWorker.state_tensors`
is its content, for the checkpoint of a host that simulates clients in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fs_fwdllm.core.wire import Assignment, ClientUpdate, encode
from fs_fwdllm.data.types import Batch
from fs_fwdllm.errors import WireError
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.method.client import BatchSettings, ClientWorker
from fs_fwdllm.method.cybgd.codec import Encoding, decode_tensors, encode_tensors
from fs_fwdllm.method.cybgd.optimiser import BlockOptimizer, OptimizerSettings
from fs_fwdllm.method.cybgd.records import BlockAssignment, BlockDelta, OptimizerState
from fs_fwdllm.method.cybgd.skipping import LayerSkipper
from fs_fwdllm.method.cybgd.state_bytes import TensorState, pack_states
from fs_fwdllm.method.cybgd.store import BlockReplica
from fs_fwdllm.model.objective import Objective

__all__ = ["BlockWorker", "VisitSettings", "delta_encoding"]


def delta_encoding(form: str) -> Encoding:
    """How a delta is written: ``int8`` leaves vectors in float32."""
    return Encoding(form, "float32" if form == "int8" else form)


@dataclass(frozen=True)
class VisitSettings:
    """How a client works.

    Attributes:
        optimizer: see :class:`~fs_fwdllm.method.cybgd.optimiser.OptimizerSettings`.
        upload: form of the delta: ``float32``, ``bfloat16`` or ``int8``.
        optimizer_state: ``reset``, ``server`` or ``client``.
        compress: whether to compress without loss.
    """

    optimizer: OptimizerSettings
    upload: str
    optimizer_state: str
    compress: bool


@dataclass(frozen=True)
class _Trained:
    """What a visit has made: losses of the batches, and by part the float32 values it ended at and optimiser states."""

    losses: list[float]
    ends: dict[int, list[torch.Tensor]]
    states: dict[int, list[TensorState]]


class BlockWorker(ClientWorker):
    """Visits blocks.

    Attributes:
        skipper: leaves layers out of the model for a while.
        residuals: what int8 deltas have lost so far, by client and part; one tensor a parameter.
        states: what optimisers of earlier visits kept, by client and part, where clients keep it.
    """

    def __init__(
        self,
        objective: Objective,
        replica: BlockReplica,
        batches: BatchSettings,
        backprop: Backprop,
        settings: VisitSettings,
    ) -> None:
        super().__init__(objective, replica, batches)
        self.replica: BlockReplica = replica
        self._backprop = backprop
        self._settings = settings
        self._store = replica.store
        self.skipper = LayerSkipper(objective.model, self._store.plan.layer_names)
        self.residuals: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.states: dict[tuple[int, int], list[TensorState]] = {}
        objective.model.requires_grad_(False)

    def train(self, assignment: Assignment, batches: Sequence[Batch]) -> ClientUpdate:
        if not isinstance(assignment, BlockAssignment):
            raise WireError(f"a block worker was sent a {type(assignment).__name__}")
        self.replica.check_base(assignment.digest_base)
        self.replica.check_held(assignment.held)
        self._check_place(assignment)
        parts = self._store.plan.active(assignment.block)
        try:
            with self.skipper.skipping(assignment.dropped), self._store.resident(parts):
                trained = self._visit(assignment, batches, parts)
            starts = {part: self.replica.start(part) for part in parts}
            return self._answer(assignment, batches, trained, starts)
        finally:
            for part in parts:
                self.replica.settle(part)

    def _check_place(self, assignment: BlockAssignment) -> None:
        """Raises :class:`~fs_fwdllm.errors.WireError` if there is no such block, or a layer to skip that is none."""
        blocks, layers = len(self._store.plan.blocks), len(self._store.plan.layer_names)
        if assignment.block >= blocks or any(layer >= layers for layer in assignment.dropped):
            raise WireError(
                f"a visit to block {assignment.block} without layers {list(assignment.dropped[:10])}, but the plan has "
                f"{blocks} blocks and {layers} layers"
            )

    def _visit(self, assignment: BlockAssignment, batches: Sequence[Batch], parts: Sequence[int]) -> _Trained:
        """Train. Optimiser and gradients are gone when this returns."""
        client, policy = assignment.client, self._settings.optimizer_state
        counts = {part: len(self._store.shapes(part)) for part in parts}
        before: list[TensorState] = []
        for part, count in counts.items():
            kept = {"reset": None, "server": self.replica.state(part), "client": self.states.get((client, part))}
            before += kept[policy] or [{}] * count
        optimizer = BlockOptimizer(
            [tensor for part in parts for tensor in self._store.parameters(part)],
            [tensor for part in parts for tensor in self.replica.start(part)],
            self._settings.optimizer,
            before,
        )
        losses = optimizer.train(self.objective, self._backprop, batches, assignment.learning_rate)
        after = iter(optimizer.state()) if policy != "reset" else iter([{}] * len(before))
        states = {part: [next(after) for _ in range(count)] for part, count in counts.items()}
        masters = iter(optimizer.masters)
        ends = {part: [next(masters).detach() for _ in range(count)] for part, count in counts.items()}
        return _Trained(losses, ends, states)

    def _answer(
        self,
        assignment: BlockAssignment,
        batches: Sequence[Batch],
        trained: _Trained,
        starts: dict[int, list[torch.Tensor]],
    ) -> BlockDelta:
        client, policy = assignment.client, self._settings.optimizer_state
        data, compressed = self.delta(client, starts, trained.ends)
        if policy == "client":
            self.states.update({(client, part): own for part, own in trained.states.items()})
        frames = []
        if policy == "server":
            frames = [encode(OptimizerState(part, values=pack_states(own, compress=self._settings.compress)))
                      for part, own in trained.states.items()]  # fmt: skip
        return BlockDelta(
            round_index=assignment.round_index,
            client=client,
            digest=assignment.digest,
            samples=sum(len(batch) for batch in batches),
            loss=float(np.mean(trained.losses)),
            forward_passes=self._backprop.forward_passes * len(batches),
            backward_passes=len(batches),
            block=assignment.block,
            versions=assignment.versions,
            digest_start=self._store.digest_of_values(list(starts), list(starts.values())),
            form=self._settings.upload,
            compressed=compressed,
            states=tuple(frames),
            values=np.frombuffer(data, np.uint8),
        )

    @torch.no_grad()
    def delta(
        self, client: int, starts: dict[int, list[torch.Tensor]], ends: dict[int, list[torch.Tensor]]
    ) -> tuple[bytes, bool]:
        """The encoded change, with what earlier int8 deltas lost, and whether it is compressed.

        Args:
            starts, ends: float32 values by part; ``ends`` is emptied, so that no part is held twice.
        """
        changes = []
        for part, start in starts.items():
            owed = self.residuals.get((client, part), [None] * len(start))
            for end, begin, more in zip(ends.pop(part), start, owed, strict=True):
                change = end - begin
                changes.append((change if more is None else change.add_(more.to(change.device))).cpu())
        encoding = delta_encoding(self._settings.upload)
        data, compressed = encode_tensors(changes, encoding, compress=self._settings.compress)
        if self._settings.upload == "int8" and all(bool(torch.isfinite(change).all()) for change in changes):
            shapes = [tuple(change.shape) for change in changes]
            sent = decode_tensors(data, shapes, encoding, compressed=compressed)
            lost = iter([change - value for change, value in zip(changes, sent, strict=True)])
            self.residuals.update({(client, part): [next(lost) for _ in start] for part, start in starts.items()})
        return data, compressed

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What clients keep between visits, by names that :meth:`load_state` understands."""
        tensors = {}
        for (client, part), owed in self.residuals.items():
            tensors.update({f"residual.{client}.{part}.{index}": value for index, value in enumerate(owed)})
        for (client, part), states in self.states.items():
            for index, state in enumerate(states):
                tensors.update({f"moment.{client}.{part}.{index}.{name}": value for name, value in state.items()})
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of :meth:`state_tensors`."""
        self.residuals.clear()
        self.states.clear()
        for key, value in tensors.items():
            kind, client, part, index, *name = key.split(".", 4)
            place, count = (int(client), int(part)), len(self._store.shapes(int(part)))
            if kind == "residual":
                self.residuals.setdefault(place, [torch.zeros(0)] * count)[int(index)] = value
            else:
                self.states.setdefault(place, [{} for _ in range(count)])[int(index)][name[0]] = value
