"""The whole of a run from one command: starts the processes, watches them, and ends all when one fails.

``sp`` runs here. For ``MPI`` the processes are ``mpiexec``'s; for ``GRPC`` the server is started first, then, when its
port answers, the clients. Each writes its standard error to ``processes/rank-N.log`` in the run folder, and its error,
if it ends with one, to ``processes/rank-N.error``; what killed a process of ``mpiexec`` is written there by its
:mod:`~fs_fwdllm.host.fedml.guard`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from fs_fwdllm.errors import HostError
from fs_fwdllm.host.fedml import HOST
from fs_fwdllm.host.fedml.guard import is_running, name_of
from fs_fwdllm.host.fedml.installation import import_fedml
from fs_fwdllm.host.fedml.process import processes_folder, server_address
from fs_fwdllm.host.fedml.settings import FedMLSettings, dump_settings, read_settings
from fs_fwdllm.method import check_combination
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.files import write_text_atomically
from fs_fwdllm.run.driver import read_own_checkpoint

__all__ = ["resume", "run"]

_POLL_S = 0.05
#: A process that is told to end has this long before it is killed, and one whose run is over to close its transport.
_GRACE_S = 5.0
_ENDING_S = 90.0


def run(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train as a FedML file says and return the run folder.

    Raises:
        ConfigError: the file, or an override, is not usable.
        HostError: FedML is not usable here, or a process failed; the message has its name and traceback.
        FwdLLMError: as :func:`fs_fwdllm.run.local.run`; the last checkpoint stays valid whatever happens.
    """
    settings = read_settings(Path(path), overrides)
    check_combination(settings.config)
    import_fedml()
    folder = RunFolder.create(settings.config)
    if settings.args["backend"] == "GRPC" and not settings.args.get("grpc_ipconfig_path"):
        settings = replace(settings, args={**settings.args, "grpc_ipconfig_path": str(_addresses_path(folder))})
    write_text_atomically(folder.path / HOST.marker, dump_settings(settings, folder.config_path.name))
    return _carry_out(settings, folder, resume=False)


def resume(path: str | Path) -> Path:
    """Continue an interrupted run from its last checkpoint; the result is the uninterrupted run's, bit for bit.

    Raises:
        CheckpointError: no run or no checkpoint there, or its configuration was changed.
        HostError: as :func:`run`.
    """
    folder = RunFolder.open(path)
    read_own_checkpoint(folder)
    import_fedml()
    return _carry_out(read_settings(folder.path / HOST.marker), folder, resume=True)


def _carry_out(settings: FedMLSettings, folder: RunFolder, *, resume: bool) -> Path:
    if settings.is_single_process:
        _run_here(folder, resume=resume)
        return folder.path
    processes_folder(folder).mkdir(exist_ok=True)
    for old in processes_folder(folder).glob("rank-*.*"):
        old.unlink()
    processes = Processes(folder, settings, resume=resume)
    try:
        if settings.args["backend"] == "MPI":
            processes.start_mpi()
        else:
            processes.start_grpc()
        processes.wait()
    finally:
        processes.end_all()
    return folder.path


def _run_here(folder: RunFolder, *, resume: bool) -> None:
    from types import SimpleNamespace

    from fs_fwdllm.host.fedml.program import build, init

    file = folder.path / HOST.marker
    args = SimpleNamespace(**{**read_settings(file).args, "role": "server", "yaml_config_file": str(file)})
    build(init(args), folder, resume=resume).run()


@dataclass
class _Child:
    name: str
    process: subprocess.Popen[str]
    said: deque[str] = field(default_factory=lambda: deque(maxlen=60))

    @property
    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)


