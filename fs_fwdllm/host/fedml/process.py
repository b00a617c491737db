"""One process of a run: ``python -m fs_fwdllm.host.fedml --cf FILE [--rank N --role server|client] [key value ...]``.

Started by hand it behaves as FedML's users know it. Started by :mod:`.cluster` it is also told a run folder; it then
writes what goes to standard error to ``processes/rank-N.log`` there, and an error, with its traceback, to
``processes/rank-N.error``, where the launcher finds it.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from fs_fwdllm.config.load import find_config
from fs_fwdllm.errors import ConfigError, FwdLLMError, HostError
from fs_fwdllm.host.addresses import is_listening, joined
from fs_fwdllm.host.fedml.addresses import read_addresses, require_free_places
from fs_fwdllm.host.fedml.guard import begin_guarded
from fs_fwdllm.host.fedml.identity import introduce, leave, processes_folder
from fs_fwdllm.host.fedml.installation import import_fedml
from fs_fwdllm.host.fedml.settings import FedMLSettings, read_settings
from fs_fwdllm.host.supervise import wait_until
from fs_fwdllm.report import RunFolder

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the part of one process. Returns 0; an error ends the process with status 2."""
    given = _parse(arguments)
    folder = RunFolder(Path(given.run)) if given.run else None
    try:
        settings = read_settings(Path(given.cf), given.overrides)
        if folder is not None and settings.args["backend"] == "MPI":
            begin_guarded(processes_folder(folder))
        rank = _rank(settings, given)
        introduce(rank, folder)
        import_fedml()
        _run(settings, given, rank, folder)
    except KeyboardInterrupt:
        leave("", HostError("interrupted"))
    except FwdLLMError as error:
        leave("", error)
    except Exception as error:
        leave(traceback.format_exc(), error)
    return 0


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
        places = read_addresses(settings)
        require_free_places(places, [rank])
        server = places[0].address
        # FedML's client dies if it is early.
        if rank != 0 and not wait_until(lambda: is_listening(server), time.monotonic() + settings.deadline_s):
            waited = f"no server answers at {joined(*server)} within {settings.deadline_s:g} s"
            raise HostError(f"{waited}; start rank 0 --role server first")
    program = build(init(args), folder, overrides=given.overrides, resume=given.resume)
    try:
        program.run()
    except BaseException as error:
        if program.server_aggregator is not None:
            program.server_aggregator.close(error)
        raise
