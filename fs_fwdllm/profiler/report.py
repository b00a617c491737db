"""The result of a profile: a table, a picture, and a configuration that uses the winner."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from fs_fwdllm.config import Config, dump_config
from fs_fwdllm.errors import ModelError
from fs_fwdllm.profiler.measure import Budget, Measured
from fs_fwdllm.report.figure import COLOURS, new_figure, save_figure
from fs_fwdllm.report.files import write_text_atomically
from fs_fwdllm.report.units import format_bytes, format_metric, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["profile_table", "write_profile"]

_SIZE_PX = (1500, 620)


def profile_table(ranked: Sequence[Measured]) -> Table:
    """The measurements, best candidate first."""
    right = ("trainable", "cosine", "expected", "memory", "loss", "metric", "rate", "time")
    table = Table(Column("adapter", style="bold"), *(Column(name, justify="right") for name in right))
    for item in ranked:
        if item.problem:
            table.add_row(Text(item.candidate.name), Text(item.problem, style="dim"))
            continue
        table.add_row(
            Text(item.candidate.name),
            f"{item.trainable:,}",
            f"{item.cosine:.3f}",
            f"{item.expected_cosine:.3f}",
            format_bytes(item.memory_bytes),
            f"{format_metric(item.loss_before)} -> {format_metric(item.loss_after)}",
            format_metric(item.metric),
            f"{item.learning_rate:g}",
            format_seconds(item.seconds),
        )
    return table


def write_profile(folder: Path, config: Config, ranked: Sequence[Measured], budget: Budget) -> Path:
    """Write ``profile.csv``, ``profile.png`` and ``winner.yaml`` into ``folder``; returns the configuration's path.

    Raises:
        ModelError: no candidate could be measured.
        CheckpointError: a file cannot be written.
    """
    measured = [item for item in ranked if not item.problem]
    if not measured or not math.isfinite(measured[0].loss_after):
        reasons = "; ".join(f"{item.candidate.name}: {item.problem or 'no stable learning rate'}" for item in ranked)
        raise ModelError(f"profile: no candidate could be measured ({reasons})")
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "profile.csv", _csv(ranked))
    _draw(folder / "profile.png", measured, budget)
    path = folder / "winner.yaml"
    write_text_atomically(path, _winner(config, measured[0]))
    return path


def _csv(ranked: Sequence[Measured]) -> str:
    names = [item.name for item in fields(Measured) if item.name != "candidate"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["adapter", *names])
    for item in ranked:
        writer.writerow([item.candidate.name, *(getattr(item, name) for name in names)])
    return text.getvalue()


def _winner(config: Config, best: Measured) -> str:
    chosen = best.candidate.apply(config)
    chosen.train.optimizer.lr = best.learning_rate
    note = (
        f"# Written by fs-fwdllm profile: {best.candidate.name} had the lowest evaluation loss after the trial "
        f"({best.loss_before:.4f} -> {best.loss_after:.4f}).\n"
    )
    return note + dump_config(chosen)


def _draw(path: Path, measured: Sequence[Measured], budget: Budget) -> None:
    figure, (left, right) = new_figure(1, 2, *_SIZE_PX, title="profile of adapters for forward gradients")
    for number, item in enumerate(measured):
        colour = COLOURS[number % len(COLOURS)]
        _point(left, item.trainable, item.cosine, item.candidate.name, colour)
        if math.isfinite(item.loss_after):
            _point(right, item.trainable, item.loss_after, item.candidate.name, colour)
    counts = sorted(item.trainable for item in measured)
    expected = [math.sqrt(budget.probes / (budget.probes + count - 1)) for count in counts]
    left.plot(counts, expected, color="#888888", linewidth=1.0, label="sqrt(K / (K + d - 1))")
    left.legend(frameon=False)
    right.axhline(measured[0].loss_before, color="#888888", linewidth=1.0)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("trainable parameters (logarithmic)", fontsize=11)
    left.set_ylabel(f"cosine of {budget.probes} probes to the gradient", fontsize=11)
    right.set_ylabel(f"evaluation loss after {budget.forward_passes:,} forward passes", fontsize=11)
    save_figure(figure, path)


def _point(axis: Axes, x: float, y: float, name: str, colour: str) -> None:
    axis.plot([x], [y], marker="o", color=colour)
    axis.annotate(name, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=9)
