"""Processes that belong together: whatever they do, they end with the one that started them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from fs_fwdllm.host import supervise
from fs_fwdllm.host.fedml.guard import is_running
from fs_fwdllm.host.supervise import Processes, end_in_words, interruptible, wait_until

DEADLINE_S = 30.0


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def wait_for(text: str, log: Path) -> None:
    assert wait_until(lambda: log.exists() and text in log.read_text(), time.monotonic() + DEADLINE_S)


def test_what_a_process_says_is_in_its_log_or_read_by_the_caller(tmp_path: Path) -> None:
    source = "import os, sys; print(os.environ['WORD'], flush=True); sys.exit('and an error')"
    environment = {**os.environ, "WORD": "a word"}
    with Processes() as processes:
        processes.start("logged", python(source), tmp_path / "log", environment)
        read = processes.start("read", python(source), environment=environment)
        assert read.stdout is not None and read.stdout.read() == "a word\nand an error\n"
        assert wait_until(lambda: not processes.running(), time.monotonic() + DEADLINE_S)
        assert processes.ended() == processes.failed() == {"logged": 1, "read": 1}
    assert (tmp_path / "log").read_text() == "a word\nand an error\n"


@pytest.mark.parametrize(
    ("codes", "decided"), [([0, None], 0), ([None, 0], None), ([None, 3], 3), ([4, 3], 4), ([None, None], None)]
)
def test_the_first_process_decides_or_one_that_failed(codes: list[int | None], decided: int | None) -> None:
    with Processes() as processes:
        for number, code in enumerate(codes):
            does = "import time; time.sleep(600)" if code is None else f"raise SystemExit({code})"
            processes.start(str(number), python(does))
        over = sum(code is not None for code in codes)
        assert wait_until(lambda: len(processes.ended()) == over, time.monotonic() + DEADLINE_S)
        assert (processes.decided() or ("", None))[1] == decided
    assert not processes.running()


def test_a_process_that_does_not_listen_is_killed_and_so_are_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "GRACE_S", 0.5)
    deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.fork(); print(os.getpid(), flush=True); "
    with Processes() as processes:
        processes.start("deaf", python(deaf + "time.sleep(600)"), tmp_path / "log")
        assert wait_until(lambda: (tmp_path / "log").read_text().count("\n") == 2, time.monotonic() + DEADLINE_S)
    assert processes.ended() == {"deaf": -signal.SIGKILL}
    assert end_in_words(processes.ended()["deaf"]) == "was killed by SIGKILL"
    pids = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert wait_until(lambda: not any(is_running(pid) for pid in pids), time.monotonic() + DEADLINE_S)


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    processes = Processes()
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    processes.start("deaf", python(deaf), tmp_path / "log")
    wait_for("deaf", tmp_path / "log")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interruptible(), processes:
        timer.start()
    assert time.monotonic() - started < supervise.GRACE_S
    assert processes.ended() == {"deaf": -signal.SIGKILL}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_way_to_stop_is_an_interrupt_and_only_inside(number: signal.Signals) -> None:
    """Whatever started the tests may have made this process deaf to the signal; that is another test's matter."""

    def deaf(*_: object) -> None:
        """What the signal does where nothing else handles it."""

    inherited = signal.signal(number, deaf)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            os.kill(os.getpid(), number)
            time.sleep(DEADLINE_S)
        assert signal.getsignal(number) is deaf
    finally:
        signal.signal(number, inherited)


def test_a_job_that_shall_survive_its_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_leaves_the_signals_alone() -> None:
    handlers = []

    def enter() -> None:
        with interruptible():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(DEADLINE_S)
    assert handlers == [before]
