"""Shipped configurations as they are shipped: only where the model and the data are, and how many rounds, is changed.

The core has an Alpaca file and a model of the test's own making; with ``shared_data`` they are a real small model and
real instructions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fs_fwdllm.running.local import run_file
from tests.host.small import World, read_jsonl

__all__ = ["ROUNDS", "SHIPPED", "digests_in", "local_digests", "made_up", "real"]

SHIPPED = ("mezo_alpaca", "fwd_alpaca")
ROUNDS = 2
_ROWS = 60


def made_up(world: World) -> list[str]:
    """The overrides that put a file of made-up instructions and a tiny model in the place of the real ones."""
    rng = np.random.default_rng(4)

    def words(most: int) -> str:
        return " ".join(f"w{index}" for index in rng.integers(3, 100, rng.integers(1, most)))

    rows = [{"instruction": words(6), "input": words(4) if row % 3 else "", "output": words(8)} for row in range(_ROWS)]
    data = world.root / "alpaca"
    data.mkdir()
    (data / "alpaca_data.json").write_text(json.dumps(rows), encoding="utf-8")
    return ["data.root", str(data), "model.type", f"{world.model('llama')}@huggingface_llm"]


def real(root: Path, shared_data: Callable[[str], Path]) -> list[str]:
    """As :func:`made_up`, with real instructions and a small model with real weights."""
    (root / "alpaca_data.json").symlink_to(shared_data("alpaca/alpaca_en_demo.json"))
    model = shared_data("models/stories260K")
    return ["data.root", str(root), "model.type", f"{model}@huggingface_llm"]


def digests_in(run: Path) -> list[str]:
    """The digests in a run folder of ours, that of the finished run included."""
    lines = read_jsonl(run / "metrics.jsonl")
    assert lines[-1].get("final"), f"the run in {run} has not ended"
    return [line["digest"] for line in lines]


def local_digests(name: str, place: list[str], outdir: Path) -> list[str]:
    """The digests of a shipped configuration on ``local``; every round has moved the parameters."""
    rounds = ["federate.total_round_num", str(ROUNDS)]
    found = digests_in(run_file(Path(name), [*place, *rounds, "outdir", str(outdir), "expname", "local"]))
    assert len(set(found)) == ROUNDS + 1
    return found
