"""The model by blocks: on the server in float32, on the client in the model's own dtype, with one digest for both.

The server keeps every block in float32, so that progress smaller than the spacing of the model's dtype is not lost
between visits. The model that clients hold, that is evaluated and saved, is its *deployed* form: each value rounded to
the model's dtype. The digest is taken over deployed bits, block by block, so that only blocks that changed are hashed
again, and so that a client that holds no float32 values can confirm it.

A client's replica holds what the last message left there: of inactive blocks the *view* that the download's encoding
gives (the exact deployed bits, or a quantised or pruned form of them), of the blocks a visit trains the exact float32
values. After the visit the trained blocks show the view of the values they started from (the base model's are shown
exactly, as everybody holds them), so that what a client holds depends only on the versions it was sent, not on what it
trained; the server's answer to its upload is a new version.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from fs_fwdllm.core.trainables import DIGEST_BYTES, Trainables, digest_of
from fs_fwdllm.core.wire import Record, decode
from fs_fwdllm.errors import DivergenceError, WireError
from fs_fwdllm.method.cybgd.blocks import BlockPlan
from fs_fwdllm.method.cybgd.codec import FORMS, Encoding, decode_tensors, encode_tensors
from fs_fwdllm.method.cybgd.records import BlockModel, BlockValues, OptimizerState
from fs_fwdllm.method.cybgd.state_bytes import TensorState, unpack_states

__all__ = ["FLOAT32", "BlockReplica", "BlockStore", "view_encoding"]

FLOAT32 = Encoding("float32", "float32")


def view_encoding(trainables: Trainables, inactive: str, keep_ratio: float) -> Encoding:
    """How inactive blocks of a model are written; ``inactive`` is ``exact``, ``int8`` or ``int4``."""
    dtypes = set(trainables.dtypes)
    exact = "float32" if len(dtypes) > 1 else str(dtypes.pop()).removeprefix("torch.")
    return Encoding(exact if inactive == "exact" else inactive, exact, keep_ratio)


class BlockStore:
    """Trainables that are read, changed and hashed block by block.

    Args:
        trainables: float32 (server) or in the model's dtype (client).
        plan: its parts hold exactly the names of ``trainables``.
        dtypes: the model's, per tensor.
    """

    def __init__(self, trainables: Trainables, plan: BlockPlan, dtypes: Sequence[torch.dtype]) -> None:
        self.trainables = trainables
        self.plan = plan
        place = {name: index for index, name in enumerate(trainables.names)}
        self._members = [[place[name] for name in part.parameters] for part in plan.parts]
        self._shapes = trainables.shapes
        self._dtypes = tuple(dtypes)
        self._digests: dict[int, bytes] = {}

    def values(self, part: int) -> list[torch.Tensor]:
        """The tensors of a part, in its order (detached; their storage is the store's, or was read from its disk)."""
        return [self.trainables.tensors[index].detach() for index in self._members[part]]

    def parameters(self, part: int) -> list[torch.Tensor]:
        """The tensors of a part as the model has them; of a base on the disk, while the part is :meth:`resident`."""
        return [self.trainables.parameter(index) for index in self._members[part]]

    def in_memory(self, part: int) -> dict[int, torch.Tensor]:
        """By their places in a part, the tensors that are in memory: all, but of a base on the disk."""
        held = self.trainables.in_memory
        return {place: held[index].detach() for place, index in enumerate(self._members[part]) if index in held}

    @contextmanager
    def resident(self, parts: Sequence[int]) -> Iterator[None]:
        """Have ``parts`` in memory for as long as they are trained."""
        with self.trainables.resident([index for part in parts for index in self._members[part]]):
            yield

    def shapes(self, part: int) -> list[tuple[int, ...]]:
        return [self._shapes[index] for index in self._members[part]]

    def count(self, part: int) -> int:
        """Parameters in a part."""
        return sum(map(math.prod, self.shapes(part)))

    def deployed(self, part: int) -> list[torch.Tensor]:
        """The values of a part in the model's dtype."""
        return [
            tensor.to(self._dtypes[index]) for index, tensor in zip(self._members[part], self.values(part), strict=True)
        ]

    def is_float32(self, part: int) -> bool:
        """Whether a part's deployed form is its float32 form."""
        return all(self._dtypes[index] == torch.float32 for index in self._members[part])

    @torch.no_grad()
    def load(self, part: int, values: Sequence[torch.Tensor]) -> None:
        """Overwrite a part in place."""
        self.trainables.assign(self._members[part], values)
        self._digests.pop(part, None)

    def forget_digests(self) -> None:
        """The tensors were changed from outside: hash every part anew when it is asked for."""
        self._digests.clear()

    def part_digest(self, part: int) -> bytes:
        """16 bytes that name a part's deployed bits."""
        if part not in self._digests:
            self._digests[part] = digest_of(zip(self.plan.parts[part].parameters, self.deployed(part), strict=True))
        return self._digests[part]

    def digest(self) -> bytes:
        """16 bytes that name the deployed model: BLAKE2b over the digests of its parts."""
        joined = b"".join(self.part_digest(part) for part in range(len(self.plan.parts)))
        return hashlib.blake2b(joined, digest_size=DIGEST_BYTES).digest()

    def digest_of_values(self, parts: Sequence[int], values: Sequence[Sequence[torch.Tensor]]) -> bytes:
        """16 bytes that name float32 ``values`` of ``parts``."""
        names = [name for part in parts for name in self.plan.parts[part].parameters]
        tensors = [tensor for own in values for tensor in own]
        return digest_of(zip(names, tensors, strict=True))


class BlockReplica:
    """A client's model.

    Args:
        store: the model's own tensors.
        view: how inactive blocks are held.
        exact: whether the whole model must equal the server's, which is then checked at every assignment.
    """

    def __init__(self, store: BlockStore, view: Encoding, *, exact: bool) -> None:
        self.store = store
        self.digest = self.base_digest = store.digest()
        self._versions = [0] * len(store.plan.parts)
        self._view = view
        self._exact = exact
        self._received: dict[int, BlockValues] = {}
        self._kept: dict[int, dict[int, torch.Tensor]] = {}
        self._states: dict[int, list[TensorState]] = {}

    @property
    def trainables(self) -> Trainables:
        return self.store.trainables

    def follow(self, frames: Sequence[bytes], target: bytes) -> None:
        """Take in what the server sent.

        Raises:
            WireError: a frame is not one of the server's, or does not fit the model.
            DivergenceError: every block should now be the server's, but is not.
        """
        self._received.clear()
        self._kept.clear()
        self._states.clear()
        for frame in frames:
            self._take(decode(frame))
        if not self._exact:
            self.digest = target
            return
        self.digest = self.store.digest()
        if self.digest != target:
            raise DivergenceError(
                f"the client's model is at {self.digest.hex()} but the server's at {target.hex()}: the weights differ. "
                "Check that both run the same package versions, the same base model and the same configuration"
            )

    def check_base(self, digest: bytes) -> None:
        """Raises :class:`~fs_fwdllm.errors.DivergenceError` unless client and server loaded the same model."""
        if digest != self.base_digest:
            raise DivergenceError(
                f"the client loaded a model with digest {self.base_digest.hex()}, the server one with {digest.hex()}"
            )

    def check_held(self, held: Sequence[int]) -> None:
        """Raises :class:`~fs_fwdllm.errors.DivergenceError` unless the client holds what the server believes it does.

        A client that was started anew holds version 0 of everything; inexact downloads have no digest to betray it.
        """
        if len(held) != len(self._versions):
            raise WireError(f"an assignment speaks of {len(held)} blocks, but the plan has {len(self._versions)}")
        for part, (own, wanted) in enumerate(zip(self._versions, held, strict=True)):
            if wanted and own != wanted - 1:
                raise DivergenceError(
                    f"the client holds version {own} of block {part}, but the server takes it to hold version "
                    f"{wanted - 1}; a client that was started anew must join as a new one"
                )

    def start(self, part: int) -> list[torch.Tensor]:
        """The exact float32 values a visit starts a part from; not to be written to.

        They are needed before and after a visit, but not in between, so that they are kept as they came: as the frame's
        bytes, as a copy of what the model holds in memory, or where they are on the disk. The server leaves out only
        blocks it knows to be exact there.
        """
        record = self._received.get(part)
        if record is not None:
            return [tensor.to(self.trainables.device) for tensor in self._decoded(record)]
        if part not in self._kept:
            self._kept[part] = {place: value.clone() for place, value in self.store.in_memory(part).items()}
        kept = self._kept[part]
        return [kept.get(place, value).float() for place, value in enumerate(self.store.values(part))]

    def state(self, part: int) -> list[TensorState] | None:
        """The optimiser state the server sent for a part."""
        return self._states.pop(part, None)

    def settle(self, part: int) -> None:
        """End a visit: show the view of where it started."""
        self.store.load(part, self._seen(part, self.start(part)))
        self._received.pop(part, None)
        self._kept.pop(part, None)

    def _seen(self, part: int, start: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._exact or part >= len(self.store.plan.blocks) or self._versions[part] == 0:
            return list(start)  # the base model's blocks are held exactly by everybody
        data, _ = encode_tensors(start, self._view, compress=False)
        return decode_tensors(data, self.store.shapes(part), self._view, compressed=False)

    def _take(self, record: Record) -> None:
        if isinstance(record, BlockModel):
            for frame in record.frames:
                self._take(decode(frame))
        elif isinstance(record, BlockValues):
            self._load_values(record)
        elif isinstance(record, OptimizerState):
            self._require_part(record.block)
            self._states[record.block] = unpack_states(np.asarray(record.values), self.store.shapes(record.block))
        else:
            raise WireError(f"a {type(record).__name__} cannot bring a block replica up to date")

    def _load_values(self, record: BlockValues) -> None:
        self._require_part(record.block)
        if record.form not in FORMS:
            raise WireError(f"a block in form {record.form!r:.20}; known are {FORMS}")
        self.store.load(record.block, self._decoded(record))
        self._versions[record.block] = record.version
        if record.active:
            self._received[record.block] = record

    def _decoded(self, record: BlockValues) -> list[torch.Tensor]:
        encoding = FLOAT32 if record.active else Encoding(record.form, self._view.exact, record.keep_ratio)
        shapes = self.store.shapes(record.block)
        return decode_tensors(np.asarray(record.values), shapes, encoding, compressed=record.compressed)

    def _require_part(self, part: int) -> None:
        if part >= len(self.store.plan.parts):
            raise WireError(f"block {part} is sent, but the plan has {len(self.store.plan.parts)}")
