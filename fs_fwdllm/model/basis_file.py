"""Fixed directions of activation space, as bytes in a file.

Some adapters look at activations through a fixed matrix and train only what follows it. The matrix of a principal
component analysis differs between machines in its last bits (and in its signs), so it is computed once, by
``fs-fwdllm basis`` on public text, and travels as a safetensors file whose bytes everybody shares. A tensor is named
by its place in the model; a file that a run has saved holds the same tensors and can be given in its stead.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fs_fwdllm.errors import ConfigError, nearest
from fs_fwdllm.model.initialisation import draw_uniform_

__all__ = ["RANDOM", "basis_file", "basis_fingerprint", "basis_rows", "check_digest", "check_rank"]

#: In a file's place: rows that are drawn from the seed, as a control.
RANDOM = "random"
_KEY = "llm.adapter.args basis"


def basis_file(arguments: Mapping[str, Any]) -> str:
    """The file that an adapter's arguments name; empty if they name none."""
    place = arguments.get("basis")
    return "" if place in (None, "", RANDOM) else str(place)


def check_digest(arguments: Mapping[str, Any]) -> None:
    """Refuse a basis file whose bytes are not those that ``basis_digest`` names, where it is given.

    Raises:
        ConfigError: they are others, or there is no file.
    """
    wanted, file = arguments.get("basis_digest"), basis_file(arguments)
    if wanted is None:
        return
    if not file:
        raise ConfigError("llm.adapter.args basis_digest: names the bytes of a file, so basis must name one")
    found = basis_fingerprint(file)
    if found != wanted:
        raise ConfigError(
            f"llm.adapter.args basis_digest: is {wanted!r}, but {file!r} has {found}; every machine of a run needs "
            "the same file: copy it from the machine that made it, do not make it anew"
        )


def basis_rows(basis: Any, name: str, rank: int, width: int, seed: int) -> torch.Tensor:
    """The tensor ``name`` of a basis, ``[rank, width]`` float32.

    Args:
        basis: a file, or ``random``: uniform numbers of variance 1/width, so that a row's length is about one.

    Raises:
        ConfigError: it is neither, or the file cannot be used.
    """
    if not isinstance(basis, str):
        raise ConfigError(f"{_KEY}: must be a file's path or {RANDOM}, but the value is {basis!r}")
    if basis != RANDOM:
        return _read_rows(basis, name, rank, width)
    drawn = torch.empty(rank, width, dtype=torch.float32)
    draw_uniform_(drawn, math.sqrt(3.0 / width), seed, name)
    return drawn


def check_rank(name: str, rank: Any, width: int) -> None:
    """Refuse a number of directions that a space of ``width`` dimensions does not have."""
    if type(rank) is not int or not 1 <= rank <= width:
        raise ConfigError(
            f"llm.adapter.args {name}: must be a whole number from 1 to the hidden size {width}, but the value is "
            f"{rank!r}"
        )


def _read_rows(place: str, name: str, rank: int, width: int) -> torch.Tensor:
    """The first ``rank`` rows of the tensor ``name`` (or ``ANYTHING.name``) of a file: ``[rank, width]``, float32.

    Raises:
        ConfigError: there is no such file or tensor, or it has fewer rows or another width.
    """
    shown, file = f"{_KEY} {place!r}", _found(place)
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            found = [key for key in names if key == name or key.endswith(f".{name}")]
            tensor: torch.Tensor | None = opened.get_tensor(found[0]) if len(found) == 1 else None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{shown}: cannot be read ({error}); write it anew by fs-fwdllm basis") from error
    if tensor is None:
        raise ConfigError(
            f"{shown}: must hold one tensor {name}, but holds {', '.join(names[:3]) or 'none'}; write one for this "
            "adapter by fs-fwdllm basis"
        )
    if tensor.dtype != torch.float32 or tensor.dim() != 2 or tensor.shape[1] != width or len(tensor) < rank:
        raise ConfigError(
            f"{shown}: {found[0]} is {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, but this model "
            f"and rank need float32 of at least {rank} rows of {width}"
        )
    if not torch.isfinite(tensor).all():
        raise ConfigError(f"{shown}: {found[0]} holds a value that is not finite; write it anew by fs-fwdllm basis")
    return tensor[:rank]


def basis_fingerprint(place: str) -> str:
    """Names all bytes of a basis file. Raises :class:`~fs_fwdllm.errors.ConfigError` where it cannot be read."""
    try:
        return hashlib.blake2b(_found(place).read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise ConfigError(f"{_KEY} {place!r}: cannot be read ({error.strerror or error})") from error


def _found(place: str) -> Path:
    file = Path(place).expanduser()
    if not file.is_file():
        around = sorted(map(str, file.parent.glob("*.safetensors"))) if file.parent.is_dir() else []
        raise ConfigError(
            f"{_KEY} {place!r}: there is no such file; fs-fwdllm basis writes one{nearest(place, around)}"
        )
    return file
