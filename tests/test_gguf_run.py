"""What a user of llama.cpp does: an empty folder, a file, a few rounds, and answers from what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fs_fwdllm
from fs_fwdllm.inference import Sampling
from tests.model.tiny_gguf import save_tiny_gguf

pytestmark = pytest.mark.slow

CONFIGURATION = """
seed: 1
federate: {method: fedmezo, client_num: 2, sample_client_num: 2, total_round_num: 2}
data: {root: ., type: data.json@llm, splits: [0.8, 0.1, 0.1]}
model: {type: mine.gguf@huggingface_llm}
llm: {tok_len: 160, adapter: {use: true, args: [{adapter_package: peft, adapter_method: lora, r: 4}]}}
train: {local_update_steps: 2, optimizer: {lr: 0.01}}
dataloader: {batch_size: 4}
fwdllm: {probes: 4, probes_per_batch: 4, estimator: one_sided}
"""


def command(folder: Path, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fs_fwdllm", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr + done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def digests(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["digest"] for line in lines if "digest" in line]


def test_a_file_is_trained_on_and_answers(tmp_path: Path) -> None:
    save_tiny_gguf(
        tmp_path / "mine.gguf", lambda name: "Q6_K" if name == "token_embd.weight" else "Q4_K", tied=True,
        settings={"llama.context_length": 256},
    )  # fmt: skip
    rows = [{"instruction": f"say {word}", "input": "", "output": f"the {word}"} for word in "abcdefgh" * 3]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "my.yaml").write_text(CONFIGURATION)
    told = command(tmp_path, "plan", "my.yaml", "fwdllm.base.stream", "true")
    assert "read from the disk" in told and "mine.gguf" in told
    norms = "[{adapter_package: fs_fwdllm, adapter_method: layernorm}]"
    assert "peak" in command(tmp_path, "plan", "my.yaml", "llm.adapter.args", norms)  # no matrix of floats is left
    for place, stream, method in (
        ("memory", "false", "fedmezo"),
        ("disk", "true", "fedmezo"),
        ("exact", "true", "fedavg"),
    ):
        command(tmp_path, "run", "my.yaml", "fwdllm.base.stream", stream, "federate.method", method, "outdir", place)
    assert digests(tmp_path / "memory" / "my") == digests(tmp_path / "disk" / "my")
    answers = [
        fs_fwdllm.load(tmp_path / place / "my").generate(["say a"], sampling=Sampling(max_new_tokens=4))
        for place in ("memory", "disk")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 1
