"""From a configuration to the objects that carry a run: model, objective, replica, worker, server.

The facts of a method stand in the table (:mod:`fs_fwdllm.config.methods`); how it works is its :class:`Recipe`, which
the table names and a run imports when it needs it. A method is a combination of parts, so a recipe is short: which
worker, which server.

Hosts call :func:`assemble_worker` where clients live and :func:`assemble_server` where the server lives; both start
from the same :class:`Parts`, built once per process: one base model however many clients are simulated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fs_fwdllm.config.schema import Config
from fs_fwdllm.config.sources import (
    Source,
    check_fleet,
    counts_of,
    division_of,
    estimators_of,
    groups_of_sources,
    sources_of,
)
from fs_fwdllm.core.direction import DirectionKey, Distribution, make_distribution
from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.core.orthogonal import OrthogonalRows
from fs_fwdllm.core.replay import DEFAULT_CHUNK, Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data import collate, steps_per_epoch
from fs_fwdllm.data.types import Batch, Task
from fs_fwdllm.errors import ConfigError, EstimatorError
from fs_fwdllm.estimator import Backprop, PartedEstimator, Passes, make_parted_estimator, passes_of_step
from fs_fwdllm.method.believing import RobustSettings
from fs_fwdllm.method.client import BatchSettings, ClientWorker
from fs_fwdllm.method.client_rates import StrategySettings
from fs_fwdllm.method.direction_sets import OWN, DirectionSets
from fs_fwdllm.method.replica import Replica
from fs_fwdllm.method.server import RoundServer, ServerSettings, WorkPlan
from fs_fwdllm.model.objective import Objective
from fs_fwdllm.model.trial import PADDED_RIGHT, Conduct, trial_examples

__all__ = [
    "Parts",
    "Recipe",
    "assemble_server",
    "assemble_worker",
    "direction_sets",
    "passes_of_client",
    "recipe_of",
    "replayer_for",
    "select_device",
    "server_settings",
    "work_plans",
]

_ONE_BY_ONE = (
    "warning: fwdllm.probes_per_batch {}: an operation of this model cannot be batched over probes, so that they are "
    "evaluated one by one"
)


@dataclass
class Parts:
    """What worker and server are made from.

    Attributes:
        full: whether the model's own weights are trained, rather than an adapter beside them.
        fresh: names of the parameters that start from random numbers.
        trial: two made-up samples to try an estimator out on.
        remarks: what a user should know of settings that the model does not support.
    """

    config: Config
    model: nn.Module
    trainables: Trainables
    objective: Objective
    replica: Replica
    batches: BatchSettings
    full: bool
    fresh: frozenset[str] = frozenset()
    trial: Batch | None = None
    remarks: tuple[str, ...] = ()

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
        conduct: Conduct = PADDED_RIGHT,
        trial: Sequence[Sequence[int]] = (),
    ) -> Parts:
        """Parts around a loaded model (in evaluation mode, ``requires_grad`` on what is trained).

        Args:
            conduct: how the model takes padding.
            trial: token ids of two made-up samples; the configured estimator is tried out on them.

        Raises:
            EstimatorError: the model does not support the estimator at all.
        """
        blocks, select = config.method.trains_blocks, recipe_of(config).select
        trainables = Trainables.of_model(model) if select is None else select(config, model, fresh)
        cache_mib = 0 if blocks else config.fwdllm.prefix_cache_mib
        parts = cls(
            config=config,
            model=model,
            trainables=trainables,
            objective=Objective(model, trainables, task, cache_mib << 20, label_tokens, conduct),
            replica=Replica(replayer_for(config, trainables)),
            batches=BatchSettings(
                batch_size=config.dataloader.batch_size,
                seed=config.seed,
                pad_token_id=pad_token_id,
                shuffle=config.dataloader.shuffle,
                most_steps=partial(_steps_of_round, config),
            ),
            full=full,
            fresh=fresh,
            trial=collate(trial_examples(trial, task), pad_token_id) if trial else None,
        )
        return parts.with_config(config)

    def with_config(self, config: Config) -> Parts:
        """The same model and objective under another configuration, with a replica of its own."""
        supported = self._supported(config)
        remarks = () if supported is config else (_ONE_BY_ONE.format(config.fwdllm.probes_per_batch),)
        replica = Replica(replayer_for(supported, self.trainables))
        batches = replace(self.batches, most_steps=partial(_steps_of_round, supported))
        return replace(self, config=supported, replica=replica, remarks=remarks, batches=batches)

    def _supported(self, config: Config) -> Config:
        """``config``, with probes one by one where this model cannot evaluate several of them in one pass."""
        own = config.fwdllm
        if not config.method.measures_slopes or self.trial is None:
            return config
        plain = own.probes_per_batch == 1
        if plain and not any(one.exact or not one.works_with_fused_attention for one in estimators_of(config).values()):
            return config  # ordinary forward passes: nothing to find out
        try:
            self._try_estimators(config)
        except EstimatorError:
            if plain:
                raise
            one_by_one = config.model_copy(update={"fwdllm": own.model_copy(update={"probes_per_batch": 1})})
            self._try_estimators(one_by_one)
            return one_by_one
        return config

    def _try_estimators(self, config: Config) -> None:
        """Measure two slopes of every part as every group of clients does."""
        assert self.trial is not None
        directions, division = make_distribution(config.fwdllm.direction), division_of(config, self.trainables.names)
        for sources in groups_of_sources(config):
            estimator = make_parted_estimator(
                self.model, self.trainables, directions, config.fwdllm, division, sources, full=self.full
            )
            keys = [[DirectionKey(0, probe) for probe in range(min(2, count))] for count in estimator.probes]
            estimator.slopes(self.objective.on(self.trial), keys)

    def server_replayer(self) -> Replayer:
        """The server's own copy of the trainables, so that clients really have to rebuild it."""
        return replayer_for(self.config, self.trainables.clone())

    def measuring(self, directions: Distribution) -> Callable[[int], PartedEstimator]:
        """From a client's number to what measures its slopes along ``directions``, made once for all who do alike."""
        made: dict[tuple[Source, ...], PartedEstimator] = {}

        def of(client: int) -> PartedEstimator:
            sources = sources_of(self.config, client)
            if sources not in made:
                division = self.replica.replayer.division
                made[sources] = make_parted_estimator(
                    self.model, self.trainables, directions, self.config.fwdllm, division, sources, full=self.full
                )
            return made[sources]

        return of


