"""Where an adapter reads activations, and what these are like: second moments, and their principal directions.

A *place* is a module of the adapted model whose input is looked at. Its :class:`Moments` are summed in float64 over all
tokens of a text, by forward passes alone. The rows of a basis are principal directions of what is seen there, with
two decisions:

* **The mean contributes nothing.** Hidden states have a large common part, and a direction with a share in it is
  mostly a constant. So the rows are orthogonal to the mean: their features have mean zero without an offset to
  subtract, and a low-rank step made of them stays one matrix product that can be merged. (Principal directions of the
  covariance within that space; one direction is lost. A constant shift is what biases are for.)
* **Features have about unit variance**: rows are scaled by ``1 / sqrt(lambda + 0.01 lambda_1)``, so that one learning
  rate fits all of them and the rare directions are not blown up.

The sign of a row is the one that makes its largest element positive. Eigenvectors still differ between machines in
their last bits, and by more where eigenvalues are close; hence they are computed once, and shipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fs_fwdllm.errors import ConfigError, DataError

__all__ = ["Moments", "Place", "Rows", "see"]

#: Share of the largest eigenvalue that is added to each before a row is scaled.
_DAMPING = 0.01


class Moments:
    """Sums over the vectors ``[width]`` that were seen, in float64: 8 width^2 bytes."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, vectors: torch.Tensor) -> None:
        """Count vectors ``[number, width]``."""
        wide = vectors.detach().to(device="cpu", dtype=torch.float64)
        self.count += len(wide)
        self._sum += wide.sum(dim=0)
        self._products += wide.T @ wide

    def principal_rows(self, rank: int, *, scaled: bool = True) -> tuple[torch.Tensor, float]:
        """``(rows [rank, width] float32, share of the variance they span)``, the largest variance first.

        Args:
            scaled: so that features have about unit variance; rows have unit length otherwise.

        Raises:
            ConfigError: there are not so many directions.
        DataError: there are too few vectors for them.
        """
        width = len(self._sum)
        if type(rank) is not int or not 1 <= rank < width:
            raise ConfigError(
                f"llm.adapter.args: a basis of {rank!r} directions of {width} is no choice: 1 to {width - 1} are left "
                "beside the mean"
            )
        if self.count <= rank:
            raise DataError(f"a basis of {rank} rows needs more than {self.count} tokens; give it more text")
        mean = (self._sum / self.count).numpy()
        covariance = self._products.numpy() / self.count - np.outer(mean, mean)
        away = np.eye(width) - np.outer(mean, mean) / max(float(mean @ mean), np.finfo(float).tiny)
        values, vectors = np.linalg.eigh(away @ covariance @ away)
        values, vectors = values[::-1][:rank].clip(min=0.0), vectors[:, ::-1][:, :rank]
        largest = np.abs(vectors).argmax(axis=0)
        vectors = vectors * np.sign(vectors[largest, np.arange(rank)])
        rows = vectors.T / np.sqrt(values + _DAMPING * values[0])[:, None] if scaled else vectors.T
        return torch.from_numpy(rows.astype(np.float32)), float(values.sum() / np.trace(covariance))


@dataclass(frozen=True)
class Rows:
    """A tensor of a basis file: its name, how many rows it has, and whether they are scaled for unit variance."""

    name: str
    rank: int
    scaled: bool = True


@dataclass(frozen=True)
class Place:
    """What a basis is made for.

    Attributes:
        module: of the adapted model; its input is looked at.
        moments: of what was seen there.
        wanted: the tensors that are made of them.
    """

    module: nn.Module
    moments: Moments
    wanted: tuple[Rows, ...]


@torch.no_grad()
def see(model: nn.Module, inputs: Mapping[str, torch.Tensor], places: Sequence[Place]) -> None:
    """Run ``model`` once and count what comes to ``places``.

    Args:
        inputs: what the model is called with; ``attention_mask`` ``[rows, tokens]`` is among it, and where a module is
            given one vector per token, those of padding do not count.
    """
    mask = inputs["attention_mask"].flatten().bool()

    def count(place: Place, arguments: tuple[Any, ...]) -> None:
        seen = arguments[0].flatten(0, -2)
        place.moments.add(seen[mask] if len(mask) == len(seen) else seen)

    handles = [
        place.module.register_forward_pre_hook(lambda module, arguments, place=place: count(place, arguments))
        for place in places
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
