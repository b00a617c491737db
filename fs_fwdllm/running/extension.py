"""Giving a run another number of rounds than it was started with.

What a round does depends on its number, the seed and the configuration; on the total number of rounds only where the
learning rate follows a schedule over all of them. So a run that is given more rounds ends as one that had them from the
beginning, bit for bit, unless there is such a schedule; then it says so.
"""

from __future__ import annotations

from fs_fwdllm.config import Config
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.report import RunFolder
from fs_fwdllm.report.sinks import read_lines
from fs_fwdllm.running.checkpoint import Checkpoint

__all__ = ["depends_on_total_rounds", "describe_extension", "give_rounds"]


def give_rounds(folder: RunFolder, checkpoint: Checkpoint, rounds: int) -> None:
    """Let the run in ``folder`` have ``rounds`` rounds in all from now on.

    Raises:
        ConfigError: it has done as many already, or was stopped early, which more rounds would not change.
        CheckpointError: its ``config.yaml`` cannot be written.
    """
    config = folder.config()
    if rounds == config.federate.total_round_num:
        return
    if rounds <= checkpoint.next_round:
        raise ConfigError(
            f"--rounds {rounds}: the run in {folder.path} has done {checkpoint.next_round} rounds; allowed are "
            f"{checkpoint.next_round + 1} and more"
        )
    end = next((line for line in read_lines(folder) if line.get("final")), {})
    if end.get("stopped_early"):
        raise ConfigError(
            f"--rounds {rounds}: the run in {folder.path} was stopped after round {checkpoint.next_round} by "
            f"early_stop.patience {config.early_stop.patience}, which more rounds do not change; start a new run with "
            f"early_stop.patience 0 and fwdllm.init_adapter {folder.path}"
        )
    folder.give_rounds(rounds)


def depends_on_total_rounds(config: Config) -> str:
    """The key that makes what a round does depend on how many there are; empty if none does."""
    over_visits = config.method.trains_blocks and config.fwdllm.blocks.learning_rate_over == "visit"
    if over_visits:
        return ""
    if config.train.scheduler.type not in ("", "constant"):
        return f"train.scheduler.type {config.train.scheduler.type}"
    warmup = config.train.scheduler.warmup_ratio
    return f"train.scheduler.warmup_ratio {warmup:g}" if warmup else ""


def describe_extension(config: Config, before: int, done: int) -> str:
    """What a user should know of a run that goes on with another number of rounds."""
    total, key = config.federate.total_round_num, depends_on_total_rounds(config)
    said = f"was started for {before} rounds and goes on to {total}"
    if not key:
        return said
    return (
        f"warning: {said}: {key} runs over all rounds, so that the result is not that of a run of {total} rounds from "
        f"the beginning: rounds 1 to {done} had the rates of {before} rounds"
    )
