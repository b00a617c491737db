"""Weights in several files: which tensor goes where, and the names that others look for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["INDEX_FILE", "SHARD_BYTES", "SINGLE_FILE", "shard_file", "shard_index", "split_into_shards"]

#: Bytes of tensors that become one file.
SHARD_BYTES = 512 << 20
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def split_into_shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, cut where a shard would have more than :data:`SHARD_BYTES`; one tensor is never cut.

    Args:
        sizes: bytes by name.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def shard_file(number: int, shards: int) -> str:
    """The name of shard ``number``, counted from 0."""
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


def shard_index(shards: Sequence[Sequence[str]], total_bytes: int) -> dict[str, Any]:
    """What :data:`INDEX_FILE` says of shards that have these tensors."""
    places = {name: shard_file(number, len(shards)) for number, names in enumerate(shards) for name in names}
    return {"metadata": {"total_size": total_bytes}, "weight_map": places}
