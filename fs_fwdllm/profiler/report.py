"""The result of a profile: a table, a picture, and a configuration that uses the winner."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fs_fwdllm.config import Config
from fs_fwdllm.config.yaml_text import dump_yaml
from fs_fwdllm.errors import ModelError
from fs_fwdllm.profiler.measure import Budget, Lead, Measured
from fs_fwdllm.profiler.trial import Trial
from fs_fwdllm.report.figure import COLOURS, GREY, new_figure, save_figure, show_legend
from fs_fwdllm.report.files import write_text_atomically
from fs_fwdllm.report.terminal import compact_table
from fs_fwdllm.report.units import format_bytes, format_metric, format_seconds

__all__ = ["describe_lead", "profile_table", "rate_table", "write_profile", "write_winner"]

_WIDTH_PX = 1500
_ROW_PX = 34
_MARGINS_PX = 260
_NOT_IN_FILE = ("candidate", "row_losses")


def profile_table(ranked: Sequence[Measured]) -> Table:
    """The measurements, best candidate first; below them those that could not be measured, and why."""
    table = compact_table("adapter", "trained", "cosine", "memory", "loss", "metric", "rate")
    for item in ranked:
        if item.problem:
            continue
        table.add_row(
            Text(item.candidate.name),
            f"{item.trainable:,}",
            f"{item.cosine:.3f}",
            format_bytes(item.memory_bytes),
            format_metric(item.loss_after),
            format_metric(None if math.isnan(item.metric) else item.metric),
            f"{item.learning_rate:g}",
        )
    failed = [f"{item.candidate.name}: {item.problem}" for item in ranked if item.problem]
    table.caption, table.caption_justify = Text("\n".join(failed)) if failed else None, "left"
    return table


def rate_table(trials: Sequence[Trial], loss_before: float) -> Table:
    """What each learning rate made of the evaluation loss, best first."""
    table = compact_table("learning rate", "loss", "change", "metric", "time")
    for trial in trials:
        change = trial.loss_after - loss_before
        table.add_row(
            f"{trial.learning_rate:g}",
            format_metric(trial.loss_after),
            f"{change:+.4f}" if math.isfinite(change) else "diverges",
            format_metric(None if math.isnan(trial.metric) else trial.metric),
            format_seconds(trial.seconds),
        )
    return table


def describe_lead(lead: Lead, split: str) -> str:
    """How sure the choice is."""
    text = (
        f"chosen on {lead.rows:,} labels of the {split} split: the winner's loss is {lead.difference:.4f} below that "
        f"of {lead.second}, with a standard error of {lead.standard_error:.4f}"
    )
    if lead.is_chance:
        return f"warning: {text}: that may be chance; evaluate on more rows or spend more --passes"
    return text


def write_profile(folder: Path, config: Config, ranked: Sequence[Measured], budget: Budget) -> Path:
    """Write ``profile.csv``, ``profile.png`` and ``winner.yaml`` into ``folder``; returns the configuration's path.

    Args:
        config: what the winner is written into.

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
    best = measured[0]
    note = (
        f"{best.candidate.name} had the lowest evaluation loss after the trial "
        f"({best.loss_before:.4f} -> {best.loss_after:.4f})"
    )
    return write_winner(folder, best.candidate.apply(config), best.learning_rate, note)


def write_winner(folder: Path, config: Config, learning_rate: float, note: str) -> Path:
    """Write ``winner.yaml``: the keys that ``config`` sets, at that learning rate; returns its path.

    Raises:
        CheckpointError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = config.train.optimizer.model_copy(update={"lr": learning_rate})
    train = config.train.model_copy(update={"optimizer": optimizer})
    chosen = config.model_copy(update={"train": train})
    path = folder / "winner.yaml"
    text = dump_yaml(chosen.model_dump(mode="json", exclude_unset=True))
    write_text_atomically(path, f"# Written by fs-fwdllm profile: {note}.\n{text}")
    return path


def _csv(ranked: Sequence[Measured]) -> str:
    names = [item.name for item in fields(Measured) if item.name not in _NOT_IN_FILE]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["adapter", *names])
    for item in ranked:
        writer.writerow([item.candidate.name, *(getattr(item, name) for name in names)])
    return text.getvalue()


def _draw(path: Path, measured: Sequence[Measured], budget: Budget) -> None:
    """A line a candidate, best on top: the loss after its trial, and how well few probes find its gradient."""
    size = _WIDTH_PX, _MARGINS_PX + _ROW_PX * max(4, len(measured))
    figure, (left, right) = new_figure(1, 2, *size, title="profile of adapters for forward gradients")
    places = range(len(measured))
    losses = [item.loss_after if math.isfinite(item.loss_after) else math.nan for item in measured]
    left.plot(losses, places, "o", color=COLOURS[0], label="after the trial")
    left.plot([item.loss_before for item in measured], places, "|", color=GREY, markersize=14, label="before")
    left.set_xlabel(f"evaluation loss after {budget.forward_passes:,} forward passes", fontsize=11)
    right.plot([item.cosine for item in measured], places, "o", color=COLOURS[1], label="measured")
    expected = [item.expected_cosine for item in measured]
    right.plot(expected, places, "|", color=GREY, markersize=14, label="isotropic: sqrt(K / (K + d - 1))")
    right.set_xlabel(f"cosine of {budget.probes} probes to the gradient", fontsize=11)
    names = [f"{item.candidate.name} ({item.trainable:,})" for item in measured]
    for axis, labels in ((left, names), (right, [""] * len(names))):
        axis.set_yticks(list(places), labels, parse_math=False)
        axis.set_ylim(len(measured) - 0.5, -0.5)
        show_legend(axis)
    save_figure(figure, path)
