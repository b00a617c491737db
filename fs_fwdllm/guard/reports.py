"""What a client says of itself, and how far it is believed.

*Samples* are its weight in the mean. A server knows better in two ways: nobody works on more than its steps can hold
(steps times the batch size), and where the steps follow from a size that the client itself has told
(``train.batch_or_epoch: epoch``), nobody weighs many times what is usual.

*Losses* are only looked at, but one client's ``1e30`` would be all that a run has to show: in the mean nobody counts
for more than ten times the median.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

__all__ = ["believed_losses", "believed_samples"]

_LOSS_TIMES_MEDIAN = 10.0


def believed_samples(
    reported: Mapping[int, int], most: Mapping[int, int], times_median: float | None
) -> dict[int, int]:
    """``{client: samples}`` as they count.

    Args:
        reported: what the clients say, at least one each.
        most: what their steps can hold.
        times_median: how many times the median of the round's clients anybody counts; ``None`` sets no such bound.
    """
    held = {client: min(samples, most[client]) for client, samples in reported.items()}
    if times_median is None or not held:
        return held
    bound = max(1, int(times_median * statistics.median_low(held.values())))
    return {client: min(samples, bound) for client, samples in held.items()}


def believed_losses(reported: Mapping[int, float]) -> dict[int, float]:
    """``{client: loss}`` as they count in a mean."""
    if not reported:
        return {}
    bound = _LOSS_TIMES_MEDIAN * max(1.0, abs(statistics.median_low(reported.values())))
    return {client: max(-bound, min(loss, bound)) for client, loss in reported.items()}
