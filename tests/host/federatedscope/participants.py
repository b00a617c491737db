"""Starting FederatedScope processes in tests, waiting for them, and getting rid of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Participant", "Starter", "wait_until"]

_ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Participant:
    """A process of a federation. ``log`` holds everything it wrote to its two outputs."""

    starter: Starter
    pid: int
    log: Path
    exit_code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; ``None`` while it runs."""
        if self.exit_code is None:
            self.exit_code = self.starter.request({"poll": self.pid})
        return self.exit_code

    def wait(self, within_s: float = 120) -> int:
        """Wait for the end and return the exit code. Raises AssertionError, with the log, if it does not come."""
        wait_until(lambda: self.poll() is not None, within_s, lambda: f"still running; its log:\n{self.text[-6000:]}")
        assert self.exit_code is not None
        return self.exit_code

    def succeed(self, within_s: float = 120) -> str:
        """Wait for an end with exit code 0 and return the log."""
        assert self.wait(within_s) == 0, self.text[-6000:]
        return self.text

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it the hard way, and wait until it has ended."""
        self.signal(signal.SIGKILL)
        self.wait(20)

    def says(self, text: str, within_s: float = 90) -> None:
        """Wait until the log contains ``text``."""
        wait_until(lambda: text in self.text, within_s, lambda: f"{text!r} is not in the log:\n{self.text[-6000:]}")

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


@dataclass
class Starter:
    """The forking process of :mod:`.zygote`; see there for the two ways.

    Args:
        way: ``launcher`` or ``hooked``.
        home: the FederatedScope checkout.
    """

    way: str
    home: Path
    started: list[Participant] = field(default_factory=list)

    def __post_init__(self) -> None:
        path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        path += [str(self.home)] if self.way == "hooked" else []
        environment = {
            **os.environ, "FEDERATEDSCOPE_HOME": str(self.home), "PYTHONPATH": os.pathsep.join([*path, str(_ROOT)]),
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py")), self.way],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=self.home if self.way == "hooked" else _ROOT,
        )  # fmt: skip
        while self._read() != "ready":
            pass

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forking process has ended"
        try:
            return json.loads(line)
        except ValueError:
            return line  # something the host printed while it was imported

    def request(self, content: Mapping[str, Any]) -> Any:
        """Send a request and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(content) + "\n")
        self._process.stdin.flush()
        return self._read()

    def start(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        name: str = "run",
        environment: Mapping[str, str] | None = None,
        path: Sequence[Path] = (),
        before: str = "",
    ) -> Participant:
        """Start the host's main with ``arguments`` in ``folder``; its log is ``folder / name.log``.

        Args:
            path: put at the front of ``sys.path``.
            before: Python source to execute first.
        """
        log = folder / f"{name}.log"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(self.home if self.way == "hooked" else folder), "log": str(log),
            "environment": dict(environment or {}), "path": [str(entry) for entry in path], "before": before,
        }  # fmt: skip
        participant = Participant(self, self.request(request), log)
        self.started.append(participant)
        return participant

    def kill_all(self) -> None:
        """End whatever a test left running."""
        for participant in self.started:
            if participant.poll() is None:
                os.kill(participant.pid, signal.SIGKILL)
                participant.wait(20)
        self.started.clear()

    def close(self) -> None:
        """End the forking process and everything it started."""
        self.kill_all()
        self._process.kill()
        self._process.wait(20)


def wait_until(condition: Callable[[], bool], within_s: float, explain: Callable[[], str] = str) -> None:
    """Poll until ``condition``. Raises AssertionError with ``explain()`` when it takes longer than ``within_s``."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"after {within_s:g} s: {explain()}"
        time.sleep(0.05)
