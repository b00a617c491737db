"""A run read back from its files: lines, series of points, and the few numbers that sum it up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.config.host_sections import EvalConfig
from fs_fwdllm.config.methods import MethodFacts
from fs_fwdllm.config.sources import describe_sources, groups_of_sources
from fs_fwdllm.errors import CheckpointError, ConfigError
from fs_fwdllm.evaluation.names import LOWER_IS_BETTER
from fs_fwdllm.report.folder import RunFolder
from fs_fwdllm.report.sinks import read_lines

__all__ = [
    "RunRecord", "RunSummary", "evaluation_metric", "method_facts", "method_name", "metric_title", "short_name"
]  # fmt: skip

#: Names of what an evaluation may report, for axes and tables; where no metric was asked for, the first one present is
#: the metric of a run.
_TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "exact_match": "exact match",
    "token_accuracy": "token accuracy",
    "macro_f1": "macro-F1",
    "mcc": "Matthews correlation",
    "binary_f1": "F1 of the second class",
    "perplexity": "perplexity",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "r2": "R²",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "loss": "evaluation loss",
}


def metric_title(name: str) -> str:
    """What a metric is called on axes and in tables."""
    return _TITLES.get(name, name.replace("_", " "))


def evaluation_metric(evaluation: Mapping[str, Any], settings: EvalConfig) -> str | None:
    """The metric an evaluation is judged by: the first that ``eval.metrics`` names, else the task's usual one.

    An evaluation lists its metrics in the order in which they were asked for, under their canonical names.
    """
    numbers = [name for name in evaluation if _is_number(evaluation[name]) and not name.startswith("majority_")]
    if settings.metrics:
        candidates = ["loss"] if settings.judged_by_loss else [name for name in numbers if name != "loss"]
    else:
        candidates = list(_TITLES)
    return next((name for name in [*candidates, *numbers] if name in numbers), None)


def short_name(path: str) -> str:
    """A model's or file's name for captions: of a long path the last two parts."""
    source, separator, kind = path.partition("@")
    parts = source.removeprefix("package:").strip("/").split("/")
    return "/".join(parts[-2:]) + (separator + kind if kind in ("llm", "text", "qa") else "")


def method_facts(config: Config) -> MethodFacts | None:
    """What is known of a run's method; ``None`` for one of a package that is no longer installed.

    Runs of such a package can still be looked at, which is why a report asks here and never ``config.method``.
    """
    try:
        return config.method
    except ConfigError:
        return None


def method_name(config: Config) -> str:
    """A few words that name the method of a configuration and what sets it apart, for titles and tables."""
    facts = method_facts(config)
    if facts is None:
        return config.federate.method
    if facts.measures_slopes:
        ways = dict.fromkeys(describe_sources(sources) for sources in groups_of_sources(config))
        return f"{facts.title} ({' | '.join(ways)})"
    return f"{facts.title} ({config.fwdllm.blocks.schedule if facts.trains_blocks else 'backpropagation'})"


@dataclass(frozen=True)
class RunSummary:
    """The numbers a comparison shows. ``None`` where a run has not recorded one.

    Counts, bytes and seconds are totals at the end. ``start`` is the metric before training, ``best`` the largest, or
    the smallest where lower is better, and ``majority`` that of always answering the most frequent class. ``loss`` is
    the last evaluation loss, or the last training loss of a run that never evaluated.
    """

    run: str
    method: str
    rounds: int
    metric: str | None
    start: float | None
    final: float | None
    best: float | None
    best_round: int | None
    majority: float | None
    loss: float | None
    forward_passes: float | None
    backward_passes: float | None
    upload_bytes: float | None
    download_bytes: float | None
    duration_s: float | None
    peak_rss_mib: float | None
    peak_device_mib: float | None


@dataclass(frozen=True)
class RunRecord:
    """What the files of a run say: ``rounds`` are the lines of ``metrics.jsonl`` in order, ``end`` is the final one."""

    folder: RunFolder
    config: Config
    rounds: list[dict[str, Any]]
    end: dict[str, Any] | None

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read the run folder ``path``.

        Raises:
            CheckpointError: it is not a run folder, or the run has not finished a round.
            ConfigError: its ``config.yaml`` is damaged.
        """
        folder = RunFolder.open(path)
        lines = read_lines(folder)
        rounds = [line for line in lines if not line.get("final") and isinstance(line.get("round"), int)]
        if not rounds:
            raise CheckpointError(f"{folder.metrics_path}: holds no round; let the run finish one before looking at it")
        end = next((line for line in reversed(lines) if line.get("final")), None)
        return cls(folder, folder.config(), rounds, end)

    @property
    def metric(self) -> str | None:
        """The metric the run is judged by, ``None`` when it never evaluated."""
        names = (evaluation_metric(line["eval"], self.config.eval) for line in self.rounds if line.get("eval"))
        return next((name for name in names if name), None)

    @property
    def model_facts(self) -> dict[str, Any]:
        """What the run noted of its model (:meth:`fs_fwdllm.running.session.Session.model_facts`); may be empty."""
        lines = [*self.rounds, self.end or {}]
        return next((line["model"] for line in lines if isinstance(line.get("model"), dict)), {})

    def series(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """The points of the rounds that have both numbers.

        ``"eval.loss"`` reaches into a nested object; ``"bytes"`` is the sum of upload and download.
        """
        points = [(self.value(line, x), self.value(line, y)) for line in self.rounds]
        kept = [(a, b) for a, b in points if a is not None and b is not None]
        return [a for a, _ in kept], [b for _, b in kept]

    @staticmethod
    def value(line: dict[str, Any], name: str) -> float | None:
        """The number of that name in a line, named as in :meth:`series`; ``None`` where it has none."""
        return _value(line, name)

    def summary(self) -> RunSummary:
        """The numbers a comparison shows."""
        metric = self.metric
        lines = self.rounds + ([self.end] if self.end else [])

        def last(*names: str) -> float | None:
            values = (_value(line, name) for name in names for line in reversed(lines))
            return next((value for value in values if value is not None), None)

        rounds, scores = self.series("round", f"eval.{metric}") if metric else ([], [])
        at_end = _value(self.end, f"eval.{metric}") if self.end else None
        if at_end is not None:
            rounds, scores = [*rounds, rounds[-1] if rounds else 0], [*scores, at_end]
        best = (min if metric in LOWER_IS_BETTER else max)(scores) if scores else None
        return RunSummary(
            run=self.folder.name,
            method=method_name(self.config),
            rounds=self.rounds[-1]["round"],
            metric=metric,
            start=scores[0] if scores and rounds[0] == 0 else None,
            final=scores[-1] if scores else None,
            best=best,
            best_round=int(rounds[scores.index(best)]) if best is not None else None,
            majority=last(f"eval.majority_{metric}"),
            loss=last("eval.loss", "train_loss"),
            duration_s=last("seconds"),
            **{name: last(name) for name in _TOTALS},
        )


_TOTALS = (
    "forward_passes", "backward_passes", "upload_bytes", "download_bytes", "peak_rss_mib", "peak_device_mib",
)  # fmt: skip


def _value(line: Mapping[str, Any], name: str) -> float | None:
    if name == "bytes":
        upload, download = _value(line, "upload_bytes"), _value(line, "download_bytes")
        return None if upload is None or download is None else upload + download
    found: Any = line
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if _is_number(found) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
