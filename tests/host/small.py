"""Small federations: tiny random models on a few made-up sentences, opened and run in milliseconds.

:class:`World` writes models and data below a folder and makes configurations for them. :class:`Federation` plays the
rounds of a configuration by hand, so that a test can come between client and server; every message still passes
through its frame.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.config.methods import METHODS as FACTS
from fs_fwdllm.config.methods import MethodFacts
from fs_fwdllm.core.wire import Assignment, ClientUpdate, decode, encode
from fs_fwdllm.data import client_batches
from fs_fwdllm.data.types import Batch
from fs_fwdllm.method import ClientWorker, RoundReport, assemble_server, assemble_worker
from fs_fwdllm.running.driver import choose_clients
from fs_fwdllm.running.session import Session
from tests.model.tiny import save_tiny_model

__all__ = [
    "CLASSES",
    "METHODS",
    "PLAIN_MEAN",
    "SCALAR_METHODS",
    "Federation",
    "World",
    "bits_of",
    "methods_where",
    "read_jsonl",
]

CLASSES = ("animal", "plant", "stone")

#: One configuration of every method; each of them asks all four clients in every round.
METHODS: dict[str, dict[str, Any]] = {
    "mezo": {"federate.method": "fedmezo", "train.local_update_steps": 2, "fwdllm.probes": 2},
    "forward_gradient": {"federate.method": "fedfwd", "fwdllm.probes": 4},
    "fedavg": {"federate.method": "FedAvg", "train.local_update_steps": 2},
    "fedsgd": {"federate.method": "FedSGD", "train.local_update_steps": 2},
    "cybgd": {
        "federate.method": "fedcybgd", "train.local_update_steps": 2, "train.optimizer.type": "AdamW",
        "llm.adapter.use": False, "llm.adapter.args": [{}],
        "fwdllm.blocks.parallel_blocks": 2, "fwdllm.blocks.clients_per_block": 2,
    },
}  # fmt: skip


#: For laws of the plain mean: nobody's update is shortened to what is usual.
PLAIN_MEAN = {"fwdllm.robust.clip": "none"}


def methods_where(wanted: Callable[[MethodFacts], bool]) -> list[str]:
    """The methods with a property, for tests of what does not hold for every method."""
    return [name for name in METHODS if wanted(FACTS[name])]


SCALAR_METHODS = methods_where(lambda facts: facts.measures_slopes)


@dataclass(frozen=True)
class World:
    """A folder with data (``texts.jsonl``, ``instructions.jsonl``), and models that tests share and never change."""

    root: Path
    models: Path

    def model(self, architecture: str, **changes: Any) -> Path:
        """The folder of a tiny model, written on first use. ``changes`` are those of ``save_tiny_model``."""
        folder = self.models / "-".join([architecture, *(f"{key}{value}" for key, value in sorted(changes.items()))])
        return folder if folder.exists() else save_tiny_model(folder, architecture, **changes)

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        """Write ``rows`` as JSON lines and return ``name``."""
        (self.root / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return name

    def texts(self, rows: int = 48, name: str = "texts.jsonl", classes: Sequence[str] = CLASSES) -> str:
        """Sentences whose words depend on their class, so that there is something to learn."""
        rng = np.random.default_rng(7)
        return self.write_rows(
            name,
            (
                {"text": _words(rng, 3 + 30 * (row % len(classes)), 4 + row % 5), "label": classes[row % len(classes)]}
                for row in range(rows)
            ),
        )

    def instructions(self, rows: int = 32, name: str = "instructions.jsonl") -> str:
        """Instructions with answers of different lengths, in three categories."""
        rng = np.random.default_rng(8)
        return self.write_rows(
            name,
            (
                {
                    "instruction": _words(rng, 3, 3),
                    "input": "",
                    "output": _words(rng, 3 + 30 * (row % 3), 3 + row % 4),
                    "category": CLASSES[row % 3],
                }
                for row in range(rows)
            ),
        )

    def tree(self, settings: Mapping[str, Any] | None = None, *, language_model: bool = False) -> dict[str, Any]:
        """The tree of a configuration; ``settings`` are dotted keys that replace or add to the defaults."""
        if language_model:
            base = {
                "data.type": f"{self.instructions()}@llm",
                "model.type": f"{self.model('llama')}@huggingface_llm",
                "llm.tok_len": 64,
            }
        else:
            base = {
                "data.type": f"{self.texts()}@text",
                "model.type": f"{self.model('bert')}@transformers",
                "model.task": "SequenceClassification",
                "llm.tok_len": 16,
            }
        defaults = {
            **({"use_gpu": True} if os.environ.get("FS_FWDLLM_TEST_GPU") else {}),
            "seed": 5, "outdir": str(self.root / "runs"), "expname": "small", "threads": 1,
            "federate.client_num": 4, "federate.total_round_num": 5,
            "data.root": str(self.root), "data.splits": [0.8, 0.0, 0.2],
            "dataloader.batch_size": 4, "train.optimizer.lr": 0.05, "fwdllm.radius": 0.01,
            "llm.adapter.use": True, "llm.adapter.args": [{"adapter_method": "lora", "r": 2, "lora_dropout": 0.1}],
        }  # fmt: skip
        tree: dict[str, Any] = {}
        for key, value in {**defaults, **base, **(settings or {})}.items():
            *sections, leaf = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = value
        return tree

    def config(self, settings: Mapping[str, Any] | None = None, *, language_model: bool = False) -> Config:
        """The validated :meth:`tree`."""
        return parse_config(self.tree(settings, language_model=language_model))


def _words(rng: np.random.Generator, first: int, count: int) -> str:
    return " ".join(f"w{first + int(index)}" for index in rng.integers(0, 30, count))


class Federation:
    """One server, and one worker for all clients (as the local host has it) or one for each (as devices are)."""

    def __init__(self, config: Config, *, separate_workers: bool = False) -> None:
        self.config = config
        self.session = Session.open(config)
        self.server = assemble_server(self.session.parts, self.session.client_samples)
        self.clients = sorted(self.session.client_samples)
        self._shared = assemble_worker(self.session.parts)
        self._own: dict[int, ClientWorker] | None = {} if separate_workers else None

    def worker(self, client: int) -> ClientWorker:
        """The worker of ``client``; a separate one starts from the model as it was before the first round."""
        if self._own is None:
            return self._shared
        if client not in self._own:
            self._own[client] = assemble_worker(Session.open(self.config).parts)
        return self._own[client]

    def restart(self, client: int) -> None:
        """Let the worker that ``client`` has of its own die; its next one starts from the base model."""
        assert self._own is not None
        del self._own[client]

    def batches(self, client: int, round_index: int = 0) -> list[Batch]:
        """What the client works on in a round."""
        parts = self.session.parts
        return client_batches(
            self.session.data.clients[client].train,
            client=client,
            round_index=round_index,
            steps=self.server.settings.plans[client].steps,
            batch_size=parts.batches.batch_size,
            seed=parts.batches.seed,
            pad_token_id=parts.batches.pad_token_id,
        )

    def work(self, assignment: Assignment) -> ClientUpdate:
        """A client's answer, both messages having been encoded and decoded."""
        received = decode(encode(assignment))
        assert isinstance(received, Assignment)
        examples = self.session.data.clients[assignment.client].train
        answer = decode(encode(self.worker(assignment.client).work(received, examples)))
        assert isinstance(answer, ClientUpdate)
        return answer

    def answers(self, round_index: int, clients: Sequence[int] | None = None) -> list[ClientUpdate]:
        """Open a round and let its clients work: those named, or whom a run would ask."""
        if clients is None:
            clients = choose_clients(self.server, self.config, round_index, self.clients)
        assigned = self.server.assign(round_index, clients)
        return [self.work(assignment) for assignment in assigned.values()]

    def round(
        self,
        round_index: int,
        clients: Sequence[int] | None = None,
        meddle: Callable[[list[ClientUpdate]], Iterable[ClientUpdate]] = iter,
    ) -> RoundReport:
        """A whole round; ``meddle`` may change, drop, add or reorder the answers on their way."""
        return self.server.absorb(meddle(self.answers(round_index, clients)))

    def parameters(self) -> np.ndarray:
        """The server's parameters as one float32 vector (a copy)."""
        return self.server.trainables.to_flat().copy()


def bits_of(model: nn.Module, *, trained: bool) -> str:
    """A hash of everything in ``model`` that requires a gradient, or of everything that does not, buffers included."""
    state = hashlib.sha256()
    parameters = [(name, value) for name, value in model.named_parameters() if value.requires_grad == trained]
    for name, value in [*parameters, *([] if trained else model.named_buffers())]:
        state.update(name.encode())
        state.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a half-written last line counts as none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