def replayer_for(config: Config, trainables: Trainables, chunk: int = DEFAULT_CHUNK) -> Replayer:
    """What rebuilds the updates of a configuration on ``trainables``, of PyTorch or numpy."""
    distribution = make_distribution(config.fwdllm.direction)
    if not config.method.measures_slopes:
        return Replayer(trainables, config.seed, distribution, chunk)
    division = division_of(config, trainables.names)
    if direction_sets(config).orthogonal:
        distribution = OrthogonalRows(trainables.tensors, division)
    return Replayer(trainables, config.seed, distribution, chunk, division)


def direction_sets(config: Config) -> DirectionSets:
    """Whose directions the clients of a configuration look along."""
    own = config.fwdllm
    if own.directions == "own" or not config.method.measures_slopes:
        return OWN
    if own.directions == "groups":
        return DirectionSets(own.direction_groups)
    free = config.method.pools_slopes and all(source.exact for source in estimators_of(config).values())
    return DirectionSets(1, orthogonal=free)


def _nothing_to_check(config: Config) -> None:
    """Every combination of this method's settings is fine."""


@dataclass(frozen=True)
class Recipe:
    """How the two halves of a method are made.

    Attributes:
        make_worker: assembles the clients' side from shared parts.
        make_server: assembles the server from shared parts and what hosts set.
        check: refuses settings of the method that are valid alone but not together.
        select: the parameters that are ever trained, where ``llm.adapter`` does not say so; it gets the names of
            those that start from random numbers.
        describe: what a user should be told about the parts before the first round.
    """

    make_worker: Callable[[Parts], ClientWorker]
    make_server: Callable[[Parts, ServerSettings], RoundServer]
    check: Callable[[Config], None] = _nothing_to_check
    select: Callable[[Config, nn.Module, frozenset[str]], Trainables] | None = None
    describe: Callable[[Parts], str] | None = None