class Processes:
    """The processes of a run on this machine."""

    def __init__(self, folder: RunFolder, settings: FedMLSettings, *, resume: bool) -> None:
        self._folder = folder
        self._settings = settings
        self._resume = resume
        self._children: list[_Child] = []

    def start_mpi(self) -> None:
        """Start ``mpiexec``. Raises :class:`~fs_fwdllm.errors.HostError` if there is none."""
        beside_python = str(Path(sys.executable).parent)
        mpiexec = shutil.which("mpiexec", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
        if mpiexec is None:
            raise HostError("backend MPI: there is no mpiexec; pip install mpich brings one")
        count = str(self._settings.worker_num + 1)
        self._start("mpiexec", [mpiexec, "-n", count, *self._command()])

    def start_grpc(self) -> None:
        """Start the server, wait for its port, start the clients.

        Raises:
            HostError: the server failed, or does not listen within the deadline.
        """
        path = Path(self._settings.args["grpc_ipconfig_path"])
        if path == _addresses_path(self._folder):
            _write_addresses(path, self._settings.worker_num + 1)
        address = server_address(self._settings)
        self._start(name_of(0), [*self._command(), "--rank", "0", "--role", "server"])
        end = time.monotonic() + self._settings.deadline_s
        while not _is_listening(address):
            self._check()
            if time.monotonic() > end:
                raise HostError(f"{name_of(0)}: does not listen at {address} within {self._settings.deadline_s:g} s")
            time.sleep(_POLL_S)
        for rank in range(1, self._settings.worker_num + 1):
            self._start(name_of(rank), [*self._command(), "--rank", str(rank), "--role", "client"])

    def wait(self) -> None:
        """Until all have ended well. Raises :class:`~fs_fwdllm.errors.HostError` as soon as one has not."""
        end = None
        while any(child.process.poll() is None for child in self._children):
            self._check()
            if end is None and self._children[0].process.poll() == 0:
                end = time.monotonic() + _ENDING_S  # the server is done: what was to be computed is there
            if end is not None and time.monotonic() > end:
                slow = [child.name for child in self._children if child.process.poll() is None]
                raise HostError(f"{', '.join(slow)}: did not end within {_ENDING_S:g} s after the server had finished")
            time.sleep(_POLL_S)
        self._check()

    def end_all(self) -> None:
        """End whatever is still there, politely, then not, and see it gone: mpiexec does not wait for grandchildren."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            alive = [child.process for child in self._children if child.process.poll() is None]
            for process in alive:
                with suppress(ProcessLookupError):
                    process.send_signal(number)
            end = time.monotonic() + _GRACE_S
            while any(process.poll() is None for process in alive) and time.monotonic() < end:
                time.sleep(_POLL_S)
        end = time.monotonic() + _GRACE_S
        while any(is_running(pid) for pid in self._pids()) and time.monotonic() < end:
            time.sleep(_POLL_S)

    def _pids(self) -> list[int]:
        texts = (path.read_text(encoding="utf-8") for path in processes_folder(self._folder).glob("rank-*.pid"))
        return [int(text) for text in texts if text.strip().isdigit()]

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "fs_fwdllm.host.fedml", "--cf", str(self._folder.path / HOST.marker)]
        return [*command, "--run", str(self._folder.path), *(["--resume"] if self._resume else [])]

    def _start(self, name: str, command: list[str]) -> None:
        process = subprocess.Popen(
            command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            errors="replace", env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )  # fmt: skip
        child = _Child(name, process)
        self._children.append(child)
        threading.Thread(target=_pass_on, args=(child,), daemon=True).start()

    def _check(self) -> None:
        failed = next((child for child in self._children if child.failed), None)
        if failed is not None:
            time.sleep(4 * _POLL_S)  # the error that caused another's is written first, but both may be under way
            raise HostError(self._explain(failed))

    def _explain(self, failed: _Child) -> str:
        """Who failed and why: the first process that left an error, else the one that was killed."""
        where = processes_folder(self._folder)
        errors = sorted(where.glob("rank-*.error"), key=lambda path: path.stat().st_mtime_ns)
        hint = f"; the processes' logs are in {where}. Go on with: fs-fwdllm resume {self._folder.path}"
        if errors:
            return f"{errors[0].read_text(encoding='utf-8').strip()}{hint}"
        code = failed.process.returncode
        if failed.name == "mpiexec":
            said = "\n".join(failed.said)
            return f"mpiexec ended with status {code}:\n{said}{hint}"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"{failed.name}: {how}{hint}"


def _pass_on(child: _Child) -> None:
    """Show what a process prints, and remember the last of it. ``mpiexec``'s obituary is not for the user."""
    assert child.process.stdout is not None
    quiet = False
    for line in child.process.stdout:
        child.said.append(line.rstrip())
        quiet = quiet or line.startswith("====") or "BAD TERMINATION" in line
        if not quiet and not line.startswith("------------------"):  # FedML's lists of clients
            sys.stdout.write(line)
            sys.stdout.flush()


def _addresses_path(folder: RunFolder) -> Path:
    return processes_folder(folder) / "grpc.csv"


def _write_addresses(path: Path, count: int) -> None:
    """Free ports on the loopback device, in FedML 0.9.6's format."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    rows = [f"{rank},{rank},127.0.0.1,{port}\n" for rank, port in enumerate(ports)]
    path.write_text("eid,rank,grpc_server_ip,grpc_server_port\n" + "".join(rows), encoding="utf-8")


def _is_listening(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=1.0):
            return True
    except OSError:
        return False
