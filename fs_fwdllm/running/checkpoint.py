"""Checkpoints: one file, written atomically, from which a run continues as if it had never stopped.

The file is safetensors (nothing is unpickled): the server's tensors, and in its metadata one JSON object with the round
to continue with, the counters of the accounting, and fingerprints of the configuration and of what it names (rows,
classes, model). A CRC-32 over all of it tells a damaged file from a good one: a flipped bit would otherwise be trained
on.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fs_fwdllm.config import Config, dump_config
from fs_fwdllm.errors import CheckpointError

__all__ = ["Checkpoint", "config_fingerprint", "read_checkpoint", "require_same_inputs", "write_checkpoint"]

_FILE = "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a resumed run needs.

    Attributes:
        next_round: first round that has not been done.
        tensors, numbers: the server's state.
        counters: cumulative accounting (bytes, passes, seconds).
        fingerprint: of the configuration that made it.
        inputs: fingerprints of what the configuration names, by what a user calls it.
    """

    next_round: int
    tensors: dict[str, torch.Tensor]
    numbers: dict[str, object]
    counters: dict[str, float]
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)


def require_same_inputs(checkpoint: Checkpoint, now: Mapping[str, str], place: Path) -> None:
    """Raises :class:`~fs_fwdllm.errors.CheckpointError` if a run would go on with other rows or another model."""
    changed = [name for name, found in checkpoint.inputs.items() if now.get(name) != found]
    if changed:
        raise CheckpointError(
            f"{place}: {' and '.join(changed)} changed after the checkpoint was written: the run would go on with "
            "something else than it began with, and might test on rows it trained on; put them back, start a new run, "
            "or set fwdllm.accept_changed_inputs: true in the run's config.yaml"
        )


def config_fingerprint(config: Config) -> str:
    """A digest of everything that determines the result; where it is written and how long a host waits do not."""
    neutral_keys = {"deadline_s": 1.0, "accept_changed_inputs": False}
    own = config.fwdllm.model_copy(update=neutral_keys)
    neutral = config.model_copy(update={"outdir": "", "expname": "", "fwdllm": own})
    return hashlib.blake2b(dump_config(neutral).encode(), digest_size=16).hexdigest()


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``folder``; a crash at any moment leaves the previous one or this one."""
    about = {
        "next_round": checkpoint.next_round,
        "numbers": checkpoint.numbers,
        "counters": checkpoint.counters,
        "fingerprint": checkpoint.fingerprint,
        "inputs": checkpoint.inputs,
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
