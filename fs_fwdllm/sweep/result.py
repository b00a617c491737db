"""What a sweep leaves: a table on the screen, ``sweep.csv`` with every point, ``best.yaml`` to run."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from fs_fwdllm.config.load import apply_overrides, find_config, read_tree
from fs_fwdllm.config.yaml_text import dump_yaml
from fs_fwdllm.report.files import write_text_atomically
from fs_fwdllm.report.record import metric_title
from fs_fwdllm.report.units import format_count, format_metric, format_seconds
from fs_fwdllm.sweep.choose import Setting
from fs_fwdllm.sweep.grid import Grid
from fs_fwdllm.sweep.run import Outcome

__all__ = ["sweep_table", "write_best", "write_points"]

#: Overrides that make a trial short, and are no part of what was found.
_OF_THE_TRIAL = (
    "federate.total_round_num", "data.subsample", "fwdllm.data.max_test_samples", "eval.freq",
    "fwdllm.checkpoint_every",
)  # fmt: skip
_COLUMNS = 116


def sweep_table(settings: Sequence[Setting], best: Setting | None, metric: str) -> Table:
    """One line a setting: mean and standard deviation over seeds of ``metric`` and of the task's own."""
    names = [metric, *(name for name in _task_metrics(settings) if name != metric)][:2]
    keys = [key for key, _ in settings[0].values] if settings else []
    right = [*(metric_title(name) for name in names), "passes", "time"]
    if "evaluation loss" in right:
        right[right.index("evaluation loss")] = "loss"
    heads = [Column(Text(_short(key, keys)), justify="right") for key in keys] or [Column("setting")]
    table = Table(*heads, *(Column(Text(name), justify="right") for name in right), title="on validation rows")
    for setting in settings:
        cells = [Text(value, style="bold" if setting is best else "") for _, value in setting.values]
        cells = cells or [Text("as configured")]
        if setting.problem:
            table.add_row(*cells, Text(setting.problem.partition(":")[0]), *[""] * (len(right) - 1))
            continue
        passes = math.fsum(outcome.passes for outcome in setting.outcomes) / len(setting.outcomes)
        seconds = math.fsum(outcome.seconds for outcome in setting.outcomes) / len(setting.outcomes)
        table.add_row(*cells, *(spread(setting, name) for name in names), format_count(passes), format_seconds(seconds))
    return table


def spread(setting: Setting, metric: str) -> str:
    """``0.812 ± 0.013``: the mean over seeds, and their standard deviation where there are several."""
    deviation = setting.deviation(metric)
    beside = "" if math.isnan(deviation) else f" ± {deviation:.2g}"
    return f"{format_metric(setting.mean(metric))}{beside}"


def write_points(out: Path, outcomes: Sequence[Outcome]) -> Path:
    """Write ``sweep.csv``: one row a point. Raises :class:`~fs_fwdllm.errors.CheckpointError` if that fails."""
    metrics = list(dict.fromkeys(name for outcome in outcomes for name in outcome.end))
    text = io.StringIO()
    writer = csv.writer(text)
    keys = [key for key, _ in outcomes[0].point.values]
    writer.writerow([*keys, "seed", "start_loss", *metrics, "passes", "seconds", "problem", "folder"])
    for outcome in outcomes:
        numbers = [outcome.start.get("loss", ""), *(outcome.end.get(name, "") for name in metrics)]
        facts = [outcome.passes, outcome.seconds, outcome.problem, outcome.folder.name]
        writer.writerow([*(value for _, value in outcome.point.values), outcome.point.seed, *numbers, *facts])
    write_text_atomically(out / "sweep.csv", text.getvalue())
    return out / "sweep.csv"


def write_best(cfg: str | Path, grid: Grid, best: Setting, out: Path, found: str) -> Path:
    """Write ``best.yaml``: the file as it was given, the overrides and the best values; returns its path.

    What only made the trial short is left out, and so is everything the sweep did for itself.

    Args:
        found: a sentence for the comment at its top.
    """
    file = find_config(cfg)
    tree = read_tree(file)
    kept = [(key, value) for key, value in grid.fixed if key not in _OF_THE_TRIAL]
    apply_overrides(tree, [word for pair in (*kept, *best.values) for word in pair])
    tree = {"expname": file.stem, **tree}
    left_out = [f"{key} {value}" for key, value in grid.fixed if key in _OF_THE_TRIAL]
    note = f"Written by fs-fwdllm sweep from {cfg}. {found}"
    note += f" Of the sweep only, and not kept: {', '.join(left_out)}." if left_out else ""
    lines = textwrap.wrap(note, _COLUMNS, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
    write_text_atomically(out / "best.yaml", "\n".join(lines) + "\n" + dump_yaml(tree))
    return out / "best.yaml"


def _task_metrics(settings: Sequence[Setting]) -> list[str]:
    """The loss, and the metric that the runs are judged by."""
    judged = next((found.metric for setting in settings for found in setting.outcomes if found.metric), "loss")
    return list(dict.fromkeys(("loss", judged)))


def _short(key: str, keys: Sequence[str]) -> str:
    last = key.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in keys].count(last) == 1 else key
