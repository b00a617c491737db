"""A whole run of every method: its files agree with each other, its adapter with PEFT, its result with its seed."""

from __future__ import annotations

import csv
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fs_fwdllm.config.methods import METHODS as FACTS
from fs_fwdllm.errors import ConfigError, ModelError, TrainingStalledError
from fs_fwdllm.forecast.plan import make_plan
from fs_fwdllm.method import assemble_server
from fs_fwdllm.model.inputs import batch_on
from fs_fwdllm.model.quiet import quiet_transformers
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.accounting import Accounting
from fs_fwdllm.running.checkpoint import read_checkpoint
from fs_fwdllm.running.local import run
from fs_fwdllm.running.sampling import clients_asked, clients_per_round, sample_clients
from fs_fwdllm.running.session import Session
from tests.host.small import CLASSES, METHODS, PLAIN_MEAN, World, methods_where, read_jsonl
from tests.model.tiny import save_tiny_model

CUMULATIVE = ("seconds", "upload_bytes", "download_bytes", "forward_passes", "backward_passes", "peak_rss_mib")
COLUMNS = {*CUMULATIVE, "round", "digest", "peak_device_mib"}
TRAINED = {"train_loss", "learning_rate", "loss", "rejected", "clipped", "capped"}
OF_BLOCKS = {"blocks", "cycle", "block_visits", "reassigned_blocks"}
every_method = pytest.mark.parametrize("method", METHODS)
with_an_adapter = pytest.mark.parametrize("method", methods_where(lambda facts: not facts.trains_blocks))
TASKS = pytest.mark.parametrize("language_model", [False, True], ids=["classifier", "language model"])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(RunFolder(path).metrics_path)


def rows_of(path: Path) -> list[dict[str, int]]:
    with RunFolder(path).traffic_path.open(encoding="utf-8", newline="") as file:
        return [{key: int(value) for key, value in row.items()} for row in csv.DictReader(file)]


def final_digest(path: Path) -> str:
    return lines_of(path)[-1]["digest"]


def test_every_method_has_a_configuration_here() -> None:
    assert sorted(METHODS) == FACTS.names()


@pytest.mark.usefixtures("pictures")
@TASKS
@every_method
def test_a_run_leaves_what_it_promises(world: World, method: str, language_model: bool) -> None:
    path = run(world.config(METHODS[method], language_model=language_model))
    blocks = FACTS[method].trains_blocks
    saved = "model" if blocks else "adapter"
    names = {file.name for file in path.iterdir()} - {"base_model"}
    files = {"config.yaml", "metrics.jsonl", "bytes.csv", "console.log", "report.png", "checkpoint"}
    assert names == {*files, saved, f"{saved}-last"}
    start, *rounds, final = lines_of(path)
    assert set(start) == COLUMNS | {"eval", "model"}
    assert [line["round"] for line in (start, *rounds, final)] == [0, 1, 2, 3, 4, 5, 5]
    for line in rounds:
        assert set(line) == COLUMNS | TRAINED | {"eval"} | (OF_BLOCKS if blocks else set())
        assert set(line["loss"]) == set(line["learning_rate"]) == {"1", "2", "3", "4"}
        assert line["rejected"] == {} and len(bytes.fromhex(line["digest"])) == 16
        assert line["train_loss"] == pytest.approx(sum(line["loss"].values()) / 4, rel=0.1)
    about_what_is_saved = {"saved", "saved_round", "saved_digest", "saved_last", "chosen_by", "best"}
    assert set(final) == COLUMNS | {"final"} | about_what_is_saved
    assert final["final"] is True and (final["saved"], final["saved_last"]) == (saved, f"{saved}-last")
    assert final["digest"] == rounds[-1]["digest"]
    assert len({line["digest"] for line in (start, *rounds)}) == 6
    metrics = {"loss", "token_accuracy", "perplexity"} if language_model else {
        "loss", "accuracy", "majority_accuracy", "macro_f1", "majority_macro_f1", "mcc"
    }  # fmt: skip
    assert all(set(line["eval"]) == metrics for line in (start, *rounds))


