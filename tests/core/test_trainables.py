"""Trainables: order, digest, restoring exact bits."""

from __future__ import annotations

import hashlib
import os
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fs_fwdllm.core.trainables import Trainables, digest_of
from fs_fwdllm.errors import DivergenceError, ModelError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_appear_once_and_frozen_ones_do_not():
    assert Trainables.of_model(Tied()).names == ("embedding.weight",)


def test_the_digest_sees_one_bit_a_name_and_a_shape():
    base = Trainables({"a": torch.zeros(2, 3)})
    assert base.digest() == base.clone().digest()
    flipped = torch.zeros(2, 3)
    flipped[1, 2] = 1.5e-45  # the smallest change a float32 can make
    others = [{"a": flipped}, {"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": -torch.zeros(2, 3)}]
    assert len({base.digest(), *(Trainables(other).digest() for other in others)}) == 5


def reference_digest(named):
    """As the documentation has it, one tensor after the other."""
    leaves = [
        hashlib.blake2b(f"{name}{tuple(value.shape)}".encode() + value.numpy().tobytes(), digest_size=16).digest()
        for name, value in named.items()
    ]
    return hashlib.blake2b(b"".join(leaves), digest_size=16).digest()


@pytest.mark.parametrize("processors", [1, 2, 8, None])
def test_the_digest_does_not_depend_on_who_makes_the_leaves(monkeypatch, processors):
    """Small tensors between large ones, more large ones than threads."""
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    sizes = [3, 1 << 18, 5, (1 << 18) + 1, 1 << 19, 1 << 18, 7, 1 << 18, 1 << 18]
    named = {f"part.{index}": torch.randn(size) for index, size in enumerate(sizes)}
    assert digest_of(iter(named.items())) == Trainables(named).digest() == reference_digest(named)
    named["part.4"][-1] += 1
    assert Trainables(named).digest() == reference_digest(named)


def test_the_digest_holds_few_tensors_that_are_read_for_it(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    alive = weakref.WeakSet()
    most = 0

    def read():
        nonlocal most
        for index in range(12):
            tensor = torch.full((1 << 18,), float(index))
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"part.{index}", tensor
            del tensor

    digest_of(read())
    assert most <= 4  # one a thread, the one just read, and the one that awaits its turn


def test_an_error_in_a_leaf_is_the_callers():
    with pytest.raises(AttributeError):
        digest_of([("first", torch.zeros(1 << 18)), ("second", None)])


def test_flat_round_trip_and_wrong_length():
    trainables = Trainables({"a": torch.randn(2, 3), "b": torch.randn(4)})
    other = Trainables({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    other.load_flat(trainables.to_flat())
    assert other.digest() == trainables.digest()
    with pytest.raises(DivergenceError, match="9 values does not fit 10"):
        other.load_flat(np.zeros(9, np.float32))


def test_holding_restores_the_storage_also_after_an_error():
    trainables = Trainables({"a": torch.randn(3)})
    before, pointer = trainables.digest(), trainables.tensors[0].data_ptr()
    with pytest.raises(RuntimeError, match="stop"), trainables.holding([torch.full((3,), torch.nan)]):
        assert trainables.tensors[0].isnan().all()
        raise RuntimeError("stop")
    assert trainables.digest() == before
    assert trainables.tensors[0].data_ptr() == pointer


@pytest.mark.parametrize(
    ("named", "message"),
    [({}, "no trainable parameter"), ({"a": torch.zeros(2, dtype=torch.bfloat16)}, "must be contiguous float32")],
)
def test_unusable_trainables_are_refused(named, message):
    with pytest.raises(ModelError, match=message):
        Trainables(named)
