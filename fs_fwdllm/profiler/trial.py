"""A short trial: rounds of the configured method at one learning rate, and what they make of the evaluation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fs_fwdllm.config import Config
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.core.wire import ClientUpdate, decode, encode
from fs_fwdllm.data.types import IGNORED_LABEL
from fs_fwdllm.errors import DivergenceError, TrainingStalledError
from fs_fwdllm.method import assemble_server, assemble_worker
from fs_fwdllm.report.record import evaluation_metric
from fs_fwdllm.running.driver import answer
from fs_fwdllm.running.sampling import clients_per_round, sample_clients
from fs_fwdllm.running.session import Session

__all__ = ["Trial", "evaluate_at", "run_trial"]


@dataclass(frozen=True)
class Trial:
    """Rounds at one learning rate: evaluation loss and metric after them, the loss of each label, and the seconds."""

    loss_after: float
    metric: float
    learning_rate: float
    seconds: float
    row_losses: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)


def run_trial(session: Session, forward_passes: int, learning_rate: float) -> Trial:
    """Rounds of the configured method until the forward passes are spent; then the evaluation loss."""
    config = _with_rate(session.config, learning_rate)
    start = session.parts.trainables.copy_values()
    started = time.perf_counter()
    try:
        parts = session.parts.with_config(config)
        worker, server = assemble_worker(parts), assemble_server(parts, session.client_samples)
        spent = round_index = 0
        available = sorted(session.client_samples)
        per_round = clients_per_round(config, len(available))
        while spent < forward_passes:
            clients = sample_clients(config.seed, round_index, available, per_round)
            updates = [
                decode(answer(worker, encode(given), session.data.clients[client].train))
                for client, given in server.assign(round_index, clients).items()
            ]
            report = server.absorb(update for update in updates if isinstance(update, ClientUpdate))
            spent, round_index = spent + max(report.forward_passes, 1), round_index + 1
        loss, metric = evaluate_at(replace(session, config=config), server.trainables)
        losses = _row_losses(session, server.trainables)
    except (TrainingStalledError, DivergenceError):
        loss, metric, losses = math.inf, math.nan, np.zeros(0)
    finally:
        session.parts.trainables.load_values(start)
    loss = loss if math.isfinite(loss) else math.inf
    return Trial(loss, metric, learning_rate, time.perf_counter() - started, losses)


@torch.no_grad()
def _row_losses(session: Session, trainables: Trainables) -> np.ndarray:
    """The loss of each label of the evaluation."""
    found = []
    with session.at(trainables):
        for batch in session.evaluation_batches:
            loss = session.parts.objective.on(batch)
            labelled = loss.targets != IGNORED_LABEL
            found.append(loss.judged().losses[labelled].cpu())
    return torch.cat(found).numpy()


def _with_rate(config: Config, learning_rate: float) -> Config:
    """``config`` at a constant learning rate."""
    train = config.train.model_copy(
        update={
            "optimizer": config.train.optimizer.model_copy(update={"lr": learning_rate}),
            "scheduler": config.train.scheduler.model_copy(update={"type": "constant", "warmup_ratio": 0.0}),
        }
    )
    return config.model_copy(update={"train": train})


def evaluate_at(session: Session, trainables: object) -> tuple[float, float]:
    results = session.evaluate(trainables) or {}  # type: ignore[arg-type]
    metric = evaluation_metric(results, session.config.eval)
    return results["loss"], math.nan if metric in (None, "loss") else results[metric]
