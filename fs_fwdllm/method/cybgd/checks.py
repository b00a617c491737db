"""Settings of block training that are valid alone but not together."""

from __future__ import annotations

from fs_fwdllm.config.methods import examples_of
from fs_fwdllm.config.schema import Config
from fs_fwdllm.errors import ConfigError

__all__ = ["check_blocks"]

_WITH_MOMENTUM = ("SGD", "RMSprop")


def check_blocks(config: Config) -> None:
    """Raises :class:`~fs_fwdllm.errors.ConfigError`, which names the keys and the way out."""
    own, optimizer = config.fwdllm.blocks, config.train.optimizer
    if config.llm.adapter.use:
        raise ConfigError(
            f"llm.adapter.use true: {config.federate.method} trains the model's own blocks; set it to false, or train "
            f"the adapter with {examples_of(lambda facts: facts.clients_step and not facts.measures_slopes)}"
        )
    asked = own.parallel_blocks * own.clients_per_block
    if config.federate.sample_client_num not in (-1, asked) or config.federate.sample_client_rate > 0:
        raise ConfigError(
            f"federate.sample_client_num {config.federate.sample_client_num}, sample_client_rate "
            f"{config.federate.sample_client_rate}: the block schedule chooses the clients, {asked} a round "
            "(fwdllm.blocks.parallel_blocks x clients_per_block); leave both at -1"
        )
    if own.granularity != "layer" and own.group_size > 1:
        raise ConfigError(
            f"fwdllm.blocks.group_size {own.group_size}: groups are of layers; set fwdllm.blocks.granularity: layer"
        )
    if own.schedule in ("fixed", "full") and own.parallel_blocks > 1:
        raise ConfigError(
            f"fwdllm.blocks.parallel_blocks {own.parallel_blocks}: schedule {own.schedule!r} has one block; set it to "
            "1, or use clients_per_block"
        )
    if optimizer.momentum and optimizer.type not in _WITH_MOMENTUM:
        raise ConfigError(
            f"train.optimizer.momentum {optimizer.momentum}: {optimizer.type} has none; set it to 0 or use one of "
            f"{', '.join(_WITH_MOMENTUM)}"
        )
