"""Large parameters, written every so many rounds, and the records that lead on from there.

The server of a method on scalars says in a record of a few hundred bytes how it moved. So neither a checkpoint nor the
best round need hold the parameters of their round: they name a file with those of an earlier one, and have the records
since, by which the parameters are rebuilt as a client would rebuild them, bit for bit::

    round   1  2  3  ...  16 | 17  ...
            parameters-1      | parameters-17       each as large as what is trained
            1: 2: 3: ...  16: | 17: ...             checkpoints: some kilobytes

A run of a billion trained parameters writes a quarter of a gigabyte a round instead of four; a run that is resumed
replays at most :data:`MOST_ROUNDS` records. Small parameters are kept in every checkpoint, where they cost nothing, and
so are those of a method whose steps no record describes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.method import RoundServer
from fs_fwdllm.method.server import PARAMETERS
from fs_fwdllm.running.checkpoint import Checkpoint, read_parameters
from fs_fwdllm.running.state_file import write_state

__all__ = ["LARGE_BYTES", "MOST_ROUNDS", "ParametersFiles", "names_in"]

#: Trained parameters from which on they have files of their own.
LARGE_BYTES = 64 << 20
#: Rounds after which the parameters are written anew.
MOST_ROUNDS = 16


class ParametersFiles:
    """The files of a run's parameters, in the folder of its checkpoints.

    Args:
        server: whose parameters they are.
        known: what the checkpoint says that the run continues from, if it does.
    """

    def __init__(self, server: RoundServer, folder: Path, known: Sequence[object] | None) -> None:
        self._server = server
        self._folder = folder
        self._known = None if known is None else (str(known[0]), int(str(known[1])))

    def reference(self, next_round: int) -> list[object] | None:
        """The file, the round from whose start its parameters are, and the digest of those of now, which it leads to;
        the file is written if there is none that will do. ``None`` where the parameters themselves are to be
        kept.

        Args:
            next_round: the round that starts from the parameters of now.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._server.trainables.bytes < LARGE_BYTES or self._server.records_since(next_round - 1) is None:
            return None
        if self._known is None or not self._will_do(self._known, next_round):
            name = f"parameters-{next_round}-{self._server.digest.hex()[:16]}.safetensors"
            spared = "what was written before is intact"
            write_state(self._folder / name, {"round": next_round}, self._server.parameters(), spared)
            self._known = name, next_round
        return [*self._known, self._server.digest.hex()]

    def _will_do(self, known: tuple[str, int], next_round: int) -> bool:
        name, written = known
        is_near = next_round - MOST_ROUNDS < written <= next_round
        return is_near and self._server.records_since(written) is not None and (self._folder / name).is_file()

    def lightened(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with a reference in the place of large parameters."""
        reference = self.reference(checkpoint.next_round)
        if reference is None:
            return checkpoint
        rebuilt = self._server.parameters()
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in rebuilt}
        return replace(checkpoint, tensors=kept, numbers={**checkpoint.numbers, PARAMETERS: reference})

    def records(self, reference: Sequence[object]) -> dict[str, torch.Tensor]:
        """The records from a reference to the parameters of now, to be kept beside it."""
        frames = self._server.records_since(int(str(reference[1]))) or ()
        return {
            f"record.{index}": torch.frombuffer(bytearray(frame), dtype=torch.uint8)
            for index, frame in enumerate(frames)
        }

    def rebuilt(self, reference: Sequence[object], records: Mapping[str, torch.Tensor]) -> Trainables:
        """What :meth:`reference` and :meth:`records` were kept of.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        frames = [records[f"record.{index}"].numpy().tobytes() for index in range(len(records))]
        return self._server.rebuilt(read_parameters(self._folder, reference), frames, bytes.fromhex(str(reference[2])))

    def keep_only(self, names: Collection[str]) -> None:
        """Remove files that nothing speaks of any more."""
        for path in self._folder.glob("parameters-*.safetensors"):
            if path.name not in names:
                with suppress(OSError):
                    path.unlink()


def names_in(about: Mapping[str, Any]) -> set[str]:
    """The file of parameters that a checkpoint or a best round speaks of."""
    reference = about.get("numbers", about).get(PARAMETERS)
    return set() if reference is None else {str(reference[0])}
