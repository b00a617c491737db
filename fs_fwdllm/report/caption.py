"""The facts of a run in a few lines: what a picture needs below it to be understood a year later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.report.record import RunRecord, method_facts, short_name
from fs_fwdllm.report.units import format_bytes, format_count, format_seconds

__all__ = ["adapter_name", "caption_of", "given_facts", "joined"]


def adapter_name(config: Config) -> str:
    """What is trained: an adapter with its sizes, or every parameter."""
    adapter = config.llm.adapter
    if not adapter.use:
        return "all parameters"
    arguments: dict[str, Any] = dict(adapter.args[0]) if adapter.args and adapter.args[0] else {}
    arguments.pop("adapter_package", None)
    name = str(arguments.pop("adapter_method", "lora"))
    return " ".join([name, *(f"{key}={value}" for key, value in arguments.items())])


def given_facts(record: RunRecord) -> list[str]:
    """Model, data, and what is trained how."""
    config = record.config
    federate, train = config.federate, config.train
    facts = record.model_facts
    trained = (
        f" ({facts['trainable_parameters']:,} of {facts['parameters']:,} parameters)" if "parameters" in facts else ""
    )
    clients = facts.get("clients") or federate.client_num or "all"
    return [
        f"model {short_name(config.model.type)}",
        f"data {short_name(config.data.type)}",
        f"trained {adapter_name(config)}{trained}",
        f"{_asked(config)} of {clients} clients a round",
        f"seed {config.seed}",
        f"batch {config.dataloader.batch_size}, {train.local_update_steps} local {_steps(config)}",
        f"{train.optimizer.type}, learning rate {_rate(record)} ({train.scheduler.type or 'constant'})",
    ]


def caption_of(record: RunRecord) -> str:
    """What was given, and what it cost."""
    summary = record.summary()
    cost = [
        "1 round" if summary.rounds == 1 else f"{summary.rounds:,} rounds",
        f"{format_count(summary.forward_passes)} forward and {format_count(summary.backward_passes)} backward passes",
        f"{format_bytes(summary.upload_bytes)} up, {format_bytes(summary.download_bytes)} down",
        format_seconds(summary.duration_s),
        "" if summary.peak_rss_mib is None else f"peak {summary.peak_rss_mib:.0f} MiB",
    ]
    return joined([*given_facts(record), *cost])


def joined(facts: Sequence[str]) -> str:
    """Facts in a row, which is never broken before a separator."""
    return "\u00a0· ".join(fact for fact in facts if fact)


def _asked(config: Config) -> str:
    facts = method_facts(config)
    if facts is not None and facts.trains_blocks:  # the schedule of blocks says who is asked
        return str(config.fwdllm.blocks.parallel_blocks * config.fwdllm.blocks.clients_per_block)
    rate, number = config.federate.sample_client_rate, config.federate.sample_client_num
    return f"{rate:.0%}" if rate > 0 else str(number) if number > 0 else "all"


def _rate(record: RunRecord) -> str:
    """The rate that was given, or the one that the run made of it, which is its first round's."""
    own = record.config.fwdllm
    if own.first_rate == "given" and not own.rate_for_trainables:
        return f"{record.config.train.optimizer.lr:g}"
    used: dict[str, float] = next((line["learning_rate"] for line in record.rounds if line.get("learning_rate")), {})
    return f"{max(used.values()):.3g}, found by the run" if used else "found by the run"


def _steps(config: Config) -> str:
    unit = "epoch" if config.train.batch_or_epoch == "epoch" else "step"
    return unit if config.train.local_update_steps == 1 else f"{unit}s"
