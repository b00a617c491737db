"""New weights that are the same bytes on every machine, drawn without touching anybody's random state.

A federated client that starts from another adapter than the server's is useless: every replayed update lands on the
wrong point. PyTorch's own initialisers cannot promise equal bytes, because ``normal_`` takes another code path on each
processor family. So the weights this package adds (adapters, new classification heads) are drawn here: uniform
numbers from Philox, keyed by the run's seed and the tensor's name, scaled by one float64 multiplication and rounded
once. The order in which tensors are drawn does not matter, and no global generator is read or written.

Third-party constructors still draw numbers that are then thrown away; :func:`private_torch_rng` lets them do so on a
fork of PyTorch's CPU generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["draw_uniform_", "private_torch_rng"]


@contextmanager
def private_torch_rng(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU generator for the block, and give it back as it was; accelerators' are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def draw_uniform_(tensor: torch.Tensor, bound: float, seed: int, name: str) -> None:
    """Fill ``tensor`` with uniform numbers from ``[-bound, bound)``, keyed by ``(seed, name)``.

    Args:
        tensor: any shape, floating dtype, any device; overwritten in row-major order.
        bound: half width of the interval.
        seed: the run's seed.
        name: the purpose of the numbers; another name gives independent numbers.
    """
    digest = hashlib.blake2b(f"fs_fwdllm initialisation:{seed}:{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    unit = generator.random(tensor.numel()) * 2.0 - 1.0
    values = torch.from_numpy((unit * bound).astype(np.float32)).reshape(tensor.shape)
    tensor.copy_(values)
