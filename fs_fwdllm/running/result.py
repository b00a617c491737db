"""What a finished run hands to a program: where everything is, what was reached, and the trained model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.inference import TrainedModel, load
from fs_fwdllm.model import find_saved
from fs_fwdllm.report import RunFolder, RunRecord
from fs_fwdllm.running import local

__all__ = ["RunResult", "resume", "run"]


@dataclass(frozen=True)
class RunResult:
    """A finished run; :func:`os.fspath` gives its folder.

    Attributes:
        folder: the run folder.
    """

    folder: Path

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def files(self) -> RunFolder:
        """The run's files by what they are: ``metrics_path``, ``report_path``, ``config_path``, ..."""
        return RunFolder(self.folder)

    @cached_property
    def record(self) -> RunRecord:
        """The run's lines, read back: ``record.rounds``, ``record.series("round", "eval.loss")``."""
        return RunRecord.load(self.folder)

    @property
    def trained(self) -> Path:
        """The folder of the trained adapter or model."""
        return find_saved(self.folder)

    @property
    def metrics(self) -> dict[str, Any]:
        """The evaluation of the trained model: of the round that is kept; empty if there was nothing to evaluate on."""
        by_round = {line["round"]: line["eval"] for line in self.record.rounds if line.get("eval")}
        kept = (self.record.end or {}).get("saved_round")
        return dict(by_round.get(kept) or next(reversed(by_round.values()), {}))

    def load(self, device: str = "cpu") -> TrainedModel:
        """The trained model, ready to predict or generate. Raises as :func:`fs_fwdllm.load`."""
        return load(self.folder, device)


def run(config: Config) -> RunResult:
    """Train as ``config`` says, in this process.

    Raises:
        FwdLLMError: see the subtypes; the last checkpoint stays valid whatever happens.
    """
    return RunResult(local.run(config))


def resume(path: str | Path, rounds: int | None = None) -> RunResult:
    """Continue an interrupted run from its last checkpoint; the result is the uninterrupted run's, bit for bit.

    Args:
        rounds: how many rounds it is to have in all, instead of what its configuration says. A finished run goes on.

    Raises:
        CheckpointError: no run or no checkpoint there, its configuration was changed, or another process works in it.
        ConfigError: it has done as many ``rounds`` already.
    """
    return RunResult(local.resume(path, rounds))
