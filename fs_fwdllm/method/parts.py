"""From a configuration to the objects that carry a run: model, objective, replica, worker, server.

Hosts call :func:`assemble_worker` where clients live and :func:`assemble_server` where the server lives; both start
from the same :class:`Parts`, built once per process: one base model however many clients are simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fs_fwdllm.config.schema import Config
from fs_fwdllm.core.direction import make_distribution
from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data import steps_per_epoch
from fs_fwdllm.data.types import Task
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.base import resolve_method
from fs_fwdllm.method.client import BatchSettings, ClientWorker
from fs_fwdllm.method.client_rates import StrategySettings
from fs_fwdllm.method.cybgd.checks import check_blocks
from fs_fwdllm.method.replica import Replica
from fs_fwdllm.method.server import RoundServer, ServerSettings, WorkPlan
from fs_fwdllm.model.objective import Objective

__all__ = ["Parts", "assemble_server", "assemble_worker", "check_combination", "select_device", "work_plans"]


@dataclass
class Parts:
    """What worker and server are made from.

    Attributes:
        full: whether the model's own weights are trained, rather than an adapter beside them.
        fresh: names of the parameters that start from random numbers.
    """

    config: Config
    model: nn.Module
    trainables: Trainables
    objective: Objective
    replica: Replica
    batches: BatchSettings
    full: bool
    fresh: frozenset[str] = frozenset()

    @classmethod
    def build(
        cls,
        config: Config,
        model: nn.Module,
        task: Task,
        pad_token_id: int,
        *,
        full: bool,
        label_tokens: Sequence[int] = (),
        fresh: frozenset[str] = frozenset(),
    ) -> Parts:
        """Parts around a loaded model (in evaluation mode, ``requires_grad`` on what is trained)."""
        select = resolve_method(config).select
        if select is not None:
            select(config, model, fresh)
        trainables = Trainables.of_model(model, half=select is not None)
        cache_mib = config.fwdllm.prefix_cache_mib if select is None else 0
        return cls(
            config=config,
            model=model,
            trainables=trainables,
            objective=Objective(model, trainables, task, cache_mib << 20, label_tokens),
            replica=Replica(_replayer(config, trainables)),
            batches=BatchSettings(
                batch_size=config.dataloader.batch_size,
                seed=config.seed,
                pad_token_id=pad_token_id,
                shuffle=config.dataloader.shuffle,
            ),
            full=full,
            fresh=fresh,
        )

    def with_config(self, config: Config) -> Parts:
        """The same model and objective under another configuration, with a replica of its own."""
        return replace(self, config=config, replica=Replica(_replayer(config, self.trainables)))

    def server_replayer(self) -> Replayer:
        """The server's own copy of the trainables, so that clients really have to rebuild it."""
        return _replayer(self.config, self.trainables.clone())


def _replayer(config: Config, trainables: Trainables) -> Replayer:
    return Replayer(trainables, config.seed, make_distribution(config.fwdllm.direction))


def assemble_worker(parts: Parts) -> ClientWorker:
    """The client side of the configured method."""
    return resolve_method(parts.config).make_worker(parts)


def assemble_server(parts: Parts, client_samples: dict[int, int]) -> RoundServer:
    """The server side of the configured method; ``client_samples`` counts each client's training samples."""
    config = parts.config
    settings = ServerSettings(
        plans=work_plans(config, client_samples),
        schedule=Schedule(
            base=config.train.optimizer.lr,
            shape=config.train.scheduler.type or "constant",
            rounds=config.federate.total_round_num,
            warmup_ratio=config.train.scheduler.warmup_ratio,
        ),
        weight_decay=config.train.optimizer.weight_decay,
        equal_weights=config.federate.ignore_weight,
        max_failed_rounds=config.fwdllm.max_failed_rounds,
        strategy=StrategySettings(config.train.train_strategy, config.fwdllm.strategy_span, config.seed),
    )
    return resolve_method(config).make_server(parts, settings)


def work_plans(config: Config, client_samples: dict[int, int]) -> dict[int, WorkPlan]:
    """Steps and probes of every client's round; with ``batch_or_epoch: epoch`` the steps follow the client's size."""
    probes = config.fwdllm.probes if resolve_method(config).forward_only else 0
    plans = {}
    for client, samples in client_samples.items():
        steps = config.train.local_update_steps
        if config.train.batch_or_epoch == "epoch":
            steps *= steps_per_epoch(samples, config.dataloader.batch_size)
        else:
            steps *= config.grad.grad_accum_count
        plans[client] = WorkPlan(steps=steps, probes=probes)
    return plans


