"""Evaluation: the loss, and the metrics people in the field report for the task.

Classification: accuracy, macro-averaged F1 and Matthews correlation (scikit-learn's), and the accuracy of always
answering the most frequent class, without which an accuracy means little; on request ``per_class``, the confusion
counts and what follows from them. Regression: mean squared and mean absolute error, Pearson's and Spearman's
correlation (GLUE's for STS-B); on request ``r2``, which is 0 for always answering the mean. Language models: token
accuracy and perplexity over answer tokens; on request, for data with reference answers, exact match and F1 of answers
generated greedily. Question answering: exact match and F1 of the best span over all windows of a question. Exact match
and F1 are SQuAD's, as shares; on request they are told apart for questions with and without an answer, as in SQuAD v2's
evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    mean_squared_error,
)

from fs_fwdllm.config.host_sections import LOSS_WORDS
from fs_fwdllm.data.types import IGNORED_LABEL, Batch, Task
from fs_fwdllm.errors import ConfigError, DataError, nearest
from fs_fwdllm.evaluation.answers import BestSpans, judge, judge_apart
from fs_fwdllm.evaluation.generation import generate_answers
from fs_fwdllm.evaluation.names import METRICS, METRICS_ON_REQUEST, OF_ANSWERS, OF_ANSWERS_APART
from fs_fwdllm.model.base.vocabulary import Judged
from fs_fwdllm.model.objective import BatchLoss, Objective

__all__ = [
    "METRICS", "METRICS_ON_REQUEST", "check_metrics", "evaluate", "majority_scores", "of_classes", "of_numbers"
]  # fmt: skip

T = TypeVar("T")
#: FederatedScope's names for the same things.
_ALIASES = {"acc": "accuracy", "f1": "macro_f1", **dict.fromkeys(LOSS_WORDS, "loss")}


def check_metrics(names: Sequence[str], task: Task) -> list[str]:
    """Canonical names of the requested metrics; the task's usual ones when none are named.

    Raises:
        ConfigError: an unknown name.
    """
    allowed = (*METRICS[task], *METRICS_ON_REQUEST[task])
    wanted = [name if name in allowed else _ALIASES.get(name, name) for name in names]
    for name, canonical in zip(names, wanted, strict=True):
        if canonical != "loss" and canonical not in allowed:
            raise ConfigError(f"eval.metrics {name!r}: a {task} task has {list(allowed)}{nearest(name, allowed)}")
    return [name for name in wanted if name != "loss"] or list(METRICS[task])


def evaluate(
    objective: Objective,
    batches: Sequence[Batch],
    metrics: Sequence[str],
    label_names: Sequence[str] = (),
    tokenizer: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Mean loss per label and the named metrics over ``batches``.

    Args:
        label_names: the classes in index order, for ``per_class``.
        tokenizer: turns generated tokens to text, for a language model's ``exact_match`` and ``f1``.
        progress: is told, before the first batch and after each, how many are done and how many there are.

    Returns:
        Numbers by name; ``per_class`` is a mapping of lists (see :func:`_per_class`).

    Raises:
        DataError: exact match is asked for, but the data has no reference answers.
    """
    generates = objective.task == "causal_lm" and bool({*OF_ANSWERS, *OF_ANSWERS_APART} & set(metrics))
    total = len(batches) * (1 + generates)
    total_loss, predictions, targets, spans = 0.0, [], [], BestSpans()
    for batch, seen in zip(batches, _watched(_seen(objective, batches), 0, total, progress), strict=True):
        total_loss += seen.loss
        predictions.append(seen.predictions)
        targets.append(seen.targets)
        if seen.logits is not None:
            spans.add(seen.logits, batch.references)
    predicted, actual = torch.cat(predictions).numpy(), torch.cat(targets).numpy()
    counted = len(actual) if objective.task == "regression" else int((actual != IGNORED_LABEL).sum())
    known: dict[str, Any] = {"loss": total_loss / counted if counted else math.nan}
    if objective.task == "question_answering":
        known |= judge(spans.answers, spans.gold) | judge_apart(spans.answers, spans.gold)
    elif objective.task == "regression":
        known |= of_numbers(predicted, actual)
    elif objective.task == "causal_lm":
        known |= _of_tokens(known["loss"], predicted, actual)
        if generates:
            known |= _of_generated(objective, _watched(batches, len(batches), total, progress), tokenizer)
    else:
        known |= of_classes(predicted, actual, metrics, label_names)
    return {name: known[name] for name in ("loss", *metrics)}


