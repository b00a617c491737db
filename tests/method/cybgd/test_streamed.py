"""Blocks of a base on the disk are trained as those of one in memory are, and the user's files are left alone."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fs_fwdllm
from fs_fwdllm.config import dump_config
from fs_fwdllm.errors import CheckpointError, ConfigError, ModelError, TrainingStalledError
from fs_fwdllm.forecast.plan import make_plan
from fs_fwdllm.method import assemble_server
from fs_fwdllm.method.cybgd.server import BlockServer
from fs_fwdllm.model.base import shards
from fs_fwdllm.model.base.changed_files import ChangedFiles
from fs_fwdllm.model.base.packed import PackedLinear, packed_layers
from fs_fwdllm.model.base.streaming import Reader
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running import local
from fs_fwdllm.running.checkpoint import read_checkpoint
from fs_fwdllm.running.evaluating import evaluate_run
from fs_fwdllm.running.session import Session
from fs_fwdllm.running.state_file import read_about
from tests.host.small import Federation, World, read_jsonl
from tests.method.cybgd.settings import blocks
from tests.method.cybgd.test_runs import lines_without_time
from tests.model.sentence import save_tiny_encoder

STREAMED = {"fwdllm.base.stream": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": blocks(norm="in"),
    "bfloat16": {**blocks(), "fwdllm.base.compute_dtype": "bfloat16"},
    "matrices, int8 both ways": {
        **blocks(granularity="matrix", upload="int8", download_inactive="int8"),
        "fwdllm.base.compute_dtype": "bfloat16",
    },
    "halves, state on the server": blocks(granularity="attention-mlp", optimizer_state="server", parallel_blocks=2),
    "whole model": blocks(schedule="full"),
    "skipped and pruned": blocks(download_drop_ratio=0.9, download_keep_ratio=0.5),
    "checkpointed": {**blocks(), "fwdllm.gradient_checkpointing": True},
}


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rounds(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(path / "metrics.jsonl") if not line.get("final")]


@pytest.mark.parametrize("case", CASES)
def test_a_run_over_the_disk_is_the_run_in_memory(world: World, case: str) -> None:
    settings = {**CASES[case], "federate.total_round_num": 5, "eval.freq": 2}
    base = files_of(world.model("llama"))
    resident = local.run(world.config(settings, language_model=True))
    streamed = local.run(world.config({**settings, **STREAMED}, language_model=True))
    assert files_of(world.model("llama")) == base
    assert rounds(streamed)[0]["digest"] == rounds(resident)[0]["digest"]  # the same names, order, shapes and bits
    # Llama's layers have no bias, and each of these is one block of rows: the very same operations.
    assert lines_without_time(streamed / "metrics.jsonl") == lines_without_time(resident / "metrics.jsonl")
    ours, theirs = weights(streamed / "model"), weights(resident / "model")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
    AutoModelForCausalLM.from_pretrained(streamed / "model")


@pytest.mark.parametrize("architecture", ["gpt2", "bloom"])
def test_other_decoders(world: World, architecture: str) -> None:
    model = {"model.type": f"{world.model(architecture)}@huggingface_llm", "federate.total_round_num": 3}
    resident = local.run(world.config({**blocks(), **model}, language_model=True))
    streamed = local.run(world.config({**blocks(), **model, **STREAMED}, language_model=True))
    assert rounds(streamed)[0]["digest"] == rounds(resident)[0]["digest"]
    for name, tensor in weights(streamed / "model").items():
        torch.testing.assert_close(tensor, weights(resident / "model")[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize("architecture", ["bert", "albert", "distilbert"])
def test_a_classifier_with_a_fresh_head(world: World, architecture: str) -> None:
    model = {"model.type": f"{world.model(architecture)}@transformers", "federate.total_round_num": 3}
    resident = local.run(world.config({**blocks(), **model}))
    streamed = local.run(world.config({**blocks(), **model, **STREAMED}))
    assert rounds(streamed)[0]["digest"] == rounds(resident)[0]["digest"]
    for name, tensor in weights(streamed / "model").items():
        torch.testing.assert_close(tensor, weights(resident / "model")[name], rtol=0, atol=2e-3)
    AutoModelForSequenceClassification.from_pretrained(streamed / "model")
    assert fs_fwdllm.load(streamed).predict(["w1 w2"])[0].label


def test_a_classifier_on_an_encoders_own_pooling(world: World) -> None:
    encoder = save_tiny_encoder(world.root / "encoder")
    settings = {**blocks(), "model.type": f"{encoder}@transformers", "federate.total_round_num": 3}
    resident = local.run(world.config(settings))
    streamed = local.run(world.config({**settings, **STREAMED}))
    assert rounds(streamed)[0]["digest"] == rounds(resident)[0]["digest"]
    for place in ("0_Transformer", "3_Dense"):
        ours, theirs = weights(streamed / "model" / place), weights(resident / "model" / place)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-3)
    said = [fs_fwdllm.load(path).predict(["w1 w2", "w30 w31 w32"]) for path in (streamed, resident)]
    for one, other in zip(*said, strict=True):
        assert one.label == other.label and one.probabilities == pytest.approx(other.probabilities, abs=1e-3)


def test_what_was_trained_is_loaded_from_the_disk_again(world: World) -> None:
    path = local.run(world.config({**blocks(), **STREAMED}, language_model=True))
    trained = fs_fwdllm.load(path)
    assert any(layer.streamed is not None for _, layer in packed_layers(trained.model))
    assert trained.generate(["w1 w2"])


def test_a_plan_plays_visits_and_leaves_nothing(world: World) -> None:
    settings = {**blocks(zstandard=False), **STREAMED, "federate.total_round_num": 4, "eval.freq": -1}
    config = world.config(settings, language_model=True)
    forecast = make_plan(config)
    outdir = Path(config.outdir)
    assert not outdir.exists() or not list(outdir.iterdir())
    counted = read_jsonl(local.run(config) / "metrics.jsonl")[-1]
    assert forecast.run.download_bytes == pytest.approx(counted["download_bytes"], rel=1e-3)
    in_memory = make_plan(world.config({**settings, "fwdllm.base.stream": False}, language_model=True))
    assert forecast.memory.replicas_bytes < in_memory.memory.replicas_bytes / 4


def test_a_model_is_written_in_shards(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    path = local.run(world.config({**blocks(), **STREAMED}, language_model=True))
    files = sorted((path / "model").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 60_000 for file in files)
    whole = AutoModelForCausalLM.from_pretrained(path / "model").state_dict()
    saved = weights(path / "model")
    assert all(torch.equal(whole[name], tensor) for name, tensor in saved.items())
    assert set(saved) <= set(whole) and any(".layers." in name for name in saved)


def test_only_the_visited_block_is_in_memory(world: World) -> None:
    federation = Federation(world.config({**blocks(schedule="ascending"), **STREAMED}, language_model=True))
    worker = federation.worker(1)
    model, plan = worker.objective.model, federation.server.plan
    layers = {name for name, _ in packed_layers(model)}
    with worker.replica.store.resident([1]):
        inside = layers - {name for name, _ in packed_layers(model)}
        assert inside == {name.removesuffix(".weight") for name in plan.parts[1].parameters} & layers
        assert all(not isinstance(model.get_submodule(name), PackedLinear) for name in inside)
    assert {name for name, _ in packed_layers(model)} == layers
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_error_in_a_visit_leaves_the_model_on_the_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(world.config({**blocks(schedule="ascending"), **STREAMED}, language_model=True))
    worker = federation.worker(1)
    layers = [name for name, _ in packed_layers(worker.objective.model)]
    before = federation.server.digest

    def fail(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fs_fwdllm.estimator.Backprop.gradient", fail)
        with pytest.raises(KeyboardInterrupt):
            federation.round(0, [1])
    assert [name for name, _ in packed_layers(worker.objective.model)] == layers
    assert worker.replica.store.digest() == before


@pytest.mark.parametrize("case", ["plain", "bfloat16", "halves, state on the server"])
def test_a_resumed_run_is_the_uninterrupted_one(world: World, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**CASES[case], **STREAMED, "federate.total_round_num": 6, "eval.freq": 2}
    config = world.config(settings, language_model=True)
    whole = local.run(config)
    broken = interrupted(config, monkeypatch)
    resumed = local.resume(broken)
    assert lines_without_time(resumed / "metrics.jsonl") == lines_without_time(whole / "metrics.jsonl")
    ours, theirs = weights(resumed / "model"), weights(whole / "model")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def interrupted(config: Any, monkeypatch: pytest.MonkeyPatch, after: int = 4) -> Path:
    original, seen = Session.checkpoints_after, []

    def stop(self: Session, round_index: int) -> bool:
        seen.append(round_index)
        if len(seen) == after:
            raise KeyboardInterrupt
        return original(self, round_index)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "checkpoints_after", stop)
        with pytest.raises(KeyboardInterrupt):
            local.run(config)
    return sorted(Path(config.outdir).iterdir(), key=lambda folder: folder.stat().st_mtime)[-1]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_command_line(world: World) -> None:
    settings = {**blocks(), **STREAMED, "federate.total_round_num": 60, "eval.freq": 20, "fwdllm.checkpoint_every": 2}
    config = world.config(settings, language_model=True)
    (world.root / "my.yaml").write_text(dump_config(config))
    path = Path(config.outdir) / "small"
    command = [sys.executable, "-m", "fs_fwdllm"]
    with subprocess.Popen([*command, "run", str(world.root / "my.yaml")], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not ((path / "metrics.jsonl").is_file() and len(read_jsonl(path / "metrics.jsonl")) > 5):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert not (path / "model").exists()
    subprocess.run([*command, "resume", str(path)], check=True, capture_output=True, timeout=120)
    whole = local.run(config)
    assert lines_without_time(path / "metrics.jsonl") == lines_without_time(whole / "metrics.jsonl")
    assert not [file for file in path.parent.rglob(".writing-*")]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="a file without a name cannot be opened again here")
def test_a_file_that_nobody_looks_for_has_no_name_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a process that is killed just then leaves nothing."""
    reader, seen, fsync = Reader(), [], os.fsync

    def look(descriptor: int) -> None:
        seen.append([file.name for file in tmp_path.iterdir()])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    files = ChangedFiles(reader, None, tmp_path)
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    (written,) = files.write([tensor])
    assert seen == [[]]
    memory = bytearray(written.entry.bytes)
    reader.file(written.entry.file).read_into(memoryview(memory), written.entry.offset)
    assert bytes(memory) == tensor.numpy().tobytes()
    files.let_go(written)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_given_more_rounds(world: World) -> None:
    config = world.config({**blocks(), **STREAMED, "federate.total_round_num": 3}, language_model=True)
    more = local.resume(local.run(config), rounds=5)
    whole = local.run(world.config({**blocks(), **STREAMED, "federate.total_round_num": 5}, language_model=True))
    assert [line["digest"] for line in rounds(more)] == [line["digest"] for line in rounds(whole)]


