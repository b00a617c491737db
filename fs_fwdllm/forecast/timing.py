"""How long clients' work takes on this machine, and what it reads: a step is tried, and the rest follows.

A step is tried for two seconds as a client takes it, with one group of probes, and its passes are counted; a backward
pass counts as two. Over a base on the disk the trial ends when its time is over, wherever it is: the share of the base
that was read by then says how long all of it would have taken. Evaluations, and what travels, are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fs_fwdllm.config.sources import Source, sources_of
from fs_fwdllm.core.direction import DirectionKey, make_distribution
from fs_fwdllm.estimator import Backprop, Passes, passes_of_step, reads_of_step
from fs_fwdllm.forecast.dry_run import Cost
from fs_fwdllm.model.base.packed import packed_layers, reader_of
from fs_fwdllm.model.base.streaming import Reader
from fs_fwdllm.running.session import Session
from fs_fwdllm.running.slope_check import first_batch

__all__ = ["TRIAL_S", "Pace", "find_pace"]

#: After which a trial ends.
TRIAL_S = 2.0
_TRIALS = 3
#: Of a base on the disk, of which a trial reads at least this.
_LEAST_SHARE = 0.02


@dataclass(frozen=True)
class Pace:
    """What a pass takes.

    Attributes:
        seconds: on this machine, of one of the passes that a run counts.
        new_batch_seconds: besides, of a batch that is seen for the first time, where there is a prefix cache.
        read_bytes: from the disk; zero where the base is in memory.
    """

    seconds: float
    new_batch_seconds: float
    read_bytes: float

    def seconds_of(self, cost: Cost, new_batches: int) -> float:
        """Of so many passes, one after the other, over batches of which so many are new."""
        weight = Passes(cost.forward_passes, cost.backward_passes).in_forwards
        return self.seconds * weight + self.new_batch_seconds * new_batches

    def read_bytes_of(self, cost: Cost) -> float:
        """Of so many passes."""
        return self.read_bytes * Passes(cost.forward_passes, cost.backward_passes).in_forwards


def find_pace(session: Session) -> Pace:
    """Try a step of the client that measures most."""
    config = session.config
    if not config.method.measures_slopes:
        batch_loss = session.parts.objective.on(first_batch(session))
        forward = Backprop.passes(gradient_checkpointing=config.fwdllm.gradient_checkpointing)
        step, reads = Passes(forward, 1), forward + 1
        seconds = _tried(session, batch_loss.clean)
    else:
        held = session.client_samples
        client = max(held, key=lambda one: passes_of_step(sources_of(config, one), config.fwdllm).in_forwards)
        sources = sources_of(config, client)
        step, reads = passes_of_step(sources, config.fwdllm), reads_of_step(sources, config.fwdllm)
        seconds = _seconds_of_slopes(session, client, sources)
    reader = reader_of(session.loaded.model)
    stored = 0 if reader is None else reader.stored_bytes
    return Pace(seconds, _seconds_of_new_batch(session), stored * reads / step.in_forwards)


def _seconds_of_slopes(session: Session, client: int, sources: Sequence[Source]) -> float:
    parts, own = session.parts, session.config.fwdllm
    estimator = parts.measuring(make_distribution(own.direction))(client)
    whole = [source.estimator is None or source.estimator.exact for source in sources]
    most = [
        source.probes if all_of_it else own.probes_per_batch for source, all_of_it in zip(sources, whole, strict=True)
    ]
    counts = [min(source.probes, count) for source, count in zip(sources, most, strict=True)]
    keys = [[DirectionKey(session.config.seed, probe) for probe in range(count)] for count in counts]
    batch_loss = parts.objective.on(first_batch(session))
    tried = passes_of_step([Source(one.slopes, count) for one, count in zip(sources, counts, strict=True)], own)
    return _tried(session, lambda: estimator.slopes(batch_loss, keys)) / tried.in_forwards


def _seconds_of_new_batch(session: Session) -> float:
    if not session.config.fwdllm.prefix_cache_mib:
        return 0.0
    batch = replace(first_batch(session), key=None)  # which is recorded anew whenever it is seen
    session.parts.objective.on(batch)
    started = time.perf_counter()
    session.parts.objective.on(batch)
    return time.perf_counter() - started


class _Enough(Exception):
    """Ends a trial whose time is over; never leaves this module."""


def _tried(session: Session, run: Any) -> float:
    """Seconds of ``run``: of the quickest of a few, or of one as it would have gone on."""
    reader, began = reader_of(session.loaded.model), time.perf_counter()
    quickest = float("inf")
    for _ in range(_TRIALS):
        read, started, share = 0 if reader is None else reader.bytes_read, time.perf_counter(), 1.0
        try:
            with _ending(session, reader, started + TRIAL_S):
                run()
        except _Enough:
            assert reader is not None
            share = (reader.bytes_read - read) / reader.stored_bytes
        quickest = min(quickest, (time.perf_counter() - started) / share)
        if time.perf_counter() - began > TRIAL_S:
            break
    return quickest


@contextmanager
def _ending(session: Session, reader: Reader | None, end: float) -> Iterator[None]:
    """Raise ``_Enough`` where a layer is about to be read after ``end``, and enough was read to go by."""
    if reader is None:
        yield
        return
    enough = reader.bytes_read + _LEAST_SHARE * reader.stored_bytes

    def look(*_: Any) -> None:
        if time.perf_counter() > end and reader.bytes_read >= enough:
            raise _Enough

    layers = [layer for _, layer in packed_layers(session.loaded.model) if layer.streamed is not None]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
