"""The output layer: what goes into the last linear layer, and how far what comes out of it is from the targets.

Behind the last linear layer there is nothing but the loss, so the gradient of everything that lies there follows from
one forward pass in closed form. With features ``f_n`` (rows that go in), logits ``W f_n + b``, and the *error* ``e_n =
dL/d logits_n``, which is ``(softmax(logits_n) - onehot(y_n)) / N`` for cross-entropy and ``2 (prediction - target) /
N`` for the squared error::

    dL/dW = sum_n e_n f_n^T      dL/db = sum_n e_n      dL/df_n = W^T e_n

This module runs that pass, finds the layer, and gives features and errors row by row, whatever the task reads: one row
per sample for a classifier, one per labelled token for a language model, one per token for span extraction. The errors
over a large vocabulary are made a slice of columns at a time; no second array as large as the logits exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fs_fwdllm.errors import EstimatorError
from fs_fwdllm.model.objective import BatchLoss, Objective

__all__ = ["OutputLayer", "OutputPass"]

_LINEAR = (nn.Linear, Conv1D)
#: The child of an output layer that adds to its input and its output.
_ADAPTER = "output_residual"


@dataclass(frozen=True)
class OutputPass:
    """One pass over a batch.

    Attributes:
        loss: of the batch, a float64 scalar.
        features: float32 ``[rows, hidden]``: what went into the layer, of the rows that have an error.
        below: the same before an adapter at the layer's door; ``None`` without one.
        width: outputs of the layer.
        error: ``error(start, stop)`` is the loss's derivative by those outputs, float32 ``[rows, stop - start]``.
    """

    loss: torch.Tensor
    features: torch.Tensor
    below: torch.Tensor | None
    width: int
    error: Callable[[int, int], torch.Tensor]


@dataclass
class _Seen:
    """What went into the layer and came out, call by call, and what went into an adapter at its door."""

    features: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    below: list[torch.Tensor] = field(default_factory=list)


class OutputLayer:
    """The layer whose output the logits of an objective are; it is found in the first pass.

    Attributes:
        module: the layer, ``None`` before the first pass.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.module: Any = None

    @property
    def adapter(self) -> Any:
        """The adapter at the layer's door, if there is one."""
        return getattr(self.module, _ADAPTER, None)

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weight as ``[outputs, hidden]``."""
        weight: torch.Tensor = self.module.weight.detach()
        return weight.T if self.is_transposed else weight

    @property
    def is_transposed(self) -> bool:
        """Whether the layer keeps its weight as ``[hidden, outputs]``."""
        return isinstance(self.module, Conv1D)

    def role_of(self, tensor: torch.Tensor) -> str:
        """What a trainable is to the layer: ``weight``, ``bias``, ``up`` or ``logit_bias``; empty for anything else.

        A weight that stands in a second place of the model (tied embeddings) does more than this layer: it is none.
        """
        adapter = self.adapter
        roles = {"weight": self.module.weight, "bias": getattr(self.module, "bias", None)}
        if adapter is not None:
            roles |= {"up": adapter.up, "logit_bias": adapter.bias}
        if self._objective.places_of(tensor) != 1:
            return ""
        return next((role for role, known in roles.items() if known is tensor), "")

    @torch.no_grad()
    def run(self, batch_loss: BatchLoss) -> OutputPass:
        """Run the model on the batch where it stands.

        Raises:
            EstimatorError: the logits are not what a linear layer put out.
        """
        if self.module is None:
            self.module = self._find(batch_loss)
        with self._watched() as seen:
            logits = batch_loss.logits()
        batch_loss.note_clean(loss := self._objective.readout.loss(logits, batch_loss.targets))
        rows = _ROWS[self._objective.task](batch_loss, seen.outputs, logits)
        if rows is None:
            raise EstimatorError(
                f"closed_form: the logits of {type(batch_loss.model).__name__} are not what its last linear layer "
                f"puts out: a scale, a cap or another head follows it. {_ADVICE}"
            )
        width = seen.outputs[0].shape[-1]
        below = rows.of(seen.below).float() if seen.below else None
        return OutputPass(loss, rows.of(seen.features).float(), below, width, rows.error)

    def _find(self, batch_loss: BatchLoss) -> nn.Module:
        """The linear layer that is called last."""
        called: list[nn.Module] = []
        layers = [module for module in self._objective.model.modules() if isinstance(module, _LINEAR)]
        handles = [layer.register_forward_hook(lambda module, *_: called.append(module)) for layer in layers]
        try:
            batch_loss.logits()
        finally:
            for handle in handles:
                handle.remove()
        if not called:
            raise EstimatorError(f"closed_form: {type(batch_loss.model).__name__} has no linear layer. {_ADVICE}")
        return called[-1]

    @contextmanager
    def _watched(self) -> Iterator[_Seen]:
        seen = _Seen()

        def note(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            seen.features.append(arguments[0])
            seen.outputs.append(output)

        def note_below(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.below.append(arguments[0])

        handles = [self.module.register_forward_hook(note)]
        if self.adapter is not None:
            handles.append(self.adapter.register_forward_pre_hook(note_below))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


_ADVICE = "Use projected where the device can backpropagate, else forward_mode, one_sided or central"


@dataclass(frozen=True)
class _Rows:
    """Which of the layer's rows count, and their errors.

    Attributes:
        indices: of the rows, all calls one after the other; ``None`` for all in their order.
        may_be_chosen: what is exactly as long as ``indices`` has been reduced to these rows already, before the layer.
    """

    indices: torch.Tensor | None
    error: Callable[[int, int], torch.Tensor]
    may_be_chosen: bool = False

    def of(self, seen: Sequence[torch.Tensor]) -> torch.Tensor:
        """Those rows of what was seen, ``[rows, width]``."""
        flat = _flat(seen)
        if self.indices is None or (self.may_be_chosen and len(flat) == len(self.indices)):
            return flat
        return flat.index_select(0, self.indices)


def _flat(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([one.flatten(0, -2) for one in seen]) if len(seen) > 1 else seen[0].flatten(0, -2)


def _columns(errors: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: errors[:, start:stop]


def _rows_of_samples(batch_loss: BatchLoss, outputs: Sequence[torch.Tensor], logits: torch.Tensor) -> _Rows | None:
    """A row per sample. A decoder's classifier puts out a row per token: the ones that were read are found by value."""
    flat = _flat(outputs).float()
    error = _columns(batch_loss.readout.error(logits, batch_loss.targets, 0, logits.shape[1]))
    if flat.shape[1:] != logits.shape[1:]:
        return None
    if flat.shape == logits.shape and torch.equal(flat, logits):
        return _Rows(None, error)
    same = (logits[:, None] == flat[None]).all(dim=-1)
    return _Rows(same.int().argmax(dim=1), error) if bool(same.any(dim=1).all()) else None


