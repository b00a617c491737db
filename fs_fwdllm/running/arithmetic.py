"""What a run's model is and what one forward pass costs, noted once in the run's first line.

Reports need both long after the model is gone: a caption names the parameters, and a model of other devices' time
scales their constants by the arithmetic of a pass (:mod:`fs_fwdllm.report.device_model`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fs_fwdllm.config.sources import sources_of
from fs_fwdllm.data import client_batches
from fs_fwdllm.data.types import Batch, FederatedData
from fs_fwdllm.estimator import Backprop, passes_of_step
from fs_fwdllm.method import Parts
from fs_fwdllm.model.base.packed import elements_of

__all__ = ["count_flops", "model_facts"]


def model_facts(parts: Parts, data: FederatedData) -> dict[str, Any]:
    """Numbers of parameters, clients, and operations (:func:`count_flops`) and passes of a client's step.

    The operations are missing where this process holds no training row or a kernel cannot be counted.
    """
    own = parts.config.fwdllm
    facts: dict[str, Any] = {
        "parameters": elements_of(parts.model),
        "trainable_parameters": parts.trainables.count,
        "clients": len(data.clients),
        "passes_per_step": passes_of_step(sources_of(parts.config), own).forward
        if parts.config.method.measures_slopes
        else Backprop.passes(gradient_checkpointing=own.gradient_checkpointing),
    }
    batch = _first_batch(parts, data)
    if batch is not None:
        with suppress(Exception):  # a figure for a report must not stop a run
            facts |= count_flops(parts, batch)
    return facts


def _first_batch(parts: Parts, data: FederatedData) -> Batch | None:
    settings = parts.batches
    for client, held in sorted(data.clients.items()):
        if held.train:
            return client_batches(
                held.train, client=client, round_index=0, steps=1, batch_size=settings.batch_size, seed=settings.seed,
                pad_token_id=settings.pad_token_id, shuffle=settings.shuffle,
            )[0]  # fmt: skip
    return None


@torch.no_grad()
def count_flops(parts: Parts, batch: Batch) -> dict[str, int]:
    """The floating-point operations of a forward pass over ``batch``.

    Returns:
        ``forward_flops`` of all of it; ``kept_flops`` of the part below the lowest trained layer, which the prefix
        cache keeps. Attention scores are counted where PyTorch's counter knows the kernel.
    """
    seen_once = replace(batch, key=None)
    loss = parts.objective.on(seen_once)  # the first recording looks for what is read, with passes of its own
    with FlopCounterMode(display=False) as counter:
        loss.here()
    above = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        parts.objective.on(seen_once)
    kept = counter.get_total_flops()
    return {"forward_flops": above + kept, "kept_flops": kept}
