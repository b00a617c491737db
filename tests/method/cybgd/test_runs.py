"""Whole runs on the local host: the published program's defects, saving, resuming, the baselines beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fs_fwdllm.forecast.plan import make_plan
from fs_fwdllm.method import assemble_server
from fs_fwdllm.report import RunFolder, RunRecord
from fs_fwdllm.report.caption import caption_of
from fs_fwdllm.running import local
from fs_fwdllm.running.checkpoint import read_checkpoint
from fs_fwdllm.running.session import Session
from tests.host.small import METHODS, Federation, World, read_jsonl
from tests.method.cybgd.settings import blocks

#: What the published README's command asks for, on a tiny model: cycles over clients, K = 3 local epochs, cosine.
PUBLISHED: dict[str, Any] = {
    **blocks(schedule="ascending"),
    "federate.client_num": 4,
    "federate.total_round_num": 8,
    "train.batch_or_epoch": "epoch",
    "train.local_update_steps": 3,
    "train.scheduler.type": "cosine",
    "grad.grad_accum_count": 2,
    "fwdllm.base.compute_dtype": "float16",
    "fwdllm.gradient_checkpointing": True,
}
RESUMED: dict[str, dict[str, Any]] = {
    "plain": blocks(),
    "int8 both ways, bfloat16": {
        **blocks(upload="int8", download_inactive="int8"),
        "fwdllm.base.compute_dtype": "bfloat16",
    },
    "state on the client": blocks(optimizer_state="client", schedule="rotating"),
    "state on the server": blocks(optimizer_state="server", parallel_blocks=2),
    "dropped, pruned, run schedule": {
        **blocks(download_drop_ratio=0.9, download_keep_ratio=0.5, learning_rate_over="run"),
        "train.scheduler.type": "linear",
    },
}


def lines_without_time(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_rss_mib")} for line in read_jsonl(path)]


@pytest.mark.parametrize("language_model", [False, True], ids=["classifier", "language model"])
def test_a_published_command_line_s_equivalent_runs_to_the_end(world: World, language_model: bool) -> None:
    path = local.run(world.config(PUBLISHED, language_model=language_model))
    lines = read_jsonl(path / "metrics.jsonl")
    assert (
        lines[-1]["final"] and lines[-2]["block_visits"] == [4, 4] and not any(line["rejected"] for line in lines[1:-1])
    )
    losses = [line["train_loss"] for line in lines[1:-1]]
    assert sum(losses[4:]) < sum(losses[:4])  # each client's second visit against its first


@pytest.mark.parametrize("schedule", ["ascending", "descending", "random", "rotating"])
@pytest.mark.parametrize("layers", [3, 5])
def test_all_layers_are_trained_whatever_their_number_is(world: World, layers: int, schedule: str) -> None:
    """The published program knows 12, 24, 28 and 32 layers, and of RoBERTa-large it trains half."""
    model = f"{world.model('llama', num_hidden_layers=layers)}@huggingface_llm"
    settings = {
        **blocks(schedule=schedule),
        "model.type": model,
        "federate.client_num": layers + 1,
        "federate.total_round_num": layers * (layers + 1),
        "eval.freq": -1,
        "train.local_update_steps": 1,
    }
    path = local.run(world.config(settings, language_model=True))
    visits = read_jsonl(path / "metrics.jsonl")[-2]["block_visits"]
    assert visits == [layers + 1] * layers
    before = load_file(world.model("llama", num_hidden_layers=layers) / "model.safetensors")
    after = load_file(path / "model" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".layers." in name}  # the embeddings and the head are out


def test_every_visit_takes_exactly_k_steps_the_first_too(world: World) -> None:
    """The published optimiser switches a step early at first."""
    federation = Federation(world.config(blocks(optimizer_state="client", schedule="ascending")))
    for round_index in range(3):
        federation.round(round_index, federation.server.wanted_clients(federation.clients))
        for states in list(federation.worker(1).states.values())[-2:]:
            assert {float(state["step"]) for state in states} <= {3.0, 6.0}
    steps = {key: float(states[0]["step"]) for key, states in federation.worker(1).states.items()}
    assert steps == {(1, 0): 3, (1, 2): 3, (2, 1): 3, (2, 2): 3, (3, 0): 3, (3, 2): 3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_saved_model_is_the_server_s_bit_for_bit(world: World, dtype: str) -> None:
    """The published program saves the last block only."""
    config = world.config({**blocks(), "fwdllm.base.compute_dtype": dtype}, language_model=True)
    path = local.run(config)
    final = read_jsonl(path / "metrics.jsonl")[-1]
    saved = AutoModelForCausalLM.from_pretrained(path / "model", dtype="auto")
    assert str(next(saved.parameters()).dtype) == f"torch.{dtype}"
    session = Session.open(config)
    server = assemble_server(session.parts, session.client_samples)
    checkpoint = read_checkpoint(RunFolder.open(path).checkpoint_path)
    server.load_state(checkpoint.tensors, checkpoint.numbers)
    assert server.digest.hex() == final["digest"]
    for part in range(len(server.plan.parts)):
        for name, value in zip(server.plan.parts[part].parameters, server.store.deployed(part), strict=True):
            assert torch.equal(saved.get_parameter(name).detach(), value)
    # A checkpoint holds what has changed, not the base model.
    changed = sum(server.store.count(part) for part, version in enumerate(server.versions) if version)
    kept = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith("block.")]
    assert sum(tensor.numel() for tensor in kept) == changed < sum(p.numel() for p in saved.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(world: World, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config({**RESUMED[case], "federate.total_round_num": 7, "eval.freq": 3})
    whole = local.run(config)
    original, rounds = Session.checkpoints_after, []

    def stop(self: Session, round_index: int) -> bool:
        rounds.append(round_index)
        if len(rounds) == 5:
            raise KeyboardInterrupt
        return original(self, round_index)

    monkeypatch.setattr(Session, "checkpoints_after", stop)
    with pytest.raises(KeyboardInterrupt):
        local.run(config)
    monkeypatch.undo()
    broken = sorted(whole.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)[-1]
    assert broken != whole
    resumed = local.resume(broken)
    assert lines_without_time(resumed / "metrics.jsonl") == lines_without_time(whole / "metrics.jsonl")


def test_resets_keep_nothing_and_other_policies_differ(world: World) -> None:
    def digest(policy: str) -> str:
        settings = blocks(optimizer_state=policy, schedule="fixed")
        return read_jsonl(local.run(world.config({**settings, "eval.freq": -1})) / "metrics.jsonl")[-1]["digest"]

    assert len({digest(policy) for policy in ("reset", "server", "client")}) == 3


def test_a_picture_says_how_many_clients_were_asked(world: World) -> None:
    settings = {**blocks(parallel_blocks=2), "federate.client_num": 3}
    path = local.run(world.config(settings, language_model=True))
    assert "2 of 3 clients a round" in caption_of(RunRecord.load(path))


def test_never_switching_trains_one_block(world: World) -> None:
    path = local.run(world.config(blocks(schedule="fixed", first_block=1), language_model=True))
    assert read_jsonl(path / "metrics.jsonl")[-2]["block_visits"] == [0, 5]


def test_the_lora_baseline_changes_lora_tensors(world: World) -> None:
    """The published baseline's optimiser is made before the adapter, and trains nothing."""
    federation = Federation(world.config(METHODS["fedavg"], language_model=True))
    before = [tensor.clone() for tensor in federation.server.trainables.tensors]
    federation.round(0)
    names = federation.server.trainables.names
    moved = [not torch.equal(was, now) for was, now in zip(before, federation.server.trainables.tensors, strict=True)]
    assert all("lora" in name for name in names) and all(
        now for name, now in zip(names, moved, strict=True) if "lora_B" in name
    )


