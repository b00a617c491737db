"""The forecast against the run itself: traffic and passes to the last byte, memory within its tolerance."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fs_fwdllm.config import Config, dump_config, parse_config
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.forecast import dry_run, timing
from fs_fwdllm.forecast.memory import MemoryEstimate
from fs_fwdllm.forecast.plan import Cost, make_plan
from fs_fwdllm.model.base.packed import reader_of
from fs_fwdllm.running import local
from fs_fwdllm.running.session import Session
from tests.model.tiny import HIDDEN, save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
DIGEST = bytes(range(16))
LORA = {"use": True, "args": [{"adapter_method": "lora", "r": 2}]}
FULL: dict[str, Any] = {"use": False}
HEAD = {"use": True, "args": [{"adapter_method": "head"}]}
DECAYING = {"lr": 1e-3, "weight_decay": 0.1}


def write_rows(folder: Path, rows: int) -> None:
    generator = np.random.Generator(np.random.Philox(key=7))
    lines = []
    for row in range(rows):
        words = [f"w{word}" for word in generator.integers(3, 100, size=int(generator.integers(3, 14)))]
        lines.append(json.dumps({"text": " ".join(words), "label": str(row % 3)}))
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")


def configuration(folder: Path, method: str, adapter: dict[str, Any], *, rows: int = 41, **sections: Any) -> Config:
    """A classifier on ``rows`` random rows; 41 rows over five clients give batches and clients of different sizes."""
    write_rows(folder, rows)
    if not (folder / "model").exists():
        save_tiny_model(folder / "model", "bert")
    tree: dict[str, Any] = {
        "seed": 3,
        "outdir": str(folder / "runs"),
        "threads": 1,
        "federate": {"method": method, "client_num": 5, "total_round_num": 2},
        "data": {"root": str(folder), "type": "rows.jsonl@text", "splits": [0.8, 0.0, 0.2]},
        "model": {"type": f"{folder / 'model'}@transformers", "task": "SequenceClassification"},
        "llm": {"tok_len": 16, "adapter": adapter},
        "dataloader": {"batch_size": 4},
        "train": {"optimizer": {"lr": 1e-3}},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_config(tree)


def costs_of_run(config: Config) -> list[Cost]:
    """Cumulative costs after each round, as the run's own files have them."""
    lines = [json.loads(line) for line in (local.run(config) / "metrics.jsonl").read_text().splitlines()]
    names = [field.name for field in dataclasses.fields(Cost)]
    return [Cost(**{name: line[name] for name in names}) for line in lines if not line.get("final")][1:]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mezo": ("fedmezo", LORA, {"train": {"local_update_steps": 3}, "fwdllm": {"probes": 2}}),
    "mezo by epochs": ("fedmezo", HEAD, {"train": {"batch_or_epoch": "epoch", "local_update_steps": 50}}),
    "mezo, decay": ("fedmezo", LORA, {"train": {"local_update_steps": 2, "optimizer": DECAYING}}),
    "mezo, random rates": ("fedmezo", LORA, {"train": {"optimizer": DECAYING, "train_strategy": "random"}}),
    "fedavg, decay": ("fedavg", LORA, {"train": {"optimizer": DECAYING}}),
    "forward, decay": ("fedfwd", LORA, {"train": {"optimizer": DECAYING}}),
    "momentum": ("fedfwd", HEAD, {"fwdllm": {"estimator": "one_sided", "probes": 4, "server_momentum": 0.9}}),
    "moments in the state": ("fedfwd", HEAD, {"fwdllm": {"probes": 70, "server_optimizer": "adam"}}),
    "some clients": ("fedfwd", LORA, {"federate": {"method": "fedfwd", "client_num": 5, "sample_client_num": 2}}),
    "forward mode": ("fedfwd", HEAD, {"fwdllm": {"estimator": "forward_mode", "probes": 5, "probes_per_batch": 2}}),
    "more than the head": ("fedfwd", HEAD, {"fwdllm": {"probes": 70, "probes_per_batch": 70}}),
    "published sampling": ("fwdllm", LORA, {"fwdllm": {"sampling": {"kind": "published", "every": 2}}}),
    "corrected sampling": ("fwdllm", LORA, {"fwdllm": {"probes": 3, "sampling": {"kind": "corrected"}}}),
    "a reference in the state": (
        "fwdllm",
        HEAD,
        {"fwdllm": {"probes": 70, "server_momentum": 0.9, "sampling": {"kind": "corrected"}}},
    ),
    "common directions": ("fedfwd", LORA, {"fwdllm": {"probes": 9, "directions": "common"}}),
    "steps in groups": (
        "fedmezo",
        LORA,
        {"train": {"local_update_steps": 2}, "fwdllm": {"directions": "groups", "direction_groups": 2}},
    ),
    "dense": ("fedmezo", LORA, {"fwdllm": {"upload": "dense"}}),
    "full": ("fedmezo", FULL, {}),
    "fedavg": ("fedavg", LORA, {"train": {"local_update_steps": 2}}),
    "fedsgd": ("fedsgd", LORA, {"fwdllm": {"gradient_checkpointing": True}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_traffic_and_passes_are_those_of_the_run(tmp_path: Path, case: str) -> None:
    method, adapter, sections = CASES[case]
    config = configuration(tmp_path, method, adapter, **sections)
    config.federate.total_round_num = 4
    plan = make_plan(config)
    after = costs_of_run(config)
    assert plan.first_round == after[0]
    assert plan.run == after[3]
    assert plan.run + plan.last_round.times(-1) == after[2]


@pytest.mark.parametrize("sampling", ["none", "published", "corrected"])
@pytest.mark.parametrize(("threshold", "steps"), [(1e9, 6), (1e-9, 2)])
def test_the_gate_decides_between_two_forecasts(tmp_path: Path, threshold: float, steps: int, sampling: str) -> None:
    gate = {"kind": "published", "threshold": threshold, "max_repeats": 2}
    own = {"probes": 2, "gate": gate, "sampling": {"kind": sampling}}
    config = configuration(tmp_path, "fwdllm", LORA, fwdllm=own, federate={"client_num": 5, "sample_client_num": 2})
    config.federate.total_round_num = 6
    plan = make_plan(config)
    assert (plan.run if steps == 6 else plan.run_of_longest_steps) == costs_of_run(config)[5]
    assert plan.run != plan.run_of_longest_steps
    assert dict(plan.rows())["server steps (the gate decides)"] == "2 to 6"


def test_the_plan_names_what_would_be_trained(tmp_path: Path) -> None:
    config = configuration(tmp_path, "fedfwd", HEAD, fwdllm={"probes": 7})
    plan = make_plan(config)
    head = 3 * (HIDDEN + 1)
    assert (plan.method, plan.adapter, plan.trainable_parameters) == ("forward_gradient", "head", head)
    assert (plan.clients, plan.clients_with_data, plan.clients_per_round, plan.rounds) == (5, 5, 5, 2)
    assert (plan.steps, plan.parts[0].scalars, plan.costliest_client.forward_passes) == ((1, 1), 35, 14)
    assert plan.costliest_client.upload_bytes <= 4 * 7 + 100
    rows = dict(plan.rows())
    assert rows["passes per round"] == "70 forward, 0 backward"
    assert f"{head:,} of {plan.total_parameters:,}" in rows["trained"]
    assert rows["upload per client and round"] == f"{plan.costliest_client.upload_bytes} B"
    assert not Path(config.outdir).exists()


def test_planning_changes_no_parameter_and_is_repeatable(tmp_path: Path) -> None:
    config = configuration(tmp_path, "fedmezo", LORA)
    first, second = make_plan(config), make_plan(config)
    assert dataclasses.replace(first, memory=second.memory) == second


def test_rounds_that_are_not_played_cost_what_the_late_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(tmp_path, "fedmezo", LORA)
    config.federate.total_round_num = 40
    exact = make_plan(config).run
    monkeypatch.setattr(dry_run, "MAX_DRY_ROUNDS", 10)
    assert make_plan(config).run == exact


def test_what_a_run_refuses_a_plan_refuses(tmp_path: Path) -> None:
    config = configuration(tmp_path, "fedmezo", LORA)
    config.federate.sample_client_num = 6
    with pytest.raises(ConfigError, match="sample_client_num 6"):
        make_plan(config)


MEASURE = """
import json, sys
from fs_fwdllm.config import load_config
from fs_fwdllm.model.base.packed import reader_of
from fs_fwdllm.running import local
from fs_fwdllm.running.session import Session
from fs_fwdllm.running.accounting import peak_rss_mib
from fs_fwdllm.forecast.plan import make_plan
config = load_config(sys.argv[2])
if sys.argv[1] == "plan":
    print(json.dumps(make_plan(config).memory.peak_bytes))
else:
    local.run(config)
    print(json.dumps(peak_rss_mib() * 2**20))
"""


def in_a_process(what: str, config: Config) -> Any:
    path = Path(config.data.root) / f"{what}.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, what, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("method", "train"),
    [
        ("fedmezo", {"local_update_steps": 2}),
        ("fedavg", {"optimizer": {"type": "AdamW", "lr": 1e-4}}),
        ("fedcybgd", {"local_update_steps": 2, "optimizer": {"type": "AdamW", "lr": 1e-4}}),
    ],
)
@pytest.mark.slow
def test_predicted_memory_where_all_parameters_are_trained(tmp_path: Path, method: str, train: dict[str, Any]) -> None:
    """Of the whole process, libraries included; a state that is never sent is not counted."""
    save_tiny_model(tmp_path / "model", "bert", vocab_size=400_000)
    config = configuration(tmp_path, method, FULL, train=train)
    config.federate.total_round_num = 1
    peak_bytes = in_a_process("plan", config)
    measured_bytes = in_a_process("run", config)
    assert measured_bytes / 1.6 < peak_bytes < 1.6 * measured_bytes


def test_the_peak_counts_the_larger_of_work_and_evaluation() -> None:
    parts = {"process_bytes": 1, "model_bytes": 10, "replicas_bytes": 100, "messages_bytes": 1000}
    for work, evaluation in ((50_000, 20_000), (20_000, 50_000)):
        estimate = MemoryEstimate(**parts, work_bytes=work, evaluation_bytes=evaluation, prefix_cache_bytes=7)
        assert estimate.peak_bytes == 1111 + 50_000 + 7
        assert dataclasses.replace(estimate, check_bytes=50_000).peak_bytes == 1111 + 50_000 + evaluation + 7
        at_end = dataclasses.replace(estimate, check_bytes=40_000, best_bytes=10_000)
        assert at_end.peak_bytes == 1111 + 50_000 + evaluation + 7


def test_the_best_round_is_counted_where_a_run_reads_it_back(tmp_path: Path) -> None:
    plan = make_plan(configuration(tmp_path, "fedmezo", FULL))
    assert plan.memory.best_bytes == 4 * plan.trainable_parameters
    assert make_plan(configuration(tmp_path, "fedmezo", FULL, fwdllm={"saved_round": "last"})).memory.best_bytes == 0
    nothing_to_choose_by = configuration(tmp_path, "fedmezo", FULL, data={"splits": [1.0, 0.0, 0.0]})
    assert make_plan(nothing_to_choose_by).memory.best_bytes == 0


def test_the_best_round_is_read_back_in_float32_whatever_the_model_computes_in(tmp_path: Path) -> None:
    blocks = configuration(tmp_path, "fedcybgd", FULL, fwdllm={"base": {"compute_dtype": "bfloat16"}})
    plan = make_plan(blocks)
    assert plan.memory.best_bytes == 4 * plan.trainable_parameters


def test_rows_of_a_table_that_nobody_looks_up_take_no_memory(tmp_path: Path) -> None:
    """A hundred words stand in the first 64 KiB of a table of 40,000; where it is trained, all of it is in memory."""
    save_tiny_model(tmp_path / "model", "bert", vocab_size=40_000)
    frozen, trained = (make_plan(configuration(tmp_path, "fedmezo", adapter)).memory for adapter in (HEAD, FULL))
    table_bytes, read_bytes = 4 * 40_000 * HIDDEN, 64 << 10
    assert trained.model_bytes - frozen.model_bytes == table_bytes - read_bytes
    assert frozen.check_bytes == frozen.model_bytes


def test_a_plan_says_how_well_a_round_knows_each_part(tmp_path: Path) -> None:
    """``(d - 1)/(C n)``, part by part, and what mostly adds noise."""
    parts = [{"match": "classifier", "slopes": "closed_form", "scalars": 60}, {"match": "*", "probes": 2}]
    plan = make_plan(configuration(tmp_path, "fedfwd", LORA, fwdllm={"parts": parts}))
    head, adapter = plan.parts
    for part, count in ((head, 60), (adapter, 2)):
        assert part.scalars == count * plan.clients_per_round
        assert part.relative_error == pytest.approx((part.parameters - 1) / part.scalars)
    assert head.parameters + adapter.parameters == plan.trainable_parameters
    assert any("part '*' is" in remark and "mostly adds noise" in remark for remark in plan.advice)
    shown = dict(plan.rows())
    assert "60 scalars" in shown["slopes, classifier"] and "2 probes" in shown["slopes, *"]


def test_a_plan_warns_of_an_adapter_that_shares_its_few_directions_with_the_head(tmp_path: Path) -> None:
    shared, many = (make_plan(configuration(tmp_path, "fedfwd", LORA, fwdllm={"probes": n})) for n in (2, 500))
    assert any("lie below the output layer" in remark and "fwdllm.parts" in remark for remark in shared.advice)
    assert not any("lie below the output layer" in remark for remark in many.advice)


def test_frozen_parts_have_no_error_to_speak_of(tmp_path: Path) -> None:
    parts = [{"match": "classifier", "slopes": "closed_form"}, {"match": "*", "slopes": "frozen"}]
    plan = make_plan(configuration(tmp_path, "fedfwd", LORA, fwdllm={"parts": parts}))
    assert plan.parts[1].in_words().endswith("frozen") and not any("adds noise" in remark for remark in plan.advice)


@pytest.mark.parametrize("method", ["fedfwd", "fedmezo", "fedavg"])
@pytest.mark.parametrize("cache_mib", [0, 64])
def test_a_plan_says_how_long_the_work_takes_here(tmp_path: Path, method: str, cache_mib: int) -> None:
    config = configuration(tmp_path, method, LORA, fwdllm={"prefix_cache_mib": cache_mib})
    plan = make_plan(config)
    one, all_of_it = (plan.pace.seconds_of(cost, plan.batches) for cost in (plan.costliest_client, plan.run))
    assert 0 < one < all_of_it < 600
    assert plan.pace.read_bytes == 0 and "read from the disk" not in dict(plan.rows())
    assert dict(plan.rows())["time here per client and round"].startswith("about ")
    assert plan.batches == sum(-(-samples // 4) for samples in (11, 11, 11)) or plan.batches > 0


@pytest.mark.parametrize("trial_s", [0.0, 2.0])
def test_a_plan_over_a_base_on_the_disk_counts_what_is_read(
    tmp_path: Path, trial_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the trial ends in the middle of a pass."""
    monkeypatch.setattr(timing, "TRIAL_S", trial_s)
    own = {"probes": 12, "estimator": "one_sided", "base": {"stream": True, "passes_per_read": 4}}
    config = configuration(tmp_path, "fedmezo", LORA, fwdllm=own)
    session = Session.open(config)
    reader = reader_of(session.loaded.model)
    assert reader is not None
    before = session.parts.trainables.digest()
    pace = timing.find_pace(session)
    assert session.parts.trainables.digest() == before
    assert pace.read_bytes * 13 == pytest.approx(3 * reader.stored_bytes)  # 12 probes, 4 a read, beside a clean pass
    assert 0 < pace.seconds < 60
