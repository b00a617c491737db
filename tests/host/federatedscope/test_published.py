"""The published FedMeZO files, byte for byte, through both ways in, on an unmodified checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.host.federatedscope.participants import Starter
from tests.host.small import read_jsonl
from tests.model.tiny import save_tiny_model

_STRATEGIES = ("frozen", "random", "round-wise", "five-round", "model-diff")
_FROZEN = {"alpaca": "iid", "gsm8k": "iid", "code": "lda", "dolly": "meta"}
PUBLISHED = [
    *(f"dynamic/alpaca_{strategy}.yaml" for strategy in _STRATEGIES),
    *(f"frozen/{data}/{data}_{way}_{split}.yaml" for data, split in _FROZEN.items() for way in ("mezo", "bpbased")),
    "mezo_testcase.yaml",
]
_CATEGORIES = ("Go", "Java", "Perl", "Ruby")


def test_the_list_is_what_is_published(peer_home: Path) -> None:
    folder = peer_home / "federatedscope" / "llm" / "baseline"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")} >= set(PUBLISHED)
    assert len(PUBLISHED) == len(set(PUBLISHED)) == 14


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that shrink a published file: a tiny model, tiny data files of the right names, two rounds."""
    root = tmp_path_factory.mktemp("published")
    model = save_tiny_model(root / "model", "llama")
    rng = np.random.default_rng(3)

    def words(count: int) -> str:
        return " ".join(f"w{index}" for index in rng.integers(3, 100, count))

    def pairs(count: int) -> list[dict[str, str]]:
        return [{"instruction": words(2), "input": "", "output": words(3)} for _ in range(count)]

    # The published shares leave 1 of 1000 rows for validation; three clients need three.
    (root / "alpaca_data.json").write_text(json.dumps(pairs(3200)))
    code = [{**row, "input": _CATEGORIES[index % 4]} for index, row in enumerate(pairs(600))]
    (root / "rosetta_alpaca.json").write_text(json.dumps(code))
    gsm8k = [{"question": words(3), "answer": f"{words(2)} #### {index}"} for index in range(3200)]
    dolly = [
        {"instruction": words(2), "context": words(1), "response": words(3), "category": _CATEGORIES[index % 4]}
        for index in range(600)
    ]
    for name, rows in (("gsm8k_train.jsonl", gsm8k), ("databricks-dolly-15k.jsonl", dolly)):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides: dict[str, Any] = {
        "data.root": root, "model.type": f"{model}@huggingface_llm", "federate.total_round_num": 2,
        "train.local_update_steps": 2, "llm.tok_len": 48, "device": -1, "eval.freq": 1,
    }  # fmt: skip
    return [str(part) for pair in overrides.items() for part in pair]


def _arguments(peer: Path, name: str, small: list[str], out: Path) -> list[str]:
    cfg = peer / "federatedscope" / "llm" / "baseline" / name
    saved = out / "trained.ckpt"
    return ["--cfg", str(cfg), *small, "outdir", str(out), "expname", "run", "federate.save_to", str(saved)]


def _check(name: str, out: Path) -> None:
    results = (out / "run" / "eval_results.log").read_text()
    assert "'Round': 1" in results and "'Round': 'Final'" in results
    for file in ("trained.ckpt", "final_trained.ckpt"):
        saved = torch.load(out / file, weights_only=True)
        assert len(saved["model"]) == 8, "LoRA on two matrices of two layers"
    folder = out / "run" / "fwdllm"
    if "bpbased" in name:
        assert not folder.exists(), "the host's own method runs untouched"
        return
    _, *rounds, final = read_jsonl(folder / "metrics.jsonl")
    assert [line["round"] for line in rounds] == [1, 2] and final["final"]
    assert len({line["digest"] for line in rounds}) == 2, "training moves the parameters"
    assert all(line["rejected"] == {} and set(line["learning_rate"]) == {"1", "2", "3"} for line in rounds)
    assert 3 * 2 * 4 * 2 < final["upload_bytes"] < 3 * 2 * 200, "scalars go up"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_runs_with_no_file_added(
    name: str, peer_home: Path, small: list[str], launcher: Starter, tmp_path: Path
) -> None:
    launcher.start(_arguments(peer_home, name, small, tmp_path), tmp_path).succeed()
    _check(name, tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_runs_in_a_checkout_with_the_hook(
    name: str, peer_home: Path, small: list[str], hooked: Starter, tmp_path: Path
) -> None:
    hooked.start(_arguments(peer_home, name, small, tmp_path), tmp_path).succeed()
    _check(name, tmp_path)
