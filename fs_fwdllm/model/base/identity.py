"""Whether two machines hold the same base: one digest of its weights and settings, whatever files they lie in.

Digests of a run are of what is trained. The frozen base is never sent, so that nothing would tell if a client had
another one, or a damaged copy: its slopes would be slopes of another loss. The digest here is of every tensor's name,
dtype, shape and bytes, in the order of their names, and of ``config.json`` (of a GGUF file, also of its own settings);
how tensors are dealt to files does not matter, nor does the dtype they are computed in.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fs_fwdllm.config.base_section import BaseConfig
from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.base.checkpoint import Entry, SafetensorsCheckpoint
from fs_fwdllm.model.base.gguf_checkpoint import gguf_entry
from fs_fwdllm.model.folder import read_settings
from fs_fwdllm.model.gguf_file import read_gguf
from fs_fwdllm.model.source import ModelSource

__all__ = ["UNTOLD_BASE", "base_digest", "refusal_of_base"]

#: What a server says of a client that sends no digest, after its name.
UNTOLD_BASE = "does not say which base it has, so that none is compared"

_DIGEST_BYTES = 16
_CHUNK_BYTES = 16 << 20
#: What ``config.json`` says of who wrote it, where, and in which dtype it is read.
_OF_NO_MATTER = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")


def base_digest(source: ModelSource, packing: BaseConfig) -> bytes:
    """16 bytes that name a base; reads all of it once.

    Args:
        packing: how a float base is packed as it is read, which makes another one of it.

    Returns:
        Nothing (no bytes) for a name on the hub of which there is no copy here.

    Raises:
        ModelError: a file cannot be read.
    """
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    if source.gguf is not None:
        settings, entries = _of_gguf(source.gguf)
    elif (folder := _folder(source)) is not None:
        settings, entries = read_settings(folder / "config.json"), dict(SafetensorsCheckpoint(folder).entries)
    else:
        return b""
    settings = {key: value for key, value in settings.items() if key not in _OF_NO_MATTER}
    state.update(json.dumps(settings, sort_keys=True).encode())
    if packing.quantise != "none":
        state.update(f"{packing.quantise} {packing.group} {packing.symmetric}".encode())
    for name, entry in sorted(entries.items()):
        form = "" if entry.codec is None else f"{type(entry.codec).__name__} "  # two forms may have equally long rows
        state.update(f"\n{name} {entry.dtype} {entry.shape} {form}".encode())
        _update(state, entry)
    return state.digest()


def _of_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Settings and tensors of a file by its own names; of what it says of itself, only what decides its results."""
    header = read_gguf(file)
    config = file.parent / "config.json"
    own = read_settings(config) if config.is_file() else {}
    decisive = {key: value for key, value in header.settings.items() if key.startswith(f"{header.architecture}.")}
    return {**own, **decisive}, {name: gguf_entry(file, tensor) for name, tensor in header.tensors.items()}


def refusal_of_base(own: bytes, other: bytes) -> str:
    """Why a server does not take a client that has another base, as both sides are told; empty if it takes it.

    Args:
        own: the server's :func:`base_digest`.
        other: the client's. Where one of the two is empty there is nothing to compare.
    """
    if not own or other in (b"", own):
        return ""
    return (
        "the server does not take this client: its base model is another one than the server's "
        f"({other.hex()}, not {own.hex()}); give it a copy of the same folder (model.type) and the same "
        "fwdllm.base, and start it again"
    )


def _folder(source: ModelSource) -> Path | None:
    if source.is_local:
        return Path(source.transformer)
    known = try_to_load_from_cache(source.location, "config.json")
    folder = Path(known).parent if isinstance(known, str) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _update(state: Any, entry: Entry) -> None:
    try:
        with entry.file.open("rb") as opened:
            opened.seek(entry.offset)
            left = entry.bytes
            while left:
                chunk = opened.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise ModelError(f"{entry.file}: ends in the middle of a tensor; copy it anew")
                state.update(chunk)
                left -= len(chunk)
    except OSError as error:
        raise ModelError(f"{entry.file}: cannot be read ({error.strerror or error})") from error
