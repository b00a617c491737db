"""Real processes, really stopped: kill -9, kill, Ctrl-C. Whatever it was, the run goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.config import dump_config
from fs_fwdllm.report.folder import CHECKPOINT_FILES
from fs_fwdllm.running.local import resume, run
from tests.host.small import METHODS, World, read_jsonl

ROOT = Path(__file__).resolve().parents[2]
#: So long that a signal after some rounds finds it in the middle, on any machine.
ROUNDS = 30
STOP_AFTER = 5
DEADLINE_S = 120

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")]

SETTINGS: dict[str, dict[str, Any]] = {
    "mezo": METHODS["mezo"],
    "forward, momentum": {**METHODS["forward_gradient"], "fwdllm.server_momentum": 0.9},
    "fedsgd, adamw": {**METHODS["fedsgd"], "train.optimizer.type": "AdamW"},
}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fs_fwdllm", *map(str, arguments)]


def listen_to_interrupts() -> None:
    """A shell that started the tests in the background made this process, and its children, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(world: World, case: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run in a process of its own, some rounds under way."""
    config = world.config({**SETTINGS[case], "federate.total_round_num": ROUNDS, "eval.freq": 5})
    cfg = world.root / "run.yaml"
    cfg.write_text(dump_config(config), encoding="utf-8")
    with subprocess.Popen(
        command("run", "--cfg", cfg), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}, preexec_fn=listen_to_interrupts,
    ) as process:  # fmt: skip
        try:
            wait_for_rounds(process, Path(config.outdir) / config.expname, STOP_AFTER)
            yield process, Path(config.outdir) / config.expname
        finally:
            process.kill()


def wait_for_rounds(process: subprocess.Popen[str], path: Path, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    metrics = path / "metrics.jsonl"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the run ended by itself ({process.returncode}): {process.communicate()[1]}")
        if metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") > count:
            return
        time.sleep(0.005)
    pytest.fail(f"no {count} rounds within {DEADLINE_S} s")


def stop(process: subprocess.Popen[str], number: int) -> tuple[int, str, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def digests(path: Path) -> list[str]:
    return [line["digest"] for line in read_jsonl(path / "metrics.jsonl")]


def assert_equals_uninterrupted(world: World, case: str, path: Path) -> None:
    settings = {**SETTINGS[case], "federate.total_round_num": ROUNDS, "eval.freq": 5, "expname": "whole"}
    whole = run(world.config(settings))
    assert digests(path) == digests(whole)
    assert (path / "bytes.csv").read_text() == (whole / "bytes.csv").read_text()


def assert_in_the_middle(path: Path) -> None:
    assert (path / "checkpoint" / "state.safetensors").is_file()
    assert STOP_AFTER < len(digests(path)) <= ROUNDS
    assert not (path / "adapter").exists()


def test_a_killed_run_resumed_from_the_command_line_ends_with_the_same_bits(world: World) -> None:
    with running(world, "mezo") as (process, path):
        assert stop(process, signal.SIGKILL)[0] == -signal.SIGKILL
    assert_in_the_middle(path)
    done = subprocess.run(
        command("resume", path), cwd=ROOT, text=True, capture_output=True, timeout=DEADLINE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_equals_uninterrupted(world, "mezo", path)


def test_a_terminated_run_can_be_resumed(world: World) -> None:
    """SIGTERM, as batch systems send it: no last word, but a checkpoint."""
    with running(world, "fedsgd, adamw") as (process, path):
        assert stop(process, signal.SIGTERM)[0] in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert_in_the_middle(path)
    resume(path)
    assert_equals_uninterrupted(world, "fedsgd, adamw", path)


def test_ctrl_c_says_how_to_go_on(world: World) -> None:
    with running(world, "forward, momentum") as (process, path):
        code, out, err = stop(process, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert "fs-fwdllm resume" in err
    assert f"go on with: fs-fwdllm resume {path}" in out
    assert_in_the_middle(path)
    left = {file.name for file in (path / "checkpoint").iterdir()}
    whole = {*CHECKPOINT_FILES, "best.safetensors"}
    assert left <= whole, "nothing half-written; whatever the round it was stopped in had come to"
    resume(path)
    assert_equals_uninterrupted(world, "forward, momentum", path)
