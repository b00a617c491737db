"""What users of the host expect to find and to set: results, checkpoints, early stop, evaluation, tracking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.host.federatedscope.federation import Federation, outcome_of, presplit, write_config
from tests.host.federatedscope.participants import Starter
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl

__all__ = ["models", "world"]

_MEZO = {"federate.method": "fedmezo", "federate.make_global_eval": False, "eval.freq": 1}


def _federation(world: World, launcher: Starter, root: Path, settings: dict[str, Any] | None = None) -> Federation:
    chosen = {**_MEZO, "data.type": presplit(world), **(settings or {})}
    return Federation(write_config(world, chosen), root, launcher)


def _results(federation: Federation, name: str) -> list[dict[str, Any]]:
    """The lines of the host's ``eval_results.log``."""
    text = (federation.root / name / "run" / "eval_results.log").read_text()
    return [eval(line, {"np": np, "nan": float("nan"), "inf": float("inf")}) for line in text.splitlines()]


def test_results_and_checkpoints_are_the_hosts(world: World, launcher: Starter, tmp_path: Path) -> None:
    saved = tmp_path / "trained.ckpt"
    files = {"federate.save_to": str(saved), "federate.save_freq": 2, "federate.save_client_model": True}
    federation = _federation(world, launcher, tmp_path, files)
    outcome = federation.standalone()
    rounds = [line for line in _results(federation, "standalone") if "Results_weighted_avg" in line]
    assert [line["Round"] for line in rounds] == [1, 2, 3, 4]
    lines = read_jsonl(federation.folder("standalone") / "metrics.jsonl")
    for line, told in zip(lines[1:5], rounds, strict=True):
        assert line["eval"]["loss"] == pytest.approx(told["Results_weighted_avg"]["test_avg_loss"], rel=1e-6)
    names = {path.name for path in tmp_path.glob("*.ckpt")}
    assert names == {f"{prefix}trained.ckpt" for prefix in ("", "final_", "2_", *(f"client_{i}_" for i in (1, 2, 3)))}
    best = min(range(4), key=lambda index: rounds[index]["Results_weighted_avg"]["test_loss"])
    assert torch.load(saved, weights_only=True)["cur_round"] == best + 1
    final = torch.load(tmp_path / "final_trained.ckpt", weights_only=True)
    adapter = federation.folder("standalone") / "adapter" / "adapter_model.safetensors"
    assert _same_values(final["model"], adapter)
    again = federation.standalone("federate.restore_from", tmp_path / "final_trained.ckpt", name="again")
    assert again.digests[0] == outcome.digests[-1], "it starts where the other ended"


def _same_values(model: dict[str, torch.Tensor], adapter: Path) -> bool:
    from safetensors.torch import load_file

    stored = {name.replace(".weight", ".default.weight"): value for name, value in load_file(adapter).items()}
    assert set(stored) == set(model), (sorted(stored), sorted(model))
    return all(torch.equal(stored[name], model[name]) for name in model)


#: The host's own adapter model loads what our server saved, as its evaluation scripts do.
_LOAD_IN_HOST = """
import torch
from federatedscope.llm.model.model_builder import get_llm
from federatedscope.core.configs.config import global_cfg
config = global_cfg.clone()
config.merge_from_file({cfg!r})
model = get_llm(config)
saved = torch.load({saved!r}, weights_only=True)["model"]
before = model.state_dict()
assert set(saved) == set(before), (sorted(saved), sorted(before))
model.load_state_dict(saved, strict=False)
assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
print("the host has loaded", len(saved))
raise SystemExit(0)
"""


def test_the_hosts_own_model_loads_what_we_save(world: World, launcher: Starter, tmp_path: Path) -> None:
    saved = tmp_path / "a folder" / "not there yet" / "trained.ckpt"
    federation = _federation(world, launcher, tmp_path, {"federate.save_to": str(saved)})
    federation.standalone()
    check = _LOAD_IN_HOST.format(cfg=str(federation.cfg), saved=str(saved))
    assert "the host has loaded 8" in launcher.start([], tmp_path, name="load", before=check).succeed()


@pytest.mark.parametrize("mode", ["standalone", "distributed"])
def test_early_stop_ends_the_run_for_everybody(mode: str, world: World, launcher: Starter, tmp_path: Path) -> None:
    """Nothing improves by as much as is asked for: with patience 1 the host stops long before the last round."""
    settings = {"early_stop.patience": 1, "early_stop.delta": 1000.0, "federate.total_round_num": 30}
    federation = _federation(world, launcher, tmp_path, settings)
    outcome = getattr(federation, mode)()
    assert 2 <= len(outcome.rejected) < 6
    folder = federation.folder("server" if mode == "distributed" else mode)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert any(line["Round"] == "Final" for line in _results(federation, folder.parent.parent.name))


@pytest.mark.parametrize("mode", ["standalone", "distributed"])
def test_clients_without_a_sample_to_evaluate_on_do_not_matter(
    mode: str, world: World, launcher: Starter, tmp_path: Path
) -> None:
    """A client of one sample trains on it and has none left for evaluation."""
    settings = {"data.type": presplit(world), "data.splits": [0.9, 0.0, 0.1], "eval.split": ["val", "test"]}
    source = world.root / "data" / "client_2.jsonl"
    source.write_text(source.read_text().splitlines(keepends=True)[0])
    cfg = write_config(world, {**_MEZO, **settings, "eval.best_res_update_round_wise_key": "val_loss"})
    federation = Federation(cfg, tmp_path, launcher)
    assert getattr(federation, mode)().digests == federation.local().digests


