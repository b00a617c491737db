"""The records that data passes through: examples, the clients that hold them, and the padded batch a model sees.

An :class:`Example` is already tokenised, so that a run tokenises every text once. A :class:`Batch` carries a ``key``
that names exactly which examples, in which order, it was padded from: equal keys mean equal tensors, which is what lets
the prefix cache reuse activations across rounds without changing a bit of the result.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

__all__ = ["IGNORED_LABEL", "Batch", "ClientData", "Example", "FederatedData", "Task"]

Task = Literal["causal_lm", "classification"]

#: Label of a position that does not count towards the loss (PyTorch's and Hugging Face's convention).
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Example:
    """One tokenised sample.

    Attributes:
        input_ids: int32 array of shape ``[tokens]``.
        labels: int32 array; shape ``[tokens]`` for a language model (``-100`` where the prompt is masked, not shifted),
            shape ``[]`` for a classifier (the class index).
    """

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some examples.

    Attributes:
        input_ids: int64 ``[batch, tokens]``, padded on the right.
        attention_mask: int64 ``[batch, tokens]``, one where there is a token.
        labels: int64 ``[batch, tokens]`` (language model, unshifted, ``-100`` where ignored) or ``[batch]``
            (classifier).
        key: names the examples and their order; ``None`` where the batch will not be seen again.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    key: Hashable | None = None

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        move = {name: getattr(self, name).to(device) for name in ("input_ids", "attention_mask", "labels")}
        return Batch(key=self.key, **move)


@dataclass
class ClientData:
    """What one client holds. Any split may be empty."""

    train: list[Example] = field(default_factory=list)
    val: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)


@dataclass
class FederatedData:
    """All clients of a simulation, numbered from 1 as FederatedScope does, and the server's evaluation splits.

    Attributes:
        task: what the labels mean.
        clients: ``{client id: data}``.
        val, test: the server's evaluation examples (the union over clients unless the config names a test file).
        label_names: the classes in index order; empty for a language model.
    """

    task: Task
    clients: dict[int, ClientData]
    val: list[Example]
    test: list[Example]
    label_names: list[str] = field(default_factory=list)
