"""A small run on disk, made by the reporter itself."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.report import RunFolder, RunReporter, TrafficRow


def make_line(number: int, **changes: Any) -> dict[str, Any]:
    """The line of round ``number``: every count grows by a fixed amount a round, evaluation every second round."""
    line: dict[str, Any] = {
        "round": number,
        "seconds": 1.5 * number,
        "upload_bytes": 100 * number,
        "download_bytes": 300 * number,
        "forward_passes": 16 * number,
        "backward_passes": 0,
        "peak_rss_mib": 500.0 + number,
        "peak_device_mib": None,
        "digest": f"{number:08x}",
        "train_loss": 2.0 / number,
        "learning_rate": {1: 0.1, 2: 0.2},
        "loss": {1: 0.5, 2: 0.6},
        "rejected": [],
    }
    if number % 2 == 0:
        line["eval"] = {"loss": 1.0 / number, "accuracy": 0.5 + 0.01 * number, "majority_accuracy": 0.25}
    return line | changes


def make_rows(number: int) -> list[TrafficRow]:
    return [TrafficRow(number, client, 150, 50) for client in (1, 2)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    settings = {"outdir": str(tmp_path / "runs"), "expname": "small", "fwdllm": {"probes": 8}}
    return parse_config(settings | {"federate": {"method": "fedfwd"}})


@pytest.fixture
def quiet() -> Console:
    """A console that is no terminal; what it shows is in ``quiet.file``."""
    return Console(file=io.StringIO(), width=100, force_terminal=False, color_system=None)


@pytest.fixture
def write_run(config: Config, quiet: Console) -> Callable[..., RunFolder]:
    """``write_run(rounds=6, finished=True, **config changes)`` makes a run folder."""

    def write(
        rounds: int = 6, *, finished: bool = True, line: Callable[[int], dict[str, Any]] = make_line, **changes: Any
    ) -> RunFolder:
        own = parse_config(config.model_dump(mode="json") | changes)
        folder = RunFolder.create(own)
        with RunReporter(folder, own, total_rounds=rounds, start_round=1, console=quiet) as reporter:
            for number in range(1, rounds + 1):
                reporter.round(line(number), make_rows(number))
            if finished:
                reporter.finish({"rounds": rounds, "digest": f"{rounds:08x}"})
        return folder

    return write
