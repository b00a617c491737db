"""Discriminative sampling: looking more where the previous gradient estimate points.

The *reference* ``r`` is the pooled estimate of the previous server step. Server and clients rebuild it by replay, so it
costs memory, but nothing is sent for it. Let ``d`` be the number of trainable parameters and ``r^ = r / |r|``.

**published** (FwdLLM, ATC 2024). For ``N`` probes of a round, ``candidates * N`` directions are drawn, ranked by the
signed cosine to the reference, *every tensor on its own*, and the best ``N`` kept; the ``k``-th best parts of all
tensors make one direction. Ranking needs all candidates of a round but not their values at once: the server walks
candidates in blocks and parameters in chunks (memory ``block x chunk``; time ``candidates * N * d`` additions). Who
evaluates what is drawn by lot, so that no client always has the best direction. Which candidates were chosen is *sent*
(uint32 per probe and tensor, downwards only, in the assignment and in the step's record): no replica depends on the
last bit of a cosine, and uploads stay at 4 bytes a probe. The estimate is biased towards the reference and longer:
``E[z z^T] = I + (m^2) s s^T`` within each tensor, ``m`` being the mean of the kept normal scores (1.755 for the best
tenth). Much of what it gains is a longer step.

**corrected**. Instead of preferring directions that happen to lie near ``r`` (at best a few thousandths nearer, since
``d`` is large), look along ``r`` itself: the last probe of a step measures ``g_r``, the slope along ``sqrt(d) r^``, so
``b = (g_r / sqrt(d)) r^`` is the gradient's component along the reference, *measured*. Of the other probes only what
``b`` does not explain is kept::

    estimate = b + 1/P sum_k (g_k - b . z_k) z_k

As ``E[z z^T] = I``, this is unbiased for *every* ``b`` that does not depend on the ``z_k``: ``b + E[z z^T] (grad -
b)``. It is stratified importance sampling (one draw in ``P + 1`` from the line, the rest from its complement, each
weighted by its share) written as a control variate, and it costs ``O(d)`` a probe where candidates cost ``O(candidates
d)``. If ``rho`` is the cosine of reference and gradient, the variance falls from ``(d - 1)/P`` to ``(1 - rho^2)(d -
1)/P`` times ``|grad|^2``: much for a good reference, nothing for a poor one, never a loss beyond the one probe spent.
(A slope that is itself biased, as the one-sided difference's by the curvature along ``r``, biases ``b``; then the rest
is unbiased for what is left, and the sum is off by that error along ``r^`` alone.)

The client subtracts ``b . z_k`` before it uploads, so it sends ``P`` scalars as ever. The record says how much of the
reference the step contains, one more scalar, and replay stays exact: products ``r * a`` and sums, element by element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fs_fwdllm.core.arrays import Array, arrays_of, count_of, squared_norm
from fs_fwdllm.core.direction import DirectionKey, Distribution, candidate_seed
from fs_fwdllm.core.replay import DEFAULT_CHUNK
from fs_fwdllm.core.seeding import seeded_permutation

__all__ = [
    "choose_candidates",
    "deal",
    "projections",
    "reference_scale",
    "residual_slopes",
]

#: Elements of the block of directions that is held at once.
BLOCK_ELEMENTS = 1 << 21


def reference_scale(reference: Sequence[Array]) -> float:
    """``sqrt(d) / |r|``: along the reference one looks as far as along any other direction. Zero for ``r = 0``."""
    squared = squared_norm(reference)
    return math.sqrt(sum(map(count_of, reference)) / squared) if squared else 0.0


def projections(keys: Sequence[DirectionKey], vector: Array, tensor_id: int, distribution: Distribution) -> np.ndarray:
    """``z . v`` and ``z . z`` for one tensor's part of every direction, float64 ``[2, len(keys)]``; chunked."""
    arrays = arrays_of(vector)
    flat = arrays.flat(vector)
    sums = np.zeros((2, len(keys)))
    for start in range(0, len(flat), DEFAULT_CHUNK):
        part = arrays.as_float32(flat[start : start + DEFAULT_CHUNK])
        rows = max(1, BLOCK_ELEMENTS // len(part))
        for first in range(0, len(keys), rows):
            block = distribution.values(keys[first : first + rows], tensor_id, start, len(part), arrays)
            sums[:, first : first + rows] += arrays.products(block, part)
    return sums


def residual_slopes(
    slopes: np.ndarray,
    keys: Sequence[DirectionKey],
    reference: Sequence[Array],
    scale: float,
    distribution: Distribution,
) -> np.ndarray:
    """What the reference does not explain of a step's slopes.

    Args:
        slopes: ``[probes]``; the last one was measured along ``scale * reference``, the others along ``keys``.

    Returns:
        float32 ``[probes]``: ``g_k - b . z_k``, and the last slope as it was.
    """
    along = sum(projections(keys, part, index, distribution)[0] for index, part in enumerate(reference))
    count = sum(map(count_of, reference))
    explained = float(slopes[-1]) * scale / count * np.asarray(along)
    return np.append(slopes[:-1].astype(np.float64) - explained, slopes[-1]).astype(np.float32)


def choose_candidates(
    round_index: int,
    count: int,
    candidates: int,
    reference: Sequence[Array],
    run_seed: int,
    distribution: Distribution,
) -> np.ndarray:
    """The best ``count`` of ``count * candidates`` directions by signed cosine, tensor by tensor.

    Returns:
        uint32 ``[count, tensors]``: the ``index`` of candidates in :func:`candidate_seed`, best first.
    """
    keys = [DirectionKey(run_seed, candidate_seed(round_index, index)) for index in range(count * candidates)]
    columns = []
    for tensor_id, part in enumerate(reference):
        dots, squares = projections(keys, part, tensor_id, distribution)
        columns.append(np.argsort(-dots / np.sqrt(squares), kind="stable")[:count])
    return np.stack(columns, axis=1).astype("<u4")


def deal(choices: np.ndarray, shares: Mapping[int, int], seed: int, round_index: int) -> dict[int, bytes]:
    """Rows of ``choices`` for every client, by lot; ``shares`` says how many each one gets."""
    order = seeded_permutation(len(choices), "chosen directions", seed, round_index)
    ends = np.cumsum(list(shares.values()))[:-1]
    return {client: choices[rows].tobytes() for client, rows in zip(shares, np.split(order, ends), strict=True)}
