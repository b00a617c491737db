"""Fixed directions of activation space, as bytes in a file.

Some adapters look at activations through a fixed matrix and train only what follows it. The matrix of a principal
component analysis differs between machines in its last bits (and in its signs), so it is computed once, by
``fs-fwdllm basis`` on public text, and travels as a safetensors file whose bytes everybody shares. A tensor is named
by its place in the model; a file that a run has saved holds the same tensors and can be given in its stead.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fs_fwdllm.errors import ConfigError, nearest

__all__ = ["basis_fingerprint", "read_basis"]

_KEY = "llm.adapter.args basis"


def read_basis(place: str, name: str, rank: int, width: int) -> torch.Tensor:
    """The first ``rank`` rows of the tensor ``name`` (or ``ANYTHING.name``) of a file: ``[rank, width]``, float32.

    Raises:
        ConfigError: there is no such file or tensor, or it has fewer rows or another width.
    """
    file = Path(place).expanduser()
    shown = f"{_KEY} {place!r}"
    if not file.is_file():
        around = sorted(map(str, file.parent.glob("*.safetensors"))) if file.parent.is_dir() else []
        raise ConfigError(f"{shown}: there is no such file; fs-fwdllm basis writes one{nearest(str(file), around)}")
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
    """Names all bytes of a basis file."""
    return hashlib.blake2b(Path(place).expanduser().read_bytes(), digest_size=16).hexdigest()
