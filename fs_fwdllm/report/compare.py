"""Several runs in one picture and one table, a single run in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.report.figure import COLOURS, X_AXES, draw, label_axes, label_log_axes, new_figure, save_figure
from fs_fwdllm.report.record import METRIC_NAMES, RunRecord, RunSummary, method_name
from fs_fwdllm.report.units import format_bytes, format_count, format_metric, format_seconds

__all__ = ["common_curve", "compare_runs", "load_runs", "summary_table"]

_SIZE_PX = (1500, 1000)

#: Axes that turn logarithmic when the ends of two runs on them are further apart than this factor.
_LOG_AXES = frozenset({"bytes", "forward_passes"})
_FAR_APART = 20.0

_FACTS: dict[str, Callable[[RunSummary], str]] = {
    "method": lambda summary: summary.method,
    "rounds": lambda summary: str(summary.rounds),
    "metric": lambda summary: METRIC_NAMES[summary.metric] if summary.metric else "-",
    "final": lambda summary: format_metric(summary.final),
    "best": lambda summary: format_metric(summary.best),
    "majority": lambda summary: format_metric(summary.majority),
    "loss": lambda summary: format_metric(summary.loss),
    "forward passes": lambda summary: format_count(summary.forward_passes),
    "backward passes": lambda summary: format_count(summary.backward_passes),
    "upload": lambda summary: format_bytes(summary.upload_bytes),
    "download": lambda summary: format_bytes(summary.download_bytes),
    "time": lambda summary: format_seconds(summary.duration_s),
    "peak RSS": lambda summary: "-" if summary.peak_rss_mib is None else f"{summary.peak_rss_mib:.0f} MiB",
    "peak device": lambda summary: "-" if summary.peak_device_mib is None else f"{summary.peak_device_mib:.0f} MiB",
}


def compare_runs(paths: Sequence[str | Path], output: str | Path) -> tuple[Path, Table]:
    """Draw the runs of ``paths`` over each other into ``output`` (PNG, 1500 by 1000 pixels); return it and a table.

    The curve is the metric all runs share, else the evaluation loss, else the training loss.

    Raises:
        CheckpointError: a path is not a run folder or has no round yet; ``output`` cannot be written.
        ConfigError: no path is given, or there are more runs than colours.
    """
    records, labels = load_runs(paths, "compare")
    y, y_label = common_curve(records)
    figure, axes = new_figure(2, 2, *_SIZE_PX, title="comparison of runs")
    for axis, x in zip(axes, X_AXES, strict=True):
        curves = [record.series(x, y) for record in records]
        for number, (record, curve) in enumerate(zip(records, curves, strict=True)):
            name = f"{labels[number]}: {method_name(record.config)}"
            width_pt = 3.0 - 1.5 * number / len(records)  # equal curves (one run on two hosts) stay visible
            draw(axis, *curve, label=name, colour=COLOURS[number], width_pt=width_pt)
        ends = [curve[0][-1] for curve in curves if curve[0]]
        far_apart = x in _LOG_AXES and min(ends, default=0) > 0 and max(ends) > _FAR_APART * min(ends)
        (label_log_axes if far_apart else label_axes)(axis, x, y_label)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), frameon=False, fontsize=11)
    return save_figure(figure, Path(output)), summary_table([record.summary() for record in records], labels)


def summary_table(summaries: Sequence[RunSummary], labels: Sequence[str] = ()) -> Table:
    """One column a run, one line a fact; a fact no run has a value for is left out. ``labels`` replace the names."""
    table = Table(Column("run", style="bold"), *_headers(summaries, labels))
    for name, describe in _FACTS.items():
        cells = [describe(summary) for summary in summaries]
        if any(cell != "-" for cell in cells):
            table.add_row(name, *map(Text, cells))
    return table


def _headers(summaries: Sequence[RunSummary], labels: Sequence[str]) -> list[Column]:
    names = labels or [summary.run for summary in summaries]
    return [Column(Text(name), justify="right" if len(names) > 1 else "left", overflow="fold") for name in names]


def load_runs(paths: Sequence[str | Path], command: str) -> tuple[list[RunRecord], list[str]]:
    """The runs and a name for each: its folder's, or the path where folders share a name.

    Raises:
        CheckpointError: a path is not a run folder or has no round yet.
        ConfigError: no path is given to ``command``, or there are more runs than colours.
    """
    if not 1 <= len(paths) <= len(COLOURS):
        raise ConfigError(f"{command}: takes 1 to {len(COLOURS)} run folders, but {len(paths)} are given")
    records = [RunRecord.load(path) for path in paths]
    names = [record.folder.name for record in records]
    unique = len(set(names)) == len(names)
    return records, names if unique else [str(record.folder.path) for record in records]


def common_curve(records: Sequence[RunRecord]) -> tuple[str, str]:
    """``(series, axis label)``: the metric all runs share, else the evaluation loss, else the training loss."""
    metrics = {record.metric for record in records}
    if None in metrics:
        return "train_loss", "training loss"
    metric = metrics.pop() if len(metrics) == 1 else "loss"
    return f"eval.{metric}", METRIC_NAMES[metric or "loss"]
