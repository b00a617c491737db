"""Inside FedML, in one process: its loop, our objects in it, what they let through and what they refuse."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fs_fwdllm.core.wire import ScalarUpdate, decode, encode
from fs_fwdllm.errors import ConfigError, HostError, WireError
from fs_fwdllm.host.fedml import resume, run
from fs_fwdllm.host.fedml.payload import pack_answers, unpack_answers, unpack_orders
from fs_fwdllm.host.fedml.settings import read_settings
from fs_fwdllm.method import ClientWorker
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.local import resume as resume_locally
from fs_fwdllm.running.local import run as run_locally
from tests.host.fedml.federation import CASES, FedMLWorld, comparable
from tests.host.small import read_jsonl

pytestmark = pytest.mark.fedml


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fs_fwdllm.report.reporter.plot_run", lambda path: RunFolder(Path(path)).report_path)


def program_of(path: Path) -> Any:
    """What a FedML program builds."""
    host = importlib.import_module("fs_fwdllm.host.fedml")
    args = SimpleNamespace(**{**read_settings(path).args, "rank": 0, "role": "server", "yaml_config_file": str(path)})
    return host.build(host.init(args))


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_the_local_hosts(world: FedMLWorld, case: str) -> None:
    ours = run(world.file(case, "sp"))
    assert comparable(ours) == comparable(run_locally(world.config(case)))


def test_weights_and_biases_without_a_network(world: FedMLWorld) -> None:
    """The real library, which FedML brings along: every round is in its offline file, inside the run folder."""
    pytest.importorskip("wandb")
    path = run(world.file("mezo", "sp", **{"wandb.use": True, "wandb.online_track": False}))
    (kept,) = (path / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0 and b"train_loss" in kept.read_bytes()
    assert comparable(path) == comparable(run_locally(world.config("mezo")))


def test_a_plain_fedml_program_is_enough(world: FedMLWorld) -> None:
    """What a user writes, in a process of its own, with FedML's own reader of arguments."""
    program = world.root / "main.py"
    program.write_text(
        "from fs_fwdllm.host.fedml import build, enable, init\n"
        "enable()\n"
        "from fedml import FedMLRunner\n"
        "args = init()\n"
        "p = build(args)\n"
        "FedMLRunner(args, p.device, p.dataset, p.model, p.client_trainer, p.server_aggregator).run()\n"
    )
    path = world.file("mezo", "sp")
    done = subprocess.run(
        [sys.executable, str(program), "--cf", str(path)], text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert comparable(world.root / "runs" / "small") == comparable(run_locally(world.config("mezo")))
    assert world.left_behind() <= {".fedml", ".cache", ".config"}


def test_nothing_is_hijacked_and_nobody_is_called(world: FedMLWorld) -> None:
    called: list[tuple[str, Any]] = []
    watching = [True]

    def watch(event: str, details: tuple[Any, ...]) -> None:
        if watching and event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"):
            called.append((event, details[1:]))

    sys.addaudithook(watch)
    before = sys.stdout.write, sys.excepthook, logging.root, list(logging.root.handlers)
    run(world.file("mezo", "sp"))
    watching.clear()
    assert called == []
    assert (sys.stdout.write, sys.excepthook, logging.root, list(logging.root.handlers)) == before
    assert world.left_behind() <= {".fedml"}


def test_other_trainers_go_where_they_always_went(world: FedMLWorld) -> None:
    importlib.import_module("fs_fwdllm.host.fedml").enable()
    runner = importlib.import_module("fedml.simulation.simulator")
    api = importlib.import_module("fedml.simulation.sp.fedavg").FedAvgAPI
    args = SimpleNamespace(federated_optimizer="FedAvg", client_num_per_round=0, dataset="x")
    stock = runner.SimulatorSingleProcess(args, None, [0, 0, None, None, {}, {}, {}, 2], None)
    assert type(stock.fl_trainer) is api


def test_one_round_is_enough(world: FedMLWorld) -> None:
    path = run(world.file("forward", "sp", **{"federate.total_round_num": 1}))
    assert [line["round"] for line in read_jsonl(path / "metrics.jsonl")] == [0, 1, 1]


def test_bytes_are_the_lengths_of_the_frames_fedml_is_handed(world: FedMLWorld) -> None:
    program = program_of(world.file("forward", "sp"))
    trainer, aggregator = program.client_trainer, program.server_aggregator
    down: dict[int, int] = {}
    up: dict[int, int] = {}
    set_params, get_params = trainer.set_model_params, trainer.get_model_params

    def set_and_count(payload: Any) -> None:
        set_params(payload)
        for client, frame in unpack_orders(payload[trainer.id]).frames.items():
            down[client] = down.get(client, 0) + len(frame)

    def get_and_count() -> Any:
        payload = get_params()
        for client, frame in unpack_answers(payload).items():
            up[client] = up.get(client, 0) + len(frame)
            assert len(frame) <= 4 * 4 + 100  # four probes
        return payload

    trainer.set_model_params, trainer.get_model_params = set_and_count, get_and_count
    program.run()
    rows = [line.split(",") for line in (aggregator.folder.traffic_path).read_text().splitlines()[1:]]
    assert down == {c: sum(int(row[2]) for row in rows if int(row[1]) == c) for c in down}
    assert up == {c: sum(int(row[3]) for row in rows if int(row[1]) == c) for c in up}
    final = read_jsonl(aggregator.folder.metrics_path)[-1]
    assert (final["download_bytes"], final["upload_bytes"]) == (sum(down.values()), sum(up.values()))


@pytest.mark.parametrize(
    "rubbish",
    [b"\x80\x04random", None, {"w": 1.0}, OrderedDict(weight=3), {}, {"fs_fwdllm": ((1, "text"),)}],
    ids=["bytes", "nothing", "dictionary", "state dictionary", "empty", "text"],
)
def test_a_payload_that_is_not_ours_costs_its_silo_the_round(world: FedMLWorld, rubbish: Any) -> None:
    lines, victim = meddled(world, lambda payload: rubbish)
    assert lines[1]["rejected"] == {str(victim): "unreadable"}
    assert len(lines[1]["loss"]) == 2


@pytest.mark.parametrize(
    ("meddle", "reason"),
    [
        (lambda frame: b"random bytes", "unreadable"),
        (lambda frame: frame[:-1], "unreadable"),
        (lambda frame: changed(frame, digest=bytes(16)), "other_digest"),
        (lambda frame: changed(frame, values=[1.0]), "wrong_length"),
        (lambda frame: changed(frame, loss=float("nan")), "not_finite"),
    ],
    ids=["random", "truncated", "another run's digest", "wrong length", "not finite"],
)
def test_a_frame_that_must_not_be_used_is_named(world: FedMLWorld, meddle: Any, reason: str) -> None:
    lines, victim = meddled(
        world, lambda payload: pack_answers({c: meddle(frame) for c, frame in unpack_answers(payload).items()})
    )
    assert lines[1]["rejected"] == {str(victim): reason}


def test_a_silo_cannot_speak_for_another(world: FedMLWorld) -> None:
    lines, victim = meddled(
        world, lambda payload: pack_answers({c % 4 + 1: frame for c, frame in unpack_answers(payload).items()})
    )
    assert lines[1]["rejected"] == {str(victim): "no_answer"}


def changed(frame: bytes, **fields: Any) -> bytes:
    update = decode(frame)
    assert isinstance(update, ScalarUpdate)
    return encode(type(update)(**{**vars(update), **fields}))


def meddled(world: FedMLWorld, meddle: Any) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run whose first client's first payload is changed on its way, and that client."""
    program = program_of(world.file("forward", "sp"))
    trainer = program.client_trainer
    get_params, victims = trainer.get_model_params, []

    def meddle_once() -> Any:
        payload = get_params()
        if victims:
            return payload
        victims.extend(unpack_answers(payload))
        return meddle(payload)

    trainer.get_model_params = meddle_once
    program.run()
    lines = read_jsonl(program.server_aggregator.folder.metrics_path)
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 3]
    (victim,) = victims
    return lines, victim


