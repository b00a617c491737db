"""A researcher wants MeZO to learn on instructions, at a rate that was looked for, and to keep what came of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.stories.shell import Shell

pytestmark = pytest.mark.slow

SHARED = Path(__file__).resolve().parents[2].parent / "shared/data"
MODEL, ROWS = SHARED / "models/stories260K", SHARED / "alpaca/alpaca_small_2000.json"

CONFIGURATION = """
data: {{root: ., type: instructions.json@llm, splits: [0.8, 0.1, 0.1]}}
model: {{type: {model}@huggingface_llm}}
federate: {{method: fedmezo, client_num: 4, total_round_num: 10}}
llm: {{tok_len: 160, adapter: {{use: true, args: [{{adapter_package: peft, adapter_method: lora, r: 8}}]}}}}
dataloader: {{batch_size: 4}}
train: {{local_update_steps: 5, optimizer: {{lr: 0.001}}}}
fwdllm: {{estimator: central, probes: 2}}
eval: {{freq: 5}}
"""


@pytest.mark.skipif(not (MODEL.is_dir() and ROWS.is_file()), reason=f"needs {MODEL} and {ROWS}")
def test_from_instructions_to_a_model_that_answers(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    rows = json.loads(ROWS.read_text(encoding="utf-8"))[:160]
    shell.write("instructions.json", json.dumps(rows))
    shell.write("mezo.yaml", CONFIGURATION.format(model=MODEL))
    assert "160 rows" in shell.type("data", "show", "instructions.json", "--cfg", "mezo.yaml")
    shell.type("plan", "--cfg", "mezo.yaml")
    shell.type("sweep", "mezo.yaml", "train.optimizer.lr", "0.0003", "0.003", "0.03")
    shell.type("run", "sweeps/mezo/best.yaml", "expname", "mezo")
    before, after = _losses(tmp_path / "runs/mezo")
    assert after < before, "at the rate that was found it learns"
    shell.type("resume", "runs/mezo", "--rounds", "14")
    assert _losses(tmp_path / "runs/mezo")[1] < before
    assert f"{before:.2f}"[:3] in shell.type("evaluate", "--cfg", "sweeps/mezo/best.yaml")
    shell.type("evaluate", "runs/mezo", "--split", "val")
    shell.type("generate", "runs/mezo", "--prompt", "Tell me about a dog.", "--max-new-tokens", "20")
    talk = shell.type("chat", "runs/mezo", "--max-new-tokens", "10", stdin="Hello\nGo on\n")
    assert len(re.findall(r"\S", talk))
    shell.type(
        "run", "mezo.yaml", "fwdllm.init_adapter", "runs/mezo/adapter", "federate.total_round_num", "1", "expname", "on"
    )
    assert _losses(tmp_path / "runs/on")[0] < before, "training goes on from the adapter"
    shell.type("merge", "runs/mezo", "merged")
    assert (tmp_path / "merged/model.safetensors").is_file()
    shell.tell()


def _losses(run: Path) -> tuple[float, float]:
    """The evaluation loss before the first round, and the last one."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval"]["loss"] for line in lines if line.get("eval")]
    return losses[0], losses[-1]
