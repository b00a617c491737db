"""Who died first? ``mpiexec`` kills every process as soon as one is dead, and may then name any of them.

So each process of a run forks before it begins: the child is the process, and its parent, which ``mpiexec`` knows, only
waits. Nobody else has been told when the parent sees its child dead, and it writes down how that happened before it
ends itself. If ``mpiexec`` kills the parent, the child goes with it, and nothing is written.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from fs_fwdllm.report.files import write_text_atomically

__all__ = ["begin_guarded", "is_running", "name_of"]

_PR_SET_PDEATHSIG = 1


def name_of(rank: int) -> str:
    """What messages call a process."""
    return "server (rank 0)" if rank == 0 else f"client process (rank {rank})"


def is_running(pid: int) -> bool:
    """Whether the process is there and not merely waiting for its parent to notice its end."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def begin_guarded(processes: Path) -> None:
    """Return in a child; the parent leaves ``rank-N.error`` in folder ``processes`` if that is killed by a signal.

    To be called before there are threads. The child's number is read from the ``rank-N.pid`` it writes.
    """
    parent = os.getpid()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        return

    def pass_on(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the child by itself
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _write_obituary(processes, child, -code)
    os._exit(code if code >= 0 else 128 - code)


def _die_with(parent: int) -> None:
    """The kernel is asked to kill this process when its parent is gone (Linux; elsewhere mpiexec kills the group)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write_obituary(processes: Path, pid: int, number: int) -> None:
    for path in processes.glob("rank-*.pid"):
        if path.read_text(encoding="utf-8").strip() == str(pid):
            error = path.with_suffix(".error")
            name = name_of(int(path.stem.removeprefix("rank-")))
            if not error.exists():
                write_text_atomically(error, f"{name}: was killed by {signal.Signals(number).name}\n")
