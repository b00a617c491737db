"""The cross-entropy over many classes, a slice of the classes at a time.

Of each slice of columns two numbers a row are kept, its largest logit ``m`` and ``s = sum exp(logit - m)``; all slices
together give the logarithm of the sum of all exponentials::

    log sum_c s_c exp(m_c - M) + M        M = max_c m_c

Slices have the same width wherever logits come from. So it makes no difference, not of a bit, whether they are there as
one matrix or come off a vocabulary that is read piece by piece (:mod:`fs_fwdllm.model.base.vocabulary`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["SLICE_COLUMNS", "Slice", "cross_entropies", "joined", "slice_of"]

#: Columns of a slice.
SLICE_COLUMNS = 4096
#: Rows that are looked at together: what exists beside the logits is as large as these rows of a slice, and stays in
#: the processor's cache.
_ROWS = 64


class Slice(NamedTuple):
    """Of each row the largest logit, ``[rows]``, and the sum of exponentials relative to it."""

    largest: torch.Tensor
    sums: torch.Tensor


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each row of float32 ``[rows, classes]``, as float64 ``[rows]``.

    A slope is a small difference of two losses. Near 11, where a language model begins, float32 has steps of a
    millionth, which a radius of 0.001 makes slopes of a thousandth; the losses are therefore put together in float64.
    What is summed over the classes stays float32: its rounding is a ten-millionth of the loss.

    Args:
        targets: class of each row; where it is negative, the loss means nothing.
    """
    slices = [slice_of(columns) for columns in logits.split(SLICE_COLUMNS, dim=1)]
    return joined(slices, logits.gather(1, targets.clamp_min(0)[:, None]).squeeze(1))


def slice_of(logits: torch.Tensor) -> Slice:
    """What is kept of ``[rows, columns]``."""
    found = [_of_rows(rows.contiguous()) for rows in logits.split(_ROWS)]
    return Slice(*map(torch.cat, zip(*found, strict=True)))


def _of_rows(logits: torch.Tensor) -> Slice:
    largest = logits.amax(dim=1).detach()
    return Slice(largest, (logits - largest[:, None]).exp_().sum(dim=1))


def joined(slices: Sequence[Slice], chosen: torch.Tensor) -> torch.Tensor:
    """The losses, float64, of rows whose targets' logits are ``chosen``."""
    largest = torch.stack([one.largest for one in slices], dim=1).double()
    sums = torch.stack([one.sums for one in slices], dim=1).double()
    top = largest.amax(dim=1)
    total = (sums * (largest - top[:, None]).exp()).sum(dim=1)
    return total.log() + (top - chosen.double())
