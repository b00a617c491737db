"""Who this process is in a run, where it leaves its log and its error, and how it ends: at once, from any thread."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fs_fwdllm.errors import HostError
from fs_fwdllm.host.fedml.guard import name_of
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.files import write_text_atomically

__all__ = ["end_process", "introduce", "leave", "processes_folder", "say"]

_EXIT_OF_ERROR = 2


@dataclass
class _Identity:
    name: str = "this process"
    error_path: Path | None = None


_me = _Identity()


def processes_folder(folder: RunFolder) -> Path:
    """Where the processes of a run leave their logs and errors."""
    return folder.path / "processes"


def introduce(rank: int, folder: RunFolder | None) -> None:
    """Take a rank. With a run folder, standard error goes to ``rank-N.log`` from here on, and the number of this
    process to ``rank-N.pid``."""
    _me.name = name_of(rank)
    if folder is None:
        return
    where = processes_folder(folder)
    where.mkdir(parents=True, exist_ok=True)
    _me.error_path = where / f"rank-{rank}.error"
    write_text_atomically(where / f"rank-{rank}.pid", f"{os.getpid()}\n")
    log = os.open(where / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    os.close(log)


def say(text: str) -> None:
    """Say something to whoever started this process, under its name."""
    sys.stderr.write(f"{_me.name}: {text}\n")
    sys.stderr.flush()


def end_process(explanation: str) -> NoReturn:
    """End at once, from any thread, with an error that says why."""
    leave("", HostError(explanation))


def leave(trace: str, error: BaseException) -> NoReturn:
    """End with status 2, the error (behind ``trace``) being written where the one who started this process looks.

    MPI's and gRPC's threads would keep the process, and with it the others, alive, so they are not waited for.
    """
    text = f"{trace}{_me.name}: {type(error).__name__}: {error}\n"
    if _me.error_path is not None:
        _me.error_path.write_text(text, encoding="utf-8")
    sys.stderr.write(text)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(_EXIT_OF_ERROR)
