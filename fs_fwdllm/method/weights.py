"""How much a client's slopes count beside the others'.

Where all clients send equally many slopes for a part, a client counts by its samples, as in federated averaging. Where
they do not (a mixed fleet), it counts by samples over the noise that it brings. What a client says, from ``n`` slopes,
is its mini-batch gradient ``g`` plus the error of the sketch, ``E|error|^2 = spread/n |g|^2`` with ``spread = d - 1``
for signs; and ``g`` itself is nearly all mini-batch noise (the mean of ``|g_c|^2`` over clients is 28 to 500 times the
squared length of their mean, on AG News). So the variance of what it says about the common gradient goes as ``(1 +
spread/n) |g|^2``, and the best weights of independent estimates of one thing are the inverse variances::

    w_c  ~  samples_c / (1 + spread / n_c)

A client that sends no slope of a part has no weight in it. With clients whose data differ, weights by precision lean
towards the data of those that send more; ``fwdllm.weigh_by: samples`` does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["client_shares", "part_shares"]


def client_shares(samples: Sequence[int], *, equal: bool) -> np.ndarray:
    """Every client's share of the samples (or an equal one), float64, in order; they sum to one."""
    counts = np.array([1 if equal else count for count in samples], dtype=np.float64)
    shares: np.ndarray = counts / counts.sum()
    return shares


def part_shares(
    samples: Mapping[int, int], slopes: Mapping[int, int], spread: float | None, *, equal: bool
) -> dict[int, float]:
    """Every client's weight in the estimate of one part; they sum to one, or are zero where nobody has a slope.

    Args:
        samples: ``{client: samples}``.
        slopes: ``{client: slopes of the part}``.
        spread: variance of a single slope's estimate over ``|g|^2``; ``None`` weighs by samples alone.
        equal: clients count equally before their precision does.
    """
    sending = [client for client in samples if slopes[client]]
    weights = dict.fromkeys(samples, 0.0)
    if not sending:
        return weights
    numbers = np.array([1 if equal else samples[client] for client in sending], dtype=np.float64)
    counts = [slopes[client] for client in sending]
    if spread is not None and len(set(counts)) > 1:  # equal numbers leave the samples' bits as they are
        numbers = numbers / (1.0 + spread / np.array(counts, dtype=np.float64))
    weights.update(zip(sending, (numbers / numbers.sum()).tolist(), strict=True))
    return weights
