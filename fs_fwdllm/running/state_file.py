"""Tensors and a few facts in one file: written atomically, read back whole or refused.

The file is safetensors (nothing is unpickled) with one JSON object in its metadata. A CRC-32 over all of it tells a
damaged file from a good one: a flipped bit would otherwise be trained on. Checkpoints and the best round are such
files. Tensors that are in memory already are written from where they are, without a copy.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fs_fwdllm.errors import CheckpointError

__all__ = ["read_about", "read_state", "write_state"]


def write_state(path: Path, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], spared: str) -> None:
    """Write ``tensors`` and the JSON object ``about``; a crash at any moment leaves the file that was there, or this.

    Args:
        spared: what is still there if this fails, for the message.

    Raises:
        CheckpointError: it cannot be written.
    """
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(about)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(held, temporary, {"fs_fwdllm": text, "crc32": _checksum(text, held)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be written ({reason}); {spared}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Inverse of :func:`write_state`: the object and the tensors, which stay on the disk until they are looked at.

    Raises:
        CheckpointError: it is damaged, or no such file.
    """
    with _opened(path) as (file, text, checksum):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if checksum != _checksum(text, tensors):
            raise ValueError("its checksum does not fit its content")
        return _facts(text), tensors


def read_about(path: Path) -> dict[str, Any]:
    """The object alone, without a look at the tensors. Raises as :func:`read_state`."""
    with _opened(path) as (_, text, _):
        return _facts(text)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, str, str]]:
    """The file, the text of its facts, and its checksum; what goes wrong in the block is a damaged file's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            yield file, metadata["fs_fwdllm"], metadata["crc32"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged or not a checkpoint of ours ({error})") from error


def _facts(text: str) -> dict[str, Any]:
    about = json.loads(text)
    if not isinstance(about, dict):
        raise TypeError(f"its facts are a {type(about).__name__}")
    return about


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the text and of every tensor's name, type, shape and bytes."""
    checksum = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
