"""Every configuration of block training is valid, and does on a tiny model what it says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fs_fwdllm.config import load_config
from fs_fwdllm.host import local
from fs_fwdllm.method import check_combination, resolve_method
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
    assert resolve_method(config).name == "cybgd" and not config.ignored_keys()
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
