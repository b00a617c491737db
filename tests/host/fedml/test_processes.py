"""Real processes over FedML's transports: the same bits as the local host, and a defined end whatever happens to them.

A run of three processes takes some ten seconds to start, so each test asks much of one run.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from fs_fwdllm.errors import DataError, HostError
from fs_fwdllm.host.fedml import resume, run
from fs_fwdllm.host.fedml.guard import is_running
from fs_fwdllm.host.supervise import wait_until
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.local import run as run_locally
from tests.host.fedml.federation import FedMLWorld, comparable, digests, inject

pytestmark = pytest.mark.fedml

DEADLINE_S = 180
#: What drawing a picture leaves in a home folder the first time, on any host.
CACHES = (".cache", ".config")
SEVERAL = ("simulation MPI", "MPI", "GRPC")


@pytest.mark.parametrize("backend", SEVERAL)
@pytest.mark.parametrize("case", ["mezo", "forward"])
def test_several_processes_end_with_the_local_hosts_bits(world: FedMLWorld, case: str, backend: str) -> None:
    """Trainables, losses and bytes, round by round; and nothing is left outside the run folder and FedML's home."""
    path = run(world.file(case, backend))
    assert comparable(path) == comparable(run_locally(world.config(case)))
    assert {"config.yaml", "metrics.jsonl", "bytes.csv", "report.png", "adapter", "checkpoint", "processes"} <= {
        entry.name for entry in path.iterdir()
    }
    assert world.left_behind() <= {".fedml", *CACHES}
    assert not survivors(world)


@pytest.mark.parametrize("backend", ["MPI", "GRPC"])
@pytest.mark.parametrize("case", ["blocks", "gated"])
def test_methods_that_wait_or_take_turns_end_with_the_local_hosts_bits(
    world: FedMLWorld, case: str, backend: str
) -> None:
    assert comparable(run(world.file(case, backend))) == comparable(run_locally(world.config(case)))


