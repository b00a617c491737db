"""``report.png``: one run on a page. Each panel answers a question of its own, and one without an answer is left out.

=====================  =============================================================================================
panel                  question
=====================  =============================================================================================
metric by round        does it learn, compared with the start and with always answering the most frequent class?
losses by round        does evaluation follow training? (training is noisy: each round has other clients and batches)
metric by bytes        what did it cost to get there?
classes, or clients    whom is it good for? classes by F1 where ``per_class`` was asked for, else clients by their loss
traffic by round       what travels, up and down?
memory by round        what did the process need?
=====================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from fs_fwdllm.report.caption import caption_of
from fs_fwdllm.report.classes import class_scores
from fs_fwdllm.report.figure import (
    COLOURS,
    GREY,
    draw,
    label_axes,
    new_figure,
    save_figure,
    shortened,
    show_legend,
    smoothed,
)
from fs_fwdllm.report.record import RunRecord, method_name, metric_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_run"]

_SIZE_PX = (1500, 960)
_COLUMNS = 3
#: So many classes can be read below each other.
_CLASSES_SHOWN = 24


def plot_run(path: str | Path) -> Path:
    """Redraw ``report.png`` of the run folder ``path`` from its files, 1500 by 960 pixels, and return its path.

    Raises:
        CheckpointError: ``path`` is not a run folder, has no round yet, or cannot be written.
        ConfigError: its ``config.yaml`` is damaged.
    """
    record = RunRecord.load(path)
    title = f"{record.folder.name}: {method_name(record.config)}"
    panels = _panels(record)
    columns = _COLUMNS if len(panels) > 4 else 2
    figure, axes = new_figure(2, columns, *_SIZE_PX, title=title, caption=caption_of(record))
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis, record)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return save_figure(figure, record.folder.report_path)


def _panels(record: RunRecord) -> list[Callable[[Axes, RunRecord], None]]:
    panels: list[Callable[[Axes, RunRecord], None]] = [_draw_losses]
    if record.metric is not None:
        panels = [_draw_metric, *panels] if record.metric != "loss" else panels
        panels.append(_draw_metric_by_bytes)
    if class_scores(record):
        panels.append(_draw_classes)
    elif any(len(_client_losses(line)) > 1 for line in record.rounds):
        panels.append(_draw_clients)
    return [*panels, _draw_traffic, _draw_memory]


def _draw_losses(axis: Axes, record: RunRecord) -> None:
    rounds, losses = record.series("round", "train_loss")
    draw(axis, rounds, losses, label="", colour=COLOURS[1], width_pt=0.8, opacity=0.35)
    means = "training, running mean" if smoothed(losses) != losses else "training"
    draw(axis, rounds, smoothed(losses), label=means, colour=COLOURS[1])
    rounds, losses = record.series("round", "eval.loss")
    if rounds:
        draw(axis, rounds, losses, label="evaluation", colour=COLOURS[0])
        if rounds[0] == 0:
            axis.axhline(losses[0], color=GREY, linestyle=":", linewidth=1.4, label="evaluation before training")
    label_axes(axis, "round", "loss")
    show_legend(axis)


def _draw_metric(axis: Axes, record: RunRecord) -> None:
    metric, summary = str(record.metric), record.summary()
    draw(axis, *record.series("round", f"eval.{metric}"), label=metric_title(metric), colour=COLOURS[0])
    if summary.majority is not None:
        axis.axhline(summary.majority, color=GREY, linestyle="--", linewidth=1.4, label="most frequent class, always")
    if summary.start is not None:
        axis.axhline(summary.start, color=GREY, linestyle=":", linewidth=1.4, label="before training")
    if summary.best is not None and summary.best_round is not None:
        axis.plot([summary.best_round], [summary.best], "*", color=COLOURS[4], markersize=13, zorder=3,
                  label=f"best: {summary.best:.4g} in round {summary.best_round}")  # fmt: skip
    label_axes(axis, "round", metric_title(metric))
    show_legend(axis)


def _draw_metric_by_bytes(axis: Axes, record: RunRecord) -> None:
    draw(axis, *record.series("bytes", f"eval.{record.metric}"), label="", colour=COLOURS[0])
    label_axes(axis, "bytes", metric_title(str(record.metric)))


def _draw_classes(axis: Axes, record: RunRecord) -> None:
    scores = sorted(class_scores(record), key=lambda score: -1.0 if score.f1 is None else score.f1)
    shown = scores
    if len(scores) > _CLASSES_SHOWN:
        half = _CLASSES_SHOWN // 2
        shown = [*scores[:half], *scores[-half:]]
    names = [f"{shortened(score.name)} ({score.rows:,})" for score in shown]
    axis.barh(range(len(shown)), [score.f1 or 0.0 for score in shown], color=COLOURS[2])
    axis.set_yticks(range(len(shown)), names, fontsize=8 if len(shown) > 10 else 10, parse_math=False)
    axis.grid(False, axis="y")
    axis.set_xlim(0, 1)
    left_out = len(scores) - len(shown)
    of_which = f"; the {left_out} between are left out" if left_out else ""
    axis.set_xlabel(f"F1 of a class (evaluation rows){of_which}", fontsize=11)


def _client_losses(line: dict[str, object]) -> list[float]:
    held = line.get("loss")
    return [loss for loss in held.values() if loss is not None] if isinstance(held, dict) else []


def _draw_clients(axis: Axes, record: RunRecord) -> None:
    found = [(line["round"], sorted(_client_losses(line))) for line in record.rounds]
    found = [(number, losses) for number, losses in found if losses]
    rounds = [number for number, _ in found]
    lowest, highest = [losses[0] for _, losses in found], [losses[-1] for _, losses in found]
    axis.fill_between(rounds, smoothed(lowest), smoothed(highest), color=COLOURS[3], alpha=0.25, linewidth=0,
                      label="best to worst client")  # fmt: skip
    if len(rounds) == 1:
        axis.vlines(rounds, lowest, highest, color=COLOURS[3], alpha=0.4, linewidth=6)
    draw(axis, rounds, smoothed([median(losses) for _, losses in found]), label="median client", colour=COLOURS[3])
    label_axes(axis, "round", "training loss of a round's clients")
    show_legend(axis)


def _draw_traffic(axis: Axes, record: RunRecord) -> None:
    draw(axis, *record.series("round", "upload_bytes"), label="upload", colour=COLOURS[0])
    draw(axis, *record.series("round", "download_bytes"), label="download", colour=COLOURS[1])
    axis.set_ylim(bottom=0)
    label_axes(axis, "round", "sent so far, all clients", y_is_bytes=True)
    show_legend(axis)


def _draw_memory(axis: Axes, record: RunRecord) -> None:
    draw(axis, *record.series("round", "peak_rss_mib"), label="process (RSS)", colour=COLOURS[2])
    rounds, device_mib = record.series("round", "peak_device_mib")
    if rounds:
        draw(axis, rounds, device_mib, label="accelerator", colour=COLOURS[3])
    axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
    label_axes(axis, "round", "peak memory [MiB]")
    show_legend(axis, loc="lower right")
