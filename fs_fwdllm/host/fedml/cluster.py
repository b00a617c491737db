"""The whole of a run from one command: starts the processes, watches them, and ends all when one fails.

``sp`` runs here. For ``MPI`` the processes are ``mpiexec``'s; for ``GRPC`` the server is started first, then, when its
port answers, the clients. Each writes its standard error to ``processes/rank-N.log`` in the run folder, and its error,
if it ends with one, to ``processes/rank-N.error``; what killed a process of ``mpiexec`` is written there by its
:mod:`~fs_fwdllm.host.fedml.guard`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fs_fwdllm.data.sources import read_source
from fs_fwdllm.errors import HostError
from fs_fwdllm.host import supervise
from fs_fwdllm.host.addresses import is_listening, joined
from fs_fwdllm.host.fedml import HOST
from fs_fwdllm.host.fedml.addresses import read_addresses, require_free_places, server_address
from fs_fwdllm.host.fedml.guard import is_running, name_of
from fs_fwdllm.host.fedml.identity import processes_folder
from fs_fwdllm.host.fedml.installation import import_fedml
from fs_fwdllm.host.fedml.settings import FedMLSettings, dump_settings, read_settings
from fs_fwdllm.host.supervise import Processes, wait_until
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.files import write_text_atomically
from fs_fwdllm.running.driver import read_own_checkpoint
from fs_fwdllm.running.extension import give_rounds
from fs_fwdllm.running.preflight import check_beforehand

__all__ = ["explain_failure", "resume", "run", "write_addresses"]

#: Once the server has finished, the others have this long to close their transport.
_ENDING_S = 90.0
#: The error that caused another's is written first, but both may be under way.
_ERRORS_SPREAD_S = 0.2
_LINES_REMEMBERED = 60
_MPIEXEC = "mpiexec"
_ADDRESSES = "grpc.csv"
_TABLE = "grpc_ipconfig_path"


def run(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train as a FedML file says and return the run folder.

    Raises:
        ConfigError: the file, or an override, is not usable.
        HostError: FedML is not usable here, or a process failed; the message has its name and traceback.
        FwdLLMError: as :func:`fs_fwdllm.running.local.run`; the last checkpoint stays valid whatever happens.
    """
    settings = read_settings(Path(path), overrides)
    check_beforehand(settings.config)
    import_fedml()
    _require_transport(settings)
    if not settings.is_single_process:
        read_source(settings.config)  # every process will: one that misses a file would keep the others waiting
    folder = RunFolder.create(settings.config)
    if settings.args["backend"] == "GRPC" and not settings.args.get(_TABLE):
        settings = replace(settings, args={**settings.args, _TABLE: str(processes_folder(folder) / _ADDRESSES)})
    write_text_atomically(folder.path / HOST.marker, dump_settings(settings, folder.config_path.name))
    return _carry_out(settings, folder, resume=False)


def resume(path: str | Path, rounds: int | None = None) -> Path:
    """Continue a run from its last checkpoint, as :func:`fs_fwdllm.running.local.resume`.

    Raises:
        CheckpointError, ConfigError: as there.
        HostError: as :func:`run`.
    """
    folder = RunFolder.open(path)
    checkpoint = read_own_checkpoint(folder)
    if rounds is not None:
        give_rounds(folder, checkpoint, rounds)
    import_fedml()
    settings = read_settings(folder.path / HOST.marker)
    if not _has_own_table(settings, folder):
        _require_transport(settings)
    return _carry_out(settings, folder, resume=True)


def _require_transport(settings: FedMLSettings) -> None:
    """Check what the processes will speak over, before there is any.

    Raises:
        ConfigError: the table of addresses is not usable.
        HostError: there is no MPI, or nobody can listen at an address in the table.
    """
    if settings.is_single_process:
        return
    if settings.args["backend"] == "MPI":
        _find_mpiexec()
        if importlib.util.find_spec("mpi4py") is None:
            raise HostError("backend MPI: the module mpi4py is not installed; pip install mpi4py mpich")
    elif settings.args.get(_TABLE):
        places = read_addresses(settings)
        require_free_places(places, range(settings.worker_num + 1))


