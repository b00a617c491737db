"""The built-in methods, each a combination of the same few parts and one registration call.

| name | federate.method, trainer.type | client | server |
|---|---|---|---|
| ``mezo`` | fedmezo, or fedavg with mezotrainer | local zeroth-order steps | replays slopes |
| ``forward_gradient`` | fedfwd, fwdllm, or fedavg with fwdtrainer | probes at one point | paced replay, momentum |
| ``fedavg`` | fedavg, llmtrainer | local SGD or AdamW by backpropagation | averages changes |
| ``fedsgd`` | fedsgd, llmtrainer | gradient by backpropagation | SGD or AdamW |
| ``cybgd`` | fedcybgd, cybgdtrainer | visits a block by backpropagation | cycles through the blocks, adds deltas |
"""

from __future__ import annotations

from fs_fwdllm.core.direction import AimedDirections
from fs_fwdllm.estimator import Backprop, make_estimator
from fs_fwdllm.method.base import Method, register_method
from fs_fwdllm.method.client import ClientWorker
from fs_fwdllm.method.cybgd.parts import make_block_server, make_block_worker, plan_of, select_blocks
from fs_fwdllm.method.first_order.dense import AverageServer, BackpropWorker, GradientServer, optimizer_factory
from fs_fwdllm.method.forward.pacing import Pacing
from fs_fwdllm.method.parts import Parts
from fs_fwdllm.method.scalar import ScalarServer, ScalarSettings, ScalarWorker
from fs_fwdllm.method.server import RoundServer, ServerSettings

__all__: list[str] = []


def _scalar_worker(parts: Parts, *, local_steps: bool) -> ClientWorker:
    config = parts.config
    distribution = parts.replica.replayer.distribution
    aimed = None if config.fwdllm.sampling.kind == "none" else AimedDirections(distribution)
    estimator = make_estimator(parts.model, parts.trainables, aimed or distribution, config.fwdllm, full=parts.full)
    settings = ScalarSettings(
        local_steps=local_steps,
        dense_upload=config.fwdllm.upload == "dense",
        weight_decay=config.train.optimizer.weight_decay,
    )
    return ScalarWorker(parts.objective, parts.replica, parts.batches, estimator, settings, aimed)


def _scalar_server(parts: Parts, settings: ServerSettings, *, local_steps: bool) -> RoundServer:
    config = parts.config
    momentum = config.fwdllm.server_momentum
    if config.fwdllm.upload == "scalars":
        pacing = Pacing.of(config.fwdllm, parts.trainables)
        return ScalarServer(
            parts.server_replayer(), settings, local_steps=local_steps, momentum=momentum, pacing=pacing
        )
    if local_steps:
        return AverageServer(parts.server_replayer(), settings)
    return GradientServer(
        parts.server_replayer(), settings, optimizer_factory("SGD", weight_decay=0.0, momentum=momentum)
    )


def _backprop_worker(parts: Parts, *, local_steps: bool) -> ClientWorker:
    config = parts.config
    optimizer = config.train.optimizer
    factory = optimizer_factory(optimizer.type, weight_decay=optimizer.weight_decay, momentum=optimizer.momentum)
    return BackpropWorker(
        parts.objective,
        parts.replica,
        parts.batches,
        Backprop(parts.model, gradient_checkpointing=config.fwdllm.gradient_checkpointing),
        factory if local_steps else None,
        optimizer.weight_decay,
    )


def _gradient_server(parts: Parts, settings: ServerSettings) -> RoundServer:
    optimizer = parts.config.train.optimizer
    factory = optimizer_factory(optimizer.type, weight_decay=optimizer.weight_decay, momentum=optimizer.momentum)
    return GradientServer(parts.server_replayer(), settings, factory)


register_method(
    Method(
        name="mezo",
        spellings=(("fedmezo", ""), ("fedmezo", "mezotrainer"), ("fedavg", "mezotrainer")),
        forward_only=True,
        make_worker=lambda parts: _scalar_worker(parts, local_steps=True),
        make_server=lambda parts, settings: _scalar_server(parts, settings, local_steps=True),
        local_steps=True,
    )
)
register_method(
    Method(
        name="forward_gradient",
        spellings=(
            ("fedfwd", ""),
            ("fedfwd", "fwdtrainer"),
            ("fedavg", "fwdtrainer"),
            ("fwdllm", ""),
            ("fwdllm", "fwdtrainer"),
        ),
        forward_only=True,
        make_worker=lambda parts: _scalar_worker(parts, local_steps=False),
        make_server=lambda parts, settings: _scalar_server(parts, settings, local_steps=False),
    )
)
register_method(
    Method(
        name="fedavg",
        spellings=(("fedavg", ""), ("fedavg", "llmtrainer"), ("fedavg", "general")),
        forward_only=False,
        make_worker=lambda parts: _backprop_worker(parts, local_steps=True),
        make_server=lambda parts, settings: AverageServer(parts.server_replayer(), settings),
        local_steps=True,
    )
)
register_method(
    Method(
        name="fedsgd",
        spellings=(("fedsgd", ""), ("fedsgd", "llmtrainer"), ("fedsgd", "general")),
        forward_only=False,
        make_worker=lambda parts: _backprop_worker(parts, local_steps=False),
        make_server=_gradient_server,
    )
)
register_method(
    Method(
        name="cybgd",
        spellings=(("fedcybgd", ""), ("fedcybgd", "cybgdtrainer"), ("fedavg", "cybgdtrainer")),
        forward_only=False,
        make_worker=make_block_worker,
        make_server=make_block_server,
        select=select_blocks,
        describe=lambda parts: plan_of(parts).describe(),
    )
)
