"""A machine with numpy and without PyTorch: the core, a replica and the data up to batches are imported and work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fs_fwdllm.core.direction import Rademacher
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables
from tests.core.rounds import RUN_SEED, random_records, random_start, replayed

ROOT = Path(__file__).parents[2]

#: Nothing of these can be imported; for numpy alone, nothing of what else is heavy either.
_BLOCK = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not on this device")

sys.meta_path.insert(0, Refuse())
"""

_WORK = """
import importlib, json
sys.path.insert(0, {helpers!r})
for name in {modules!r}:
    importlib.import_module(name)
from fs_fwdllm.core.direction import Rademacher
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables
from rounds import RUN_SEED, random_records, random_start, replayed
start = Trainables(random_start(8))
replayer = Replayer(start, RUN_SEED, Rademacher())
print(json.dumps(list(replayed(replayer, random_records(8, 10, len(start.tensors))))))
"""

_CORE = [f"fs_fwdllm.core.{path.stem}" for path in (ROOT / "fs_fwdllm" / "core").glob("[a-z]*.py")]
_CORE.remove("fs_fwdllm.core.torch_arrays")
MODULES = [
    *_CORE,
    "fs_fwdllm.errors",
    "fs_fwdllm.method.replica",
    "fs_fwdllm.method.catch_up",
    "fs_fwdllm.method.forward.directed_sampling",
    "fs_fwdllm.data.types",
    "fs_fwdllm.data.batches",
]


def run_blocked(blocked: list[str], script: str) -> str:
    """What ``script`` prints in a process in which ``blocked`` cannot be imported."""
    program = _BLOCK.format(blocked=blocked) + script
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_torch_a_replica_replays_the_same_bits():
    heavy = ["torch", "transformers", "pydantic", "peft", "sklearn", "scipy", "safetensors", "yaml"]
    printed = run_blocked(heavy, _WORK.format(modules=MODULES, helpers=str(Path(__file__).parent)))
    start = Trainables({name: torch.from_numpy(values) for name, values in random_start(8).items()})
    records = random_records(8, 10, len(start.tensors))
    assert json.loads(printed) == list(replayed(Replayer(start, RUN_SEED, Rademacher()), records))


def test_without_torch_and_transformers_every_module_of_the_data_is_imported():
    paths = sorted((ROOT / "fs_fwdllm" / "data").rglob("*.py"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    assert len(modules) > 10
    run_blocked(["torch", "transformers"], f"import importlib\nlist(map(importlib.import_module, {modules}))")


def test_without_torch_a_batch_is_padded():
    script = """
import numpy as np
from fs_fwdllm.data import Example, client_batches
examples = [Example(np.full(n, n, dtype=np.int32), np.array(n % 2)) for n in (1, 3, 2)]
batch, = client_batches(examples, client=1, round_index=0, steps=1, batch_size=8, seed=1, pad_token_id=0, shuffle=False)
print(batch.input_ids.tolist(), batch.labels.tolist())
"""
    assert run_blocked(["torch", "transformers"], script) == "[[1, 0, 0], [3, 3, 3], [2, 2, 0]] [1, 1, 0]\n"


@pytest.mark.parametrize("package", ["fs_fwdllm", "data", "estimator", "evaluation", "method", "model", "report"])
def test_a_package_imports_nothing_heavy_before_a_name_is_used(package):
    name = package if package == "fs_fwdllm" else f"fs_fwdllm.{package}"
    script = f"""
import sys, {name}
print(sorted({{"numpy", "torch", "transformers", "matplotlib", "pydantic"}} & set(sys.modules)))
"""
    assert run_blocked([], script) == "[]\n"


@pytest.mark.parametrize("package", ["", ".data", ".estimator", ".method", ".model", ".report"])
def test_every_name_that_a_package_promises_exists(package):
    module = __import__(f"fs_fwdllm{package}", fromlist=["*"])
    assert module.__all__ and all(getattr(module, name) is not None for name in module.__all__)


def test_the_function_run_stays_a_function_when_the_package_run_is_imported():
    script = """
from fs_fwdllm import run
import fs_fwdllm.running.driver
import fs_fwdllm
assert fs_fwdllm.run is run and callable(run)
from fs_fwdllm.running import sampling
"""
    run_blocked([], script)
