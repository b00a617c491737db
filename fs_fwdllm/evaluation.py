"""Evaluation: the loss, and the metrics people in the field report for the task.

Classification: accuracy, macro-averaged F1 and Matthews correlation (scikit-learn's), and the accuracy of always
answering the most frequent class, without which an accuracy means little. Language models: token accuracy and
perplexity over answer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fs_fwdllm.data.types import Batch, Task
from fs_fwdllm.errors import ConfigError, nearest
from fs_fwdllm.model.objective import Objective

__all__ = ["METRICS", "check_metrics", "evaluate"]

METRICS: dict[Task, tuple[str, ...]] = {
    "classification": ("accuracy", "majority_accuracy", "macro_f1", "mcc"),
    "causal_lm": ("token_accuracy", "perplexity"),
}
#: Computed only when asked for. ``binary_f1`` is the F1 of the second class: GLUE's for MRPC and QQP.
ON_REQUEST: dict[Task, tuple[str, ...]] = {"classification": ("binary_f1",), "causal_lm": ()}
#: FederatedScope's names for the same things.
_ALIASES = {"acc": "accuracy", "f1": "macro_f1", "loss": "loss", "avg_loss": "loss", "total": "loss"}


def check_metrics(names: Sequence[str], task: Task) -> list[str]:
    """Canonical names of the requested metrics; all of the task's when none are named.

    Raises:
        ConfigError: an unknown name.
    """
    allowed = (*METRICS[task], *ON_REQUEST[task])
    wanted = [_ALIASES.get(name, name) for name in names]
    for name, canonical in zip(names, wanted, strict=True):
        if canonical != "loss" and canonical not in allowed:
            raise ConfigError(f"eval.metrics {name!r}: a {task} task has {list(allowed)}{nearest(name, allowed)}")
    return [name for name in wanted if name != "loss"] or list(METRICS[task])


def evaluate(objective: Objective, batches: Sequence[Batch], metrics: Sequence[str]) -> dict[str, float]:
    """Mean loss per label and the named metrics over ``batches``."""
    total_loss, predictions, targets = 0.0, [], []
    for batch in batches:
        batch_loss = objective.on(batch)
        logits = batch_loss.logits()
        total_loss += float(F.cross_entropy(logits, batch_loss.targets, reduction="sum"))
        predictions.append(logits.argmax(-1).cpu())
        targets.append(batch_loss.targets.cpu())
    predicted, actual = torch.cat(predictions).numpy(), torch.cat(targets).numpy()
    loss = total_loss / len(actual)
    known = {"loss": loss} | _metrics_of(objective.task, loss, predicted, actual, metrics)
    return {name: known[name] for name in ("loss", *metrics)}


def _metrics_of(
    task: Task, loss: float, predicted: np.ndarray, actual: np.ndarray, wanted: Sequence[str]
) -> dict[str, float]:
    if task == "causal_lm":
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"token_accuracy": float((predicted == actual).mean()), "perplexity": perplexity}
    return {
        "accuracy": float(accuracy_score(actual, predicted)),
        "majority_accuracy": float(np.bincount(actual).max() / len(actual)),
        "macro_f1": float(f1_score(actual, predicted, average="macro")) if "macro_f1" in wanted else math.nan,
        "mcc": float(matthews_corrcoef(actual, predicted)) if "mcc" in wanted else math.nan,
        "binary_f1": float(f1_score(actual == 1, predicted == 1)) if "binary_f1" in wanted else math.nan,
    }