def check_combination(config: Config) -> None:
    """Refuse settings that are valid alone but not together.

    Raises:
        ConfigError: names the keys and the way out.
    """
    method = resolve_method(config)
    own = config.fwdllm
    if config.train.train_strategy != "frozen" and not method.local_steps:
        raise ConfigError(
            f"train.train_strategy {config.train.train_strategy!r}: with {method.name} the server takes the steps, so "
            "clients have no learning rate of their own; set train.train_strategy: frozen, or use a method whose "
            "clients step: federate.method fedmezo, or FedAvg with trainer.type mezotrainer or llmtrainer"
        )
    _check_pacing(config, method.name)
    if method.select is not None:
        check_blocks(config)
        return
    _refuse_block_settings(config, method.name)
    if not method.forward_only:
        return
    if method.name == "mezo" and own.server_momentum:
        raise ConfigError(
            f"fwdllm.server_momentum {own.server_momentum}: MeZO's clients take the steps, so the server has no "
            "gradient to give momentum to; set it to 0 or use federate.method: fedfwd"
        )
    if own.estimator == "forward_mode" and own.attention == "sdpa":
        raise ConfigError(
            "fwdllm.attention 'sdpa': fused attention has no forward-mode derivative, which fwdllm.estimator "
            "'forward_mode' needs; set fwdllm.attention: eager"
        )
    if not config.llm.adapter.use and own.probes_per_batch > 1 and own.estimator != "forward_mode":
        raise ConfigError(
            f"fwdllm.probes_per_batch {own.probes_per_batch}: full-parameter tuning would need that many copies of the "
            "model; set it to 1 or use an adapter (llm.adapter.use: true)"
        )
    most = max(own.probes, 2 if own.estimator == "central" else 1)  # 2 batches the two points of a single probe
    if own.probes_per_batch > most:
        raise ConfigError(
            f"fwdllm.probes_per_batch {own.probes_per_batch}: more than fwdllm.probes {own.probes}; allowed are 1 to "
            f"{most}"
        )


def _check_pacing(config: Config, method: str) -> None:
    """Refuse gate, sampling and step control where no server step is built from pooled slopes."""
    own = config.fwdllm
    asked = [
        f"{name} {value!r}"
        for name, value, neutral in (
            ("fwdllm.gate.kind", own.gate.kind, "none"),
            ("fwdllm.sampling.kind", own.sampling.kind, "none"),
            ("fwdllm.step.control", own.step.control, "none"),
            ("fwdllm.step.report_norms", own.step.report_norms, False),
            ("fwdllm.step.report_cosine", own.step.report_cosine, False),
        )
        if value != neutral
    ]
    if asked and (method != "forward_gradient" or own.upload != "scalars"):
        raise ConfigError(
            f"{asked[0]}: needs a server that pools slopes, which federate.method {config.federate.method!r} with "
            f"fwdllm.upload {own.upload!r} does not; use federate.method: fwdllm with fwdllm.upload: scalars"
        )
    if own.sampling.kind == "corrected" and own.probes < 2:
        raise ConfigError(
            f"fwdllm.probes {own.probes}: fwdllm.sampling.kind 'corrected' spends one probe of a step on the "
            "reference; allowed are 2 or more"
        )
    if own.gate.tensor != "all" and own.gate.kind != "published":
        raise ConfigError(
            f"fwdllm.gate.tensor {own.gate.tensor!r}: only fwdllm.gate.kind 'published' looks at one tensor; set it to "
            "'all' or the kind to 'published'"
        )


def _refuse_block_settings(config: Config, method: str) -> None:
    """What only block training honours must not be ignored elsewhere."""
    only = "only federate.method: fedcybgd has it"
    if config.grad.grad_clip > 0:
        raise ConfigError(f"grad.grad_clip {config.grad.grad_clip}: {method} does not clip, {only}; set it to -1")
    if config.grad.grad_accum_count > 1:
        raise ConfigError(
            f"grad.grad_accum_count {config.grad.grad_accum_count}: {method} does not accumulate, {only}; set it to 1 "
            "and raise dataloader.batch_size"
        )
    if config.train.optimizer.type not in ("SGD", "AdamW"):
        raise ConfigError(
            f"train.optimizer.type {config.train.optimizer.type!r}: {method} has 'SGD' and 'AdamW', {only}"
        )


def select_device(config: Config) -> torch.device:
    """The device a configuration asks for; ``use_gpu`` without an accelerator falls back to the CPU."""
    if config.use_gpu and torch.cuda.is_available():
        return torch.device("cuda", max(config.device, 0))
    return torch.device("cpu")
