"""Step control: how long is a step, when the length of the gradient estimate is mostly noise?

A forward-gradient estimate is nearly orthogonal to the parameters (it is mostly noise), and ``sqrt((n + d - 1)/n)``
times as long as the gradient. So every plain step adds its squared length to ``|theta|^2``, and where gradients grow
with the parameters the two feed each other. A control multiplies the pooled estimate by one number before it is used
(before momentum, as LARS does):

* **none**: 1, the published step.
* **normalised**: ``1 / sqrt(E g^2)``. The root mean square of the slopes estimates ``|grad|``, so the step is the plain
  step for a gradient of norm one, ``lr sqrt((n + d - 1)/n)`` long in expectation. Rescaling the loss changes nothing;
  the step does not grow with the gradient; nothing but the scalars is needed. Lower ``lr`` over time as ever.
* **trust_ratio**: ``|theta| / |G|`` over all trainables together: a step is ``lr |theta|`` long, whatever the
  estimate's length (You et al., "Large batch training of convolutional networks", arXiv 1708.03888, equation 6).
  ``|theta|`` then grows by ``sqrt(1 + lr^2)`` a step, at any gradient; one where either norm is zero. One more replay
  on the server.

The server computes the number once, in float64, and writes coefficients that contain it: no replica ever needs a norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from fs_fwdllm.core.arrays import squared_norm
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.method.forward.pool import Pool

__all__ = ["STEP_CONTROLS", "StepControl", "norm_of", "normalised", "plain", "trust_ratio"]

#: The factor of a pooled estimate.
StepControl = Callable[[Pool, Replayer], float]


def plain(pool: Pool, replayer: Replayer) -> float:
    """One."""
    return 1.0


def normalised(pool: Pool, replayer: Replayer) -> float:
    """One over the root mean square slope; one where all slopes are zero."""
    squared = pool.mean_squared_slope(replayer.trainables.count)
    return 1.0 / math.sqrt(squared) if squared > 0 else 1.0


def trust_ratio(pool: Pool, replayer: Replayer) -> float:
    """``|theta| / |G|``; one where either is zero."""
    length, radius = norm_of(pool.estimate(replayer)), norm_of(replayer.trainables.tensors)
    return radius / length if length > 0 and radius > 0 else 1.0


def norm_of(tensors: Iterable[torch.Tensor]) -> float:
    """Euclidean norm of a vector in pieces, in float64."""
    return math.sqrt(squared_norm(tensors))


STEP_CONTROLS: dict[str, StepControl] = {"none": plain, "normalised": normalised, "trust_ratio": trust_ratio}
