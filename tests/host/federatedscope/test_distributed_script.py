"""``scripts/federatedscope_distributed``: one command, a server and its clients as real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fs_fwdllm.errors import CheckpointError
from fs_fwdllm.report.record import RunRecord
from tests.host.small import World, read_jsonl
from tests.model.tiny import save_tiny_model

_ROOT = Path(__file__).resolve().parents[3]

_CONFIG = """
federate: {{method: fedmezo, client_num: 2, total_round_num: 2}}
data: {{root: {root}, type: instructions.jsonl@llm, splits: [0.8, 0.0, 0.2], splitter: iid}}
model: {{type: {root}/model@huggingface_llm}}
llm: {{tok_len: 48, adapter: {{use: true, args: [{{adapter_package: peft, adapter_method: lora, r: 2}}]}}}}
dataloader: {{batch_size: 2}}
train: {{local_update_steps: 2, batch_or_epoch: batch, optimizer: {{lr: 0.01}}}}
trainer: {{type: mezotrainer}}
eval: {{freq: 2, metrics: [loss], split: [test], best_res_update_round_wise_key: test_loss}}
early_stop: {{patience: 0}}
fwdllm: {{deadline_s: 60}}
"""


def command(host_home: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "FEDERATEDSCOPE_HOME": str(host_home), "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1",
        "FS_FWDLLM_DEADLINE_S": "200",
    }  # fmt: skip
    script = _ROOT / "scripts" / "federatedscope_distributed"
    return subprocess.run(
        [script, "c.yaml", *arguments], cwd=folder, capture_output=True, text=True, timeout=240, env=environment
    )


def test_one_command_runs_a_server_and_its_clients(host_home: Path, tmp_path: Path) -> None:
    world = World(tmp_path, tmp_path)
    world.instructions()
    save_tiny_model(tmp_path / "model", "llama")
    (tmp_path / "c.yaml").write_text(_CONFIG.format(root=tmp_path))
    done = command(host_home, tmp_path, "expname", "run", "seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["logs: exp/run_processes", "run folder: exp/run/fwdllm"]
    assert RunRecord.load(tmp_path / "exp/run/fwdllm").end, "what is printed is what compare takes"
    with pytest.raises(CheckpointError, match=r"name the one inside that is meant: .*exp/run/fwdllm"):
        RunRecord.load(tmp_path / "exp/run")
    _, *rounds, final = read_jsonl(tmp_path / "exp" / "run" / "fwdllm" / "metrics.jsonl")
    assert [line["round"] for line in rounds] == [1, 2] and final["final"]
    assert all(line["rejected"] == {} and set(line["learning_rate"]) == {"1", "2"} for line in rounds)
    logs = tmp_path / "exp" / "run_processes"
    assert {path.name for path in logs.glob("*.log")} == {"server.log", "client1.log", "client2.log"}


def test_a_server_that_fails_gives_its_exit_code_and_reason(host_home: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(_CONFIG.format(root=tmp_path))
    done = command(host_home, tmp_path, "fwdllm.probes", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "fwdllm.probes" in done.stdout and "server.log" in done.stdout