def test_nobody_has_a_sample_to_evaluate_on(world: World, launcher: Starter, tmp_path: Path) -> None:
    saved = tmp_path / "trained.ckpt"
    settings = {"data.splits": [1.0, 0.0, 0.0], "federate.save_to": str(saved)}
    federation = _federation(world, launcher, tmp_path, settings)
    assert federation.standalone().digests == federation.local().digests
    assert (tmp_path / "final_trained.ckpt").is_file()


def test_a_single_client_trains_alone(world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path, {"federate.client_idx_for_local_train": 2})
    federation.standalone()
    lines = read_jsonl(federation.folder("standalone") / "metrics.jsonl")
    assert all(set(line["loss"]) == {"1"} for line in lines if "loss" in line)


#: Stands for Weights & Biases, which reads what the host makes of its own printed results.
_WANDB = """
import json, types
lines = []
summary, config = {}, types.SimpleNamespace(update=lambda values, allow_val_change: None)
def init(**named): lines.append({"init": named["project"]})
def log(values): lines.append({"log": values})
def finish():
    with open("wandb.jsonl", "a") as out: out.writelines(json.dumps(line) + "\\n" for line in lines)
import atexit; atexit.register(finish)
"""


def test_the_host_tracks_our_runs(world: World, launcher: Starter, tmp_path: Path) -> None:
    stand_in = tmp_path / "modules"
    stand_in.mkdir()
    (stand_in / "wandb.py").write_text(_WANDB)
    federation = _federation(world, launcher, tmp_path)
    overrides = ["wandb.use", True, "wandb.online_track", True, "wandb.name_project", "p"]
    federation.start_standalone(*overrides, path=[stand_in]).succeed()
    first, *logged = read_jsonl(tmp_path / "wandb.jsonl")
    assert first == {"init": "p"}
    losses = [line["log"] for line in logged if any("test_avg_loss" in key for key in line["log"])]
    assert len(losses) >= 4, json.dumps(logged)[:2000]


def test_optional_packages_of_the_host_may_be_missing(world: World, launcher: Starter, tmp_path: Path) -> None:
    federation = _federation(world, launcher, tmp_path)
    hide = "import sys; sys.modules.update(dict.fromkeys(['wandb', 'fvcore', 'deepspeed']))"
    federation.start_standalone(before=hide).succeed()
    assert len(outcome_of(federation.folder("standalone")).digests) == 6


#: Counts models, and every attempt to pickle one.
_SPY = """
import atexit, pickle
from fs_fwdllm.running import session
import torch
made, pickled = [], []
load, real = session.load_model, pickle.dumps
def load_model(*arguments): made.append(1); return load(*arguments)
def dumps(thing, *arguments, **named):
    content = real(thing, *arguments, **named)
    if isinstance(thing, torch.nn.Module): pickled.append(len(content))
    return content
session.load_model, pickle.dumps = load_model, dumps
atexit.register(lambda: print("models made:", len(made), "pickled:", len(pickled)))
"""


def test_one_model_for_all_clients_and_never_a_pickle_of_it(world: World, launcher: Starter, tmp_path: Path) -> None:
    settings = {**_MEZO, "data.type": presplit(world, 8), "federate.client_num": 8, "federate.total_round_num": 2}
    federation = Federation(write_config(world, settings), tmp_path, launcher)
    assert "models made: 1 pickled: 0" in federation.start_standalone(before=_SPY).succeed()


@pytest.mark.parametrize("named", [[], ["loss"], ["macro_f1"], ["per_class", "binary_f1"]], ids=str)
@pytest.mark.parametrize("label_words", [False, True])
def test_results_of_classes_are_merged_whatever_metrics_are_named(
    named: list[str], label_words: bool, world: World, launcher: Starter, tmp_path: Path
) -> None:
    """The host looks up how each value of a result compares, also of those that follow from the task."""
    rows = world.texts(name="words.jsonl", classes=("w7", "w8"))
    settings = {**_MEZO, "data.type": f"{rows}@text", "data.root": str(world.root), "federate.total_round_num": 2,
                "eval.metrics": named}  # fmt: skip
    if label_words:
        settings |= {"model.type": f"{world.model('llama')}@huggingface_llm", "model.task": ""}
    federation = Federation(write_config(world, settings, language_model=False), tmp_path, launcher)
    federation.standalone()
    (line, *_) = [line for line in _results(federation, "standalone") if "Results_weighted_avg" in line]
    merged = line["Results_weighted_avg"]
    wanted = [name for name in named if name not in ("loss", "per_class")] or ["accuracy", "mcc"]
    assert {f"test_{name}" for name in wanted} <= set(merged)


@pytest.mark.parametrize("named", [[], ["mse", "r2"]], ids=str)
def test_results_of_numbers_are_merged(named: list[str], world: World, launcher: Starter, tmp_path: Path) -> None:
    rows = [{"text": f"w{3 + row} w{4 + row}", "label": row / 10} for row in range(36)]
    settings = {**_MEZO, "data.type": f"{world.write_rows('numbers.jsonl', rows)}@text", "data.root": str(world.root),
                "fwdllm.data.regression": True, "federate.total_round_num": 2, "eval.metrics": named}  # fmt: skip
    federation = Federation(write_config(world, settings, language_model=False), tmp_path, launcher)
    federation.standalone()
    (line, *_) = [line for line in _results(federation, "standalone") if "Results_weighted_avg" in line]
    assert {f"test_{name}" for name in named or ["mse", "pearson"]} <= set(line["Results_weighted_avg"])
