"""The plugin of the documentation, as another package brings it: announced by entry points, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fs_fwdllm.config.yaml_text import dump_yaml
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl

__all__ = ["command", "configuration", "environment", "models", "world"]

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "docs" / "plugins" / "fzoo.py"
ENTRY_POINTS = "[fs_fwdllm.methods]\nfzoo = fzoo:FACTS\n[fs_fwdllm.settings]\nfzoo = fzoo:Settings\n"
SETTINGS = {
    "federate.method": "FZOO", "federate.client_num": 3, "federate.total_round_num": 3, "fwdllm.probes": 4,
    "train.local_update_steps": 2, "dataloader.batch_size": 2, "train.optimizer.lr": 0.02, "eval.freq": 100,
    "federate.make_global_eval": True, "eval.best_res_update_round_wise_key": "test_loss", "eval.metrics": ["loss"],
    "early_stop.patience": 0, "data.splits": [0.5, 0.0, 0.5], "data.splitter": "iid",
}  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which a distribution ``fzoo`` is installed."""
    site = tmp_path / "site"
    about = site / "fzoo-0.1.dist-info"
    about.mkdir(parents=True)
    shutil.copy(PLUGIN, site / "fzoo.py")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fzoo\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    paths = os.pathsep.join([str(site), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", "NO_COLOR": "1"}


def command(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own: only there are the entry points new."""
    words = [sys.executable, "-m", "fs_fwdllm", *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


def configuration(world: World, **changes: object) -> Path:
    path = world.root / "run.yaml"
    path.write_text(dump_yaml(world.tree({**SETTINGS, **changes})))
    return path


def test_the_plugin_is_as_short_as_the_documentation_says() -> None:
    assert len(PLUGIN.read_text(encoding="utf-8").splitlines()) <= 40


def test_a_plugin_trains_plans_and_is_named_in_the_report(world: World, environment: dict[str, str]) -> None:
    cfg = configuration(world)
    done = command(environment, "run", "--cfg", cfg)
    assert done.returncode == 0, done.stderr
    assert "FZOO (central, 4 probes)" in done.stdout
    run = world.root / "runs" / "small"
    lines = read_jsonl(run / "metrics.jsonl")
    assert len({line["digest"] for line in lines}) == 4, "every round moves the parameters"
    planned = command(environment, "plan", "--cfg", cfg)
    assert planned.returncode == 0, planned.stderr
    assert f"{lines[-1]['forward_passes']} forward, 0 backward" in planned.stdout
    compared = command(environment, "compare", run, "--output", world.root / "picture.png")
    assert "FZOO" in compared.stdout


def test_its_section_changes_the_run_and_is_checked(world: World, environment: dict[str, str]) -> None:
    digests = []
    for floor in (1e-8, 1e3):
        cfg = configuration(world, **{"expname": f"floor{floor}", "fwdllm.ext": {"fzoo": {"floor": floor}}})
        assert command(environment, "run", "--cfg", cfg).returncode == 0
        digests.append(read_jsonl(world.root / "runs" / f"floor{floor}" / "metrics.jsonl")[-1]["digest"])
    assert digests[0] != digests[1]
    refused = command(environment, "run", "--cfg", configuration(world, **{"fwdllm.ext": {"fzoo": {"flour": 1.0}}}))
    assert refused.returncode == 2 and "fzoo.flour" in refused.stderr and "floor" in refused.stderr


def test_without_the_package_its_words_are_unknown_and_its_runs_can_still_be_looked_at(
    world: World, environment: dict[str, str]
) -> None:
    cfg = configuration(world)
    assert command(environment, "run", "--cfg", cfg).returncode == 0
    bare = {**environment, "PYTHONPATH": str(ROOT)}
    refused = command(bare, "run", "--cfg", cfg)
    assert refused.returncode == 2 and "federate.method 'FZOO'" in refused.stderr
    compared = command(bare, "compare", world.root / "runs" / "small", "--output", world.root / "picture.png")
    assert compared.returncode == 0 and "FZOO" in compared.stdout
    for looked_at in (["plot"], ["cost", "--output", world.root / "costs.png"]):
        done = command(bare, *looked_at, world.root / "runs" / "small")
        assert done.returncode == 0, done.stderr


def test_a_package_that_cannot_be_imported_is_named(world: World, environment: dict[str, str]) -> None:
    (Path(environment["PYTHONPATH"].split(os.pathsep)[0]) / "fzoo.py").write_text("raise ImportError('no such thing')")
    refused = command(environment, "run", "--cfg", configuration(world))
    assert refused.returncode == 2
    assert "fzoo announces it as 'fzoo:FACTS'" in refused.stderr and "Traceback" not in refused.stderr
