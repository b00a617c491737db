"""A client process with another base is refused by name on both sides, nothing waits for it, and the others go on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.errors import HostError
from fs_fwdllm.host.fedml.admission import Admission
from fs_fwdllm.host.fedml.cluster import write_addresses
from fs_fwdllm.host.placement import Placement
from fs_fwdllm.model.base.packing import Form
from fs_fwdllm.model.base.quantising import quantise_folder
from fs_fwdllm.running.agreement import settings_of_work, settings_text
from fs_fwdllm.running.session import Session
from tests.host.fedml.federation import FedMLWorld
from tests.host.small import read_jsonl
from tests.model.tiny import flip_a_bit

DEADLINE_S = 240
LORA = {"llm.adapter.args": [{"adapter_method": "lora", "r": 2}]}
REFUSED = "the server does not take this client: its base model is another one than the server's"
REFUSED_2 = f"client process (rank 2): {REFUSED}"
CURE = "give it a copy of the same folder (model.type) and the same fwdllm.base, and start it again"


def session_of(world: FedMLWorld, **settings: Any) -> Session:
    return Session.open(world.config("mezo", **settings))


def said_by(session: Session) -> str:
    return settings_text(settings_of_work(session))


def test_those_with_the_servers_base_take_part(world: FedMLWorld) -> None:
    """Four clients in two processes; what a process does not say, or garbles, is not compared and is told."""
    session = session_of(world)
    for other in (session.base_digest, b"", None, 7, "text"):
        admission = Admission(session, Placement(2))
        admission.note(0, session.base_digest, said_by(session))
        admission.note(1, other, said_by(session))
        admission.close()
        assert admission.has_others and admission.refusals == {}
        told = [] if other == session.base_digest else ["warning: client process (rank 2) does not say which base"]
        assert [remark[: len(told[0])] for remark in admission.remarks()] == told
        assert sorted(session.client_samples) == [1, 2, 3, 4]


def test_without_other_processes_nobody_is_asked(world: FedMLWorld) -> None:
    admission = Admission(session_of(world), Placement(4))
    admission.close()
    assert not admission.has_others and admission.remarks() == [] and len(admission.session.client_samples) == 4


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_one_bit_leaves_out_the_clients_of_that_process(world: FedMLWorld, needed: int) -> None:
    session = session_of(world, **{"fwdllm.min_answers": needed})
    admission = Admission(session, Placement(2))
    admission.note(0, session.base_digest, said_by(session))
    admission.note(1, session.base_digest[:-1] + bytes([session.base_digest[-1] ^ 1]), said_by(session))
    said = ""
    try:
        admission.close()
    except HostError as error:
        said = str(error)
    assert sorted(session.client_samples) == [1, 3]
    assert admission.refusals[1].startswith(REFUSED) and admission.refusals[1].endswith(CURE)
    (remark,) = admission.remarks()
    assert remark == f"refused client process (rank 2): {admission.refusals[1]}"
    assert said == ("2 of 4 clients are left, but 3 are needed (fwdllm.min_answers)" if needed == 3 else "")


def test_another_radius_leaves_out_the_clients_of_that_process(world: FedMLWorld) -> None:
    """As does a process that says nothing of how it is configured, or garbles it."""
    session, other = session_of(world), session_of(world, **{"fwdllm.radius": 0.5})
    for said, why in ((said_by(other), "fwdllm.radius (the server has "), (None, "it does not say how it is")):
        admission = Admission(session_of(world), Placement(2))
        admission.note(0, session.base_digest, said_by(session))
        admission.note(1, session.base_digest, said)
        admission.close()
        assert why in admission.refusals[1] and sorted(admission.session.client_samples) == [1, 3]


def model_of(world: FedMLWorld, form: str) -> tuple[Path, dict[str, Any]]:
    """A base that is packed, or that stays on the disk, and its keys."""
    plain = world.small.model("bert")
    if form == "streamed":
        return plain, {**LORA, "fwdllm.base.stream": True}
    quantise_folder(plain, world.root / "packed", Form("int4", 16))
    return world.root / "packed", LORA


def other_base(world: FedMLWorld, model: Path) -> list[str]:
    """The override that gives a process a copy of the model with one other bit."""
    return ["model.type", f"{flip_a_bit(shutil.copytree(model, world.root / 'other'))}@transformers"]


def ranks_over_grpc(world: FedMLWorld, path: Path, of_rank_2: list[str]) -> dict[int, tuple[int, str, str]]:
    """Exit code, output and errors of three processes that are started by hand."""
    with ExitStack() as ends:
        started = {}
        for rank in (0, 1, 2):
            words = ["--rank", str(rank), *(of_rank_2 if rank == 2 else [])]
            started[rank] = ends.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "fs_fwdllm.host.fedml", "--cf", str(path), *words],
                    text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
            ends.callback(started[rank].kill)
        said = {rank: process.communicate(timeout=DEADLINE_S) for rank, process in started.items()}
        return {rank: (process.returncode, *said[rank]) for rank, process in started.items()}


def table(world: FedMLWorld) -> dict[str, str]:
    write_addresses(world.root / "grpc.csv", 3)
    return {"grpc_ipconfig_path": str(world.root / "grpc.csv")}


def require_a_run_of_the_others(world: FedMLWorld) -> None:
    """Three rounds to the end, of clients 1 and 3, which live in the first process, without a word of the others."""
    lines = read_jsonl(world.root / "runs" / "small" / "metrics.jsonl")
    assert lines[-1]["final"] and [line["round"] for line in lines[:-1]] == [0, 1, 2, 3]
    for line in lines[1:-1]:
        assert set(line["loss"]) == {"1", "3"} and line["rejected"] == {}


@pytest.mark.fedml
@pytest.mark.parametrize("case", ["mezo", "blocks"])
def test_over_grpc_the_others_go_on(world: FedMLWorld, case: str) -> None:
    # Three visits a round would need three clients.
    in_two = {"fwdllm.blocks.parallel_blocks": 2, "federate.sample_client_num": 2}
    model, keys = model_of(world, "packed") if case == "mezo" else (world.small.model("bert"), in_two)
    counts = {"client_num_per_round": 2} if case == "blocks" else {}
    path = world.file(case, "GRPC", {**table(world), **counts}, **keys, **{"model.type": f"{model}@transformers"})
    said = ranks_over_grpc(world, path, other_base(world, model))
    assert said[0][0] == 0 and f"refused {REFUSED_2}" in " ".join(said[0][1].split()), said[0]
    assert said[1][0] == 0 and REFUSED not in said[1][2]
    assert said[2][0] == 2 and f"client process (rank 2): HostError: {REFUSED}" in said[2][2]
    assert f"{CURE}; until the run is over this process stays without work" in said[2][2]
    assert "Traceback" not in said[2][2]
    require_a_run_of_the_others(world)


@pytest.mark.fedml
@pytest.mark.parametrize(
    ("case", "few"),
    [
        ("mezo", "HostError: 2 of 4 clients are left, but 3 are needed (fwdllm.min_answers)"),
        ("blocks", "ConfigError: fwdllm.blocks: parallel_blocks 3 with clients_per_block 1 ask 3 clients a round"),
    ],
)
def test_over_grpc_too_few_are_an_error_on_every_side(world: FedMLWorld, case: str, few: str) -> None:
    """Fewer than the user wants, or than the method can do with."""
    model, keys = model_of(world, "streamed") if case == "mezo" else (world.small.model("bert"), {})
    path = world.file(case, "GRPC", table(world), **keys, **({"fwdllm.min_answers": 3} if case == "mezo" else {}))
    said = ranks_over_grpc(world, path, other_base(world, model))
    assert [code for code, _, _ in said.values()] == [2, 2, 2], said
    assert f"server (rank 0): {few}" in said[0][2] and f"; refused {REFUSED_2}" in said[0][2]
    assert f"client process (rank 1): HostError: the server has stopped: {few}" in said[1][2]
    assert f"client process (rank 2): HostError: {REFUSED}" in said[2][2]


@pytest.mark.fedml
@pytest.mark.parametrize("backend", ["simulation MPI", "MPI"])
def test_under_mpi_the_others_go_on(world: FedMLWorld, backend: str) -> None:
    model, keys = model_of(world, "streamed")
    path = world.file("mezo", backend, **keys)
    process = [sys.executable, "-m", "fs_fwdllm.host.fedml", "--cf", str(path)]
    mpiexec = str(Path(sys.executable).parent / "mpiexec")
    command = [mpiexec, "-n", "2", *process, ":", "-n", "1", *process, *other_base(world, model)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=DEADLINE_S)
    assert done.returncode != 0
    assert f"refused {REFUSED_2}" in " ".join(done.stdout.split()), done
    assert REFUSED_2 in done.stderr and CURE in done.stderr
    require_a_run_of_the_others(world)
