"""The slow, obvious way: directions from numpy's own generator, losses from the model's own forward pass, float64 sums.

Nothing here uses the package's direction, replay, objective, estimator or method code.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fs_fwdllm.data.types import Batch
from fs_fwdllm.model.inputs import batch_on

__all__ = ["Point", "central_slopes", "direction", "loss_of", "standing_at", "to_flat", "trained"]

#: Values of the trained parameters, float64, by name and in the model's order.
Point = dict[str, torch.Tensor]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, in the model's order."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def to_flat(point: Point) -> np.ndarray:
    """All values as one float64 vector."""
    return np.concatenate([value.double().numpy().ravel() for value in point.values()])


def direction(point: Point, run_seed: int, round_index: int, client: int, step: int, probe: int) -> Point:
    """Rademacher signs as the documentation defines them."""
    name = struct.pack("<4q", round_index, client, step, probe)
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=8, person=b"fwdllm-direction").digest(), "little")
    signs = {}
    for tensor_id, (key, value) in enumerate(point.items()):
        counter = np.array([0, 0, tensor_id, 0], dtype=np.uint64)
        words = np.random.Philox(key=np.array([run_seed, seed], dtype=np.uint64), counter=counter).random_raw(
            -(-value.numel() // 64)
        )
        bits = [int(words[element // 64]) >> (element % 64) & 1 for element in range(value.numel())]
        signs[key] = torch.tensor([2.0 * bit - 1.0 for bit in bits], dtype=torch.float64).view(value.shape)
    return signs


@contextmanager
def standing_at(model: nn.Module, point: Point) -> Iterator[None]:
    """The model with its trained parameters at ``point``."""
    parameters = trained(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(point[name])
    yield
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss as the model itself computes it from labels."""
    given = batch_on("cpu", batch)
    return model(input_ids=given.input_ids, attention_mask=given.attention_mask, labels=given.labels).loss


def central_slopes(model: nn.Module, point: Point, batch: Batch, signs: Sequence[Point], radius: float) -> list[float]:
    """``(L(point + h z) - L(point - h z)) / 2h`` for every ``z``."""
    slopes = []
    for z in signs:
        losses = []
        for side in (radius, -radius):
            with torch.no_grad(), standing_at(model, {name: point[name] + side * z[name] for name in point}):
                losses.append(float(loss_of(model, batch)))
        slopes.append((losses[0] - losses[1]) / (2 * radius))
    return slopes
