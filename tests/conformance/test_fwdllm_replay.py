"""Gate x sampling x moments: replicas that know only frames hold the server's bits, every round and after a resume."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fs_fwdllm.core.direction import make_distribution
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.wire import DenseState, RoundUpdate, decode, encode
from fs_fwdllm.method import Replica
from tests.conformance.test_replay import assert_equal_bits, follow
from tests.host.small import Federation, World, bits_of

ROUNDS = 6
_BASE = {
    "federate.method": "fwdllm", "fwdllm.probes": 4, "train.local_update_steps": 2, "fwdllm.probes_per_batch": 2,
    "federate.total_round_num": 20, "train.optimizer.weight_decay": 0.1, "fwdllm.attention": "eager",
}  # fmt: skip
_GATES: dict[str, dict[str, Any]] = {
    "no gate": {},
    "published gate": {"fwdllm.gate.kind": "published", "fwdllm.gate.threshold": 1e-9, "fwdllm.gate.max_repeats": 1},
    "relative gate": {"fwdllm.gate.kind": "relative", "fwdllm.gate.threshold": 1e-9, "fwdllm.gate.max_repeats": 1},
}
_SAMPLINGS: dict[str, dict[str, Any]] = {
    "as drawn": {},
    "published": {"fwdllm.sampling.kind": "published", "fwdllm.sampling.candidates": 3},
    "corrected": {"fwdllm.sampling.kind": "corrected"},
}
_MOMENTA: dict[str, dict[str, Any]] = {"no momentum": {}, "momentum": {"fwdllm.server_momentum": 0.9}}
CASES: dict[str, dict[str, Any]] = {
    ", ".join(names): {**_BASE, **_GATES[names[0]], **_SAMPLINGS[names[1]], **_MOMENTA[names[2]]}
    for names in itertools.product(_GATES, _SAMPLINGS, _MOMENTA)
}
CASES["everything, trust ratio"] = {
    **CASES["relative gate, corrected, momentum"], "fwdllm.step.control": "trust_ratio",
    "fwdllm.radius_scale": "relative",
}  # fmt: skip
_ADAM = {"fwdllm.server_optimizer": "adam", "train.optimizer.lr": 0.01}
CASES["gate, corrected, adam"] = {**CASES["relative gate, corrected, no momentum"], **_ADAM}
CASES["published, adam"] = {**CASES["no gate, published, no momentum"], **_ADAM}
CASES["normalised"] = {**CASES["no gate, corrected, no momentum"], "fwdllm.step.control": "normalised"}

cases = pytest.mark.parametrize("case", CASES)


def clients_of(round_index: int) -> list[int]:
    """Client 4 joins in round 3, in the middle of a pool."""
    return [1, 2] if round_index < 3 else [1, 2, 4]


@cases
def test_every_client_holds_the_servers_bits_after_every_round(world: World, case: str) -> None:
    federation = Federation(world.config(CASES[case]), separate_workers=True)
    for round_index in range(ROUNDS):
        federation.round(round_index, clients_of(round_index))
        for assignment in federation.server.assign(round_index + 1, clients_of(round_index)).values():
            replica = follow(federation, assignment)
            assert_equal_bits(replica, federation)
            ours, theirs = replica.replayer.reference, federation.server.replayer.reference
            assert (ours is None) == (theirs is None)
            assert all(a.equal(b) for a, b in zip(ours or (), theirs or (), strict=True))


@cases
def test_every_chunk_size_rebuilds_the_same_bits(world: World, case: str) -> None:
    federation = Federation(world.config(CASES[case]))
    config, start = federation.config, federation.server.trainables.clone()
    replicas = [
        Replica(Replayer(start.clone(), config.seed, make_distribution(config.fwdllm.direction), chunk))
        for chunk in (7, 4096)
    ]
    for round_index in range(4):
        federation.round(round_index, [1, 3])
        (assignment,) = federation.server.assign(round_index + 1, [1]).values()
        assert all(isinstance(decode(frame), RoundUpdate) for frame in assignment.catch_up)
        for replica in replicas:
            replica.follow(assignment.catch_up, assignment.digest)
            assert_equal_bits(replica, federation)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("relative gate")])
def test_a_waiting_round_needs_no_record(world: World, case: str) -> None:
    """Who worked in it or missed it: the next step's record is all that either of them needs."""
    federation = Federation(world.config(CASES[case]), separate_workers=True)
    federation.round(0)  # waiting
    assert all(not work.catch_up for work in federation.server.assign(1, [1, 2]).values())
    federation.round(1, [1, 2])  # steps; client 3 missed it
    assigned = federation.server.assign(2, federation.clients)
    records = {client: [decode(frame) for frame in work.catch_up] for client, work in assigned.items()}
    for client in federation.clients:
        (record,) = records[client]
        assert isinstance(record, RoundUpdate) and record.round_index == 1
        assert {part[0] for part in record.participants} == {0, 1}
        assert_equal_bits(follow(federation, assigned[client]), federation)


