"""Which parts make the baselines: FedAvg (clients step, changes are averaged) and FedSGD (the server steps)."""

from __future__ import annotations

from fs_fwdllm.config.schema import Config
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.method.client import ClientWorker
from fs_fwdllm.method.first_order.dense import (
    AverageServer,
    BackpropWorker,
    GradientServer,
    OptimizerFactory,
    optimizer_factory,
)
from fs_fwdllm.method.parts import Parts, Recipe
from fs_fwdllm.method.server import RoundServer, ServerSettings

__all__ = ["AVERAGING", "GRADIENTS"]


def _optimizer(config: Config) -> OptimizerFactory:
    optimizer = config.train.optimizer
    return optimizer_factory(optimizer.type, weight_decay=optimizer.weight_decay, momentum=optimizer.momentum)


def _worker(parts: Parts, make_optimizer: OptimizerFactory | None) -> ClientWorker:
    config = parts.config
    return BackpropWorker(
        parts.objective,
        parts.replica,
        parts.batches,
        Backprop(parts.model, gradient_checkpointing=config.fwdllm.gradient_checkpointing),
        make_optimizer,
        config.train.optimizer.weight_decay,
    )


def _average_server(parts: Parts, settings: ServerSettings) -> RoundServer:
    return AverageServer(parts.server_replayer(), settings)


def _gradient_server(parts: Parts, settings: ServerSettings) -> RoundServer:
    return GradientServer(parts.server_replayer(), settings, _optimizer(parts.config))


AVERAGING = Recipe(lambda parts: _worker(parts, _optimizer(parts.config)), _average_server)
GRADIENTS = Recipe(lambda parts: _worker(parts, None), _gradient_server)
