"""Every point of a sweep is a run of its own, in a folder that says which; whatever happens to it is its outcome.

A sweep that was stopped goes on with the same command: a finished point is read from its folder, one with a checkpoint
is resumed, and one without is run anew. A point that diverges is a result like any other and is not tried again.
"""

from __future__ import annotations

import io
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.errors import CheckpointError, ConfigError, DataError, FwdLLMError, ModelError, TrainingStalledError
from fs_fwdllm.method import check_combination
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.files import write_text_atomically
from fs_fwdllm.report.record import RunRecord
from fs_fwdllm.report.units import format_metric, format_seconds
from fs_fwdllm.running import local
from fs_fwdllm.sweep.grid import Grid, Point

__all__ = ["Outcome", "run_sweep"]

#: What a point that cannot be finished leaves in its folder: why.
_STOPPED = "stopped.txt"
#: An end this many times the start is no noise.
_FAR_WORSE = 1.2


@dataclass(frozen=True)
class Outcome:
    """What became of a point.

    Attributes:
        folder: of its run; there may be none where the run could not begin.
        start, end: the numbers of the evaluation before the first and after the last round, by name.
        metric: what the run is judged by; empty if it never evaluated.
        passes: forward and backward passes.
        seconds: of the run.
        problem: why there is no result; empty if there is one.
    """

    point: Point
    folder: Path
    start: dict[str, float] = field(default_factory=dict)
    end: dict[str, float] = field(default_factory=dict)
    metric: str = ""
    passes: float = math.nan
    seconds: float = math.nan
    problem: str = ""


def run_sweep(cfg: str | Path, grid: Grid, out: Path, validation: float, say: Callable[[str], None]) -> list[Outcome]:
    """Run every point that is not finished yet, one after the other; the outcomes in the order of the grid's points.

    All configurations are made, and checked, before the first run. An error of the data, the model or the configuration
    at the first point would be every point's and is raised; anything that happens later is that point's outcome.

    Raises:
        ConfigError: a value is none of its key's, or ``out`` holds runs of another configuration.
        DataError, ModelError: as :func:`fs_fwdllm.running.local.run`, at the first point.
    """
    points = grid.points()
    configs = [grid.configuration(cfg, point, out, validation) for point in points]
    for config in configs:
        check_combination(config)
        _refuse_another(config)
    outcomes: list[Outcome] = []
    started, ran = time.perf_counter(), 0
    for number, (point, config) in enumerate(zip(points, configs, strict=True), start=1):
        fresh = not _is_done(_folder(config))
        outcome = _carry_out(point, config, first=not outcomes)
        ran += fresh
        outcomes.append(outcome)
        left = len(points) - number
        spent = time.perf_counter() - started
        ahead = f"; about {format_seconds(spent / ran * left)} to go" if fresh and left else ""
        say(f"[{number}/{len(points)}] {point}: {_told(outcome)}{'' if fresh else ', as it was'}{ahead}")
    return outcomes


def _told(outcome: Outcome) -> str:
    if outcome.problem:
        return outcome.problem
    losses = f"validation loss {format_metric(outcome.start.get('loss'))} to {format_metric(outcome.end.get('loss'))}"
    return f"{losses}, {format_seconds(outcome.seconds)}"


def _folder(config: Config) -> Path:
    return Path(config.outdir) / config.expname


def _is_done(folder: Path) -> bool:
    if (folder / _STOPPED).is_file():
        return True
    try:
        return RunRecord.load(folder).end is not None
    except FwdLLMError:
        return False


def _refuse_another(config: Config) -> None:
    """Refuse to take another configuration's run for this point's."""
    folder = _folder(config)
    if not RunFolder(folder).config_path.is_file():
        return
    found = RunFolder(folder).config()
    if different := _differences(found.model_dump(), config.model_dump()):
        raise ConfigError(
            f"--out {config.outdir}: {folder} is a run with another {different[0]}; give this sweep a folder of its own"
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in wanted.items():
        other = found.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            names += _differences(other, value, f"{prefix}{name}.")
        elif value != other:
            names.append(prefix + name)
    return names


def _carry_out(point: Point, config: Config, first: bool) -> Outcome:
    folder = _folder(config)
    if not _is_done(folder):
        try:
            with redirect_stdout(io.StringIO()):  # every line is in the run's console.log
                _run_or_resume(config, folder)
        except (ConfigError, DataError, ModelError) as error:
            if first:
                raise
            return Outcome(point, folder, problem=f"failed: {error}")
        except TrainingStalledError as error:
            write_text_atomically(folder / _STOPPED, f"diverged: {error}\n")
        except FwdLLMError as error:
            return Outcome(point, folder, problem=f"failed: {error}")
        except Exception as error:  # a defect at one point must not cost the results of the others
            return Outcome(point, folder, problem=f"failed: {type(error).__name__}: {error}")
    return _read(point, folder)


def _run_or_resume(config: Config, folder: Path) -> None:
    if RunFolder(folder).checkpoint_path.is_dir():
        local.resume(folder)
        return
    if folder.exists():
        shutil.rmtree(folder)
    local.run(config)


def _read(point: Point, folder: Path) -> Outcome:
    try:
        record = RunRecord.load(folder)
    except CheckpointError as error:
        return Outcome(point, folder, problem=f"failed: {error}")
    summary = record.summary()
    evaluations = [_numbers(line["eval"]) for line in record.rounds if line.get("eval")]
    if not evaluations:
        return Outcome(point, folder, problem="failed: there is no validation row to judge it by")
    start, end = evaluations[0], evaluations[-1]
    stopped = folder / _STOPPED
    problem = stopped.read_text(encoding="utf-8").strip() if stopped.is_file() else ""
    if not problem and _diverged(start.get("loss", math.nan), end.get("loss", math.nan)):
        problem = f"diverged: validation loss {format_metric(start.get('loss'))} to {format_metric(end.get('loss'))}"
    passes = (summary.forward_passes or 0) + (summary.backward_passes or 0)
    return Outcome(point, folder, start, end, summary.metric or "", passes, summary.duration_s or math.nan, problem)


def _numbers(evaluation: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in evaluation.items() if isinstance(value, int | float)}


def _diverged(start: float, end: float) -> bool:
    """A loss that is no number is ``null`` in the run's file, and so is missing here."""
    return math.isnan(end) or end > _FAR_WORSE * start


def reasons(outcomes: Sequence[Outcome]) -> str:
    """The first few problems, each once."""
    return "; ".join(list(dict.fromkeys(outcome.problem for outcome in outcomes if outcome.problem))[:3])
