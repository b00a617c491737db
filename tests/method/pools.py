"""Pools of made-up answers around a known gradient, and their estimates written out as dense float64 sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fs_fwdllm.core.direction import DirectionKey, Distribution, Rademacher, direction_seed
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.method.forward.pool import Pool, PoolEntry

__all__ = ["RUN_SEED", "dense_directions", "dense_estimate", "flat", "pool_of", "replayer_for"]

RUN_SEED = 11


def replayer_for(sizes: Sequence[int], distribution: Distribution | None = None, chunk: int = 1 << 19) -> Replayer:
    """A replayer of tensors of the given sizes, filled with a fixed draw."""
    generator = torch.Generator().manual_seed(3)
    tensors = {f"t{index}": torch.randn(size, generator=generator) for index, size in enumerate(sizes)}
    return Replayer(Trainables(tensors), RUN_SEED, distribution or Rademacher(), chunk)


def dense_directions(replayer: Replayer, round_index: int, client: int, probes: int) -> np.ndarray:
    """float64 ``[probes, d]`` of one step."""
    keys = [DirectionKey(RUN_SEED, direction_seed(round_index, client, 0, probe)) for probe in range(probes)]
    parts = [
        replayer.distribution.values(keys, index, 0, tensor.numel()).astype(np.float64)
        for index, tensor in enumerate(replayer.trainables.tensors)
    ]
    return np.concatenate(parts, axis=1)


def pool_of(
    replayer: Replayer,
    gradients: dict[int, np.ndarray],
    probes: int,
    rounds: Sequence[int] = (0,),
    samples: dict[int, int] | None = None,
    absent: Sequence[tuple[int, int]] = (),
    noise: float = 0.0,
) -> Pool:
    """What clients with these gradients answer; ``absent`` are ``(round, client)`` pairs."""
    pool, rng = Pool(equal_weights=False), np.random.default_rng(1)
    for round_index in rounds:
        entries = []
        for client, gradient in gradients.items():
            if (round_index, client) in absent:
                continue
            slopes = dense_directions(replayer, round_index, client, probes) @ gradient
            slopes = slopes + noise * rng.normal(size=probes)
            held = (samples or {}).get(client, 1)
            entries.append(PoolEntry(round_index, client, held, slopes.astype(np.float32)[None]))
        pool.add(entries)
    return pool


def dense_estimate(replayer: Replayer, pool: Pool) -> np.ndarray:
    """``sum_c w_c / n_c sum_k g_ck z_ck``, term by term."""
    held = {entry.client: entry.samples for entry in pool.entries}
    counts = {client: sum(e.slopes.size for e in pool.entries if e.client == client) for client in held}
    total = np.zeros(replayer.trainables.count)
    for entry in pool.entries:
        z = dense_directions(replayer, entry.round_index, entry.client, entry.slopes.size)
        weight = held[entry.client] / sum(held.values()) / counts[entry.client]
        total += weight * entry.slopes.astype(np.float64).ravel() @ z
    return total


def flat(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """float64 ``[d]``."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double().numpy()
