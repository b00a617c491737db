"""What block training will cost: a dry run of the real server with deltas of zero, and the memory of one visit.

Downloads are the real frames of the server at the base model's weights; uploads are counted before zstandard, which
takes some 15 % off float32 deltas, 30 % off bfloat16 and 12 % off int8.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fs_fwdllm.config.schema import Config
from fs_fwdllm.core.wire import encode
from fs_fwdllm.method.cybgd.client import delta_encoding
from fs_fwdllm.method.cybgd.codec import encode_tensors
from fs_fwdllm.method.cybgd.optimiser import BlockOptimizer
from fs_fwdllm.method.cybgd.parts import optimizer_settings, plan_of
from fs_fwdllm.method.cybgd.records import BlockAssignment, BlockDelta, OptimizerState
from fs_fwdllm.method.cybgd.server import BlockServer
from fs_fwdllm.method.cybgd.state_bytes import pack_states
from fs_fwdllm.method.parts import Parts, assemble_server

__all__ = ["active_parameters", "dry_rounds", "visit_bytes"]

_CYCLES = 2


def dry_rounds(parts: Parts, client_samples: dict[int, int]) -> Iterator[list[tuple[BlockAssignment, int, int]]]:
    """Rounds of two cycles (at most the run's): ``(assignment, download bytes, upload bytes)`` of every client."""
    server = assemble_server(parts, client_samples)
    assert isinstance(server, BlockServer)
    config, own = parts.config, parts.config.fwdllm.blocks
    rounds = -(-_CYCLES * len(server.plan.blocks) // own.parallel_blocks)
    states: dict[int, bytes] = {}
    for round_index in range(min(config.federate.total_round_num, rounds)):
        assigned = server.assign(round_index, server.wanted_clients(round_index, sorted(client_samples)))
        answers, costs = [], []
        for assignment in assigned.values():
            assert isinstance(assignment, BlockAssignment)
            answers.append(_no_change(server, assignment, config, states))
            costs.append((assignment, len(encode(assignment)), len(encode(answers[-1]))))
        server.absorb(answers)
        yield costs


def _no_change(
    server: BlockServer, assignment: BlockAssignment, config: Config, states: dict[int, bytes]
) -> BlockDelta:
    active = server.plan.active(assignment.block)
    values = [server.store.values(part) for part in active]
    zeros = [torch.zeros(value.shape) for own in values for value in own]
    data, _ = encode_tensors(zeros, delta_encoding(config.fwdllm.blocks.upload), compress=False)
    if config.fwdllm.blocks.optimizer_state == "server":
        states.update({part: _state_frame(part, own, config) for part, own in zip(active, values, strict=True)
                       if part not in states})  # fmt: skip
    batch = config.dataloader.batch_size
    return BlockDelta(
        assignment.round_index, assignment.client, assignment.digest, batch * assignment.steps, 1.0,
        assignment.steps, assignment.steps, assignment.block, assignment.versions,
        server.store.digest_of_values(active, values), config.fwdllm.blocks.upload, False,
        tuple(states[part] for part in active if part in states), values=np.frombuffer(data, np.uint8),
    )  # fmt: skip


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
    sizes = {name: parameter.numel() for name, parameter in parts.model.named_parameters()}
    return max(
        sum(sizes[name] for part in plan.active(block) for name in plan.parts[part].parameters)
        for block in range(len(plan.blocks))
    )


def visit_bytes(parts: Parts) -> int:
    """Memory of the largest visit beside the model and its activations: start, gradient, two moments, and masters.

    A start that was sent is kept as its frame's bytes, which are no more than its float32 values.
    """
    half = any(tensor.dtype != torch.float32 for tensor in parts.trainables.tensors)
    moments = {"SGD": 4 * bool(parts.config.train.optimizer.momentum), "Adagrad": 4}
    state = moments.get(parts.config.train.optimizer.type, 8)
    return active_parameters(parts) * (8 + state + (4 if half else 0))
