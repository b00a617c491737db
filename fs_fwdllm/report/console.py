"""What a person sees of a running run: a live bar on a terminal, one plain line a round elsewhere.

The bar shows where the run is: the round, clients that have answered, batches that are evaluated, the time that is
left. What is worth keeping stays above it: evaluations and remarks. Where there is no bar, every round is a line, and
work that takes long gives a sign of life in between. The lines go to ``console.log`` in both cases, so that the log of
a run does not depend on where it was started.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from fs_fwdllm.config.host_sections import EvalConfig
from fs_fwdllm.report.files import disk_errors_named
from fs_fwdllm.report.folder import RunFolder
from fs_fwdllm.report.pace import Pace
from fs_fwdllm.report.record import evaluation_metric, metric_title
from fs_fwdllm.report.terminal import say
from fs_fwdllm.report.units import format_bytes, format_metric, format_seconds

__all__ = ["RunConsole", "describe_round"]

_LOG_COLUMNS = 120
#: Without a bar, seconds of silence after which work that goes on is mentioned.
_SILENCE_S = 30.0


def describe_round(line: Mapping[str, Any], settings: EvalConfig, left_s: float | None = None) -> str:
    """The facts of a round in one line: losses, the metric, bytes so far, seconds, what was rejected."""
    facts = []
    if line.get("train_loss") is not None or line["round"]:
        facts.append(f"loss {format_metric(line.get('train_loss'))}")
    evaluation = line.get("eval") or {}
    if evaluation.get("loss") is not None:
        facts.append(f"eval loss {format_metric(evaluation['loss'])}")
    metric = evaluation_metric(evaluation, settings)
    if metric and metric != "loss":
        facts.append(f"{metric_title(metric)} {format_metric(evaluation[metric])}")
    rejected = line.get("rejected")
    if rejected:
        facts.append(f"rejected {len(rejected) if hasattr(rejected, '__len__') else rejected}")
    if line["round"]:
        facts.append(f"up {format_bytes(line.get('upload_bytes'))}")
        facts.append(f"down {format_bytes(line.get('download_bytes'))}")
    facts.append(format_seconds(line.get("seconds")))
    if left_s:
        facts.append(f"{format_seconds(left_s)} left")
    return "  ".join(facts)


def _describe_majority(evaluation: Mapping[str, Any], settings: EvalConfig) -> str:
    """What always answering the most frequent class reaches, without which a metric means little; else empty."""
    metric = evaluation_metric(evaluation, settings)
    name = metric if metric and f"majority_{metric}" in evaluation else "accuracy"
    value = evaluation.get(f"majority_{name}")
    if value is None:
        return ""
    return f"always answering the most frequent class reaches {metric_title(name)} {format_metric(value)}"


class RunConsole:
    """The console of one run, and its log.

    Args:
        folder: the log is its ``console.log``, continued when it exists.
        total_rounds: the round number at which the run ends.
        start_round: the first round to be done; earlier ones count as done.
        settings: the section ``eval`` of the run; its first metric is the one that is shown.
        console: where to print; standard output unless told.

    Raises:
        CheckpointError: the log cannot be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        total_rounds: int,
        start_round: int,
        settings: EvalConfig,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._settings = settings
        self._total_rounds = total_rounds
        self._pace = Pace(total_rounds, time.monotonic)
        self._majority = "" if start_round <= 1 else None
        self._log_path = folder.console_path
        with disk_errors_named(self._log_path):
            self._log_file = self._log_path.open("a", encoding="utf-8")
        self._log = Console(file=self._log_file, width=_LOG_COLUMNS, highlight=False, color_system=None)
        self._bar = _Bar(self._console, total_rounds, start_round) if self._console.is_terminal else None
        self._spoke = time.monotonic()

    def start(self) -> None:
        """Show the bar, where there is one."""
        if self._bar is not None:
            self._bar.progress.start()

    def say(self, text: str) -> None:
        """One remark, on the console and in the log."""
        self._say_once(text)
        self._write_log(text)

    def show(self, table: Table) -> None:
        """A table, on the console and in the log."""
        self._console.print(table)
        self._write_log(table)

    def round(self, line: Mapping[str, Any]) -> None:
        """Show one round. An evaluation stays on the screen; the others only move the bar."""
        width = len(str(self._total_rounds))
        self._pace.note(line["round"], line.get("seconds"))
        facts = describe_round(line, self._settings, self._pace.left_s())
        text = f"round {line['round']:>{width}}/{self._total_rounds}  {facts}"
        if self._bar is None or line.get("eval"):
            self.say(text)
        else:
            self._write_log(text)
        if self._bar is not None:
            self._bar.round(line["round"], self._pace.left_s(), line.get("train_loss"))
        if self._majority == "" and line.get("eval"):
            self._majority = _describe_majority(line["eval"], self._settings) or None
            if self._majority:
                self.say(self._majority)

    def answered(self, done: int, asked: int) -> None:
        """Show how many clients of the open round have answered."""
        self._pace.answered(done, asked)
        if self._bar is not None:
            self._bar.answered(done, asked, self._pace.left_s())
        elif 0 < done < asked and self._silent():
            self._say_once(f"round {self._pace.open_round}: {done} of {asked} clients have answered{self._left()}")

    def evaluating(self, done: int, total: int) -> None:
        """Show how many batches of an evaluation are done."""
        left_s = self._pace.evaluated(done, total)
        if self._bar is not None:
            self._bar.evaluating(done, total, left_s)
        elif done < total and self._silent():
            self._say_once(f"evaluation: {done:,} of {total:,} batches, {format_seconds(left_s)} left")

    def stop_bar(self) -> None:
        """Take the bar away; what follows is printed below what was kept."""
        if self._bar is not None:
            self._bar.progress.stop()

    def close(self) -> None:
        """Stop the bar and close the log; closing twice is fine."""
        self.stop_bar()
        with disk_errors_named(self._log_path):
            self._log_file.close()

    def _silent(self) -> bool:
        return time.monotonic() - self._spoke > _SILENCE_S

    def _left(self) -> str:
        left_s = self._pace.left_s()
        return "" if left_s is None else f", {format_seconds(left_s)} left"

    def _say_once(self, text: str) -> None:
        """On the console alone."""
        say(self._console, text)
        self._spoke = time.monotonic()

    def _write_log(self, item: str | Table) -> None:
        with disk_errors_named(self._log_path):
            self._log.print(item, markup=False, soft_wrap=isinstance(item, str))
            self._log_file.flush()