@every_method
def test_the_counts_of_a_run_add_up(world: World, method: str) -> None:
    facts, own = FACTS[method], METHODS[method]
    asked = 4 if facts.trains_blocks else 3  # whom a visit asks is the schedule's to say
    config = world.config(own if facts.trains_blocks else {**own, "federate.sample_client_num": asked})
    path = run(config)
    lines, rows = lines_of(path), rows_of(path)
    for earlier, later in pairwise(lines):
        assert all(earlier[name] <= later[name] for name in CUMULATIVE)
    for name in ("upload_bytes", "download_bytes"):
        for line in lines[1:]:
            assert line[name] == sum(row[name] for row in rows if row["round"] <= line["round"])
    steps, probes = config.train.local_update_steps, config.fwdllm.probes
    assert lines[-1]["forward_passes"] == 5 * asked * steps * (2 * probes if facts.measures_slopes else 1)
    assert lines[-1]["backward_passes"] == (0 if facts.measures_slopes else 5 * asked * steps)
    dense = 4 * Session.open(config).parts.trainables.count
    for row in rows:
        if facts.measures_slopes:
            assert 4 * steps * probes < row["upload_bytes"] <= 4 * steps * probes + 100
        elif facts.trains_blocks:
            assert 0.3 * dense < row["upload_bytes"] < 0.6 * dense, "one of two blocks, and the head"
        else:
            assert row["upload_bytes"] > dense
    for number in range(1, 6):
        clients = [row["client"] for row in rows if row["round"] == number]
        assert clients == sample_clients(config.seed, number - 1, [1, 2, 3, 4], asked)


@TASKS
@with_an_adapter
def test_the_adapter_is_one_that_peft_loads(world: World, method: str, language_model: bool) -> None:
    """Base and adapter, loaded without this package, answer with exactly the logits of the server's parameters."""
    config = world.config(METHODS[method], language_model=language_model)
    path = run(config)
    session = Session.open(config)
    trained = read_checkpoint(RunFolder(path).checkpoint_path).tensors
    count = len(session.parts.trainables.tensors)
    values = [trained[f"trainable.{index}"] for index in range(count)]
    assert lines_of(path)[-1]["digest"] != session.parts.trainables.digest().hex()
    loader: Any = AutoModelForCausalLM if language_model else AutoModelForSequenceClassification
    options = {} if language_model else {"num_labels": len(CLASSES)}
    with quiet_transformers():
        base = loader.from_pretrained(config.model.type.rpartition("@")[0], **options)
        loaded: nn.Module = PeftModel.from_pretrained(base, path / "adapter-last").eval()
    batch = batch_on("cpu", session.evaluation_batches[0])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        untrained = session.loaded.model(**inputs).logits
        with session.parts.trainables.holding(values):
            expected = session.loaded.model(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, expected)
    assert not torch.equal(untrained, expected)


@every_method
def test_what_the_last_line_reports_is_what_was_saved(world: World, method: str) -> None:
    path = run(world.config(METHODS[method]))
    checkpoint = read_checkpoint(RunFolder(path).checkpoint_path)
    session = Session.open(RunFolder(path).config())
    server = assemble_server(session.parts, session.client_samples)
    server.load_state(checkpoint.tensors, checkpoint.numbers)
    last = lines_of(path)[-2]
    assert server.digest.hex() == final_digest(path) == last["digest"]
    assert session.evaluate(server.trainables) == last["eval"]


@every_method
def test_the_same_configuration_is_the_same_run(world: World, method: str) -> None:
    first, again = run(world.config(METHODS[method])), run(world.config(METHODS[method]))
    assert first != again
    assert [line["digest"] for line in lines_of(first)] == [line["digest"] for line in lines_of(again)]
    assert rows_of(first) == rows_of(again)
    other = run(world.config({**METHODS[method], "seed": 6}))
    assert final_digest(other) != final_digest(first)


