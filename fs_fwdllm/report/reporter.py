"""The reporting of a run behind two calls: ``round`` after every round, ``finish`` after the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from types import TracebackType
from typing import Any

from rich.console import Console

from fs_fwdllm.config import Config
from fs_fwdllm.errors import FwdLLMError
from fs_fwdllm.report.classes import class_scores, class_table
from fs_fwdllm.report.console import RunConsole
from fs_fwdllm.report.folder import RunFolder
from fs_fwdllm.report.plot import plot_run
from fs_fwdllm.report.record import RunRecord, method_name
from fs_fwdllm.report.sinks import open_sinks, plain
from fs_fwdllm.report.summary import summary_table
from fs_fwdllm.report.traffic import TrafficLog, TrafficRow

__all__ = ["RunReporter"]


class RunReporter:
    """Writes the files of a run and shows its progress. A context manager: leaving it closes every file.

    Rounds are numbered from 1 to ``total_rounds``; a line for round 0 may record the model before training. Opening a
    reporter with ``start_round`` of a resumed run drops the lines and rows of that round and later ones, so that the
    files read as if the run had never stopped.

    Args:
        folder: the run folder.
        config: the resolved configuration; it names the sinks.
        total_rounds: number of the last round.
        start_round: number of the first round this process will report.
        console: where progress is shown; standard output unless told.

    Attributes:
        folder: the run folder.
        sinks: where lines go, ``metrics.jsonl`` first.

    Raises:
        ConfigError: a sink the configuration asks for is not installed or refuses.
        CheckpointError: a file of the run cannot be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        *,
        total_rounds: int,
        start_round: int,
        console: Console | None = None,
    ) -> None:
        self.folder = folder
        self._config = config
        self._start_round = start_round
        self._last_round = max(start_round - 1, 0)
        with ExitStack() as opened:
            self.sinks = open_sinks(folder, config, start_round)
            for sink in self.sinks:
                opened.callback(sink.close)
            self._traffic = TrafficLog(folder.traffic_path, start_round)
            opened.callback(self._traffic.close)
            self._console = RunConsole(folder, total_rounds, start_round, config.eval, console)
            opened.callback(self._console.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> RunReporter:
        verb = "continues at" if self._start_round > 1 else "starts with"
        self.say(f"run folder {self.folder.path}")
        self.say(f"{method_name(self._config)} {verb} round {max(self._start_round, 1)}")
        if self._config.fwdllm.tensorboard:
            self.say(f"TensorBoard: tensorboard --logdir {self.folder.tensorboard_path}")
        self._console.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The error that stopped the run is the one to be seen, not that a full disk has no room for the log of it.
        with suppress(FwdLLMError) if kind is not None else nullcontext(), self._opened:
            self._console.stop_bar()
            if kind is not None and self.folder.has_checkpoint:
                self.say(f"stopped after round {self._last_round}; go on with: fs-fwdllm resume {self.folder.path}")

    def say(self, text: str) -> None:
        """Print a remark about the run, and keep it in ``console.log``."""
        self._console.say(text)

    def round(self, line: Mapping[str, Any], traffic: Sequence[TrafficRow] = ()) -> None:
        """Record one round: its line of metrics (cumulative counts) and its clients' bytes.

        Raises:
            CheckpointError: a file cannot be written.
        """
        written = plain(line)
        self._traffic.write(traffic)
        for sink in self.sinks:
            sink.write(written)
        self._last_round = written["round"]
        self._console.round(written)

    def answered(self, done: int, asked: int) -> None:
        """Show that ``done`` of the ``asked`` clients of the open round have answered."""
        self._console.answered(done, asked)

    def evaluating(self, done: int, total: int) -> None:
        """Show that ``done`` of the ``total`` batches of an evaluation are over."""
        self._console.evaluating(done, total)

    def finish(self, line: Mapping[str, Any]) -> None:
        """Close a finished run: the final line, the picture, a table of the result.

        Raises:
            CheckpointError: a file cannot be written.
        """
        written = {"final": True, **plain(line)}
        for sink in self.sinks:
            sink.write(written)
        self._console.stop_bar()
        picture = plot_run(self.folder.path)
        record = RunRecord.load(self.folder.path)
        self._console.show(summary_table(record.summary()))
        per_class = class_scores(record)
        if per_class:
            self._console.show(class_table(per_class))
        self.say(f"picture {picture}")
