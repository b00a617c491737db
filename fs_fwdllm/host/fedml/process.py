"""One process of a run: ``python -m fs_fwdllm.host.fedml --cf FILE [--rank N --role server|client] [key value ...]``.

Started by hand it behaves as FedML's users know it. Started by :mod:`.cluster` it is also told a run folder; it then
writes what goes to standard error to ``processes/rank-N.log`` there, and an error, with its traceback, to
``processes/rank-N.error``, where the launcher finds it.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from fs_fwdllm.config.load import find_config
from fs_fwdllm.errors import ConfigError, FwdLLMError, HostError
from fs_fwdllm.host.fedml.guard import begin_guarded, name_of
from fs_fwdllm.host.fedml.installation import import_fedml
from fs_fwdllm.host.fedml.settings import FedMLSettings, read_settings
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.files import write_text_atomically

__all__ = ["EXIT_OF_ERROR", "end_process", "main", "processes_folder", "server_address"]

EXIT_OF_ERROR = 2
_POLL_S = 0.1

_who = SimpleNamespace(name="this process", error_path=None)


def processes_folder(folder: RunFolder) -> Path:
    """Where the processes of a run leave their logs and errors."""
    return folder.path / "processes"


def end_process(explanation: str) -> NoReturn:
    """End at once, from any thread, with an error that says why: FedML's own threads would keep the process alive."""
    error = HostError(explanation)
    _report(f"{_who.name}: {type(error).__name__}: {error}\n")
    os._exit(EXIT_OF_ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the part of one process. Returns 0; an error ends the process with status 2."""
    given = _parse(arguments)
    folder = RunFolder(Path(given.run)) if given.run else None
    try:
        settings = read_settings(Path(given.cf), given.overrides)
        if folder is not None and settings.args["backend"] == "MPI":
            begin_guarded(processes_folder(folder))
        rank = _rank(settings, given)
        _introduce(rank, folder)
        import_fedml()
        _run(settings, given, rank, folder)
    except KeyboardInterrupt:
        _leave("interrupted\n")
    except FwdLLMError as error:
        trace = "" if isinstance(error, ConfigError) else traceback.format_exc()
        _leave(f"{trace}{_who.name}: {type(error).__name__}: {error}\n")
    except Exception as error:
        _leave(f"{traceback.format_exc()}{_who.name}: {type(error).__name__}: {error}\n")
    return 0


def server_address(settings: FedMLSettings) -> tuple[str, int]:
    """Where the server of a gRPC run listens.

    Raises:
        ConfigError: there is no table of addresses, or it has no line for rank 0.
    """
    path = settings.args.get("grpc_ipconfig_path")
    if not path:
        raise ConfigError(
            "grpc_ipconfig_path: backend GRPC started by hand needs a CSV file 'eid,rank,grpc_server_ip,"
            "grpc_server_port'; fs-fwdllm run --host fedml makes one for processes on this machine"
        )
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"grpc_ipconfig_path: {path} cannot be read ({error.strerror})") from error
    names = lines[0].replace(" ", "").split(",") if lines else []
    for line in lines[1:]:
        row = dict(zip(names, line.replace(" ", "").split(","), strict=False))
        if row.get("eid") == "0" and row.get("grpc_server_port", "").isdigit():
            return row["grpc_server_ip"], int(row["grpc_server_port"])
    raise ConfigError(f"grpc_ipconfig_path: {path} has no line for the server (eid 0), or not FedML 0.9.6's columns")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fs_fwdllm.host.fedml", allow_abbrev=False)
    parser.add_argument("--cf", "--yaml_config_file", required=True, metavar="FILE", help="FedML's configuration file")
    parser.add_argument("--rank", type=int, help="0 is the server; MPI knows it by itself")
    parser.add_argument("--role", choices=["server", "client"], help="what the rank says, for FedML's users")
    parser.add_argument("--run_id", default="0", help="FedML's name of the run")
    parser.add_argument("--run", default="", metavar="RUN", help="an existing run folder (the launcher's)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --run")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="replace values of the file")
    given = parser.parse_intermixed_args(arguments)
    if given.resume and not given.run:
        parser.error("--resume needs --run RUN")
    return given


def _rank(settings: FedMLSettings, given: argparse.Namespace) -> int:
    """This process's number.

    Raises:
        ConfigError: it is needed and not given, or contradicts the role or MPI.
    """
    backend = settings.args["backend"]
    if backend == "sp":
        return 0
    if backend == "MPI":
        rank, size = _mpi_rank_and_size()
        if size != settings.worker_num + 1:
            raise ConfigError(
                f"worker_num: {settings.worker_num} client processes need mpiexec -n {settings.worker_num + 1}, but "
                f"there are {size} processes"
            )
    else:
        rank = given.rank if given.rank is not None else 0 if given.role == "server" else -1
        if not 0 <= rank <= settings.worker_num:
            raise ConfigError(
                f"--rank {given.rank}: backend GRPC needs --rank 0 --role server, or --rank 1 to {settings.worker_num} "
                "--role client; fs-fwdllm run --host fedml starts them all"
            )
    if given.role and (given.role == "server") != (rank == 0):
        raise ConfigError(f"--role {given.role}: contradicts rank {rank}; rank 0 is the server")
    return rank


def _mpi_rank_and_size() -> tuple[int, int]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise HostError(f"backend MPI: mpi4py finds no MPI library ({error}); pip install mpi4py mpich") from error
    return MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


def _run(settings: FedMLSettings, given: argparse.Namespace, rank: int, folder: RunFolder | None) -> None:
    from fs_fwdllm.host.fedml.program import build, init

    role = "server" if rank == 0 else "client"
    own = {"rank": rank, "role": role, "run_id": given.run_id, "yaml_config_file": str(find_config(given.cf, "--cf"))}
    args = SimpleNamespace(**{**settings.args, **own})
    if settings.args["backend"] == "GRPC":
        address = server_address(settings)
        if rank != 0:
            _wait_for_server(*address, settings.deadline_s)
    program = build(init(args), folder, resume=given.resume)
    try:
        program.run()
    except BaseException as error:
        if program.server_aggregator is not None:
            program.server_aggregator.close(error)
        raise


def _wait_for_server(host: str, port: int, deadline_s: float) -> None:
    """FedML's gRPC client dies if it is early. Raises :class:`HostError` if the server is not there in time."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        try:
            with socket.create_connection((host, port), timeout=max(_POLL_S, 1.0)):
                return
        except OSError:
            time.sleep(_POLL_S)
    raise HostError(f"no server answers at {host}:{port} within {deadline_s:g} s; start rank 0 --role server first")


def _introduce(rank: int, folder: RunFolder | None) -> None:
    _who.name = name_of(rank)
    if folder is None:
        return
    where = processes_folder(folder)
    where.mkdir(parents=True, exist_ok=True)
    _who.error_path = where / f"rank-{rank}.error"
    write_text_atomically(where / f"rank-{rank}.pid", f"{os.getpid()}\n")
    log = os.open(where / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    os.close(log)


def _leave(text: str) -> NoReturn:
    _report(text)
    sys.stdout.flush()
    os._exit(EXIT_OF_ERROR)  # MPI's and gRPC's threads would keep the process, and with it the others, alive


def _report(text: str) -> None:
    if _who.error_path is not None:
        _who.error_path.write_text(text, encoding="utf-8")
    sys.stderr.write(text)
    sys.stderr.flush()