@every_method
def test_every_parameter_can_be_trained(world: World, method: str) -> None:
    settings = {**METHODS[method], "llm.adapter.use": False, "llm.adapter.args": [{}], "federate.total_round_num": 2}
    path = run(world.config(settings))
    assert lines_of(path)[-1]["saved"] == "model"
    assert (path / "model" / "config.json").is_file()


@pytest.mark.parametrize(("freq", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (-1, [0, 5])])
def test_evaluation_keeps_its_rhythm_and_always_closes(world: World, freq: int, expected: list[int]) -> None:
    path = run(world.config({**METHODS["forward_gradient"], "eval.freq": freq}))
    assert [line["round"] for line in lines_of(path) if line.get("eval")] == expected


def test_without_evaluation_data_a_run_still_runs(world: World) -> None:
    path = run(world.config({**METHODS["forward_gradient"], "data.splits": [1.0, 0.0, 0.0]}))
    assert not any(line.get("eval") for line in lines_of(path))


@with_an_adapter
def test_the_prefix_cache_does_not_change_a_bit_of_a_run(world: World, method: str) -> None:
    head = {**METHODS[method], "llm.adapter.args": [{"adapter_method": "head"}]}
    cached, plain = run(world.config(head)), run(world.config({**head, "fwdllm.prefix_cache_mib": 0}))
    assert final_digest(plain) == final_digest(cached)


def test_sampling_is_a_function_of_seed_and_round() -> None:
    clients = list(range(1, 21))
    rounds = [sample_clients(3, index, clients, 6) for index in range(40)]
    assert rounds == [sample_clients(3, index, clients, 6) for index in range(40)]
    assert all(chosen == sorted(set(chosen)) and len(chosen) == 6 for chosen in rounds)
    assert len({tuple(chosen) for chosen in rounds}) == 40
    assert {client for chosen in rounds for client in chosen} == set(clients)
    assert rounds != [sample_clients(4, index, clients, 6) for index in range(40)]
    asked = [sum(client in chosen for chosen in rounds) for client in clients]
    assert max(asked) <= 12 + 5 * math.sqrt(40 * 0.3 * 0.7)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 10),
        ({"federate.sample_client_num": 4}, 4),
        ({"federate.sample_client_rate": 0.25}, 2),
        ({"federate.sample_client_rate": 1.0}, 10),
        ({"federate.sample_client_rate": 0.01}, 1),
        ({"federate.sample_client_rate": 0.29}, 2),
        ({"federate.sample_client_num": 4, "federate.sample_client_rate": 0.99}, 9),
    ],
)
def test_how_many_clients_a_round_asks(world: World, settings: dict[str, Any], expected: int) -> None:
    assert clients_per_round(world.config(settings), 10) == expected == clients_asked(world.config(settings), 10)


def test_too_few_are_refused_before_a_run_and_all_asked_in_one_that_has_begun(world: World) -> None:
    config = world.config({"federate.sample_client_num": 4})
    with pytest.raises(ConfigError, match="only 3 clients hold training samples"):
        clients_per_round(config, 3)
    assert clients_asked(config, 3) == 3


def test_a_sampled_run_asks_whom_the_sampling_says(world: World) -> None:
    settings = {"federate.client_num": 6, "federate.sample_client_rate": 0.5, "federate.total_round_num": 6}
    path = run(world.config({**METHODS["mezo"], **settings}))
    asked = [tuple(row["client"] for row in rows_of(path) if row["round"] == number) for number in range(1, 7)]
    assert all(len(set(clients)) == 3 for clients in asked)
    assert len(set(asked)) > 1


def broken_model(world: World, value: float, first_token: int | None = None) -> str:
    """A model with one weight spoiled, as a checkpoint of a diverged run has it, or the embeddings from a token on."""
    folder = save_tiny_model(world.root / "broken", "bert")
    tensors = load_file(folder / "model.safetensors")
    if first_token is None:
        tensors["encoder.layer.1.output.dense.weight"][0, 0] = value
    else:
        tensors["embeddings.word_embeddings.weight"][first_token:] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return f"{folder}@transformers"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_without_a_finite_output_is_refused(world: World, value: float) -> None:
    config = world.config({**METHODS["fedavg"], "model.type": broken_model(world, value)})
    with pytest.raises(ModelError, match="gives NaN or infinity"):
        run(config)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_method