@pytest.mark.parametrize("backend", ["simulation MPI", "GRPC"])
def test_one_round_is_enough_and_no_process_speaks_to_another_machine(world: FedMLWorld, backend: str) -> None:
    """As many processes as clients of a round, FedML's own default; its MPI simulator would wait for ever."""
    settings = {"federate.total_round_num": 1, "federate.client_num": 2, "federate.sample_client_num": 2}
    counts = {"client_num_in_total": 2, "client_num_per_round": 2}
    path, log = world.file("fedavg", backend, counts, **settings), world.root / "calls"
    command = [sys.executable, "-m", "fs_fwdllm", "run", "--host", "fedml", "--cf", str(path)]
    done = subprocess.run(traced(command, log), text=True, capture_output=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "round 1/1" in done.stdout
    assert digests(world.root / "runs" / "small") == digests(run_locally(world.config("fedavg", **settings)))
    assert spoken_to(log) <= {"127.0.0.1", "::1", *own_addresses()}


def traced(command: list[str], log: Path) -> list[str]:
    """``command`` with a record of whom it and its children call, where ``strace`` is there to make it."""
    if shutil.which("strace") is None:
        return command
    calls = ["-e", "signal=none", "-e", "trace=connect,sendto,sendmsg"]
    return ["strace", "-f", "--seccomp-bpf", "-qq", *calls, "-o", str(log), *command]


def spoken_to(log: Path) -> set[str]:
    text = log.read_text() if log.exists() else ""
    return set(re.findall(r'sin6?_addr=inet_(?:addr|pton)\((?:AF_INET6, )?"([^"]+)"', text))


def own_addresses() -> set[str]:
    """MPI's library calls its own machine by its own address, which the kernel delivers without a network."""
    return {address.address for found in psutil.net_if_addrs().values() for address in found}


@pytest.mark.parametrize("backend", ["MPI", "GRPC"])
def test_a_killed_client_ends_the_run_which_can_go_on(
    world: FedMLWorld, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.file("forward", backend)
    with monkeypatch.context() as patch:
        inject(world, patch, rank=1, round_index=1, do="kill")
        message = failure(world, lambda: run(path))
    assert message.startswith("client process (rank 1): was killed by SIGKILL")
    stopped = world.root / "runs" / "small"
    assert f"fs-fwdllm resume {stopped}" in message
    if backend == "MPI":
        return  # resuming is the same for all
    assert resume(stopped) == stopped
    assert comparable(stopped) == comparable(run_locally(world.config("forward")))


@pytest.mark.parametrize(("backend", "rank"), [("MPI", 2), ("GRPC", 0)])
def test_an_error_in_a_process_is_shown_with_its_traceback(
    world: FedMLWorld, backend: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(world, monkeypatch, rank, round_index=1, do="raise")
    message = failure(world, lambda: run(world.file("mezo", backend)))
    who = "server (rank 0)" if rank == 0 else f"client process (rank {rank})"
    assert f"{who}: RuntimeError: a fault of the test" in message
    assert "Traceback" in message and "in faulty" in message
    assert (world.root / "runs" / "small" / "checkpoint").exists()


def test_a_killed_server_ends_the_run(world: FedMLWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(world, monkeypatch, rank=0, round_index=1, do="kill")
    message = failure(world, lambda: run(world.file("mezo", "GRPC")))
    assert message.startswith("server (rank 0): was killed by SIGKILL")


@pytest.mark.parametrize(("backend", "rank"), [("MPI", 1)])
def test_a_client_that_hangs_is_named_at_the_deadline(
    world: FedMLWorld, backend: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(world, monkeypatch, rank, round_index=1, do="stop")
    message = failure(world, lambda: run(world.file("mezo", backend, {"fwdllm_deadline_s": 20})))
    assert "server (rank 0): HostError: no answer within 20 s from client process rank 1" in message
    assert "rank 2" not in message


@pytest.mark.parametrize(("backend", "number"), [("MPI", signal.SIGINT), ("GRPC", signal.SIGTERM)])
def test_an_interrupt_ends_every_process(world: FedMLWorld, backend: str, number: signal.Signals) -> None:
    path = world.file("mezo", backend, **{"federate.total_round_num": 10_000})
    command = [sys.executable, "-m", "fs_fwdllm", "run", "--host", "fedml", "--cf", str(path)]
    metrics = world.root / "runs" / "small" / "metrics.jsonl"
    with subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert wait_until(lambda: metrics.exists() or process.poll() is not None, time.monotonic() + DEADLINE_S)
        process.send_signal(number)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130 and "fs-fwdllm resume" in err, err
    assert not survivors(world)


def by_hand(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fs_fwdllm.host.fedml", "--cf", str(path), *arguments],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def addresses(world: FedMLWorld) -> dict[str, str]:
    from fs_fwdllm.host.fedml.cluster import write_addresses

    write_addresses(world.root / "grpc.csv", 3)
    return {"grpc_ipconfig_path": str(world.root / "grpc.csv")}


def test_clients_may_be_started_by_hand_and_before_the_server(world: FedMLWorld) -> None:
    path = world.file("mezo", "GRPC", addresses(world))
    with ExitStack() as ends:
        started = []
        for rank in (2, 1, 0):
            process = by_hand(path, "--rank", str(rank), "--role", "client" if rank else "server")
            ends.enter_context(process)
            ends.callback(process.kill)
            started.append(process)
            time.sleep(0 if rank == 2 else 2)
        for process in started:
            _, err = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, err
    assert comparable(world.root / "runs" / "small") == comparable(run_locally(world.config("mezo")))


def test_a_client_without_a_server_gives_up(world: FedMLWorld) -> None:
    path = world.file("mezo", "GRPC", {**addresses(world), "fwdllm_deadline_s": 2})
    with by_hand(path, "--rank", "1", "--role", "client") as process:
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert re.search(r"client process \(rank 1\): HostError: no server answers at 127.0.0.1:\d+ within 2 s", err)


@pytest.mark.parametrize(
    ("backend", "arguments", "fragment"),
    [
        ("GRPC", [], "--rank None: backend GRPC needs --rank 0 --role server"),
        ("GRPC", ["--rank", "3"], "--rank 1 to 2"),
        ("GRPC", ["--rank", "0", "--role", "client"], "--role client: contradicts rank 0"),
        ("GRPC", ["--rank", "1", "--role", "client"], "grpc_ipconfig_path"),
        ("MPI", [], "2 client processes need mpiexec -n 3, but there are 1 processes"),
    ],
)
def test_mistakes_by_hand_are_named(world: FedMLWorld, backend: str, arguments: list[str], fragment: str) -> None:
    with by_hand(world.file("mezo", backend), *arguments) as process:
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert fragment in err and "Traceback" not in err


def failure(world: FedMLWorld, call: Callable[[], Any]) -> str:
    """The message of the error a run ends with, in time, all its processes gone."""
    start = time.monotonic()
    with pytest.raises(HostError) as raised:
        call()
    assert time.monotonic() - start < DEADLINE_S
    assert not survivors(world)
    return str(raised.value)


def survivors(world: FedMLWorld) -> list[int]:
    """Processes of a run of this world that are still there."""
    folder = RunFolder(world.root / "runs" / "small")
    pids = [int(path.read_text()) for path in (folder.path / "processes").glob("rank-*.pid")]
    alive = [pid for pid in pids if is_running(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return alive


def test_a_taken_port_is_named_before_anything_starts(world: FedMLWorld) -> None:
    """FedML would share it in silence, and every process would wait for its whole deadline."""
    table = addresses(world)
    path = world.file("mezo", "GRPC", table)
    port = int(Path(table["grpc_ipconfig_path"]).read_text().splitlines()[2].split(",")[-1])
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(HostError, match=rf"grpc\.csv line 3 \(rank 1\): grpc_server_port {port}: something else"):
            run(path)
        assert not (world.root / "runs").exists()
        with by_hand(path, "--rank", "1", "--role", "client") as process:
            _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2 and f"(rank 1): grpc_server_port {port}: something else listens" in err


def test_an_error_of_ours_in_a_process_is_one_line(world: FedMLWorld) -> None:
    """Rows without an answer within ``llm.tok_len`` show when they are tokenised; there is nothing to go on with."""
    data = ["data.type", f"{world.small.instructions()}@llm", "data.root", str(world.root), "llm.tok_len", "2"]
    model = ["model.type", f"{world.small.model('llama')}@huggingface_llm", "model.task", ""]
    with pytest.raises(HostError, match=r"DataError: .*llm\.tok_len 2") as raised:
        run(world.file("mezo", "MPI"), [*data, *model])
    assert "Traceback" not in str(raised.value) and "fs-fwdllm resume" not in str(raised.value)
    assert not survivors(world)


def test_a_missing_file_or_program_is_named_before_anything_starts(
    world: FedMLWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.file("mezo", "MPI")
    with pytest.raises(DataError, match=r"no_such_file\.jsonl"):
        run(path, ["data.type", "no_such_file.jsonl@text"])
    monkeypatch.setattr(sys, "executable", str(world.root / "python"))
    monkeypatch.setenv("PATH", str(world.root))
    with pytest.raises(HostError, match=r"backend MPI: there is no mpiexec; pip install mpich"):
        run(path)
    assert not (world.root / "runs").exists()
