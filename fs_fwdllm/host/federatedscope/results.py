"""Evaluation results and progress, between the host's forms and ours."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fs_fwdllm.running.choice import Choice

__all__ = ["LogLines", "latest_evaluation", "results_in", "with_value_to_choose_by"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

#: The host's merged forms, the one we report first.
_FORMS = ("Results_weighted_avg", "Results_avg", "Results_raw")
#: Names that mean nothing outside the host, or are reported under another one.
_LEFT_OUT = frozenset({"loss", "total", "acc"})


def results_in(content: Any) -> dict[str, float] | None:
    """A client's results, ``None`` if it has none or they are something else."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return None
    return content if all(isinstance(value, int | float) for value in content.values()) else None


def latest_evaluation(history: Mapping[str, Any], splits: Sequence[str]) -> dict[str, float] | None:
    """The last merged results in our report's terms: the first evaluated split, without its prefix.

    Args:
        history: the host's ``{form: {split_metric: values of all evaluations}}``.
    """
    for form in _FORMS:
        for split in splits:
            values = {
                key.removeprefix(f"{split}_"): float(series[-1] if isinstance(series, list) else series)
                for key, series in history.get(form, {}).items()
                if key.startswith(f"{split}_")
            }
            if values:
                loss = values.pop("avg_loss", values.get("loss", float("nan")))
                return {"loss": loss, **{key: value for key, value in values.items() if key not in _LEFT_OUT}}
    return None


def with_value_to_choose_by(
    evaluation: dict[str, float] | None, history: Mapping[str, Any], choice: Choice | None
) -> dict[str, float] | None:
    """``evaluation`` and the value that rounds are compared by, where that is of another split."""
    if evaluation is None or choice is None or choice.is_reported:
        return evaluation
    value = (latest_evaluation(history, [choice.split]) or {}).get(choice.metric)
    return evaluation if value is None else {**evaluation, choice.key: value}


class LogLines(io.TextIOBase):
    """Passes what our console prints to the host's log, line by line."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logger.info(line.rstrip())
        return len(text)
