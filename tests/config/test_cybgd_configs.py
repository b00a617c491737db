"""Every configuration of block training is valid, and does on a tiny model what it says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fs_fwdllm.config import load_config
from fs_fwdllm.method import check_combination
from fs_fwdllm.running import local
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl

__all__ = ["models", "world"]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "cybgd").glob("*.yaml"))
TINY = [
    "federate.client_num", "3", "federate.total_round_num", "2", "eval.freq", "-1", "llm.tok_len", "32",
    "fwdllm.checkpoint_every", "9", "train.batch_or_epoch", "batch", "train.local_update_steps", "1", "data.subsample",
    "0.05", "fwdllm.data.max_test_samples", "20",
]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_valid_and_has_a_script(path: Path) -> None:
    config = load_config(path)
    check_combination(config)
    assert config.method.name == "cybgd" and not config.ignored_keys()
    script = ROOT / "scripts" / "cybgd" / path.stem
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("task", ["mrpc", "cola", "rte"])
def test_a_glue_task_runs(world: World, task: str, shared_data: Callable[[str], Path]) -> None:
    root = shared_data(f"glue/{'CoLA' if task == 'cola' else task.upper()}/train.tsv").parent
    model = f"{world.model('roberta')}@transformers"
    given = ["data.root", str(root), "model.type", model, "outdir", str(world.root / "runs"), *TINY]
    path = local.run(load_config(ROOT / "configs" / "cybgd" / f"{task}.yaml", given))
    metric = {"mrpc": "binary_f1", "cola": "mcc", "rte": "accuracy"}[task]
    assert metric in read_jsonl(path / "metrics.jsonl")[-2]["eval"]


@pytest.mark.parametrize("architecture", ["gpt2", "roberta"])
def test_questions_are_answered_by_a_decoder_or_an_encoder(
    world: World, architecture: str, shared_data: Callable[[str], Path]
) -> None:
    """The new span head is trained in every visit, and nothing of it is left out."""
    document = json.loads(shared_data("squad/dev-v1.1.json").read_text(encoding="utf-8"))
    for name, articles in (("train", document["data"][:8]), ("dev", document["data"][8:10])):
        short = [{**article, "paragraphs": article["paragraphs"][:2]} for article in articles]
        (world.root / f"{name}-v1.1.json").write_text(json.dumps({"data": short}), encoding="utf-8")
    model = f"{world.model(architecture)}@transformers"
    given = ["data.root", str(world.root), "model.type", model, "outdir", str(world.root / "runs"), *TINY]
    given += ["llm.tok_len", "60", "fwdllm.data.stride", "8", "data.subsample", "1.0"]
    path = local.run(load_config(ROOT / "configs" / "cybgd" / "squad.yaml", given))
    final = read_jsonl(path / "metrics.jsonl")[-2]
    assert {"f1", "exact_match"} <= set(final["eval"]) and len(final["block_visits"]) == 2
    trained = load_file(path / "model" / "model.safetensors")
    before = load_file(world.model(architecture) / "model.safetensors")
    assert "qa_outputs.weight" in trained and "qa_outputs.weight" not in before
    assert (path / "console.log").read_text(encoding="utf-8").count("head in every visit") == 1


@pytest.mark.parametrize("name", ["alpaca", "centralised"])
def test_instruction_tuning_runs(world: World, name: str) -> None:
    model = f"{world.model('llama', max_position_embeddings=512)}@huggingface_llm"
    rows = world.instructions(200, "alpaca_data.json")
    text = (world.root / rows).read_text(encoding="utf-8")
    (world.root / rows).write_text("[" + ",".join(text.splitlines()) + "]", encoding="utf-8")
    given = ["data.root", str(world.root), "model.type", model, "outdir", str(world.root / "runs"), *TINY]
    given += ["llm.tok_len", "128", "data.subsample", "1.0"]
    path = local.run(load_config(ROOT / "configs" / "cybgd" / f"{name}.yaml", given))
    assert read_jsonl(path / "metrics.jsonl")[-1]["final"]