def majority_scores(batches: Sequence[Batch], metrics: Sequence[str]) -> dict[str, float]:
    """What always answering the most frequent class reaches in the named metrics of a classification.

    Returns:
        ``majority_accuracy`` always, and for ``macro_f1`` and ``binary_f1`` a number of that name; Matthews correlation
        is zero by definition.
    """
    actual = np.concatenate([batch.labels for batch in batches]).reshape(-1)
    most_frequent = np.full_like(actual, np.bincount(actual).argmax())
    named = [name for name in ("accuracy", "macro_f1", "binary_f1") if name == "accuracy" or name in metrics]
    found = of_classes(most_frequent, actual, named, ())
    return {f"majority_{name}": found[name] for name in named}


@dataclass
class _Seen:
    """What a model says of a batch: the sum of its losses, and a prediction and a target a label."""

    loss: float
    predictions: torch.Tensor
    targets: torch.Tensor
    logits: torch.Tensor | None


def _seen(objective: Objective, batches: Sequence[Batch]) -> Iterator[_Seen]:
    """Batch by batch; over a base on the disk several go side by side, and share what is read."""
    size = objective.meeting.largest
    for first in range(0, len(batches), size):
        group = [objective.on(batch) for batch in batches[first : first + size]]
        yield from objective.meeting.together([partial(_look_at, objective, batch_loss) for batch_loss in group])


def _look_at(objective: Objective, batch_loss: BatchLoss) -> _Seen:
    targets = batch_loss.targets
    if objective.task == "question_answering":  # the metrics are of whole windows, whose logits it takes
        logits = batch_loss.logits()
        judged = Judged(objective.readout.losses(logits, targets), objective.readout.predictions(logits))
    else:
        logits, judged = None, batch_loss.judged()
    return _Seen(
        loss=float(objective.readout.reduced(judged.losses, targets, reduction="sum")),
        predictions=judged.predictions.cpu(),
        targets=targets.cpu(),
        logits=logits,
    )


def _watched(
    items: Iterable[T], before: int, total: int, progress: Callable[[int, int], None]
) -> Iterator[T]:  # fmt: skip
    if not before:
        progress(0, total)
    for number, item in enumerate(items):
        yield item
        progress(before + number + 1, total)


def _of_tokens(loss: float, predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"token_accuracy": float((predicted == actual).mean()), "perplexity": perplexity}


def _of_generated(objective: Objective, batches: Iterable[Batch], tokenizer: Any) -> dict[str, float]:
    answers, gold = generate_answers(objective.model, batches, tokenizer)
    if not gold:
        raise DataError("eval.metrics exact_match and f1: need data with reference answers, such as SQuAD's file@llm")
    return judge(answers, gold) | judge_apart(answers, gold)


def of_classes(
    predicted: np.ndarray, actual: np.ndarray, wanted: Sequence[str], label_names: Sequence[str]
) -> dict[str, Any]:
    """The metrics of a classification.

    Args:
        predicted, actual: classes, int ``[rows]``.
        wanted: the metrics that are computed; others that take time are NaN or empty.
        label_names: the classes in index order, for ``per_class``.
    """
    return {
        "accuracy": float(accuracy_score(actual, predicted)),
        "majority_accuracy": float(np.bincount(actual).max() / len(actual)),
        "macro_f1": float(f1_score(actual, predicted, average="macro")) if "macro_f1" in wanted else math.nan,
        "mcc": float(matthews_corrcoef(actual, predicted)) if "mcc" in wanted else math.nan,
        "per_class": _per_class(predicted, actual, label_names) if "per_class" in wanted else {},
        "binary_f1": float(f1_score(actual == 1, predicted == 1)) if "binary_f1" in wanted else math.nan,
    }


def of_numbers(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """The metrics of a regression; a correlation is NaN where one side does not vary.

    Args:
        predicted, actual: float ``[rows]``.
    """
    squared_error = float(mean_squared_error(actual, predicted))
    varies = len(actual) > 1 and min(np.ptp(predicted), np.ptp(actual)) > 0
    return {
        "mse": squared_error,
        "mae": float(mean_absolute_error(actual, predicted)),
        "pearson": float(pearsonr(actual, predicted).statistic) if varies else math.nan,
        "spearman": float(spearmanr(actual, predicted).statistic) if varies else math.nan,
        "r2": 1 - squared_error / float(np.var(actual)) if np.ptp(actual) > 0 else math.nan,
    }


def _per_class(predicted: np.ndarray, actual: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """``labels``, ``confusion`` (rows are the truth, columns the prediction) and ``recall`` (``None`` without rows)."""
    count = max([len(label_names), 1 + int(max(predicted.max(), actual.max()))])
    table = confusion_matrix(actual, predicted, labels=range(count))
    recall = [int(table[code, code]) / int(rows) if rows else None for code, rows in enumerate(table.sum(axis=1))]
    labels = [*label_names] or [str(code) for code in range(count)]
    return {"labels": labels, "confusion": table.tolist(), "recall": recall}
