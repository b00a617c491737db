"""A process of mpiexec's: what killed it is written down before anybody else can know, and it outlives nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fs_fwdllm.host.fedml.guard import is_running

_PROCESS = """
import os, signal, sys, time
from pathlib import Path
from fs_fwdllm.host.fedml.guard import begin_guarded
folder = Path(sys.argv[1])
begin_guarded(folder)
(folder / "rank-2.pid").write_text(f"{os.getpid()}\\n")
print("begun", flush=True)
exec(sys.argv[2])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's"),
]


def start(folder: Path, does: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _PROCESS, str(folder), does], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_signal_that_killed_a_process_is_written_down(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, f"os.kill(os.getpid(), {int(number)})")
    assert process.wait(30) == 128 + number
    assert (tmp_path / "rank-2.error").read_text() == f"client process (rank 2): was killed by {number.name}\n"


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_ends_by_itself_keeps_its_status(tmp_path: Path, status: int) -> None:
    assert start(tmp_path, f"os._exit({status})").wait(30) == status
    assert not (tmp_path / "rank-2.error").exists()


def test_an_error_of_its_own_is_not_replaced(tmp_path: Path) -> None:
    start(tmp_path, "(folder / 'rank-2.error').write_text('mine'); os.kill(os.getpid(), 9)").wait(30)
    assert (tmp_path / "rank-2.error").read_text() == "mine"


def test_a_process_dies_with_its_guard_and_leaves_no_word(tmp_path: Path) -> None:
    process = start(tmp_path, "time.sleep(600)")
    child = int((tmp_path / "rank-2.pid").read_text())
    assert is_running(child)
    process.kill()
    process.wait(30)
    end = time.monotonic() + 30
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not (tmp_path / "rank-2.error").exists()


def test_being_asked_to_end_is_passed_on(tmp_path: Path) -> None:
    process = start(
        tmp_path, "signal.signal(15, lambda *_: os._exit(7)); Path(folder / 'ready').touch(); time.sleep(600)"
    )
    end = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 7
