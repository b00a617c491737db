"""A distributed run on one machine: a server and its clients, a process each, started and watched over together.

``python -m fs_fwdllm.host.federatedscope.cluster CONFIG [key value ...]`` writes one complete configuration file per
process (the host's command line cannot express all of them), starts the server, waits until it listens, starts the
clients, and waits for the server to end. When a process fails, at the deadline and on Ctrl-C all others are ended too:
asked first, then made to. The exit code is the server's, or that of the client that failed.

Environment variables: ``FS_FWDLLM_PORT`` is the server's port, the clients have the ones after it (free ports
unless set); ``FS_FWDLLM_DEADLINE_S`` bounds the whole run (a day unless set). The deadlines within a run are the
server's, ``fwdllm.deadline_s``.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fs_fwdllm.config.load import apply_overrides, find_config, read_tree
from fs_fwdllm.config.yaml_text import dump_yaml
from fs_fwdllm.errors import ConfigError, FwdLLMError
from fs_fwdllm.report.files import write_text_atomically

__all__ = ["Cluster", "main", "process_trees", "run_cluster"]

_COMMAND = (sys.executable, "-m", "fs_fwdllm.host.federatedscope", "--cfg")
_LOOPBACK = "127.0.0.1"
_SERVER = "server"
_LAST_PORT = 65535
_DAY_S = 86_400.0
_LOOK_EVERY_S = 0.1
#: The clients hear that it is over from the server; then they have this long to end by themselves.
_FAREWELL_S = 20.0
_GRACE_S = 5.0
_INTERRUPTED = 130
_OUT_OF_TIME = 124


def process_trees(tree: Mapping[str, Any], ports: Sequence[int], folder: Path) -> dict[str, dict[str, Any]]:
    """The configuration of every process, by its name (``server``, ``client1``, ...).

    Args:
        tree: the configuration of the run.
        ports: the server's and each client's.
        folder: what the host writes for a client goes there; the server's goes where the configuration says.
    """
    trees: dict[str, dict[str, Any]] = {}
    for index, port in enumerate(ports):
        own = deepcopy(dict(tree))
        role = "client" if index else _SERVER
        own["federate"] = {**(own.get("federate") or {}), "mode": "distributed"}
        own["distribute"] = {
            **(own.get("distribute") or {}), "use": True, "role": role, "data_idx": index,
            "server_host": _LOOPBACK, "server_port": ports[0], f"{role}_host": _LOOPBACK, f"{role}_port": port,
        }  # fmt: skip
        name = f"{role}{index or ''}"
        if index:
            own |= {"outdir": str(folder), "expname": name}
        trees[name] = own
    return trees


@dataclass
class Cluster:
    """The processes of a run. A context manager: leaving it ends those that still run.

    Attributes:
        folder: holds ``NAME.yaml`` and ``NAME.log`` of every process.
        trees: configuration of every process.
        command: what runs a process; the path of its configuration file is added.
    """

    folder: Path
    trees: dict[str, dict[str, Any]]
    command: Sequence[str] = _COMMAND
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, repr=False)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_all()

    def start(self, name: str) -> None:
        """Start a process; everything it says goes to its log."""
        path = self.folder / f"{name}.yaml"
        write_text_atomically(path, dump_yaml(self.trees[name]))
        with (self.folder / f"{name}.log").open("wb") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
            self._running[name] = subprocess.Popen(
                [*self.command, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> dict[str, int]:
        """Exit codes of the processes that have ended."""
        codes = {name: process.poll() for name, process in self._running.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def listens(self, name: str) -> bool:
        """Whether the process can be connected to."""
        distribute = self.trees[name]["distribute"]
        with contextlib.suppress(OSError), socket.create_connection((_LOOPBACK, distribute[f"{name}_port"]), 1.0):
            return True
        return False

    def end_all(self) -> None:
        """Ask every process that still runs to end, and make those end that have not after a few seconds."""
        for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
            running = [process for process in self._running.values() if process.poll() is None]
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            until = time.monotonic() + patience_s
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))

    def log_end(self, name: str, lines: int = 15) -> str:
        """The last lines of a process's log."""
        text = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def run_folder(self) -> str:
        """Where the host's server says that it writes; empty if it has not said."""
        log = self.folder / f"{_SERVER}.log"
        found = re.search(r"the output dir is ([^\x1b\n]+)", log.read_text(encoding="utf-8", errors="replace"))
        return found[1].strip() if found else ""


