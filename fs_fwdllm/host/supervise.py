"""The processes of one run on this machine: started, watched and ended together.

A host says which processes its run has and what the end of one means; how they are started, looked at and ended stands
here. Each has a session of its own: Ctrl-C reaches the supervising process alone, which then ends the others in order,
asked first and made to after a few seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

__all__ = [
    "GRACE_S", "INTERRUPTED", "LOOPBACK", "Processes", "end_in_words", "free_ports", "interruptible", "wait_until",
]  # fmt: skip

LOOPBACK = "127.0.0.1"
#: The exit code of what Ctrl-C has ended.
INTERRUPTED = 130
#: A process that is told to end has this long before it is killed.
GRACE_S = 5.0
_LOOK_EVERY_S = 0.05


class Processes:
    """Processes by name. A context manager: leaving it ends those that still run."""

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all()

    def start(
        self, name: str, command: Sequence[str], log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a process. Everything it says goes to the file ``log``; without one the caller reads its ``stdout``."""
        with ExitStack() as files:
            output = subprocess.PIPE if log is None else files.enter_context(log.open("wb"))
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True,
                errors="replace", start_new_session=True, env=environment,
            )  # fmt: skip
        self._started[name] = process
        return process

    def ended(self) -> dict[str, int]:
        """Exit codes of the processes that have ended."""
        codes = {name: process.poll() for name, process in self._started.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def failed(self) -> dict[str, int]:
        """Exit codes of those that have ended other than well."""
        return {name: code for name, code in self.ended().items() if code}

    def decided(self) -> tuple[str, int] | None:
        """Who decides how the run went, and its exit code: the first process, once it has ended, or one that failed."""
        first = next(iter(self._started), "")
        return next(((name, code) for name, code in self.ended().items() if code or name == first), None)

    def running(self) -> list[str]:
        """Names of the processes that have not ended."""
        return [name for name in self._started if name not in self.ended()]

    def end_all(self) -> None:
        """Ask every process that still runs to end, and make those end that have not in time, or on a second Ctrl-C."""
        try:
            self._send(signal.SIGTERM)
        finally:
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for name in self.running():
            with suppress(ProcessLookupError):
                os.killpg(self._started[name].pid, number)
        wait_until(lambda: not self.running(), time.monotonic() + GRACE_S)


def wait_until(condition: Callable[[], object], until: float) -> bool:
    """Look again and again until ``condition`` holds. Whether it did before ``time.monotonic()`` was ``until``."""
    while not condition():
        if time.monotonic() >= until:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True


def free_ports(count: int) -> list[int]:
    """Ports of the loopback device that nobody listens at, all different."""
    with ExitStack() as stack:
        doors = [stack.enter_context(socket.socket()) for _ in range(count)]
        for door in doors:
            door.bind((LOOPBACK, 0))
        return [door.getsockname()[1] for door in doors]


def end_in_words(code: int) -> str:
    """How a process ended that has an exit code as :mod:`subprocess` counts them."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end the run as Ctrl-C does, which also works where a shell made a job deaf to it.

    Outside the main thread nothing changes: signals are not for it to handle. Nor does SIGHUP where it is ignored
    (``nohup``).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    survives_its_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [signal.SIGINT, signal.SIGTERM, *([] if survives_its_terminal else [signal.SIGHUP])]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
