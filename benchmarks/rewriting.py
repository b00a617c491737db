"""Answers with other numbers in them, for clients that lie: what attacks and tests of the server's guard share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from fs_fwdllm.core.trainables import flatten
from fs_fwdllm.core.wire import ClientUpdate
from fs_fwdllm.method import RoundServer
from fs_fwdllm.method.cybgd.client import delta_encoding
from fs_fwdllm.method.cybgd.codec import decode_tensors, encode_tensors
from fs_fwdllm.method.cybgd.records import BlockDelta
from fs_fwdllm.method.cybgd.server import BlockServer

__all__ = ["numbers_of", "rewritten"]


def numbers_of(server: RoundServer, update: ClientUpdate) -> np.ndarray:
    """The numbers an answer stands for, float32, flat."""
    if not isinstance(update, BlockDelta):
        return update.values
    encoding = delta_encoding(update.form)
    return flatten(decode_tensors(update.values, _shapes(server, update), encoding, compressed=update.compressed))


def rewritten(server: RoundServer, update: ClientUpdate, change: Callable[[np.ndarray], np.ndarray]) -> ClientUpdate:
    """The same answer with other numbers, in the form in which it came: float32, or the bytes of a block's delta."""
    numbers = change(numbers_of(server, update).copy())
    if not isinstance(update, BlockDelta):
        return replace(update, values=numbers)
    shapes = _shapes(server, update)
    pieces = torch.from_numpy(numbers).split([math.prod(shape) for shape in shapes])
    parts = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    data, compressed = encode_tensors(parts, delta_encoding(update.form), compress=update.compressed)
    return replace(update, values=np.frombuffer(data, np.uint8), compressed=compressed)


def _shapes(server: RoundServer, update: BlockDelta) -> list[tuple[int, ...]]:
    assert isinstance(server, BlockServer)
    return [shape for part in server.plan.active(update.block) for shape in server.store.shapes(part)]
