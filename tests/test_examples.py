"""A run on a page has the digests of the run, in every round: nothing in the machinery changes a bit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm import run
from fs_fwdllm.config import Config
from fs_fwdllm.config.yaml_text import dump_yaml
from tests.host.fixtures import models, world
from tests.host.small import METHODS, PLAIN_MEAN, World, read_jsonl

__all__ = ["models", "world"]

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAGES = {
    "mezo_on_a_page": ("federated_mezo", "mezo"),
    "forward_gradient_on_a_page": ("federated_forward_gradients", "forward_gradient"),
}


def page(name: str) -> Callable[[Config], Any]:
    """The function of an example, imported from its file."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, PAGES[name][0])


def digests_of(run_folder: Path) -> list[str]:
    return [line["digest"] for line in read_jsonl(run_folder / "metrics.jsonl") if not line.get("final")]


@pytest.mark.parametrize("name", PAGES)
def test_it_fits_on_a_page(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("language_model", [False, True], ids=["classifier", "language model"])
def test_every_digest_is_the_runs(name: str, language_model: bool, world: World) -> None:
    settings = {**METHODS[PAGES[name][1]], **PLAIN_MEAN, "train.local_update_steps": 2, "fwdllm.probes": 3}
    config = world.config(settings, language_model=language_model)
    expected = digests_of(run(config).folder)
    assert len(set(expected)) == len(expected) == 1 + config.federate.total_round_num
    assert [digest.hex() for digest in page(name)(config)] == expected


def test_a_page_runs_as_a_program(world: World) -> None:
    cfg = world.root / "run.yaml"
    cfg.write_text(dump_yaml(world.tree({**METHODS["mezo"], "federate.total_round_num": 2})))
    words = [sys.executable, EXAMPLES / "mezo_on_a_page.py", cfg, "threads", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True)
    assert [len(line) for line in done.stdout.split()] == [32] * 3