@pytest.mark.parametrize("case", ["no gate, corrected, momentum", "no gate, corrected, no momentum", "published, adam"])
def test_the_parameters_travel_with_moments_and_reference(world: World, case: str) -> None:
    federation = Federation(world.config(CASES[case]), separate_workers=True)
    federation.round(0, [1])
    state = decode(federation.server.dense_frame())
    assert isinstance(state, DenseState)
    assert state.has_reference and state.has_momentum == ("no momentum" not in case)
    assert state.has_second_moment == ("adam" in case)
    parts = 2 + state.has_momentum + state.has_second_moment
    assert len(state.values) == parts * federation.server.trainables.count
    (assignment,) = federation.server.assign(1, [4]).values()
    assert_equal_bits(follow(federation, assignment), federation)
    federation.server.absorb([federation.work(assignment)])


@pytest.mark.slow
@cases
def test_resuming_in_the_middle_of_a_pool_is_exact(world: World, case: str) -> None:
    """A new server and a new client take over after every round; nothing differs from the run that went on."""
    config = world.config(CASES[case])
    whole, broken = Federation(config), Federation(config)
    for round_index in range(5):
        one = whole.round(round_index, clients_of(round_index))
        other = broken.round(round_index, clients_of(round_index))
        assert other == one
        tensors = {name: tensor.clone() for name, tensor in broken.server.state_tensors().items()}
        numbers = broken.server.state_numbers()
        broken = Federation(config)
        broken.server.load_state(tensors, numbers)
        assert broken.server.digest == whole.server.digest
        broken.worker(1).replica.follow([broken.server.dense_frame()], broken.server.digest)


@cases
def test_work_leaves_the_clients_state_as_it_was(world: World, case: str) -> None:
    federation = Federation(world.config(CASES[case]))
    for round_index in range(2):
        federation.round(round_index)
    worker = federation.worker(1)
    for assignment in federation.server.assign(2, [1, 2]).values():
        follow(federation, assignment)
        before = bits_of(worker.objective.model, trained=True), worker.replica.replayer.digest()
        federation.work(assignment)
        assert (bits_of(worker.objective.model, trained=True), worker.replica.replayer.digest()) == before


def test_what_choices_cost(world: World) -> None:
    """Four bytes per probe and tensor, downwards; nothing where directions are as drawn or corrected."""
    sizes = {}
    for kind in ("none", "published", "corrected"):
        federation = Federation(world.config({**_BASE, "fwdllm.sampling.kind": kind}))
        federation.round(0)
        (work,) = federation.server.assign(1, [1]).values()
        bare = len(encode(work)) - sum(map(len, work.catch_up))
        sizes[kind] = bare
        tensors, probes = len(federation.server.trainables.tensors), work.steps * sum(work.probes)
    assert sizes["published"] - sizes["none"] == pytest.approx(4 * tensors * probes, abs=4)
    assert sizes["corrected"] == sizes["none"]
