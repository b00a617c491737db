"""What a client does with orders that cannot be: numbers of any size end in a typed error, in little memory.

The frames are well formed, so that nothing but the client's own judgement stands between the numbers and its loops.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fs_fwdllm.core.direction import EVERYBODY, Rademacher
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.core.wire import Assignment, DenseState, RoundUpdate, decode, encode
from fs_fwdllm.errors import DivergenceError, WireError
from fs_fwdllm.method.cybgd.records import BlockAssignment
from fs_fwdllm.method.replica import Replica
from tests.host.small import METHODS, SCALAR_METHODS, Federation, World, methods_where

HUGE = 1 << 61
DIGEST = bytes(16)


def a_replica() -> Replica:
    return Replica(
        Replayer(Trainables({"w": np.ones((3, 4), np.float32), "b": np.ones(5, np.float32)}), 7, Rademacher())
    )


def a_step(replica: Replica, participants: tuple[Any, ...], values: int = 6, **changes: Any) -> bytes:
    record = RoundUpdate(3, replica.digest, DIGEST, 1.0, (), 0.0, 0.1, participants, values=np.ones(values, np.float32))
    return encode(replace(record, **changes))


#: Participants whose directions are as many as the values (six) or are none, beside others; and how it ends.
STEPS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception]]] = {
    "too few values": (((0, 1, 2, 4),), {}, WireError),
    "too many values": (((0, 1, 1, 1),), {}, WireError),
    "directions without number": (((0, 1, HUGE, HUGE),), {}, WireError),
    "steps without directions": (((0, 1, 2, 3), (0, 2, HUGE, 0)), {}, DivergenceError),
    "directions without steps": (((0, 1, 2, 3), (0, 2, 0, HUGE)), {}, DivergenceError),
    "steps without directions that decay": (
        ((0, 1, 2, 3), (0, 2, HUGE, 0)), {"step_decay": (0.5, 0.5)}, DivergenceError
    ),
    "chosen directions without steps": (
        ((0, 1, 2, 3), (0, 2, 0, HUGE)), {"choices": bytes(4 * 6 * 2)}, DivergenceError
    ),
    "decay factors of others": (((0, 1, 2, 3),), {"step_decay": (0.5, 0.5)}, WireError),
    "choices of others": (((0, 1, 2, 3),), {"choices": bytes(4)}, WireError),
    "two parts of one": (((0, 1, 2, 1, 2),), {}, WireError),
    "common directions beyond the last seed": ((((1 << 62) - 1, EVERYBODY, 1, 6),), {}, WireError),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_a_step_that_cannot_be_is_a_typed_error(case: str) -> None:
    participants, changes, error = STEPS[case]
    replica = a_replica()
    tracemalloc.start()
    with pytest.raises(error):
        replica.follow([a_step(replica, participants, **changes)], DIGEST)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("values", [0, 16, 18, 33, 35])
@pytest.mark.parametrize("has_momentum", [False, True])
def test_a_state_of_another_size_is_a_typed_error(values: int, has_momentum: bool) -> None:
    state = encode(DenseState(1, DIGEST, has_momentum, values=np.zeros(values, np.float32)))
    with pytest.raises(WireError, match="trainable parameters"):
        a_replica().follow([state], DIGEST)


def given(federation: Federation) -> Assignment:
    client = federation.server.wanted_clients(federation.clients) or federation.clients
    return federation.server.assign(0, client)[client[0]]


STEPS_OF_ALL: dict[str, Callable[[Assignment], dict[str, Any]]] = {
    "no end of steps": lambda given: {"steps": 1 << 62},
    "one step more": lambda given: {"steps": given.steps + 1},
}
#: What methods without directions do not look at, and methods whose clients step only in part.
DIRECTIONS: dict[str, Callable[[Assignment], dict[str, Any]]] = {
    "no end of directions": lambda given: {"probes": (1 << 40,)},
    "one direction more": lambda given: {"probes": (given.probes[0] + 1,)},
    "parts": lambda given: {"probes": (1,) * 50},
}
LOOKS: dict[str, Callable[[Assignment], dict[str, Any]]] = {
    "no end of directions along a reference": lambda given: {"probes": (1 << 40,), "reference_scale": 1.0},
    "a reference": lambda given: {"reference_scale": 1.0},
    "choices": lambda given: {"choices": bytes(8)},
}
LOOKING = methods_where(lambda facts: facts.pools_slopes)
CASES = [
    *((method, STEPS_OF_ALL, name) for method in METHODS for name in STEPS_OF_ALL),
    *((method, DIRECTIONS, name) for method in SCALAR_METHODS for name in DIRECTIONS),
    *((method, LOOKS, name) for method in LOOKING for name in LOOKS),
]


@pytest.mark.parametrize(("method", "orders", "name"), CASES, ids=[f"{method}, {name}" for method, _, name in CASES])
def test_an_order_that_the_configuration_does_not_give_is_refused(
    world: World, method: str, orders: Mapping[str, Callable[[Assignment], dict[str, Any]]], name: str
) -> None:
    federation = Federation(world.config(METHODS[method]))
    assignment = given(federation)
    received = decode(encode(replace(assignment, **orders[name](assignment))), Assignment)
    with pytest.raises(WireError, match="configuration"):
        federation.worker(received.client).work(received, federation.session.data.clients[received.client].train)


@pytest.mark.parametrize("change", [{"block": 1 << 60}, {"dropped": (0, (1 << 32) - 1)}, {"held": ()}])
def test_a_visit_to_what_is_not_there_is_refused(world: World, change: dict[str, Any]) -> None:
    federation = Federation(world.config(METHODS["cybgd"]))
    received = decode(encode(replace(given(federation), **change)), BlockAssignment)
    with pytest.raises(WireError, match="plan has"):
        federation.worker(received.client).work(received, federation.session.data.clients[received.client].train)