def test_one_client_is_block_training_in_one_place(world: World) -> None:
    """The centralised baseline: the same optimiser, switching every K steps, on all the data."""
    settings = {**blocks(schedule="descending"), "federate.client_num": 1, "federate.total_round_num": 4}
    path = local.run(world.config(settings, language_model=True))
    assert [line["blocks"]["1"] for line in read_jsonl(path / "metrics.jsonl")[1:-1]] == [1, 0, 1, 0]


@pytest.mark.parametrize("settings", [blocks(zstandard=False), blocks(zstandard=False, parallel_blocks=2),
                                      blocks(zstandard=False, optimizer_state="server")])  # fmt: skip
def test_the_forecast_is_what_the_run_counts(world: World, settings: dict[str, Any]) -> None:
    """Without zstandard every length is known before anything is trained."""
    config = world.config({**settings, "federate.total_round_num": 4, "eval.freq": -1, "dataloader.batch_size": 2})
    forecast = make_plan(config)
    counted = read_jsonl(local.run(config) / "metrics.jsonl")[-1]
    run = forecast.run
    assert (run.forward_passes, run.backward_passes) == (counted["forward_passes"], counted["backward_passes"])
    assert run.download_bytes == pytest.approx(counted["download_bytes"], rel=1e-3)
    assert run.upload_bytes == pytest.approx(counted["upload_bytes"], rel=1e-3)
    assert forecast.memory.peak_bytes > 0 and forecast.clients_per_round == config.fwdllm.blocks.parallel_blocks
