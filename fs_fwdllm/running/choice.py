"""Which round is the best, and whether to go on: what evaluations decide.

Both look at one value, named by ``eval.best_res_update_round_wise_key`` as FederatedScope has it: ``val_loss``,
``test_accuracy``. A test split that chooses among rounds is no test any more: its numbers for the chosen round are too
good. So the key's split is evaluated whenever it has samples, also where ``eval.split`` reports on another, and only
where it has none does the reported split stand in; the run then says so.

Early stopping is FederatedScope's, as a function of the values so far, so that a resumed run decides alike. A value
that is not finite improves on nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.config.host_sections import EarlyStopConfig
from fs_fwdllm.data.types import Task
from fs_fwdllm.errors import ConfigError, nearest
from fs_fwdllm.evaluation.metrics import check_metrics
from fs_fwdllm.evaluation.names import LOWER_IS_BETTER

__all__ = ["Choice", "choose", "is_time_to_stop"]

_KEY = "eval.best_res_update_round_wise_key"
_SPLITS = ("val", "test")


@dataclass(frozen=True)
class Choice:
    """What rounds are compared by.

    Attributes:
        split: ``val`` or ``test``.
        metric: a name of ours, such as ``loss`` or ``accuracy``.
        is_reported: whether ``split`` is the one that evaluations report on.
    """

    split: str
    metric: str
    is_reported: bool

    @property
    def key(self) -> str:
        """As ``eval.best_res_update_round_wise_key`` and the lines of ``metrics.jsonl`` call it."""
        return f"{self.split}_{self.metric}"

    @property
    def lower_is_better(self) -> bool:
        return self.metric in LOWER_IS_BETTER

    @property
    def in_words(self) -> str:
        return f"{self.key} ({'smaller' if self.lower_is_better else 'larger'} is better)"

    def value_in(self, evaluation: Mapping[str, Any] | None) -> float | None:
        """The value in an evaluation; ``None`` where nothing was evaluated, NaN where it is no finite number."""
        if evaluation is None:
            return None
        value = evaluation.get(self.metric if self.is_reported else self.key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether ``value`` is better; a number is better than none, and NaN is never better."""
        if math.isnan(value):
            return False
        return than is None or math.isnan(than) or (value < than if self.lower_is_better else value > than)


def choose(config: Config, task: Task, splits: Collection[str]) -> Choice | None:
    """What ``eval.best_res_update_round_wise_key`` means for this data; ``None`` if nothing can be evaluated.

    Args:
        splits: those of ``val`` and ``test`` that have samples.

    Raises:
        ConfigError: the key is malformed, or names a metric that the task does not have.
    """
    key = config.eval.best_res_update_round_wise_key
    split, _, name = key.partition("_")
    if split not in _SPLITS or not name:
        raise ConfigError(f"{_KEY} {key!r}: must be val_METRIC or test_METRIC, e.g. val_loss{nearest(key, _EXAMPLES)}")
    if name in ("loss", "avg_loss"):
        metric = "loss"
    else:
        try:
            (metric,) = check_metrics([name], task)
            if metric == "per_class":
                raise ConfigError("per_class is a table, not one number")
        except ConfigError as error:
            raise ConfigError(f"{_KEY} {key!r}: {str(error).removeprefix('eval.metrics ')}") from error
    reported = next((known for known in config.eval.split if known in splits), None)
    chosen = split if split in splits else reported
    return None if chosen is None else Choice(chosen, metric, chosen == reported)


_EXAMPLES = [f"{split}_{metric}" for split in _SPLITS for metric in ("loss", "accuracy")]


def is_time_to_stop(values: Sequence[float], settings: EarlyStopConfig, *, lower_is_better: bool) -> bool:
    """Whether the last of ``values``, one an evaluation in order, ends the run (``early_stop.*``)."""
    if not settings.patience or not values:
        return False
    losses = [math.inf if math.isnan(value) else value if lower_is_better else -value for value in values]
    if settings.improve_indicator_mode == "mean":
        return _is_above_mean(losses, settings)
    best, in_vain = losses[0], 0
    for loss in losses[1:]:
        if loss == math.inf or loss > best - settings.delta:
            in_vain += 1
        else:
            best, in_vain = loss, 0
    return in_vain >= settings.patience


def _is_above_mean(losses: Sequence[float], settings: EarlyStopConfig) -> bool:
    before = losses[-settings.patience - 1 : -1]
    if len(losses) <= settings.patience:
        return False
    return losses[-1] == math.inf or losses[-1] > math.fsum(before) / len(before) - settings.delta
