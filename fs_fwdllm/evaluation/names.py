"""The names of what an evaluation may report, by task, and which of them are better when they are smaller."""

from __future__ import annotations

from fs_fwdllm.data.types import Task

__all__ = ["LOWER_IS_BETTER", "METRICS", "METRICS_ON_REQUEST", "OF_ANSWERS", "OF_ANSWERS_APART", "numbers"]

_OF_CLASSES = ("accuracy", "majority_accuracy", "macro_f1", "mcc")
OF_ANSWERS = ("exact_match", "f1")
OF_ANSWERS_APART = ("has_answer_exact_match", "has_answer_f1", "no_answer_exact_match")

METRICS: dict[Task, tuple[str, ...]] = {
    "classification": _OF_CLASSES,
    "label_words": _OF_CLASSES,
    "causal_lm": ("token_accuracy", "perplexity"),
    "question_answering": OF_ANSWERS,
    "regression": ("mse", "mae", "pearson", "spearman"),
}
#: What is reported only where ``eval.metrics`` names it. ``binary_f1`` is the F1 of the second class: GLUE's for MRPC
#: and QQP.
METRICS_ON_REQUEST: dict[Task, tuple[str, ...]] = {
    "classification": ("per_class", "binary_f1"),
    "label_words": ("per_class", "binary_f1"),
    "causal_lm": (*OF_ANSWERS, *OF_ANSWERS_APART),
    "question_answering": OF_ANSWERS_APART,
    "regression": ("r2",),
}
LOWER_IS_BETTER = frozenset({"perplexity", "loss", "mae", "mse", "rmse"})
_NO_NUMBER = "per_class"


def numbers() -> list[str]:
    """Every metric of any task that is one number."""
    tasks = [*METRICS.values(), *METRICS_ON_REQUEST.values()]
    return sorted({name for names in tasks for name in names} - {_NO_NUMBER})
