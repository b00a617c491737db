"""The server's blocks in their present version, as the frames that bring them to clients.

A block that a visit trains goes as exact float32 values, with its optimiser's state where the server keeps it; all
others go as the *view*, the form that the configuration chooses for inactive blocks. A block that was never changed is
the base model's, which every client loaded and holds exactly: where it must be sent after all, it goes exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fs_fwdllm.core.trainables import CHANGED_FILES
from fs_fwdllm.core.wire import encode
from fs_fwdllm.method.cybgd.codec import Encoding, encode_tensors
from fs_fwdllm.method.cybgd.records import BlockModel, BlockValues, OptimizerState
from fs_fwdllm.method.cybgd.store import FLOAT32, BlockStore

__all__ = ["ServerBlocks"]


class ServerBlocks:
    """Blocks with versions.

    Args:
        store: float32.
        view: how inactive blocks are sent.
        compress: whether to compress without loss.

    Attributes:
        versions: per part, how often it has changed.
        states: the optimiser's state for a part, packed, where the server keeps it.
    """

    def __init__(self, store: BlockStore, view: Encoding, *, compress: bool) -> None:
        self.store = store
        self.versions = [0] * len(store.plan.parts)
        self.states: dict[int, np.ndarray] = {}
        self._view = view
        self._compress = compress
        self._frames: dict[int, bytes] = {}

    def change(self, part: int, values: Sequence[torch.Tensor]) -> None:
        """Give a part its next version."""
        self.store.load(part, values)
        self.versions[part] += 1
        self._frames.pop(part, None)

    def missing(self, held: Sequence[int]) -> list[bytes]:
        """What a client that holds the versions ``held`` lacks of the model, in the inactive form."""
        return [self._view_frame(part) for part, version in enumerate(self.versions) if held[part] != version]

    def for_visit(
        self, held: Sequence[int], active: Sequence[int], dropped: Sequence[int], *, send_all: bool
    ) -> tuple[list[bytes], list[int]]:
        """Frames for a visit that trains ``active`` and skips the layers ``dropped``.

        Returns:
            The frames that a client which holds the versions ``held`` needs, and the parts that it holds in their
            current version afterwards.
        """
        frames, current = [], []
        for part, own in enumerate(self.store.plan.parts):
            if part not in active and own.layers and set(own.layers) <= set(dropped):
                continue
            current.append(part)
            has_it = held[part] == self.versions[part] and not send_all
            if part in active:
                frames += self._active_frames(part, has_it)
            elif not has_it:
                frames.append(self._view_frame(part))
        return frames, current

    def model_frame(self, round_index: int, digest: bytes) -> bytes:
        """Everything that has changed since the start, as clients that lack nothing hold it."""
        frames = tuple(self.missing([0] * len(self.versions)))
        return encode(BlockModel(round_index=round_index, digest=digest, frames=frames))

    def _active_frames(self, part: int, has_it: bool) -> list[bytes]:
        frames = [] if has_it and self._is_exact_when_held(part) else [self._values_frame(part, FLOAT32, active=True)]
        if part in self.states:
            frames.append(encode(OptimizerState(part, values=self.states[part])))
        return frames

    def _is_exact_when_held(self, part: int) -> bool:
        """Whether a client that holds the current version of a part has its exact float32 values."""
        return self.versions[part] == 0 or (self.store.is_float32(part) and self._view == FLOAT32)

    def _view_frame(self, part: int) -> bytes:
        """The frame of an inactive part; kept until the part changes, unless there is no memory for the part itself."""
        frame = self._frames.get(part)
        if frame is None:
            base = Encoding(self._view.exact, self._view.exact)
            frame = self._values_frame(part, self._view if self.versions[part] else base, active=False)
            if len(self.store.in_memory(part)) == len(self.store.shapes(part)):
                self._frames[part] = frame
        return frame

    def _values_frame(self, part: int, encoding: Encoding, *, active: bool) -> bytes:
        data, compressed = encode_tensors(self.store.values(part), encoding, compress=self._compress)
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

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The float32 blocks that have changed (the others are the base model's), and optimiser states.

        Of a base on the disk, what is in memory of them; the rest is in files, which :meth:`state_numbers` names.
        """
        tensors = {
            f"block.{part}.{index}": value
            for part, version in enumerate(self.versions)
            if version
            for index, value in self.store.in_memory(part).items()
        }
        for part, packed in self.states.items():
            tensors[f"optimizer.{part}"] = torch.frombuffer(bytearray(packed.tobytes()), dtype=torch.uint8)
        return tensors

    def state_numbers(self) -> dict[str, object]:
        """The versions, and the files of changed blocks of a base on the disk."""
        files = self.store.trainables.kept_in_files()
        return {"versions": self.versions, **({CHANGED_FILES: files} if files else {})}

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_tensors` and :meth:`state_numbers`."""
        self.versions = list(numbers["versions"])
        self.store.trainables.take_files(numbers.get(CHANGED_FILES, {}))
        for part, version in enumerate(self.versions):
            for index, value in self.store.in_memory(part).items() if version else ():
                value.copy_(tensors[f"block.{part}.{index}"])
        self.store.forget_digests()
        packed = {name: value for name, value in tensors.items() if name.startswith("optimizer.")}
        self.states = {int(name.rpartition(".")[2]): value.numpy() for name, value in packed.items()}
        self._frames.clear()
