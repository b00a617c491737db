"""A user at a terminal: words are typed in an empty folder, and every command has to succeed at the first attempt."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Shell"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Shell:
    """Runs commands of ``fs-fwdllm`` in ``folder`` and remembers how long each took.

    Attributes:
        folder: where the user sits.
        seconds: ``[(command, seconds)]`` of everything that was typed.
    """

    folder: Path
    seconds: list[tuple[str, float]] = field(default_factory=list)

    def type(self, *words: str, stdin: str = "") -> str:
        """What ``fs-fwdllm WORDS`` prints on standard output; it must end with 0 and without a traceback."""
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "fs_fwdllm", *words],
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=500,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"},
        )
        self.seconds.append((words[0], time.perf_counter() - start))
        assert done.returncode == 0, f"fs-fwdllm {' '.join(words)}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def write(self, name: str, text: str) -> None:
        """Put a file into the folder."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def tell(self) -> None:
        """Print the seconds of every command; pytest shows them with -s or -rP."""
        for command, seconds in self.seconds:
            print(f"{seconds:6.1f} s  fs-fwdllm {command}")
        print(f"{sum(seconds for _, seconds in self.seconds):6.1f} s  in all")