def _rows_of_tokens(batch_loss: BatchLoss, outputs: Sequence[torch.Tensor], logits: torch.Tensor) -> _Rows | None:
    """A row per position that is read, of the whole vocabulary or of the words that stand for classes."""
    readout, targets = batch_loss.readout, batch_loss.targets
    rows = _Rows(batch_loss.positions, lambda start, stop: readout.error(logits, targets, start, stop), True)
    read = rows.of(outputs)
    if len(read) != len(logits) or not torch.equal(readout.of_tokens(read).float(), logits):
        return None
    return rows


def _rows_of_spans(batch_loss: BatchLoss, outputs: Sequence[torch.Tensor], logits: torch.Tensor) -> _Rows | None:
    """A row per token: how likely an answer starts there, and how likely it ends there."""
    if len(outputs) != 1 or outputs[0].shape[-1] != 2:
        return None
    samples, tokens = logits.shape[0] // 2, logits.shape[1]
    put_out = outputs[0].float().permute(2, 0, 1).reshape(2 * samples, -1)
    padding = logits == torch.finfo(logits.dtype).min
    if put_out.shape != logits.shape or not bool((padding | (put_out == logits)).all()):
        return None
    errors = batch_loss.readout.error(logits, batch_loss.targets, 0, tokens)
    return _Rows(None, _columns(errors.reshape(2, samples, tokens).permute(1, 2, 0).reshape(-1, 2)))


_ROWS = {
    "classification": _rows_of_samples,
    "regression": _rows_of_samples,
    "causal_lm": _rows_of_tokens,
    "label_words": _rows_of_tokens,
    "question_answering": _rows_of_spans,
}
