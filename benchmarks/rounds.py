"""All rounds of a configuration over a session that stays loaded, with the product's workers, servers and frames.

Dozens of runs that differ in rates and slopes share the loaded model and what its frozen layers made of each batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fs_fwdllm.config import Config
from fs_fwdllm.core.wire import decode, encode
from fs_fwdllm.data.batches import evaluation_batches
from fs_fwdllm.evaluation.metrics import evaluate
from fs_fwdllm.method import assemble_server, assemble_worker
from fs_fwdllm.running.driver import choose_clients
from fs_fwdllm.running.first_rate import with_first_rate
from fs_fwdllm.running.sampling import clients_per_round
from fs_fwdllm.running.session import Session

__all__ = ["Bench", "Reached"]


@dataclass
class Reached:
    """What a run came to: the loss of validation rows, loss and accuracy of test rows, and what it took."""

    validation: float
    test: float
    loss: float
    forward_passes: int = 0
    backward_passes: int = 0
    upload_bytes: int = 0
    download_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Bench:
    """A loaded session and its starting point."""

    session: Session
    start: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.session.parts.trainables.copy_values()
        pad = self.session.loaded.tokenizer.pad_token_id
        self.validation = evaluation_batches(self.session.data.val, 32, pad, "val")

    def with_first_rate(self, config: Config) -> Config:
        """``config`` with the rate it asks to be found."""
        asked = clients_per_round(config, len(self.session.client_samples))
        return with_first_rate(config, self.session.loaded, asked)

    def run(self, config: Config) -> Reached:
        """All rounds of ``config``, every message encoded and decoded."""
        session, started = self.session, time.process_time()
        session.parts.trainables.load_values(self.start)
        parts = session.parts.with_config(config)
        server, worker = assemble_server(parts, session.client_samples), assemble_worker(parts)
        clients = sorted(session.client_samples)
        for client in clients:
            server.note_holds(client, server.digest)
        reached = Reached(0.0, 0.0, 0.0)
        for index in range(config.federate.total_round_num):
            answers = []
            for client, given in server.assign(index, choose_clients(server, config, index, clients)).items():
                down = encode(given)
                up = encode(worker.work(decode(down), session.data.clients[client].train))
                reached.upload_bytes += len(up)
                reached.download_bytes += len(down)
                answers.append(decode(up))
            report = server.absorb(answers)
            reached.forward_passes += report.forward_passes
            reached.backward_passes += report.backward_passes
        reached.seconds = time.process_time() - started
        with session.at(server.trainables):
            reached.validation = self._measure(self.validation)["loss"]
            test = self._measure(session.evaluation_batches)
        reached.test, reached.loss = test["accuracy"], test["loss"]
        return reached

    def _measure(self, batches: Sequence[Any]) -> Mapping[str, Any]:
        session = self.session
        names, tokenizer = session.data.label_names, session.loaded.tokenizer
        return evaluate(session.parts.objective, batches, ["accuracy"], names, tokenizer)
