"""What block training will cost: a dry run of the real server with deltas of zero, and the memory of one visit.

Downloads are the real frames of the server at the base model's weights; uploads are counted before zstandard, which
takes some 15 % off float32 deltas, 30 % off bfloat16 and 12 % off int8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fs_fwdllm.config.schema import Config
from fs_fwdllm.core.wire import Assignment, encode
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.method.cybgd.client import delta_encoding
from fs_fwdllm.method.cybgd.codec import encode_tensors
from fs_fwdllm.method.cybgd.optimiser import BlockOptimizer
from fs_fwdllm.method.cybgd.recipe import optimizer_settings, plan_of
from fs_fwdllm.method.cybgd.records import BlockAssignment, BlockDelta, OptimizerState
from fs_fwdllm.method.cybgd.server import BlockServer
from fs_fwdllm.method.cybgd.state_bytes import pack_states
from fs_fwdllm.method.parts import Parts

__all__ = ["BlockAnswers", "active_parameters", "server_bytes", "visit_bytes"]

_CYCLES = 2


class BlockAnswers:
    """Answers of visits that changed nothing.

    Attributes:
        rounds: of two cycles.
    """

    def __init__(self, server: BlockServer, config: Config) -> None:
        self.rounds = -(-_CYCLES * len(server.plan.blocks) // config.fwdllm.blocks.parallel_blocks)
        self._server = server
        self._config = config
        self._states: dict[int, bytes] = {}

    def answer(self, assignment: Assignment) -> BlockDelta:
        """A delta of zero for the visited block, with the optimiser's state where that travels."""
        assert isinstance(assignment, BlockAssignment)
        store, own, steps = self._server.store, self._config.fwdllm, assignment.steps
        active = store.plan.active(assignment.block)
        values = [store.values(part) for part in active]
        zeros = [torch.zeros(value.shape) for part in values for value in part]
        data, _ = encode_tensors(zeros, delta_encoding(own.blocks.upload), compress=False)
        return BlockDelta(
            round_index=assignment.round_index,
            client=assignment.client,
            digest=assignment.digest,
            samples=self._config.dataloader.batch_size * steps,
            loss=1.0,
            forward_passes=Backprop.passes(gradient_checkpointing=own.gradient_checkpointing) * steps,
            backward_passes=steps,
            block=assignment.block,
            versions=assignment.versions,
            digest_start=store.digest_of_values(active, values),
            form=own.blocks.upload,
            compressed=False,
            states=self._states_of(active, values),
            values=np.frombuffer(data, np.uint8),
        )

    def _states_of(self, active: Sequence[int], values: Sequence[list[torch.Tensor]]) -> tuple[bytes, ...]:
        if self._config.fwdllm.blocks.optimizer_state != "server":
            return ()
        for part, own in zip(active, values, strict=True):
            if part not in self._states:
                self._states[part] = _state_frame(part, own, self._config)
        return tuple(self._states[part] for part in active)


def _state_frame(part: int, values: list[torch.Tensor], config: Config) -> bytes:
    """The state after one step on a gradient of zero."""
    parameters = [torch.zeros_like(value) for value in values]
    optimizer = BlockOptimizer(parameters, parameters, optimizer_settings(config))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.take_step(0.0)
    return encode(OptimizerState(part, values=pack_states(optimizer.state(), compress=False)))


def active_parameters(parts: Parts) -> int:
    """Parameters that the largest visit trains: ``P_b``."""
    plan = plan_of(parts)
    sizes = {
        name: math.prod(shape) for name, shape in zip(parts.trainables.names, parts.trainables.shapes, strict=True)
    }
    return max(
        sum(sizes[name] for part in plan.active(block) for name in plan.parts[part].parameters)
        for block in range(len(plan.blocks))
    )


def visit_bytes(parts: Parts) -> int:
    """Memory of the largest visit beside the model and its activations: start, gradient, two moments, and masters.

    A start that was sent is kept as its frame's bytes, which are no more than its float32 values. Of a base on the disk
    the block itself comes beside the model, too.
    """
    half = any(dtype != torch.float32 for dtype in parts.trainables.dtypes)
    moments = {"SGD": 4 * bool(parts.config.train.optimizer.momentum), "Adagrad": 4}
    state = moments.get(parts.config.train.optimizer.type, 8)
    own = max(dtype.itemsize for dtype in parts.trainables.dtypes) if _on_disk(parts) else 0
    return active_parameters(parts) * int(8 + state + (4 if half else 0) + own)


def server_bytes(parts: Parts, largest_download_bytes: int) -> int:
    """What the server holds between rounds: float32 blocks, and the frames of their views, unless they are on disk."""
    if _on_disk(parts):
        return 4 * sum(int(tensor.numel()) for tensor in parts.trainables.in_memory.values())
    return 4 * parts.trainables.count + min(parts.trainables.bytes, largest_download_bytes)


def _on_disk(parts: Parts) -> bool:
    return len(parts.trainables.in_memory) < len(parts.trainables.names)
