"""``report.png``: one run in six panels.

The losses against rounds; the metric against rounds, bytes, forward passes and seconds, because a method that wins on
one of these can lose on another; the peak of memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fs_fwdllm.report.figure import COLOURS, X_AXES, draw, label_axes, new_figure, save_figure
from fs_fwdllm.report.record import METRIC_NAMES, RunRecord, method_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_run"]

_SIZE_PX = (1500, 900)


def plot_run(path: str | Path) -> Path:
    """Redraw ``report.png`` of the run folder ``path`` from its files, 1500 by 900 pixels, and return its path.

    Raises:
        CheckpointError: ``path`` is not a run folder, has no round yet, or cannot be written.
        ConfigError: its ``config.yaml`` is damaged.
    """
    record = RunRecord.load(path)
    figure, axes = new_figure(2, 3, *_SIZE_PX, title=f"{record.folder.name}: {method_name(record.config)}")
    _draw_losses(axes[0], record)
    for axis, x in zip(axes[1:5], X_AXES, strict=True):
        _draw_metric(axis, record, x)
    _draw_memory(axes[5], record)
    return save_figure(figure, record.folder.report_path)


def _draw_losses(axis: Axes, record: RunRecord) -> None:
    draw(axis, *record.series("round", "train_loss"), label="training", colour=COLOURS[1])
    rounds, losses = record.series("round", "eval.loss")
    if rounds:
        draw(axis, rounds, losses, label="evaluation", colour=COLOURS[0])
    label_axes(axis, "round", "loss")
    axis.legend(frameon=False)


def _draw_metric(axis: Axes, record: RunRecord, x: str) -> None:
    metric = record.metric
    if metric is None:
        label_axes(axis, x, "metric")
        axis.text(0.5, 0.5, "no evaluation", transform=axis.transAxes, ha="center", va="center", color="#777777")
        return
    draw(axis, *record.series(x, f"eval.{metric}"), label=METRIC_NAMES[metric], colour=COLOURS[0])
    majority = record.summary().majority
    if metric == "accuracy" and majority is not None:
        axis.axhline(majority, color="#777777", linestyle="--", linewidth=1.4, label="majority class")
        if x == "round":
            axis.legend(frameon=False)
    label_axes(axis, x, METRIC_NAMES[metric])


def _draw_memory(axis: Axes, record: RunRecord) -> None:
    draw(axis, *record.series("round", "peak_rss_mib"), label="process (RSS)", colour=COLOURS[2])
    rounds, device_mib = record.series("round", "peak_device_mib")
    if rounds:
        draw(axis, rounds, device_mib, label="accelerator", colour=COLOURS[3])
    axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
    label_axes(axis, "round", "peak memory [MiB]")
    axis.legend(frameon=False, loc="lower right")