def test_a_model_without_a_finite_loss_stops_the_run(world: World, method: str, value: float) -> None:
    """No round has a usable update: three lines that say so, then an error; never a step.

    The model breaks at tokens that loading does not try it out on.
    """
    config = world.config({**METHODS[method], "model.type": broken_model(world, value, first_token=30)})
    with pytest.raises(TrainingStalledError, match=r"no usable update for 3 rounds.*not_finite"):
        run(config)
    (path,) = Path(config.outdir).iterdir()
    lines = lines_of(path)
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert len({line["digest"] for line in lines}) == 1
    for line in lines[1:]:
        assert line["train_loss"] is None and line["eval"]["loss"] is None
        assert line["rejected"] == dict.fromkeys("1234", "not_finite")


@pytest.mark.parametrize(("rate", "told"), [(0.05, 0), (30.0, 1)])
def test_divergence_is_told_once_in_the_round_it_happens_with_the_key_to_change(
    rate: float, told: int, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(world.config({**METHODS["fedavg"], "train.optimizer.lr": rate}))
    losses = [line["eval"]["loss"] for line in read_jsonl(path / "metrics.jsonl") if "eval" in line]
    assert (max(losses) > 1.2 * losses[0]) == bool(told)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("training diverges; lower train.optimizer.lr") == told


@pytest.mark.parametrize("method", ["fedavg", "mezo", "forward_gradient"])
def test_divergence_is_told_between_evaluations_too(
    method: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = {**METHODS[method], "eval.freq": -1, "fwdllm.saved_round": "last", "federate.total_round_num": 12}
    rates = {"fedavg": 30.0, "mezo": 3.0, "forward_gradient": 100.0}
    path = run(world.config({**quiet, **PLAIN_MEAN, "train.optimizer.lr": rates[method]}))
    losses = [line["train_loss"] for line in lines_of(path) if "train_loss" in line]
    far = [number for number, loss in enumerate(losses, start=1) if loss is None or loss > 2 * losses[0] + 1]
    said = " ".join(capsys.readouterr().out.split())
    assert far and f"warning: round {far[0]}: the training loss is" in said
    assert said.count("training diverges; lower train.optimizer.lr") == 1


def test_a_resumed_run_reports_the_most_memory_of_all_its_processes() -> None:
    earlier = Accounting(torch.device("cpu")).counters() | {"peak_rss_mib": 1e6, "peak_device_mib": 5e5}
    later = Accounting(torch.device("cpu"))
    later.restore(earlier)
    assert later.columns()["peak_rss_mib"] == 1e6 and later.columns()["peak_device_mib"] == 5e5
    assert later.counters()["peak_rss_mib"] == 1e6


def test_the_most_memory_never_falls_though_the_kernel_may_read_it_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([700.0, 699.5, 701.0])
    monkeypatch.setattr("fs_fwdllm.running.accounting.peak_rss_mib", lambda: next(readings))
    accounting = Accounting(torch.device("cpu"))
    assert [accounting.columns()["peak_rss_mib"] for _ in range(3)] == [700.0, 700.0, 701.0]


def test_what_has_no_effect_here_is_said_by_run_and_plan_alike(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**METHODS["mezo"], "federate.use_ss": True, "use_gpu": True, "federate.total_round_num": 1}
    config = world.config(settings)
    remarks = make_plan(config).remarks
    assert any("federate.use_ss" in remark for remark in remarks)
    assert torch.cuda.is_available() or any("no accelerator is found" in remark for remark in remarks)
    run(config)
    said = " ".join(capsys.readouterr().out.split())
    assert all(remark in said for remark in remarks)