class _Bar:
    """The live line at the bottom of a terminal: the rounds and, while it lasts, an evaluation."""

    def __init__(self, console: Console, total_rounds: int, start_round: int) -> None:
        self._total_rounds = total_rounds
        self._done = max(start_round - 1, 0)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20),
            TextColumn("{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console, transient=True,
        )  # fmt: skip
        self._rounds = self.progress.add_task(self._name(), total=total_rounds, completed=self._done, facts="")
        self._evaluation: TaskID | None = None

    def _name(self) -> str:
        return f"round {min(self._done + 1, self._total_rounds)}/{self._total_rounds}"

    def round(self, number: int, left_s: float | None, loss: float | None) -> None:
        self._done = number
        self._end_evaluation()
        facts = [f"{format_seconds(left_s)} left"] if left_s is not None else []
        facts += [f"loss {format_metric(loss)}"] if loss is not None else []
        self.progress.update(self._rounds, description=self._name(), completed=number, facts="  ".join(facts))

    def answered(self, done: int, asked: int, left_s: float | None) -> None:
        facts = f"{done} of {asked} clients" + (f"  {format_seconds(left_s)} left" if left_s is not None else "")
        self.progress.update(self._rounds, completed=self._done + done / max(1, asked), facts=facts)

    def evaluating(self, done: int, total: int, left_s: float | None) -> None:
        if self._evaluation is None:
            self._evaluation = self.progress.add_task("evaluating", facts="")
        facts = f"{done:,} of {total:,} batches" + (f"  {format_seconds(left_s)} left" if left_s is not None else "")
        self.progress.update(self._evaluation, completed=done, total=total, facts=facts)
        if done >= total:
            self._end_evaluation()

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self.progress.remove_task(self._evaluation)
            self._evaluation = None