def test_files_of_changed_blocks_are_those_a_run_can_go_on_from(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config({**blocks(), **STREAMED, "federate.total_round_num": 9, "eval.freq": 3}, language_model=True)
    path = local.run(config)
    folder = RunFolder.open(path)
    before = read_about(folder.checkpoint_path / "previous.safetensors")["numbers"]
    spoken_of = [read_checkpoint(folder.checkpoint_path).numbers, before, read_about(folder.best_path)]
    named = {str(reference[0]) for about in spoken_of for reference in as_files(about).values()}
    assert {file.name for file in folder.blocks_path.iterdir()} == named
    assert not [file for file in path.parent.iterdir() if file.is_file()]  # the model's own went with the process


def as_files(numbers: Mapping[str, Any]) -> dict[str, list[Any]]:
    return dict(numbers["changed_files"])


def test_a_run_that_is_ruined_when_it_goes_on_keeps_its_best_round(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.config({**blocks(), **STREAMED, "federate.total_round_num": 6, "eval.freq": 2}, language_model=True)
    broken = interrupted(config, monkeypatch)

    def stall(*_: Any) -> None:
        raise TrainingStalledError("the step left the range of float32")

    monkeypatch.setattr(BlockServer, "absorb", stall)
    with pytest.raises(TrainingStalledError):
        local.resume(broken)
    best = read_about(RunFolder.open(broken).best_path)
    assert evaluate_run(broken)["loss"] == pytest.approx(best["value"], rel=1e-5)


@pytest.mark.parametrize(("harm", "said"), [("lost", "cannot be read"), ("changed", "damaged")])
def test_a_lost_or_damaged_block_is_named(world: World, monkeypatch: pytest.MonkeyPatch, harm: str, said: str) -> None:
    config = world.config({**blocks(), **STREAMED, "federate.total_round_num": 6}, language_model=True)
    broken = interrupted(config, monkeypatch)
    numbers = read_checkpoint(RunFolder.open(broken).checkpoint_path).numbers
    file = broken / "checkpoint" / "blocks" / next(iter(as_files(numbers).values()))[0]
    if harm == "lost":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[5] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"(?s){re.escape(file.name)}.*{said}.*trained block of the checkpoint"):
        local.resume(broken)


def test_a_full_disk_ends_the_run_with_a_way_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = os.fsync

    def full(descriptor: int) -> None:
        if ".writing-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, os.strerror(28))
        flushed(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    config = world.config({**blocks(), **STREAMED}, language_model=True)
    with pytest.raises(ModelError, match=r"blocks: a trained block cannot be written there \(No space left.*resume"):
        local.run(config)


def test_a_base_that_changes_during_a_run_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation(world.config({**blocks(schedule="ascending"), **STREAMED}, language_model=True))
    federation.round(0, [1])
    file = next(Path(federation.session.loaded.source.transformer).glob("*.safetensors"))
    state = file.stat()
    try:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
        with pytest.raises(ModelError, match=r"was changed while a run was reading it"):
            federation.round(1, [2])
    finally:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("part", ["embeddings", "head"])
def test_a_table_on_the_disk_is_no_block(world: World, part: str) -> None:
    tied = world.model("llama", tie_word_embeddings=False)
    settings = {**blocks(**{part: "in"}), **STREAMED, "model.type": f"{tied}@huggingface_llm"}
    with pytest.raises(ConfigError, match=r"fwdllm\.blocks: .*table of the vocabulary.*fwdllm\.base\.stream to false"):
        Session.open(world.config(settings, language_model=True))


def test_a_run_starts_from_a_trained_model_by_its_folder(world: World) -> None:
    first = local.run(world.config({**blocks(), **STREAMED}, language_model=True)) / "model"
    settings = {**blocks(), **STREAMED, "fwdllm.init_adapter": str(first)}
    with pytest.raises(ConfigError, match=r"fwdllm\.init_adapter .*give that folder as model\.type"):
        Session.open(world.config(settings, language_model=True))
    again = {**blocks(), **STREAMED, "model.type": f"{first}@huggingface_llm"}
    assert local.run(world.config(again, language_model=True))


def test_packed_weights_are_no_blocks(world: World) -> None:
    settings = {**blocks(), "fwdllm.base.quantise": "int8", "fwdllm.base.group": 32}
    with pytest.raises(ConfigError, match=r"federate\.method: is 'fedcybgd'.*fwdllm\.base\.stream true"):
        Session.open(world.config(settings, language_model=True))


def test_an_evaluation_stands_at_the_server_s_values_and_goes_back(world: World) -> None:
    config = world.config({**blocks(), **STREAMED, "fwdllm.base.compute_dtype": "bfloat16"}, language_model=True)
    session = Session.open(config)
    own = session.parts.trainables
    server = assemble_server(session.parts, session.client_samples)
    before, loss = session.evaluate(own), session.evaluate(server.trainables)
    assert loss == before
    values = [tensor + 0.05 for tensor in server.store.values(0)]
    server.store.load(0, values)
    kept = [tensor.clone() for tensor in own.tensors]
    with session.at(server.trainables):
        for place, index in enumerate(own.names.index(name) for name in server.plan.parts[0].parameters):
            layer = session.parts.model.get_submodule(own.names[index].rpartition(".")[0])
            found = layer.dequantised(torch.bfloat16) if isinstance(layer, PackedLinear) else layer.weight
            assert torch.equal(found, values[place].bfloat16())
    assert all(torch.equal(was, now) for was, now in zip(kept, own.tensors, strict=True))
    assert session.evaluate(own) == before
