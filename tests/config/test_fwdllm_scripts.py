"""FwdLLM's experiments as one-liners: what the scripts start is valid, means what was published, and runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.config import Config, load_config
from fs_fwdllm.method import check_combination
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl

__all__ = ["models", "world"]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "fwdllm"
CONFIGS = sorted((ROOT / "configs" / "fwdllm").glob("*.yaml"))
#: Stands for the command: writes its arguments down, one command a block, and does what it was given to do.
_STUB = """#!/bin/sh
[ "$1" = --version ] && exit 0
printf '%s\\n' "$@" "" >>'{record}'
{action}
"""
ABLATIONS = {
    "ablation_probes": ("fwdllm.probes", [1, 3, 5, 10, 15, 50]),
    "ablation_gate": ("fwdllm.gate.kind", ["none", "published", "relative"]),
    "ablation_sampling": ("fwdllm.sampling.kind", ["none", "published", "corrected"]),
    "ablation_non_iid": (
        "fwdllm.data.partition_method",
        ["uniform_client_1000", *(f"niid_label_clients=1000_alpha={alpha}" for alpha in ("10.0", "1.0", "0.1"))],
    ),
    "ablation_clients": ("federate.sample_client_num", [5, 10, 50, 200, 500]),
}


class Shell:
    """Calls scripts in an environment that looks installed."""

    def __init__(self, folder: Path, action: str = "exit 0") -> None:
        self.record, environment = folder / "record", folder / "environment"
        (environment / "bin").mkdir(parents=True)
        command = environment / "bin" / "fs-fwdllm"
        command.write_text(_STUB.format(record=self.record, action=action), encoding="utf-8")
        command.chmod(0o755)
        files = [ROOT / name for name in ("setup.cfg", "pyproject.toml", "constraints.txt")]
        text = b"".join(path.read_bytes() for path in files)
        sum_ = subprocess.run(["cksum"], input=text, capture_output=True, check=True).stdout.decode().strip()
        (environment / "installed-data,demo").write_text(f"{sum_} {ROOT}\n", encoding="utf-8")
        self._environment = {**os.environ, "FS_FWDLLM_VENV": str(environment), "PYTHONPATH": str(ROOT)}

    def __call__(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPTS / script), *arguments]
        return subprocess.run(command, env=self._environment, text=True, capture_output=True, timeout=300)

    def commands(self) -> list[list[str]]:
        return [block.split("\n") for block in self.record.read_text(encoding="utf-8").split("\n\n") if block]


def config_of(command: list[str]) -> Config:
    assert command[:2] == ["run", "--cfg"]
    config = load_config(command[2], command[3:])
    check_combination(config)
    return config


def value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_valid(path: Path) -> None:
    config = load_config(path)
    check_combination(config)
    assert not config.ignored_keys()


@pytest.mark.parametrize(
    ("algorithm", "method", "trainer"),
    [("FedFwd", "fwdllm", "fwdtrainer"), ("FedAvg", "FedAvg", "llmtrainer"), ("FedSgd", "FedSGD", "llmtrainer")],
)
def test_the_published_arguments_mean_what_they_meant(
    tmp_path: Path, algorithm: str, method: str, trainer: str
) -> None:
    shell = Shell(tmp_path)
    done = shell("run_text_classification", "100", "0.02", algorithm, "seed", "7")
    assert done.returncode == 0, done.stderr
    (command,) = shell.commands()
    config = config_of(command)
    assert (config.federate.method, config.trainer.type, config.seed) == (method, trainer, 7)
    assert (config.federate.sample_client_num, config.train.optimizer.lr, config.dataloader.batch_size) == (
        100,
        0.02,
        8,
    )
    assert (config.federate.total_round_num, config.llm.tok_len) == (3000, 64)
    if algorithm == "FedFwd":
        own = config.fwdllm
        assert (own.radius, own.probes, own.direction, own.gate.kind) == (0.01, 1, "gaussian", "published")
        assert (own.sampling.kind, own.sampling.candidates, own.sampling.every) == ("published", 10, 2)


@pytest.mark.parametrize("script", ABLATIONS)
def test_an_ablation_changes_one_thing_and_draws_all(tmp_path: Path, script: str) -> None:
    shell = Shell(tmp_path)
    done = shell(script, "eval.freq", "9", "outdir", "elsewhere")
    assert done.returncode == 0, done.stderr
    *runs, comparison = shell.commands()
    key, values = ABLATIONS[script]
    configs = [config_of(run) for run in runs]
    assert [value(config, key) for config in configs] == values
    assert {config.eval.freq for config in configs} == {9}
    assert comparison[0] == "compare"
    assert comparison[1 : 1 + len(runs)] == [f"{config.outdir}/{config.expname}" for config in configs]
    if script == "ablation_clients":
        assert {config.federate.sample_client_num * config.fwdllm.probes for config in configs} == {1000}


@pytest.mark.parametrize("algorithm", ["FedFwd", "FedAvg", "FedSgd"])
@pytest.mark.slow
def test_the_published_experiment_runs(world: World, algorithm: str) -> None:
    """To the end, on text files and a tiny model, with the documented keys."""
    shell = Shell(world.root, f'exec "{sys.executable}" -m fs_fwdllm "$@"')
    files = ["data.root", str(world.root), "data.type", f"{world.texts()}@text", "data.splits", "[0.8,0.0,0.2]"]
    files += ["fwdllm.data.partition", "", "fwdllm.data.partition_method", "", "federate.client_num", "6"]
    given = ["model.type", f"{world.model('bert')}@transformers", "federate.total_round_num", "5", "eval.freq", "5"]
    given += ["outdir", str(world.root / "runs"), "threads", "1"]
    done = shell("run_text_classification", "3", "0.01", algorithm, *files, *given)
    assert done.returncode == 0, done.stderr
    (folder,) = (world.root / "runs").iterdir()
    assert folder.name == f"agnews_{algorithm}_3"
    final = read_jsonl(folder / "metrics.jsonl")[-1]
    assert final["final"] and final["round"] == 5
    assert (final["backward_passes"] == 0) == (algorithm == "FedFwd")


def test_costs_are_asked_for(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    assert shell("system_cost", "runs/a", "--target", "0.8").returncode == 0
    (command,) = shell.commands()
    assert command == ["cost", "runs/a", "--target", "0.8"]


@pytest.mark.parametrize(
    ("script", "arguments", "fragment"),
    [
        ("run_text_classification", ["100", "0.01"], "CLIENTS LR FedFwd|FedAvg|FedSgd"),
        ("run_text_classification", ["100", "0.01", "FedProx"], "ALG FedProx is not known; allowed are FedFwd"),
        ("system_cost", [], "usage:"),
    ],
)
def test_a_wrong_call_is_explained(tmp_path: Path, script: str, arguments: list[str], fragment: str) -> None:
    done = Shell(tmp_path)(script, *arguments)
    assert done.returncode == 2 and fragment in done.stderr
