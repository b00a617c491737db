"""A first learning rate for a linear head, without a sweep: how steep its loss can curve is known beforehand.

The head reads features ``f`` (with the bias's constant 1 among them) and ends in a softmax and cross entropy. Its
Hessian is ``H = E[(diag(p) - p p^T) x f f^T]`` (a Kronecker product; ``p`` the probabilities). The matrix of
probabilities is at most 1/2 in any direction, and its trace is at most ``1 - 1/K`` for ``K`` classes (Boehning, 1992,
*Multinomial logistic regression algorithm*, Annals of the Institute of Statistical Mathematics 44), so whatever the
weights are::

    largest eigenvalue of H  <=  1/2 largest eigenvalue of E[f f^T]  =: L
    trace of H               <=  (1 - 1/K) E|f|^2                    =: T

**Exact gradient.** A step ``-r g`` changes the loss by at most ``-r |g|^2 + r^2 L |g|^2 / 2``: it falls for every ``r``
below ``2 / L``.

**Sketched gradient.** ``C`` clients that see the gradient ``g`` send ``n`` slopes each along signs of their own, and
the pool is ``g`` plus noise that goes equally far in all directions, of covariance ``|g|^2 / (C n)`` times the
identity, or a little less. In the mean the step then changes the loss by at most
``-r |g|^2 + r^2 (L + T / (C n)) |g|^2 / 2``, so the bound becomes ``2 / (L + T / (C n))``. Since ``T <= d L`` this is
never below the better known ``2 / L / (1 + d / (C n))``, and mostly far above: noise in a direction in which the loss
is flat does no harm.

**Without data.** Standardised features (``fwdllm.feature_scale: layer_norm``) of width ``m`` have ``|f|^2 = m + 1``
exactly, and no eigenvalue is above that: ``L <= (m + 1) / 2`` for any text. Real features spread over many directions,
so that the largest eigenvalue, and what could have been a stable rate, is several times away.

**Where a head starts** it is undecided, ``p = 1/K`` for every class, and the matrix of probabilities is at most ``1/K``
instead of 1/2. The loss is as steep as 1/2 says only where a text is torn between two classes, so with many classes the
bound for all weights is far too careful, and ``at_start`` a better first rate; that it stays safe later is no longer
proven. For two classes the two are the same.

What the bound is not: the best rate. Mini-batches that disagree add noise of their own, which does not make a step
unstable, but leaves a floor that falls with the rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Curvature", "curvature_of", "curvature_of_standardised", "safe_rate"]


@dataclass(frozen=True)
class Curvature:
    """Bounds of the Hessian of a head's mean loss.

    Attributes:
        largest: of its largest eigenvalue.
        trace: of the sum of all.
    """

    largest: float
    trace: float


def curvature_of(features: np.ndarray, classes: int, *, at_start: bool = False) -> Curvature:
    """The bounds for given features.

    Args:
        features: ``[rows, width]``, without the bias's constant.
        classes: of the head; 1 for regression by squared error, where the bounds are the values.
        at_start: for a head that is undecided, instead of for any.

    Raises:
        ValueError: there is no row, or no class.
    """
    if features.ndim != 2 or not features.size:
        raise ValueError(f"features must be [rows, width] with a row, but have the shape {features.shape}")
    rows = np.concatenate([features, np.ones((len(features), 1))], axis=1, dtype=np.float64)
    wide = rows.shape[0] < rows.shape[1]  # the smaller of two matrices with the same eigenvalues
    moments = (rows @ rows.T if wide else rows.T @ rows) / len(rows)
    return _bounds(float(np.linalg.eigvalsh(moments)[-1]), float(np.trace(moments)), classes, at_start)


def curvature_of_standardised(width: int, classes: int, *, at_start: bool = False) -> Curvature:
    """As :func:`curvature_of`, for any features of ``width`` numbers that are standardised within each row."""
    return _bounds(width + 1.0, width + 1.0, classes, at_start)


def safe_rate(curvature: Curvature, *, clients: int = 1, scalars: int = 0, momentum: float = 0.0) -> float:
    """The rate below which every step lowers the loss, in the mean over directions, where clients agree.

    Args:
        curvature: of the head's loss.
        clients: whose slopes are pooled for a step; 1 where a client steps by itself.
        scalars: slopes of each, along directions of its own; 0 for the exact gradient.
        momentum: of ``v <- momentum v + g``, ``theta <- theta - rate v``. One step of the gradient moves the
            parameters ``1 / (1 - momentum)`` times as far in the end, so the rate is that much lower.

    Raises:
        ValueError: ``clients`` below 1, ``scalars`` below 0, or ``momentum`` not in [0, 1).
    """
    if clients < 1 or scalars < 0 or not 0 <= momentum < 1:
        raise ValueError(f"clients {clients}, scalars {scalars}, momentum {momentum}: out of range")
    noise = curvature.trace / (clients * scalars) if scalars else 0.0
    return (1 - momentum) * 2.0 / (curvature.largest + noise)


def _bounds(largest: float, squared_norm: float, classes: int, at_start: bool) -> Curvature:
    if classes < 1:
        raise ValueError(f"classes must be 1 or more, but are {classes}")
    if classes == 1:  # the squared error, without a half
        return Curvature(2.0 * largest, 2.0 * squared_norm)
    return Curvature(largest / (classes if at_start else 2), (1.0 - 1.0 / classes) * squared_norm)