@pytest.mark.parametrize("resuming", [resume, resume_locally], ids=["inside FedML", "by the local host"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    world: FedMLWorld, resuming: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.file("forward", "sp")
    whole = run(path)
    original = ClientWorker.work

    def interrupt(self: ClientWorker, assignment: Any, examples: Any) -> Any:
        if assignment.round_index == 1:
            raise KeyboardInterrupt
        return original(self, assignment, examples)

    with monkeypatch.context() as patch:
        patch.setattr(ClientWorker, "work", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    stopped = world.root / "runs" / "small-2"
    assert "go on with: fs-fwdllm resume" in (stopped / "console.log").read_text()
    resuming(stopped)
    assert comparable(stopped) == comparable(whole)


def test_a_finished_run_goes_on_to_more_rounds(world: FedMLWorld) -> None:
    path = run(world.file("forward", "sp"))
    resume(path, rounds=5)
    assert comparable(path) == comparable(run_locally(world.config("forward", **{"federate.total_round_num": 5})))


def test_a_run_stops_early_where_the_local_host_does(world: FedMLWorld) -> None:
    """FedML counts its rounds to the end; ours is over before."""
    settings = {"early_stop.patience": 2, "early_stop.delta": 1000.0, "federate.total_round_num": 8}
    path = run(world.file("fedavg", "sp", **settings))
    assert comparable(path) == comparable(run_locally(world.config("fedavg", **settings)))
    assert read_jsonl(path / "metrics.jsonl")[-1]["round"] == 3


def test_an_error_of_ours_reaches_the_caller(world: FedMLWorld) -> None:
    with pytest.raises(ConfigError, match="sample_client_num 9: only 4 clients"):
        run(world.file("mezo", "sp", {"client_num_per_round": 9}))


def test_answers_before_questions_are_refused(world: FedMLWorld) -> None:
    program = program_of(world.file("mezo", "sp"))
    with pytest.raises(HostError, match="has not begun"):
        program.server_aggregator.aggregate([])
    with pytest.raises(WireError, match="nothing for silo 0"):
        program.client_trainer.set_model_params({3: None})


def test_fedmls_command_tree_has_a_local_run(world: FedMLWorld, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("fs_fwdllm.host.fedml.command").main
    main(["run", "--help"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("local", "list", "logs", "stop"))
    main(["run", "local", "--cf", str(world.file("mezo", "sp")), "comm_round", "1"])
    assert json.loads((world.root / "runs/small/metrics.jsonl").read_text().splitlines()[-1])["round"] == 1
