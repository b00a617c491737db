"""How far each client's change of a round is from the mean change: the statistic of the ``model-diff`` strategy.

FedMeZO publishes it as a *sum over tensors of Euclidean norms* (not the norm of everything), with the plain mean over
clients, unweighted:

    ``distance_k = sum_t || Delta_kt - mean_j Delta_jt ||_2``,   ``Delta_kt`` = end - start of trained tensor ``t``

Where clients send changes these are at hand. Where they send slopes, a client's change after ``K`` steps is a sum of
seeded directions and, with a decay factor ``f`` a step, a shrinking of where the round started (only for tensors that
decay): ``Delta_k = (f^K - 1) theta + sum_i c_i z_i``. Either way the changes of all clients are laid side by side one
block of elements at a time, and only sums of squares are kept. For slopes that generates every direction once, as the
round's step does, and no dense change ever exists as a whole.

Blocks are rounded like a replay; differences and squares are float64; results are rounded to float32, which is far
coarser than what the order of a summation can change, so that other devices and thread counts find the same number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fs_fwdllm.core.direction import DirectionKey
from fs_fwdllm.core.replay import DEFAULT_CHUNK, Contributions, Replayer, add_contribution_slice

__all__ = ["ScalarChange", "dense_distances", "scalar_distances"]

#: Numbers of all clients together in one block (in float32 and float64, with what a replay needs: some 60 MiB).
BLOCK_ELEMENTS = 1 << 21
#: Shorter slices would make the calls cost more than the numbers.
SHORTEST_SLICE = 1 << 12


@dataclass(frozen=True)
class ScalarChange:
    """A client's change as the scalars that stand for it.

    Attributes:
        contributions: its directions and coefficients, learning rate and sign included.
        decay: what is left, at the end of its round, of a parameter that decays and is not moved.
    """

    contributions: Contributions
    decay: float = 1.0


@torch.no_grad()
def scalar_distances(replayer: Replayer, changes: Sequence[ScalarChange]) -> list[float]:
    """Distance of each change from their mean, for clients that start from the replayer's trainables.

    Not finite where the changes are not.
    """
    tensors, decays, division = replayer.trainables.tensors, replayer.trainables.decays(), replayer.division
    by_part = [[change.contributions.of_part(part) for change in changes] for part in range(division.parts)]

    def blocks() -> Iterator[tuple[int, torch.Tensor]]:
        for tensor_id, start, count in _slices([tensor.numel() for tensor in tensors], len(changes)):
            origin = tensors[tensor_id].detach().view(-1)[start : start + count]
            block = torch.zeros(len(changes), count, device=origin.device)
            for row, covering, change in zip(block, by_part[division.owners[tensor_id]], changes, strict=True):
                keys = [DirectionKey(replayer.run_seed, seed) for seed in covering.seeds]
                coefficients = covering.coefficients_for(decays[tensor_id])
                if keys:
                    add_contribution_slice(row, keys, coefficients, tensor_id, start, replayer.distribution)
                if decays[tensor_id] and change.decay != 1.0:
                    row.add_(origin, alpha=change.decay - 1.0)
            yield tensor_id, block

    return _distances(blocks(), len(tensors), len(changes))


@torch.no_grad()
def dense_distances(sizes: Sequence[int], changes: Sequence[np.ndarray]) -> list[float]:
    """Distance of each change from their mean.

    Args:
        sizes: elements of each tensor.
        changes: per client, one float32 vector of all tensors, in order.
    """
    offsets = np.cumsum([0, *sizes])

    def blocks() -> Iterator[tuple[int, torch.Tensor]]:
        for tensor_id, start, count in _slices(sizes, len(changes)):
            first = offsets[tensor_id] + start
            yield tensor_id, torch.from_numpy(np.stack([change[first : first + count] for change in changes]))

    return _distances(blocks(), len(sizes), len(changes))


def _slices(sizes: Sequence[int], clients: int) -> Iterator[tuple[int, int, int]]:
    """``(tensor id, first element, count)`` of slices whose blocks hold a bounded number of elements."""
    longest = min(DEFAULT_CHUNK, max(SHORTEST_SLICE, BLOCK_ELEMENTS // clients))
    for tensor_id, size in enumerate(sizes):
        for start in range(0, size, longest):
            yield tensor_id, start, min(longest, size - start)


def _distances(blocks: Iterable[tuple[int, torch.Tensor]], tensors: int, clients: int) -> list[float]:
    """From blocks ``[clients, elements]`` to one number a client."""
    squares = torch.zeros(tensors, clients, dtype=torch.float64)
    for tensor_id, block in blocks:
        values = block.double()
        values -= values.mean(dim=0)
        squares[tensor_id] += values.square_().sum(dim=1).cpu()
    return [float(value) for value in squares.sqrt_().sum(dim=0).float()]
