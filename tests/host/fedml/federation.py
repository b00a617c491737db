"""Small federations in FedML's files, and faults for their processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.config import Config, dump_config
from fs_fwdllm.config.yaml_text import dump_yaml
from tests.host.small import METHODS, World, read_jsonl
from tests.method.cybgd.settings import blocks

__all__ = ["BACKENDS", "CASES", "FedMLWorld", "comparable", "digests", "inject"]

#: FedML's ways of carrying a run, by a name of ours.
BACKENDS: dict[str, dict[str, Any]] = {
    "sp": {"training_type": "simulation", "backend": "sp"},
    "simulation MPI": {"training_type": "simulation", "backend": "MPI", "worker_num": 2},
    "MPI": {"training_type": "cross_silo", "backend": "MPI", "worker_num": 2},
    "GRPC": {"training_type": "cross_silo", "backend": "GRPC", "worker_num": 2},
}
CASES: dict[str, dict[str, Any]] = {
    "mezo": {**METHODS["mezo"], "train.optimizer.weight_decay": 0.1},
    "forward": {**METHODS["forward_gradient"], "fwdllm.server_momentum": 0.9},
    "fleet": {
        **METHODS["forward_gradient"],
        "fwdllm.parts": [{"match": "classifier", "slopes": "closed_form", "scalars": 9}, {}],
        "fwdllm.fleet": [{"clients": [2, 3], "slopes": "projected", "scalars": 12}],
    },
    "groups": {**METHODS["mezo"], "fwdllm.directions": "groups", "fwdllm.direction_groups": 2},
    "fedavg": METHODS["fedavg"],
    # Three visits side by side; int8 uploads leave a remainder on every client, which must be its own in any process.
    "blocks": {
        **blocks(parallel_blocks=3, embeddings="in", upload="int8", download_inactive="int8"),
        "fwdllm.gradient_checkpointing": True,
    },
    # The gate waits for several rounds before it lets a step be taken; the last round's is taken anyway.
    "gated": {
        **METHODS["forward_gradient"], "federate.method": "fwdllm", "fwdllm.gate.kind": "relative",
        "fwdllm.gate.threshold": 1e-9, "fwdllm.gate.max_repeats": 1, "fwdllm.sampling.kind": "corrected",
        "fwdllm.server_momentum": 0.5,
    },
}  # fmt: skip
_VARYING = ("seconds", "peak_rss_mib", "peak_device_mib")

#: Runs at the start of every process of a run: makes one of them misbehave in one round.
_FAULT = """
import json, os, signal, sys, time
fault = json.loads(os.environ.get("TEST_FAULT", "{}"))
words = sys.orig_argv
rank = os.environ.get("PMI_RANK") or (words[words.index("--rank") + 1] if "--rank" in words else None)
if fault and "fs_fwdllm.host.fedml" in words and rank == str(fault["rank"]):
    from fs_fwdllm.method import ClientWorker, RoundServer
    cls, name = (RoundServer, "absorb") if rank == "0" else (ClientWorker, "work")
    original = getattr(cls, name)
    def faulty(self, first, *rest):
        if (self.round_index if rank == "0" else first.round_index) == fault["round"]:
            if fault["do"] == "raise":
                raise RuntimeError("a fault of the test")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault["do"]])
        return original(self, first, *rest)
    setattr(cls, name, faulty)
"""


@dataclass(frozen=True)
class FedMLWorld:
    """A :class:`~tests.host.small.World` that also writes FedML's files."""

    small: World

    @property
    def root(self) -> Path:
        return self.small.root

    def config(self, case: str, **settings: Any) -> Config:
        """What is trained: four clients, three of them in each round, three rounds."""
        common = {"federate.sample_client_num": 3, "federate.total_round_num": 3}
        return self.small.config({**CASES[case], **common, **settings})

    def file(self, case: str, backend: str, args: Mapping[str, Any] | None = None, **settings: Any) -> Path:
        """A FedML file, and beside it the configuration it names. ``args`` are FedML's keys, or ours in its file."""
        config = self.config(case, **settings)
        (self.root / "ours.yaml").write_text(dump_config(config), encoding="utf-8")
        theirs = {"client_num_in_total": 4, "client_num_per_round": 3, "comm_round": config.federate.total_round_num}
        own = {"fwdllm_config": "ours.yaml", "fwdllm_deadline_s": 120}
        flat = {**BACKENDS[backend], **theirs, **own, **(args or {})}
        sections = {
            "common_args": {key: value for key, value in flat.items() if not key.startswith("fwdllm_")},
            "fwdllm_args": {key: value for key, value in flat.items() if key.startswith("fwdllm_")},
        }
        path = self.root / "fedml_config.yaml"
        path.write_text(dump_yaml(sections), encoding="utf-8")
        return path

    def left_behind(self) -> set[str]:
        """What runs left in the current folder and in the home folder."""
        return {path.name for name in ("here", "home") for path in (self.root / name).iterdir()}


def inject(world: FedMLWorld, patch: pytest.MonkeyPatch, rank: int, round_index: int, do: str) -> None:
    """Let process ``rank`` of the next runs ``raise``, ``kill`` itself or ``stop`` in a round."""
    folder = world.root / "fault"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_FAULT, encoding="utf-8")
    patch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).resolve().parents[3]}")
    patch.setenv("TEST_FAULT", json.dumps({"rank": rank, "round": round_index, "do": do}))


def comparable(path: Path) -> tuple[list[dict[str, Any]], str, str]:
    """What must not depend on who carried the run: metrics without time and memory, bytes, what was saved."""
    lines = [
        {key: value for key, value in line.items() if key not in _VARYING}
        for line in read_jsonl(path / "metrics.jsonl")
    ]
    (saved,) = [*path.glob("adapter/adapter_model.safetensors"), *path.glob("model/model.safetensors")]
    return lines, (path / "bytes.csv").read_text(encoding="utf-8"), saved.read_bytes().hex()


def digests(path: Path) -> list[str]:
    return [line["digest"] for line in read_jsonl(path / "metrics.jsonl")]
