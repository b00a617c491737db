"""From a configuration to a block worker and a block server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from fs_fwdllm.config.schema import Config
from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.method.client import ClientWorker
from fs_fwdllm.method.cybgd.blocks import BlockPlan, block_plan
from fs_fwdllm.method.cybgd.checks import check_blocks
from fs_fwdllm.method.cybgd.client import BlockWorker, VisitSettings
from fs_fwdllm.method.cybgd.codec import Encoding
from fs_fwdllm.method.cybgd.optimiser import OptimizerSettings
from fs_fwdllm.method.cybgd.schedule import CycleSchedule
from fs_fwdllm.method.cybgd.server import BlockServer, BlockServerSettings
from fs_fwdllm.method.cybgd.store import BlockReplica, BlockStore, view_encoding
from fs_fwdllm.method.parts import Parts, Recipe
from fs_fwdllm.method.server import RoundServer, ServerSettings
from fs_fwdllm.model.base.packed import reader_of
from fs_fwdllm.model.base.trained_on_disk import StreamedTrainables

__all__ = ["RECIPE", "optimizer_settings", "plan_of"]


def plan_of(parts: Parts) -> BlockPlan:
    """The block plan of a loaded model."""
    return block_plan(parts.model, parts.config.fwdllm.blocks, parts.fresh)


def _select_blocks(config: Config, model: nn.Module, fresh: frozenset[str]) -> Trainables:
    """Exactly the parameters that the plan ever trains; those in memory require a gradient."""
    names = block_plan(model, config.fwdllm.blocks, fresh).names()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    if reader_of(model) is not None:
        return StreamedTrainables.of_streamed(model, names, Path(config.outdir))
    return Trainables.of_model(model, half=True)


def _make_worker(parts: Parts) -> ClientWorker:
    """The client of a configuration."""
    config, own = parts.config, parts.config.fwdllm.blocks
    store = BlockStore(parts.trainables, plan_of(parts), parts.trainables.dtypes)
    download = own.download
    replica = BlockReplica(
        store,
        _view(parts),
        exact=download.inactive == "exact" and download.keep_ratio == 1 and download.drop_ratio == 0,
    )
    settings = VisitSettings(
        optimizer=optimizer_settings(config),
        upload=own.upload,
        optimizer_state=own.optimizer_state,
        compress=own.zstandard,
    )
    backprop = Backprop(parts.model, gradient_checkpointing=config.fwdllm.gradient_checkpointing)
    return BlockWorker(parts.objective, replica, parts.batches, backprop, settings)


def _make_server(parts: Parts, settings: ServerSettings) -> RoundServer:
    """The server of a configuration.

    Raises:
        ConfigError: a round asks for more clients than hold samples.
    """
    config, own = parts.config, parts.config.fwdllm.blocks
    wanted = own.parallel_blocks * own.clients_per_block
    if wanted > len(settings.plans):
        raise ConfigError(
            f"fwdllm.blocks: parallel_blocks {own.parallel_blocks} with clients_per_block {own.clients_per_block} ask "
            f"{wanted} clients a round, but only {len(settings.plans)} hold training samples"
        )
    plan = plan_of(parts)
    store = BlockStore(parts.trainables.clone(float32=True, folder=settings.folder), plan, parts.trainables.dtypes)
    schedule = CycleSchedule(
        order=own.schedule,
        blocks=len(plan.blocks),
        seed=config.seed,
        first_block=own.first_block,
        clients_per_block=own.clients_per_block,
    )
    if own.learning_rate_over == "visit":  # then the schedule runs inside a visit, on the client
        settings = replace(settings, schedule=_constant(settings.schedule))
    blocks = BlockServerSettings(
        parallel_blocks=own.parallel_blocks,
        view=_view(parts),
        send_all=own.download.select == "all",
        drop_ratio=own.download.drop_ratio,
        optimizer=optimizer_settings(config),
        upload=own.upload,
        optimizer_state=own.optimizer_state,
        compress=own.zstandard,
    )
    return BlockServer(store, settings, schedule, blocks)


def _constant(schedule: Schedule) -> Schedule:
    return replace(schedule, shape="constant", warmup_ratio=0.0)


def _view(parts: Parts) -> Encoding:
    download = parts.config.fwdllm.blocks.download
    return view_encoding(parts.trainables, download.inactive, download.keep_ratio)


def optimizer_settings(config: Config) -> OptimizerSettings:
    """How a block is trained."""
    over_visit = config.fwdllm.blocks.learning_rate_over == "visit"
    return OptimizerSettings(
        kind=config.train.optimizer.type,
        momentum=config.train.optimizer.momentum,
        weight_decay=config.train.optimizer.weight_decay,
        clip=config.grad.grad_clip,
        accumulate=config.grad.grad_accum_count,
        shape=(config.train.scheduler.type or "constant") if over_visit else "constant",
        warmup_ratio=config.train.scheduler.warmup_ratio if over_visit else 0.0,
    )


RECIPE = Recipe(
    _make_worker,
    _make_server,
    check=check_blocks,
    select=_select_blocks,
    describe=lambda parts: plan_of(parts).describe(),
)
