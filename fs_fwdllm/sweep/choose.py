"""Mean and spread over seeds, the best setting, and how sure that is.

Two things blur a mean. Seeds: another draw of weights, batches and directions gives another end; the standard
deviation over seeds says how far. Rows: another draw of validation rows would have another loss; the standard error
over rows says how far. The rows of a seed are the same at every point, so differences between points are surer than it
suggests.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fs_fwdllm.data.batches import collate
from fs_fwdllm.data.types import IGNORED_LABEL
from fs_fwdllm.errors import ConfigError, TrainingStalledError, nearest
from fs_fwdllm.evaluation.names import LOWER_IS_BETTER
from fs_fwdllm.method import assemble_server
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.driver import read_own_checkpoint
from fs_fwdllm.running.session import Session
from fs_fwdllm.sweep.run import Outcome, reasons

__all__ = ["Setting", "best_of", "row_noise", "settings_of", "warnings_of"]

#: The rows are dealt to so many groups, over which their noise is measured.
_GROUPS = 64
#: Metrics that are shares of the rows: their standard error follows from the share.
_SHARES = frozenset({"accuracy", "exact_match"})


@dataclass(frozen=True)
class Setting:
    """The outcomes of one combination of values, one a seed."""

    values: tuple[tuple[str, str], ...]
    outcomes: tuple[Outcome, ...]

    @property
    def problem(self) -> str:
        """What went wrong with any of its seeds; empty if all ended."""
        return reasons(self.outcomes)

    def mean(self, metric: str, of_start: bool = False) -> float:
        """The mean over seeds of a metric at the end (or start); NaN where a seed has none."""
        return statistics.fmean(self._values(metric, of_start))

    def deviation(self, metric: str) -> float:
        """The standard deviation over seeds; NaN where there is one only."""
        values = self._values(metric)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def _values(self, metric: str, of_start: bool = False) -> list[float]:
        return [(found.start if of_start else found.end).get(metric, math.nan) for found in self.outcomes]


def settings_of(outcomes: Sequence[Outcome]) -> list[Setting]:
    """The outcomes by their values, in the order they come in."""
    groups: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.point.values, []).append(outcome)
    return [Setting(values, tuple(found)) for values, found in groups.items()]


def best_of(settings: Sequence[Setting], metric: str) -> Setting:
    """The setting with the best mean, of those that ended with every seed.

    Raises:
        ConfigError: the evaluations have no such metric.
        TrainingStalledError: no setting ended with every seed.
    """
    ended = [setting for setting in settings if not setting.problem]
    if not ended:
        found = reasons([outcome for setting in settings for outcome in setting.outcomes])
        raise TrainingStalledError(f"no setting ended with every seed ({found}); try values far from these")
    known = ended[0].outcomes[0].end
    if metric not in known:
        raise ConfigError(f"--by {metric}: the evaluations have {', '.join(known)}{nearest(metric, known)}")
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return min(ended, key=lambda setting: sign * setting.mean(metric))


def warnings_of(best: Setting, axes: Sequence[tuple[str, tuple[str, ...]]], metric: str) -> list[str]:
    """What a user should know before they trust the best setting: that it does not learn, or ends a grid."""
    found = []
    sign = 1 if metric in LOWER_IS_BETTER else -1
    if sign * best.mean(metric) >= sign * best.mean(metric, of_start=True):
        found.append(f"nothing is learned: the best {metric} is no better than before training")
    for key, values in axes:
        chosen, numbers = _number(dict(best.values)[key]), sorted(map(_number, values))
        if not any(map(math.isnan, numbers)) and chosen in (numbers[0], numbers[-1]):
            end, beyond = ("smallest", "smaller") if chosen == numbers[0] else ("largest", "larger")
            found.append(f"{key} {chosen:g} is the {end} that was tried; try {beyond} ones, too")
    return found


@torch.no_grad()
def row_noise(folder: Path, metric: str, value: float) -> tuple[int, float]:
    """``(validation rows, standard error)`` of a finished run's metric; the error is NaN where none is known.

    The loss is a sum over labels by their number, and rows have different numbers of labels; its error is that of a
    ratio, over groups of rows.

    Raises:
        FwdLLMError: whatever a resumed run would raise while it loads.
    """
    run = RunFolder.open(folder)
    session = Session.open(run.config())
    rows = len(session.data.val)
    if metric in _SHARES:
        return rows, math.sqrt(max(value * (1 - value), 0) / rows)
    if metric != "loss":
        return rows, math.nan
    checkpoint = read_own_checkpoint(run)
    server = assemble_server(session.parts, session.client_samples)
    server.load_state(checkpoint.tensors, checkpoint.numbers)
    sums, labels = [], []
    with session.at(server.trainables):
        for group in range(min(_GROUPS, rows)):
            batch = collate(session.data.val[group::_GROUPS], session.loaded.tokenizer.pad_token_id)
            on_batch = session.parts.objective.on(batch)
            labelled = on_batch.targets != IGNORED_LABEL
            sums.append(float(on_batch.judged().losses[labelled].sum()))
            labels.append(int(labelled.sum()))
    return rows, _ratio_error(sums, labels)


def _ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """The standard error of ``sum(sums) / sum(counts)`` over independent groups (Cochran, 1977, section 2.11)."""
    groups, total = len(sums), sum(counts)
    if groups < 2 or not total:
        return math.nan
    ratio = math.fsum(sums) / total
    squares = math.fsum((amount - ratio * count) ** 2 for amount, count in zip(sums, counts, strict=True))
    return math.sqrt(squares * groups / (groups - 1)) / total


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
