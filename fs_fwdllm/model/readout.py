"""How a task reads a model: where its labels are, and what the model's output says about them.

Every task ends in rows of logits with one target per row, so one loss, one evaluation and one set of estimators serve
them all. What differs is three small questions, answered here once per task:

======================  ===========================  ==========================================================
task                    rows                         classes
======================  ===========================  ==========================================================
``classification``      one per sample               the classes
``causal_lm``           one per labelled token       the vocabulary
``label_words``         one per sample, at its end   the tokens that stand for the classes
``regression``          one per sample               one number, and the loss is the squared error
``question_answering``  two per sample: the first    the tokens of the window; padding has no chance
                        and the last token
======================  ===========================  ==========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fs_fwdllm.data.types import IGNORED_LABEL, Task
from fs_fwdllm.model.inputs import DeviceBatch
from fs_fwdllm.model.log_sum_exp import cross_entropies

__all__ = ["Readout", "make_readout"]


class Readout:
    """Reads a classifier: one row per sample. The base of the others.

    Attributes:
        reads_tokens: whether rows are positions of a language model, so that its vocabulary projection need only run
            at those.
    """

    reads_tokens = False

    def labelled(self, batch: DeviceBatch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Flat positions to read (``None`` for a model that has one row per label anyway), and the targets."""
        return None, batch.labels

    def logits(self, output: Any, batch: DeviceBatch) -> torch.Tensor:
        """``[targets, classes]`` of a model's output."""
        logits: torch.Tensor = output.logits
        return logits

    def of_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """``[targets, classes]`` of the vocabulary logits at the labelled positions."""
        return logits

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of each row of float32 logits, float64 ``[targets]``."""
        return cross_entropies(logits, targets)

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        """The class of each row that is the likeliest."""
        return logits.argmax(dim=-1)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The loss of float32 logits, float64; rows whose target is ``-100`` do not count."""
        return self.reduced(self.losses(logits, targets), targets, reduction)

    def reduced(self, losses: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The ``mean`` or the ``sum`` of the losses that count."""
        counts = self._counts(targets)
        total = torch.where(counts, losses, 0.0).sum()
        return total if reduction == "sum" else total / counts.sum()

    def _counts(self, targets: torch.Tensor) -> torch.Tensor:
        return targets != IGNORED_LABEL

    def error(self, logits: torch.Tensor, targets: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The derivative of the mean loss by outputs ``start`` to ``stop`` of the output layer, ``[targets, stop -
        start]``: ``(softmax - onehot) / N``."""
        return _softmax_error(logits, targets, start, stop)


class _NumberReadout(Readout):
    """The model's one output is the number."""

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (logits.squeeze(-1).double() - targets.double()).square()

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.squeeze(-1)

    def _counts(self, targets: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(targets, dtype=torch.bool)

    def error(self, logits: torch.Tensor, targets: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return (2.0 / len(targets)) * (logits - targets[:, None])[:, start:stop]


class _TokenReadout(Readout):
    """Every token that has a label is predicted at the position before it."""

    reads_tokens = True

    def labelled(self, batch: DeviceBatch) -> tuple[torch.Tensor | None, torch.Tensor]:
        shifted = torch.full_like(batch.labels, IGNORED_LABEL)
        shifted[:, :-1] = batch.labels[:, 1:]
        flat = shifted.flatten()
        positions = torch.nonzero(flat != IGNORED_LABEL).flatten()
        return positions, flat[positions]


class _LabelWordReadout(Readout):
    """The class is the word a language model would put after the sample; only the classes' words compete."""

    reads_tokens = True

    def __init__(self, label_tokens: Sequence[int]) -> None:
        self._label_tokens = list(label_tokens)

    def labelled(self, batch: DeviceBatch) -> tuple[torch.Tensor | None, torch.Tensor]:
        rows, tokens = batch.input_ids.shape
        ends = batch.attention_mask.sum(dim=1) - 1
        return torch.arange(rows, device=ends.device) * tokens + ends, batch.labels

    def of_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., self._label_tokens]

    def error(self, logits: torch.Tensor, targets: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Of the whole vocabulary's outputs, of which only the classes' words have a part in the loss."""
        errors = _softmax_error(logits, targets, 0, logits.shape[1])
        spread = errors.new_zeros(len(errors), stop - start)
        inside = [index for index, token in enumerate(self._label_tokens) if start <= token < stop]
        spread[:, [self._label_tokens[index] - start for index in inside]] = errors[:, inside]
        return spread


class _SpanReadout(Readout):
    """The first and the last token of an answer, each among the tokens of the window."""

    def labelled(self, batch: DeviceBatch) -> tuple[torch.Tensor | None, torch.Tensor]:
        return None, batch.labels.T.flatten()

    def logits(self, output: Any, batch: DeviceBatch) -> torch.Tensor:
        ends = torch.cat([output.start_logits, output.end_logits]).float()
        padding = torch.cat([batch.attention_mask, batch.attention_mask]) == 0
        return ends.masked_fill(padding, torch.finfo(ends.dtype).min)


def _softmax_error(logits: torch.Tensor, targets: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """``(softmax(logits) - onehot(targets)) / N`` in columns ``start`` to ``stop``; zero in rows that do not count."""
    counts = targets != IGNORED_LABEL
    errors = torch.exp(logits[:, start:stop] - logits.logsumexp(dim=1, keepdim=True))
    inside = torch.nonzero(counts & (targets >= start) & (targets < stop)).flatten()
    errors[inside, targets[inside] - start] -= 1.0
    errors *= counts[:, None]
    return errors.div_(max(1, int(counts.sum())))


def make_readout(task: Task, label_tokens: Sequence[int] = ()) -> Readout:
    """The readout of ``task``; ``label_tokens`` stand for the classes of ``label_words``, in index order."""
    if task == "causal_lm":
        return _TokenReadout()
    if task == "label_words":
        return _LabelWordReadout(label_tokens)
    if task == "regression":
        return _NumberReadout()
    return _SpanReadout() if task == "question_answering" else Readout()
