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

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from fs_fwdllm.config.load import apply_overrides, find_config, read_tree
from fs_fwdllm.config.yaml_text import dump_yaml
from fs_fwdllm.errors import ConfigError, FwdLLMError
from fs_fwdllm.host import supervise
from fs_fwdllm.host.addresses import is_listening, require_free
from fs_fwdllm.host.federatedscope import RUN_FOLDER
from fs_fwdllm.host.supervise import INTERRUPTED, LOOPBACK, Processes, wait_until
from fs_fwdllm.report.files import write_text_atomically

__all__ = ["Cluster", "choose_ports", "main", "prepare", "process_trees", "read_deadline_s", "run_cluster"]

_COMMAND = (sys.executable, "-m", "fs_fwdllm.host.federatedscope", "--cfg")
_SERVER = "server"
_LAST_PORT = 65535
_DAY_S = 86_400.0
#: The clients hear that it is over from the server; then they have this long to end by themselves.
_FAREWELL_S = 20.0
_LINES_SHOWN = 15
_ERROR = "error: "
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
            "server_host": LOOPBACK, "server_port": ports[0], f"{role}_host": LOOPBACK, f"{role}_port": port,
        }  # fmt: skip
        name = f"{role}{index or ''}"
        if index:
            own |= {"outdir": str(folder), "expname": name}
        trees[name] = own
    return trees


