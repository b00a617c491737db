"""Checkpoints: one file, written atomically, from which a run continues as if it had never stopped.

The file is safetensors (nothing is unpickled): the server's tensors, and in its metadata one JSON object with the round
to continue with, the counters of the accounting, and a fingerprint of the configuration. A CRC-32 over all of it tells
a damaged file from a good one: a flipped bit would otherwise be trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fs_fwdllm.config import Config, dump_config
from fs_fwdllm.errors import CheckpointError

__all__ = ["Checkpoint", "config_fingerprint", "read_checkpoint", "write_checkpoint"]

_FILE = "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a resumed run needs.

    Attributes:
        next_round: first round that has not been done.
        tensors, numbers: the server's state.
        counters: cumulative accounting (bytes, passes, seconds).
        fingerprint: of the configuration that made it.
    """

    next_round: int
    tensors: dict[str, torch.Tensor]
    numbers: dict[str, object]
    counters: dict[str, float]
    fingerprint: str


def config_fingerprint(config: Config) -> str:
    """A digest of everything that determines the result; where it is written and how long a host waits do not."""
    patient = config.fwdllm.model_copy(update={"deadline_s": 1.0})
    neutral = config.model_copy(update={"outdir": "", "expname": "", "fwdllm": patient})
    return hashlib.blake2b(dump_config(neutral).encode(), digest_size=16).hexdigest()


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``folder``; a crash at any moment leaves the previous one or this one."""
    about = {
        "next_round": checkpoint.next_round,
        "numbers": checkpoint.numbers,
        "counters": checkpoint.counters,
        "fingerprint": checkpoint.fingerprint,
    }
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in checkpoint.tensors.items()}
    text = json.dumps(about)
    metadata = {"fs_fwdllm": text, "crc32": _checksum(text, tensors)}
    temporary = folder / f".{_FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, folder / _FILE)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{folder / _FILE}: cannot be written ({reason}); the previous checkpoint is intact"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Inverse of :func:`write_checkpoint`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint there; a run writes one after its first round")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text, checksum = metadata["fs_fwdllm"], metadata["crc32"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if checksum != _checksum(text, tensors):
            raise ValueError("its checksum does not fit its content")
        return Checkpoint(tensors=tensors, **json.loads(text))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or not a checkpoint of ours ({error})") from error


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of the text and of every tensor's name, type, shape and bytes."""
    checksum = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