def run_cluster(cluster: Cluster, deadline_s: float) -> int:
    """Run the server and then the clients to their end; the exit code of the run."""
    until = time.monotonic() + deadline_s
    cluster.start(_SERVER)
    while not cluster.listens(_SERVER) and not cluster.ended() and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_S)
    for name in cluster.trees:
        if name != _SERVER and not cluster.ended():
            cluster.start(name)
    code = _wait_for_server(cluster, until)
    if code == 0:
        _wait_for_clients(cluster, min(until, time.monotonic() + _FAREWELL_S))
    return code


def _wait_for_server(cluster: Cluster, until: float) -> int:
    while time.monotonic() < until:
        codes = cluster.ended()
        if _SERVER in codes:
            return _report_end(cluster, _SERVER, codes[_SERVER])
        for name, code in codes.items():
            if code:
                return _report_end(cluster, name, code)
        time.sleep(_LOOK_EVERY_S)
    print(f"error: the run is not over at its deadline (FS_FWDLLM_DEADLINE_S); ended. Logs: {cluster.folder}")
    return _OUT_OF_TIME


def _wait_for_clients(cluster: Cluster, until: float) -> None:
    while len(cluster.ended()) < len(cluster.trees) and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_S)


def _report_end(cluster: Cluster, name: str, code: int) -> int:
    if code:
        how = f"with exit code {code}" if code > 0 else f"by signal {signal.Signals(-code).name}"
        print(f"error: {name} ended {how}; its log {cluster.folder / name}.log ends:\n{cluster.log_end(name)}")
    return code if code >= 0 else 128 - code


def _ports(count: int) -> list[int]:
    wanted = os.environ.get("FS_FWDLLM_PORT", "")
    if wanted:
        if not wanted.isdecimal() or not 0 < int(wanted) <= _LAST_PORT - count + 1:
            raise ConfigError(f"FS_FWDLLM_PORT {wanted!r}: must be a port from 1 to {_LAST_PORT - count + 1}")
        return list(range(int(wanted), int(wanted) + count))
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((_LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def _deadline_s() -> float:
    text = os.environ.get("FS_FWDLLM_DEADLINE_S", "") or str(_DAY_S)
    try:
        deadline_s = float(text)
    except ValueError:
        deadline_s = 0.0
    if not 0 < deadline_s < float("inf"):
        raise ConfigError(f"FS_FWDLLM_DEADLINE_S {text!r}: must be a number of seconds above 0")
    return deadline_s


def _prepare(arguments: Sequence[str], command: Sequence[str] = _COMMAND) -> Cluster:
    """The processes of the run that the command line asks for.

    Raises:
        ConfigError: the file, an override or an environment variable is not usable.
    """
    if not arguments:
        raise ConfigError("usage: CONFIG [key value ...]")
    cfg = find_config(arguments[0])
    tree = read_tree(cfg)
    apply_overrides(tree, arguments[1:])
    clients = (tree.get("federate") or {}).get("client_num", 0)
    if type(clients) is not int or clients < 1:
        raise ConfigError(f"federate.client_num {clients!r}: must be the number of clients to start, 1 or more")
    tree["outdir"], tree["expname"] = tree.get("outdir") or "exp", tree.get("expname") or cfg.stem
    folder = Path(tree["outdir"]) / f"{tree['expname']}_processes"
    folder.mkdir(parents=True, exist_ok=True)
    return Cluster(folder, process_trees(tree, _ports(1 + clients), folder), command)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, and Ctrl-C does so where a shell has told a background job to ignore it."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str], command: Sequence[str] = _COMMAND) -> int:
    """Run ``CONFIG [key value ...]``; the exit code. ``command`` as :attr:`Cluster.command`."""
    try:
        cluster, deadline_s = _prepare(arguments, command), _deadline_s()
        print(f"logs: {cluster.folder}", flush=True)
        with _interruptible(), cluster:
            code = run_cluster(cluster, deadline_s)
    except FwdLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; every process has been ended", file=sys.stderr)
        return _INTERRUPTED
    print(f"run folder: {cluster.run_folder() or 'none: the server ended before it made one'}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