@dataclass
class Cluster:
    """The processes of a run.

    Attributes:
        folder: holds ``NAME.yaml`` and ``NAME.log`` of every process.
        trees: configuration of every process.
        command: what runs a process; the path of its configuration file is added.
        processes: those that have been started.
    """

    folder: Path
    trees: dict[str, dict[str, Any]]
    command: Sequence[str] = _COMMAND
    processes: Processes = field(default_factory=Processes)

    def start(self, name: str) -> None:
        """Start a process; everything it says goes to its log."""
        path = self.folder / f"{name}.yaml"
        write_text_atomically(path, dump_yaml(self.trees[name]))
        self.processes.start(name, [*self.command, str(path)], path.with_suffix(".log"))

    def run_folder(self) -> Path | None:
        """Our run folder, inside the folder where the host's server says that it writes. ``None`` if it made none."""
        found = re.search(r"the output dir is ([^\x1b\n]+)", self.said(_SERVER))
        path = Path(found[1].strip()) / RUN_FOLDER if found else None
        return path if path is not None and path.is_dir() else None

    def said(self, name: str) -> str:
        """Everything a process has said so far."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")


def run_cluster(cluster: Cluster, deadline_s: float) -> int:
    """Run the server and then the clients to their end, and end what still runs; the exit code of the run."""
    until, address = time.monotonic() + deadline_s, (LOOPBACK, cluster.trees[_SERVER]["distribute"]["server_port"])
    with cluster.processes as processes:
        cluster.start(_SERVER)
        wait_until(lambda: is_listening(address) or processes.ended(), until)
        for name in cluster.trees:
            if name != _SERVER and not processes.ended():
                cluster.start(name)
        wait_until(processes.decided, until)
        match processes.decided():
            case None:
                print(f"error: the run met its deadline (FS_FWDLLM_DEADLINE_S) and was ended. Logs: {cluster.folder}")
                return _OUT_OF_TIME
            case _, 0:
                wait_until(lambda: not processes.running(), min(until, time.monotonic() + _FAREWELL_S))
                return 0
            case name, code:
                print(f"error: {_reason(cluster, name, code)}")
                return code if code > 0 else 128 - code  # as shells count a signal


def _reason(cluster: Cluster, name: str, code: int) -> str:
    """Why a process failed: the error it ended with, or the end of its log if it left none."""
    lines, log = cluster.said(name).splitlines(), cluster.folder / f"{name}.log"
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    if errors:
        return f"{name}: {errors[-1]}; its log is {log}"
    end = [f"its log {log} ends:", *lines[-_LINES_SHOWN:]] if lines else ["it has said nothing"]
    return f"{name} {supervise.end_in_words(code)}; " + "\n".join(end)


def choose_ports(number: int) -> list[int]:
    """Ports from ``FS_FWDLLM_PORT`` on, or free ones.

    Raises:
        ConfigError: there are not as many from there on.
        HostError: one of them is taken.
    """
    wanted = os.environ.get("FS_FWDLLM_PORT", "")
    if not wanted:
        return supervise.free_ports(number)
    if not wanted.isdecimal() or not 0 < int(wanted) <= _LAST_PORT - number + 1:
        raise ConfigError(f"FS_FWDLLM_PORT {wanted!r}: must be a port from 1 to {_LAST_PORT - number + 1}")
    ports = list(range(int(wanted), int(wanted) + number))
    for port in ports:
        require_free(LOOPBACK, port, "the loopback address", f"FS_FWDLLM_PORT {wanted}: port")
    return ports


def read_deadline_s() -> float:
    """How long the whole run may take: ``FS_FWDLLM_DEADLINE_S``, or a day. Raises ``ConfigError`` if it is no time."""
    text = os.environ.get("FS_FWDLLM_DEADLINE_S", "") or str(_DAY_S)
    try:
        deadline_s = float(text)
    except ValueError:
        deadline_s = 0.0
    if not 0 < deadline_s < float("inf"):
        raise ConfigError(f"FS_FWDLLM_DEADLINE_S {text!r}: must be a number of seconds above 0")
    return deadline_s


def prepare(arguments: Sequence[str], command: Sequence[str] = _COMMAND) -> Cluster:
    """The processes of the run that the command line asks for; none is started.

    Raises:
        ConfigError: the file, an override or an environment variable is not usable.
        HostError: a port is taken.
    """
    if not arguments:
        raise ConfigError("usage: CONFIG [key value ...]")
    cfg = find_config(arguments[0])
    tree = read_tree(cfg)
    apply_overrides(tree, arguments[1:])
    clients = (tree.get("federate") or {}).get("client_num", 0)
    if type(clients) is not int or clients < 1:
        raise ConfigError(f"federate.client_num {clients!r}: must be the number of clients to start, 1 or more")
    tree["outdir"] = tree.get("outdir") or "exp"
    ports = choose_ports(1 + clients)
    folder, tree["expname"] = _claim_folder(Path(tree["outdir"]), str(tree.get("expname") or cfg.stem))
    return Cluster(folder, process_trees(tree, ports, folder), command)


def _claim_folder(outdir: Path, name: str) -> tuple[Path, str]:
    """A folder for the processes' files that no other run has, and the run's name; ``name-2``, ``-3`` ... if it must.

    Raises:
        ConfigError: the folder cannot be made.
    """
    for number in count(1):
        chosen = name if number == 1 else f"{name}-{number}"
        folder = outdir / f"{chosen}_processes"
        if (outdir / chosen).exists():
            continue
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()  # two runs that start at once: one of them makes it
        except FileExistsError:
            if not folder.parent.is_dir():
                raise ConfigError(f"outdir {str(outdir)!r}: {folder.parent} is a file, not a folder") from None
            continue
        except OSError as error:
            raise ConfigError(f"outdir {str(outdir)!r}: {folder} cannot be made ({error.strerror})") from error
        return folder, chosen
    raise AssertionError("numbers do not end")


def main(arguments: Sequence[str], command: Sequence[str] = _COMMAND) -> int:
    """Run ``CONFIG [key value ...]``; the exit code. ``command`` as :attr:`Cluster.command`."""
    try:
        cluster, deadline_s = prepare(arguments, command), read_deadline_s()
        print(f"logs: {cluster.folder}", flush=True)
        with supervise.interruptible():
            code = run_cluster(cluster, deadline_s)
    except FwdLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; every process has been ended", file=sys.stderr)
        return INTERRUPTED
    print(f"run folder: {cluster.run_folder() or 'none: the server ended before it made one'}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
