"""Checkpoints: one file, written atomically, from which a run continues as if it had never stopped.

The file is safetensors (nothing is unpickled): the server's tensors, and in its metadata one JSON object with the round
to continue with, the counters of the accounting, and a fingerprint of the configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

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
    """A digest of everything that determines the result; where it is written does not."""
    neutral = config.model_copy(update={"outdir": "", "expname": ""})
    return hashlib.blake2b(dump_config(neutral).encode(), digest_size=16).hexdigest()


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``folder``; a crash at any moment leaves the previous one or this one."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "next_round": checkpoint.next_round,
        "numbers": checkpoint.numbers,
        "counters": checkpoint.counters,
        "fingerprint": checkpoint.fingerprint,
    }
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in checkpoint.tensors.items()}
    temporary = folder / f".{_FILE}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            file.write(save(tensors, metadata={"fs_fwdllm": json.dumps(about)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / _FILE)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{folder / _FILE}: cannot be written ({error.strerror}); the previous checkpoint is intact"
        ) from error


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
            about = json.loads((file.metadata() or {})["fs_fwdllm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return Checkpoint(tensors=tensors, **about)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or not a checkpoint of ours ({error})") from error
