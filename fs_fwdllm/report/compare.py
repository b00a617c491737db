"""Several runs in one picture and in tables; runs that differ only in ``seed`` are one line with a spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.report.caption import given_facts, joined
from fs_fwdllm.report.figure import (
    COLOURS,
    GREY,
    LINE_STYLES,
    X_AXES,
    draw,
    label_axes,
    label_log_axes,
    new_figure,
    save_figure,
    smoothed,
    write_warning,
)
from fs_fwdllm.report.groups import Curve, RunGroup, group_runs, incomparable
from fs_fwdllm.report.record import RunRecord, RunSummary, method_name, metric_title
from fs_fwdllm.report.terminal import compact_table
from fs_fwdllm.report.units import format_bytes, format_metric, format_seconds, short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Comparison", "common_curve", "compare_runs", "load_runs"]

_SIZE_PX = (1600, 1060)
#: Axes that turn logarithmic when the ends of two runs on them are further apart than this factor.
_LOG_AXES = frozenset({"bytes", "forward_passes"})
_FAR_APART = 20.0


@dataclass(frozen=True)
class Comparison:
    """What comparing runs gives.

    Attributes:
        picture: the file.
        legend: number and label of each group of runs.
        common: what all runs share: method, model, data, and how they train.
        result, costs: what they reached, and what that took.
        warning: said if the runs are not of one task; else empty.
    """

    picture: Path
    legend: list[tuple[str, str]]
    common: str
    result: Table
    costs: Table
    warning: str


def compare_runs(paths: Sequence[str | Path], output: str | Path) -> Comparison:
    """Draw the runs of ``paths`` over each other into ``output`` (PNG, 1600 by 1060 pixels).

    The curve is the metric all runs share, else the evaluation loss, else the training loss.

    Raises:
        CheckpointError: a path is not a run folder or has no round yet; ``output`` cannot be written.
        ConfigError: no path is given, or there are more groups of runs than colours.
    """
    records = load_runs(paths, "compare")
    groups = group_runs(records)
    if len(groups) > len(COLOURS):
        raise ConfigError(
            f"compare: takes up to {len(COLOURS)} configurations (runs that differ only in seed are one), but "
            f"{len(groups)} are given"
        )
    y, y_label = common_curve(records)
    warning = incomparable(groups)
    common = _common_facts(records)
    picture = _draw(groups, y, y_label, warning, common, Path(output))
    legend = [(str(number + 1), group.label) for number, group in enumerate(groups)]
    return Comparison(picture, legend, common, _result_table(groups, y, y_label), _cost_table(groups), warning)


def load_runs(paths: Sequence[str | Path], command: str) -> list[RunRecord]:
    """The runs of ``paths``.

    Raises:
        CheckpointError: a path is not a run folder or has no round yet.
        ConfigError: no path is given to ``command``.
    """
    if not paths:
        raise ConfigError(f"{command}: takes one or more run folders, but none is given")
    return [RunRecord.load(path) for path in paths]


def common_curve(records: Sequence[RunRecord]) -> tuple[str, str]:
    """``(series, axis label)``: the metric all runs share, else the evaluation loss, else the training loss."""
    metrics = {record.metric for record in records}
    if None in metrics:
        return "train_loss", "training loss"
    metric = metrics.pop() if len(metrics) == 1 else "loss"
    return f"eval.{metric}", metric_title(metric or "loss")


def _common_facts(records: Sequence[RunRecord]) -> str:
    every = [[method_name(record.config), *given_facts(record)] for record in records]
    common = [fact for fact in every[0] if all(fact in facts for facts in every)]
    return f"{'all of them: ' if len(records) > 1 else ''}{joined(common)}" if common else ""


def _draw(groups: Sequence[RunGroup], y: str, y_label: str, warning: str, common: str, output: Path) -> Path:
    figure, axes = new_figure(2, 3, *_SIZE_PX, title="", caption=common)
    by_round, losses, *by_cost, ends = axes
    _draw_curves(by_round, groups, "round", y, y_label)
    majorities = [summary.majority for group in groups if _is_own(group, y) for summary in group.summaries]
    known = [majority for majority in majorities if majority is not None]
    if known and not warning:
        by_round.axhline(fmean(known), color=GREY, linestyle="--", linewidth=1.2, label="most frequent class, always")
    has_evaluation = y != "train_loss" and y != "eval.loss"
    _draw_curves(losses, groups, "round", *(("eval.loss", "evaluation loss") if has_evaluation else _TRAINING))
    for axis, x in zip(by_cost, [name for name in X_AXES if name != "round"], strict=True):
        _draw_curves(axis, groups, x, y, y_label)
    _draw_ends(ends, groups, y, y_label)
    if warning:
        write_warning(by_round, warning)
    handles, names = by_round.get_legend_handles_labels()
    columns = 1 if max(map(len, names), default=0) > 70 else 2
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False, fontsize=11, handlelength=4)
    return save_figure(figure, output)


_TRAINING = ("train_loss", "training loss, running mean")


def _draw_curves(axis: Axes, groups: Sequence[RunGroup], x: str, y: str, y_label: str) -> None:
    curves = [_curve(group, x, y) for group in groups]
    for number, (group, curve) in enumerate(zip(groups, curves, strict=True)):
        colour = COLOURS[number]
        if any(curve.spread):
            low = [mean - spread for mean, spread in zip(curve.y, curve.spread, strict=True)]
            high = [mean + spread for mean, spread in zip(curve.y, curve.spread, strict=True)]
            axis.fill_between(curve.x, low, high, color=colour, alpha=0.18, linewidth=0)
        width_pt = 3.2 - 1.6 * number / len(groups)
        label = f"{number + 1}  {group.label}"
        draw(axis, curve.x, curve.y, label=label, colour=colour, width_pt=width_pt, style=LINE_STYLES[number])
    ends = [curve.x[-1] for curve in curves if curve.x]
    far_apart = x in _LOG_AXES and min(ends, default=0) > 0 and max(ends) > _FAR_APART * min(ends)
    (label_log_axes if far_apart else label_axes)(axis, x, y_label)


def _curve(group: RunGroup, x: str, y: str) -> Curve:
    curve = group.curve(x, y)
    return Curve(curve.x, smoothed(curve.y), smoothed(curve.spread)) if y == "train_loss" else curve


def _draw_ends(axis: Axes, groups: Sequence[RunGroup], y: str, y_label: str) -> None:
    """Each run's last value as a point, and the groups' means and spreads."""
    for number, group in enumerate(groups):
        values = [series[-1] for record in group.records if (series := record.series("round", y)[1])]
        curve = _curve(group, "round", y)
        if not values or not curve.y:
            continue
        axis.errorbar([curve.y[-1]], [number], xerr=[curve.spread[-1]], fmt="o", color=COLOURS[number], markersize=9,
                      capsize=6, linewidth=2)  # fmt: skip
        axis.plot(values, [number] * len(values), "|", color=COLOURS[number], markersize=18)
    axis.set_yticks(range(len(groups)), [f"{index + 1}" for index in range(len(groups))])
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_ylabel("line of the legend", fontsize=11)
    axis.set_xlabel(f"{y_label} at the end", fontsize=11)
    axis.locator_params(axis="x", nbins=4)


def _result_table(groups: Sequence[RunGroup], y: str, y_label: str) -> Table:
    several = any(len(group.records) > 1 for group in groups)
    title = f"{y_label}{', mean ± standard deviation over seeds' if several else ''}"
    rows: dict[str, Callable[[RunGroup], str]] = {
        "rounds": lambda group: "/".join(sorted({str(summary.rounds) for summary in group.summaries})),
        "start": lambda group: format_metric(_first_value(group, y)),
        "end": lambda group: _with_spread(_end_value(group, y)),
        "best": lambda group: format_metric(group.mean(lambda summary: summary.best)) if _is_own(group, y) else "-",
        "majority": lambda group: (
            format_metric(group.mean(lambda summary: summary.majority)) if _is_own(group, y) else "-"
        ),
        "loss": lambda group: format_metric(group.mean(lambda summary: summary.loss)) if "loss" not in y else "-",
    }
    return _table(groups, rows, title)


def _is_own(group: RunGroup, y: str) -> bool:
    return all(f"eval.{summary.metric}" == y for summary in group.summaries)


def _first_value(group: RunGroup, y: str) -> float | None:
    curve = group.curve("round", y)
    return curve.y[0] if curve.x and curve.x[0] == 0 else None


def _end_value(group: RunGroup, y: str) -> tuple[float | None, float | None]:
    if _is_own(group, y):
        return group.mean(lambda summary: summary.final), group.deviation(lambda summary: summary.final)
    curve = group.curve("round", y)
    return (curve.y[-1], curve.spread[-1] if len(group.records) > 1 else None) if curve.y else (None, None)


def _with_spread(value: tuple[float | None, float | None]) -> str:
    mean, deviation = value
    return format_metric(mean) if deviation is None else f"{format_metric(mean)} ± {deviation:.2g}"


def _cost_table(groups: Sequence[RunGroup]) -> Table:
    def mean_of(show: Callable[[float | None], str], number: Callable[[RunSummary], float | None]):  # type: ignore[no-untyped-def]
        return lambda group: show(group.mean(number))

    rows: dict[str, Callable[[RunGroup], str]] = {
        "forward": mean_of(short_count, lambda summary: summary.forward_passes),
        "backward": mean_of(short_count, lambda summary: summary.backward_passes or None),
        "up": mean_of(format_bytes, lambda summary: summary.upload_bytes),
        "down": mean_of(format_bytes, lambda summary: summary.download_bytes),
        "time": mean_of(format_seconds, lambda summary: summary.duration_s),
        "RSS": mean_of(_mib, lambda summary: summary.peak_rss_mib),
        "device": mean_of(_mib, lambda summary: summary.peak_device_mib),
    }
    return _table(groups, rows, "passes, bytes, time and peak memory of a run")


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} MiB"


def _table(groups: Sequence[RunGroup], columns: dict[str, Callable[[RunGroup], str]], title: str) -> Table:
    """One line a group; a column nobody has a value for is left out."""
    cells = {name: [describe(group) for group in groups] for name, describe in columns.items()}
    shown = {name: values for name, values in cells.items() if any(value != "-" for value in values)}
    table = compact_table("run", *shown, title=title)
    for number, group in enumerate(groups):
        more = f" and {len(group.records) - 1} more" if len(group.records) > 1 else ""
        table.add_row(Text(f"{number + 1} {group.name}{more}"), *(Text(values[number]) for values in shown.values()))
    return table