def recipe_of(config: Config) -> Recipe:
    """The recipe of the method that a configuration chooses.

    Raises:
        ConfigError: there is no such method, or its recipe cannot be imported.
    """
    facts = config.method
    recipe: Any = facts.recipe
    if isinstance(recipe, str):
        module, _, attribute = recipe.partition(":")
        try:
            recipe = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # another package's module may fail in any way
            raise ConfigError(
                f"federate.method {config.federate.method!r}: the recipe {facts.recipe!r} of method {facts.name!r} "
                f"cannot be imported ({type(error).__name__}: {error}); install the package that brings it anew"
            ) from error
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"federate.method {config.federate.method!r}: the recipe of method {facts.name!r} is a "
            f"{type(recipe).__name__}; it must be a fs_fwdllm.method.Recipe, or 'module:attribute' of one"
        )
    return recipe


def assemble_worker(parts: Parts) -> ClientWorker:
    """The client side of the configured method."""
    return recipe_of(parts.config).make_worker(parts)


def assemble_server(parts: Parts, client_samples: dict[int, int], folder: Path | None = None) -> RoundServer:
    """The server side of the configured method.

    Args:
        client_samples: each client's training samples, counted.
        folder: of files for what does not fit in memory.
    """
    return recipe_of(parts.config).make_server(parts, server_settings(parts.config, client_samples, folder))


def server_settings(config: Config, client_samples: dict[int, int], folder: Path | None = None) -> ServerSettings:
    """What a configuration says to any server."""
    return ServerSettings(
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
        weigh_by_precision=config.fwdllm.weigh_by == "precision",
        folder=folder,
        robust=RobustSettings(
            clip=config.fwdllm.robust.times_median,
            samples_times_median=config.fwdllm.robust.samples_times_median,
            statistic=config.fwdllm.robust.statistic,
            liars=config.fwdllm.robust.liars,
        ),
        sets=direction_sets(config),
    )


def work_plans(config: Config, client_samples: dict[int, int]) -> dict[int, WorkPlan]:
    """Steps and probes of every client's round; with ``batch_or_epoch: epoch`` the steps follow the client's size.

    Raises:
        ConfigError: nobody is in a group of ``fwdllm.fleet``.
    """
    check_fleet(config, client_samples)
    plans = {}
    for client, samples in client_samples.items():
        probes = counts_of(config, client) if config.method.measures_slopes else ()
        steps = _steps_of_round(config, samples)
        plans[client] = WorkPlan(steps, probes, samples=steps * min(samples, config.dataloader.batch_size))
    return plans


def _steps_of_round(config: Config, samples: int) -> int:
    """Batches that a client with so many samples works on in a round."""
    steps = config.train.local_update_steps
    if config.train.batch_or_epoch == "epoch":
        return steps * steps_per_epoch(samples, config.dataloader.batch_size)
    return steps * config.grad.grad_accum_count


def passes_of_client(config: Config, client: int, steps: int) -> Passes:
    """What ``steps`` steps of a client take, by its method or its sources of slopes."""
    own = config.fwdllm
    if config.method.measures_slopes:
        step = passes_of_step(sources_of(config, client), own)
    else:
        step = Passes(Backprop.passes(gradient_checkpointing=own.gradient_checkpointing), 1)
    return Passes(steps * step.forward, steps * step.backward)


def select_device(config: Config) -> torch.device:
    """The device a configuration asks for; ``use_gpu`` without an accelerator falls back to the CPU."""
    if config.use_gpu and torch.cuda.is_available():
        return torch.device("cuda", max(config.device, 0))
    return torch.device("cpu")
