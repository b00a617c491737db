"""What a person sees of a running run: a live bar on a terminal, one plain line a round elsewhere.

The plain lines go to ``console.log`` in both cases, so that the log of a run does not depend on where it was started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fs_fwdllm.report.files import disk_errors_named
from fs_fwdllm.report.folder import RunFolder
from fs_fwdllm.report.record import METRIC_NAMES, evaluation_metric
from fs_fwdllm.report.units import format_bytes, format_metric, format_seconds

__all__ = ["RunConsole", "describe_round"]

_LOG_COLUMNS = 120


def describe_round(line: Mapping[str, Any]) -> str:
    """The facts of a round in one line: losses, metric, bytes so far, seconds, what was rejected."""
    facts = [f"loss {format_metric(line.get('train_loss'))}"]
    evaluation = line.get("eval") or {}
    if evaluation.get("loss") is not None:
        facts.append(f"eval loss {format_metric(evaluation['loss'])}")
    metric = evaluation_metric(evaluation)
    if metric and metric != "loss":
        majority = evaluation.get("majority_accuracy")
        beside = f" (majority {format_metric(majority)})" if majority is not None else ""
        facts.append(f"{METRIC_NAMES[metric]} {format_metric(evaluation[metric])}{beside}")
    rejected = line.get("rejected")
    if rejected:
        facts.append(f"rejected {len(rejected) if hasattr(rejected, '__len__') else rejected}")
    facts.append(f"up {format_bytes(line.get('upload_bytes'))}")
    facts.append(f"down {format_bytes(line.get('download_bytes'))}")
    facts.append(format_seconds(line.get("seconds")))
    return "  ".join(facts)


class RunConsole:
    """The console of one run, and its log.

    Args:
        folder: the log is its ``console.log``, continued when it exists.
        total_rounds: the round number at which the run ends.
        start_round: the first round to be done; earlier ones count as done.
        console: where to print; standard output unless told.

    Raises:
        CheckpointError: the log cannot be written.
    """

    def __init__(self, folder: RunFolder, total_rounds: int, start_round: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._total_rounds = total_rounds
        self._log_path = folder.console_path
        with disk_errors_named(self._log_path):
            self._log_file = self._log_path.open("a", encoding="utf-8")
        self._log = Console(file=self._log_file, width=_LOG_COLUMNS, highlight=False, color_system=None)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("round"), MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}", markup=False), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task("round", total=total_rounds, completed=max(start_round - 1, 0), facts="")

    def start(self) -> None:
        """Show the bar, where there is one."""
        if self._bar is not None:
            self._bar.start()

    def say(self, text: str) -> None:
        """One plain line, on the console and in the log."""
        self._console.print(text, markup=False, soft_wrap=True)
        self._write_log(text)

    def show(self, table: Table) -> None:
        """A table, on the console and in the log."""
        self._console.print(table)
        self._write_log(table)

    def round(self, line: Mapping[str, Any]) -> None:
        """Show one round."""
        width = len(str(self._total_rounds))
        text = f"round {line['round']:>{width}}/{self._total_rounds}  {describe_round(line)}"
        if self._bar is None or self._task is None:
            self.say(text)
            return
        self._write_log(text)
        self._bar.update(self._task, completed=line["round"], facts=describe_round(line))

    def stop_bar(self) -> None:
        """Leave the bar as it is; what follows is printed below it."""
        if self._bar is not None:
            self._bar.stop()

    def close(self) -> None:
        """Stop the bar and close the log; closing twice is fine."""
        self.stop_bar()
        with disk_errors_named(self._log_path):
            self._log_file.close()

    def _write_log(self, item: str | Table) -> None:
        with disk_errors_named(self._log_path):
            self._log.print(item, markup=False, soft_wrap=isinstance(item, str))
            self._log_file.flush()
