"""The command ``fs-fwdllm sweep``: try values of some keys on validation rows, several seeds each."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from fs_fwdllm.cli.words import ConfigFile, file_and_words
from fs_fwdllm.errors import ConfigError

__all__ = ["SweepCommand", "sweep"]

_SEEDS = "--seeds"


class SweepCommand(TyperCommand):
    """``--seeds 1 2 3``: all whole numbers behind the option are its value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the seeds to one word, as the parser of options wants it."""
        if _SEEDS in args:
            first = args.index(_SEEDS) + 1
            last = first
            while last < len(args) and args[last].isdigit():
                last += 1
            if last > first:
                args = [*args[:first], " ".join(args[first:last]), *args[last:]]
        return super().parse_args(ctx, args)


def sweep(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE] KEY VALUE [VALUE ...] ...",
            help="The file, unless --cfg names it; then keys. One with several values is tried with each, one with a "
            "single value is set in every run.",
        ),
    ] = None,
    cfg: ConfigFile = None,
    seeds: Annotated[str, typer.Option(metavar="N [N ...]", help="Run everything once with each of these seeds.")] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the runs and the result; sweeps/NAME unless told.")
    ] = None,
    by: Annotated[str, typer.Option(metavar="METRIC", help="What is compared: loss, accuracy, f1, ...")] = "loss",
    validation: Annotated[
        float,
        typer.Option(
            min=0.001, max=0.9, metavar="SHARE", help="Rows held out of training where the file has no validation rows."
        ),
    ] = 0.1,
) -> None:
    """Find the best value of a key, or of several: a small grid, judged on validation rows, never on test rows.

    Example: fs-fwdllm sweep mezo_demo train.optimizer.lr 0.3 1 3 --seeds 1 2 3

    Example: fs-fwdllm sweep mezo_demo train.optimizer.lr 1 3 fwdllm.probes 10 50 federate.total_round_num 20

    Every point is a run in a folder of its own below --out. The same command goes on where it was stopped, and with
    more values or seeds runs only what is new. The result is a table, sweep.csv and best.yaml, which is your file with
    the best values: fs-fwdllm run sweeps/mezo_demo/best.yaml. Runs on this machine, on the host local.
    """
    from fs_fwdllm.config import load_config

    package = importlib.import_module("fs_fwdllm.sweep")
    file, keys = file_and_words(words, cfg, "sweep")
    grid = package.parse_grid(keys, _numbers(seeds), load_config(file).seed)
    folder = out or Path("sweeps") / file.stem
    try:
        outcomes = package.run_sweep(file, grid, folder, validation, _say)
    except KeyboardInterrupt:
        _say("the same command goes on with this sweep")
        raise
    _report(file, grid, outcomes, folder, by)


def _report(cfg: Path, grid: Any, outcomes: list[Any], folder: Path, by: str) -> None:
    package = importlib.import_module("fs_fwdllm.sweep")
    result = importlib.import_module("fs_fwdllm.sweep.result")
    points = result.write_points(folder, outcomes)
    settings = package.settings_of(outcomes)
    try:
        best = package.best_of(settings, by)
    except Exception:
        _print(result.sweep_table(settings, None, by))
        raise
    _print(result.sweep_table(settings, best, by))
    first = best.outcomes[0]
    rows, error = package.row_noise(first.folder, by, first.end[by])
    values = " ".join(f"{key} {value}" for key, value in best.values) or "as configured"
    noise = "" if math.isnan(error) else f" (standard error over them {error:.2g})"
    seeds = f"{len(grid.seeds)} seeds" if len(grid.seeds) > 1 else f"seed {grid.seeds[0]}"
    found = f"Best {by} on {rows:,} validation rows{noise}, {seeds}: {values}, {result.spread(best, by)}"
    found += f", before training {result.format_metric(best.mean(by, of_start=True))}."
    _say(found)
    for warning in package.warnings_of(best, grid.axes, by):
        _say(f"warning: {warning}")
    tried = "; ".join(f"{key} {', '.join(values)}" for key, values in grid.axes)
    path = result.write_best(cfg, grid, best, folder, f"{found} Tried: {tried}." if tried else found)
    _say(f"every point: {points}")
    _say(f"use it with: fs-fwdllm run {path}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"{_SEEDS} {text}: must be whole numbers, e.g. {_SEEDS} 1 2 3") from None


def _say(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)


def _print(table: Table) -> None:
    Console(highlight=False).print(table)