def _find_mpiexec() -> str:
    beside_python = str(Path(sys.executable).parent)
    mpiexec = shutil.which(_MPIEXEC, path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if mpiexec is None:
        raise HostError("backend MPI: there is no mpiexec; pip install mpich brings one")
    return mpiexec


def _has_own_table(settings: FedMLSettings, folder: RunFolder) -> bool:
    """Whether the addresses are ours to choose: free ones, anew at every start."""
    return settings.args.get(_TABLE) == str(processes_folder(folder) / _ADDRESSES)


def _carry_out(settings: FedMLSettings, folder: RunFolder, *, resume: bool) -> Path:
    if settings.is_single_process:
        _run_here(folder, resume=resume)
        return folder.path
    processes_folder(folder).mkdir(exist_ok=True)
    for old in processes_folder(folder).glob("rank-*.*"):
        old.unlink()
    with supervise.interruptible(), Ranks(folder, settings, resume) as ranks:
        if settings.args["backend"] == "MPI":
            ranks.start_mpi()
        else:
            ranks.start_grpc()
        ranks.wait()
    return folder.path


def _run_here(folder: RunFolder, *, resume: bool) -> None:
    from types import SimpleNamespace

    from fs_fwdllm.host.fedml.program import build, init

    file = folder.path / HOST.marker
    args = SimpleNamespace(**{**read_settings(file).args, "role": "server", "yaml_config_file": str(file)})
    build(init(args), folder, resume=resume).run()


@dataclass
class Ranks:
    """The processes of a run. A context manager: leaving it ends those that still run."""

    folder: RunFolder
    settings: FedMLSettings
    resume: bool
    _processes: Processes = field(default_factory=Processes)
    _said: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_REMEMBERED))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever is still there and see it gone: ``mpiexec`` does not wait for grandchildren."""
        self._processes.end_all()
        wait_until(lambda: not any(map(is_running, self._pids())), time.monotonic() + supervise.GRACE_S)

    def start_mpi(self) -> None:
        """Start ``mpiexec``. Raises :class:`~fs_fwdllm.errors.HostError` if there is none."""
        count = str(self.settings.worker_num + 1)
        self._start(_MPIEXEC, [_find_mpiexec(), "-n", count, *self._command()])

    def start_grpc(self) -> None:
        """Start the server, wait for its port, start the clients.

        Raises:
            HostError: the server failed, or does not listen within the deadline.
        """
        deadline_s = self.settings.deadline_s
        if _has_own_table(self.settings, self.folder):
            write_addresses(Path(self.settings.args[_TABLE]), self.settings.worker_num + 1)
        address = server_address(self.settings)
        self._start(name_of(0), [*self._command(), "--rank", "0", "--role", "server"])
        if not self._wait_until(lambda: is_listening(address), deadline_s):
            raise HostError(f"{name_of(0)}: does not listen at {joined(*address)} within {deadline_s:g} s")
        for rank in range(1, self.settings.worker_num + 1):
            self._start(name_of(rank), [*self._command(), "--rank", str(rank), "--role", "client"])

    def wait(self) -> None:
        """Return when all have ended well. Raises :class:`~fs_fwdllm.errors.HostError` as soon as one has not."""
        deadline_s = self.settings.deadline_s
        if not self._wait_until(lambda: self._processes.decided() or self._all_have_begun(), deadline_s):
            raise HostError(
                f"only {len(self._pids())} of {self.settings.worker_num + 1} processes began in {deadline_s:g} s"
            )
        # From here on every process has deadlines of its own.
        wait_until(self._processes.decided, math.inf)
        # The server, or mpiexec, is done: what was to be computed is there.
        if not self._wait_until(lambda: not self._processes.running(), _ENDING_S):
            slow = ", ".join(self._processes.running())
            raise HostError(f"{slow}: did not end within {_ENDING_S:g} s after the server had finished")

    def _wait_until(self, condition: Callable[[], object], within_s: float) -> bool:
        """Whether ``condition`` holds in time; a process that fails meanwhile is an error."""
        is_in_time = wait_until(lambda: self._processes.failed() or condition(), time.monotonic() + within_s)
        if self._processes.failed():
            time.sleep(_ERRORS_SPREAD_S)
            raise HostError(explain_failure(self.folder, self._processes.failed(), self._said))
        return is_in_time

    def _all_have_begun(self) -> bool:
        return len(self._pids()) > self.settings.worker_num

    def _pids(self) -> list[int]:
        texts = (path.read_text(encoding="utf-8") for path in processes_folder(self.folder).glob("rank-*.pid"))
        return [int(text) for text in texts if text.strip().isdigit()]

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "fs_fwdllm.host.fedml", "--cf", str(self.folder.path / HOST.marker)]
        return [*command, "--run", str(self.folder.path), *(["--resume"] if self.resume else [])]

    def _start(self, name: str, command: list[str]) -> None:
        process = self._processes.start(name, command, environment={"OMP_WAIT_POLICY": "PASSIVE", **os.environ})
        threading.Thread(target=_pass_on, args=(process, self._said), daemon=True).start()


def explain_failure(folder: RunFolder, failed: Mapping[str, int], said: Iterable[str] = ()) -> str:
    """Who failed and why: a process that was killed, which no other's error does, else the first that left an error.

    Args:
        failed: exit codes of the processes that failed.
        said: the last lines they printed, which is all there is of an ``mpiexec`` whose processes left no error.
    """
    name, code = min(failed.items(), key=lambda item: item[1])
    where = processes_folder(folder)
    errors = sorted(where.glob("rank-*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors and (code > 0 or name == _MPIEXEC):
        reason = errors[0].read_text(encoding="utf-8").strip()
    else:
        reason = "\n".join([f"{name}: {supervise.end_in_words(code)}", *(said if name == _MPIEXEC else ())])
    advice = f". Go on with: fs-fwdllm resume {folder.path}" if folder.checkpoint_path.is_dir() else ""
    return f"{reason}; the processes' logs are in {where}{advice}"


def _pass_on(process: subprocess.Popen[str], said: deque[str]) -> None:
    """Show what a process prints, and remember the last of it. ``mpiexec``'s obituary is not for the user."""
    assert process.stdout is not None
    quiet = False
    for line in process.stdout:
        said.append(line.rstrip())
        quiet = quiet or line.startswith("====") or "BAD TERMINATION" in line
        if not quiet and not line.startswith("------------------"):  # FedML's lists of clients
            sys.stdout.write(line)
            sys.stdout.flush()


def write_addresses(path: Path, count: int) -> None:
    """Write free ports of the loopback device in FedML 0.9.6's format, for ranks 0 to ``count - 1``."""
    rows = [f"{rank},{rank},{supervise.LOOPBACK},{port}\n" for rank, port in enumerate(supervise.free_ports(count))]
    path.write_text("eid,rank,grpc_server_ip,grpc_server_port\n" + "".join(rows), encoding="utf-8")
