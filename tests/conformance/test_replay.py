"""The law the package rests on: whoever knows the seeds and the scalars holds the server's parameters, bit for bit.

Every client here has a model of its own, so that nothing but frames connects it to the server.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from fs_fwdllm.core.direction import make_distribution
from fs_fwdllm.core.replay import DEFAULT_CHUNK, Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.core.wire import Assignment, DenseState, RoundUpdate, ScalarUpdate, decode
from fs_fwdllm.errors import DivergenceError
from fs_fwdllm.method import ClientWorker, Replica
from fs_fwdllm.method.cybgd.store import BlockReplica
from fs_fwdllm.method.parts import replayer_for
from fs_fwdllm.running.local import run
from fs_fwdllm.running.session import Session
from tests.host.small import METHODS, Federation, World, bits_of, methods_where

ROUNDS = 4

_MEZO, _FORWARD = METHODS["mezo"], METHODS["forward_gradient"]
_DECAY = {"train.optimizer.weight_decay": 0.1}
_FULL = {"llm.adapter.use": False, "llm.adapter.args": [{}]}

_PARTS = [
    {"match": "classifier", "slopes": "closed_form", "scalars": 11},
    {"match": "*", "slopes": "one_sided", "probes": 2, "rate": 0.3},
]

#: Every scalar method in every form that changes how an update is built.
SCALAR_CASES: dict[str, dict[str, Any]] = {
    "mezo": _MEZO,
    "mezo, decay": {**_MEZO, **_DECAY},
    "mezo, epochs": {**_MEZO, "train.batch_or_epoch": "epoch", "train.local_update_steps": 1},
    "mezo, one step, one probe": {**_MEZO, "train.local_update_steps": 1, "fwdllm.probes": 1},
    "mezo, every parameter": {**_MEZO, **_DECAY, **_FULL},
    "mezo, gaussian": {**_MEZO, "fwdllm.direction": "gaussian"},
    "mezo, one-sided": {**_MEZO, "fwdllm.estimator": "one_sided"},
    "mezo, decay, random rates": {**_MEZO, **_DECAY, "train.train_strategy": "random", "fwdllm.strategy_span": 0.04},
    "mezo, decay, rates by model difference": {
        **_MEZO,
        **_DECAY,
        "train.train_strategy": "model-diff",
        "fwdllm.strategy_span": 0.04,
    },
    "forward": _FORWARD,
    "forward, decay": {**_FORWARD, **_DECAY},
    "forward, momentum": {**_FORWARD, "fwdllm.server_momentum": 0.9},
    "forward, momentum and decay": {**_FORWARD, **_DECAY, "fwdllm.server_momentum": 0.9},
    "forward, adam": {**_FORWARD, "fwdllm.server_optimizer": "adam"},
    "forward, adam and decay": {
        **_FORWARD,
        **_DECAY,
        "fwdllm.server_optimizer": "adam",
        "fwdllm.server_betas": [0, 0.9],
    },
    "forward, gaussian, momentum": {**_FORWARD, "fwdllm.direction": "gaussian", "fwdllm.server_momentum": 0.5},
    "forward, one-sided, batched": {**_FORWARD, "fwdllm.estimator": "one_sided", "fwdllm.probes_per_batch": 3},
    "forward, forward mode": {**_FORWARD, "fwdllm.estimator": "forward_mode", "fwdllm.probes_per_batch": 2},
    "forward, cosine": {**_FORWARD, "train.scheduler.type": "cosine", "train.scheduler.warmup_ratio": 0.4},
    "forward, two batches": {**_FORWARD, "train.local_update_steps": 2},
    "forward, parts": {**_FORWARD, "fwdllm.parts": _PARTS, "fwdllm.server_momentum": 0.9},
    "mezo, parts": {**_MEZO, "fwdllm.parts": _PARTS},
    "mezo, parts, rates by model difference": {
        **_MEZO,
        "fwdllm.parts": _PARTS,
        "train.train_strategy": "model-diff",
        "fwdllm.strategy_span": 0.04,
    },
    "forward, a mixed fleet": {**_FORWARD, "fwdllm.fleet": [{"clients": 1, "slopes": "projected", "scalars": 9}]},
    "forward, directions in common": {
        **_FORWARD,
        "fwdllm.estimator": "projected",
        "fwdllm.directions": "common",
        "fwdllm.probes": 7,
    },
}
PORTABLE_CASES = [name for name, case in SCALAR_CASES.items() if case.get("fwdllm.direction") != "gaussian"]
ARRIVAL_CASES = (
    "mezo", "mezo, decay", "mezo, gaussian", "forward", "forward, momentum and decay", "forward, adam",
    "forward, two batches",
)  # fmt: skip
LANGUAGE_MODEL_CASES = ("mezo, decay", "forward, momentum", "forward, adam", "forward, forward mode")

scalar_cases = pytest.mark.parametrize("case", SCALAR_CASES)


def moment_bits(replayer: Replayer) -> list[bytes]:
    return [buffer.cpu().numpy().tobytes() for buffers in replayer.moments.values() for buffer in buffers]


def assert_equal_bits(replica: Replica, federation: Federation) -> None:
    """The replica holds what the server holds, by its own claim, by a digest taken now, and value by value."""
    server = federation.server
    assert replica.digest == server.digest
    assert replica.trainables.digest() == server.trainables.digest()
    assert replica.replayer.digest() == server.replayer.digest() == server.digest
    for ours, theirs in zip(replica.trainables.tensors, server.trainables.tensors, strict=True):
        assert torch.equal(ours.detach(), theirs.detach())
    assert moment_bits(replica.replayer) == moment_bits(server.replayer)


def follow(federation: Federation, assignment: Assignment) -> Replica:
    """Bring the client of ``assignment`` to where the assignment starts, without working."""
    replica = federation.worker(assignment.client).replica
    replica.follow(assignment.catch_up, assignment.digest)
    return replica


def bits_held(worker: ClientWorker) -> tuple[object, ...]:
    """Everything a client's model is: parameters, frozen or not, and moments; and their digest, taken now."""
    model, replica = worker.objective.model, worker.replica
    if isinstance(replica, Replica):
        held: tuple[object, ...] = (moment_bits(replica.replayer), replica.replayer.digest())
    else:
        assert isinstance(replica, BlockReplica)
        replica.store.forget_digests()
        held = ([], replica.store.digest())
    return bits_of(model, trained=True), bits_of(model, trained=False), *held


def check_every_round(federation: Federation) -> None:
    """Clients 1 and 2 work in every round; client 4 joins in round 2. After each round all hold the server's bits."""
    seen = {federation.server.digest}
    for round_index in range(ROUNDS):
        taking_part = [1, 2] if round_index < 2 else [1, 2, 4]
        federation.round(round_index, taking_part)
        assert federation.server.digest not in seen
        seen.add(federation.server.digest)
        for assignment in federation.server.assign(round_index + 1, taking_part).values():
            assert_equal_bits(follow(federation, assignment), federation)


@scalar_cases
def test_every_client_holds_the_servers_bits_after_every_round(world: World, case: str) -> None:
    check_every_round(Federation(world.config(SCALAR_CASES[case]), separate_workers=True))


@pytest.mark.parametrize("case", PORTABLE_CASES)
def test_so_does_a_client_without_pytorch(world: World, case: str) -> None:
    """It has the names and values of the start, and frames; the server's tensors may be on an accelerator."""
    federation = Federation(world.config(SCALAR_CASES[case]))
    server = federation.server
    start = {name: tensor.detach().cpu().numpy().copy() for name, tensor in
             zip(server.trainables.names, server.trainables.tensors, strict=True)}  # fmt: skip
    own = replayer_for(federation.config, Trainables(start))
    replica = Replica(own)
    for round_index in range(ROUNDS):
        federation.round(round_index, [1, 2])
        assignment = server.assign(round_index + 1, [4])[4]
        replica.follow(assignment.catch_up, assignment.digest)
        assert own.digest() == server.digest


@pytest.mark.parametrize("case", LANGUAGE_MODEL_CASES)
def test_so_do_clients_with_a_language_model(world: World, case: str) -> None:
    check_every_round(Federation(world.config(SCALAR_CASES[case], language_model=True), separate_workers=True))


@pytest.mark.parametrize("case", ARRIVAL_CASES)
def test_the_order_of_arrival_changes_nothing(world: World, case: str) -> None:
    config = world.config(SCALAR_CASES[case])
    in_order, shuffled = Federation(config), Federation(config)
    for round_index in range(2):
        one = in_order.round(round_index)
        rng = random.Random(round_index)
        other = shuffled.round(
            round_index,
            rng.sample(shuffled.clients, len(shuffled.clients)),
            meddle=lambda updates, rng=rng: rng.sample(updates, len(updates)),
        )
        assert other == one
        assert shuffled.server.digest == in_order.server.digest


@pytest.mark.parametrize("method", METHODS)
def test_nor_does_it_for_any_method(world: World, method: str) -> None:
    config = world.config(METHODS[method])
    in_order, reversed_order = Federation(config), Federation(config)
    for round_index in range(2):
        one = in_order.round(round_index)
        assert reversed_order.round(round_index, meddle=reversed) == one


@pytest.mark.parametrize("case", PORTABLE_CASES)
def test_every_chunk_size_rebuilds_the_same_bits(world: World, case: str) -> None:
    """Replicas that know nothing but the start and the records, each walking the parameters in other steps."""
    federation = Federation(world.config(SCALAR_CASES[case]))
    config, start = federation.config, federation.server.trainables.clone()
    whole = max(tensor.numel() for tensor in start.tensors)
    chunks = (1, 7, 4096, whole, DEFAULT_CHUNK)
    if case == "mezo, every parameter":
        chunks = chunks[2:]  # walking a whole model element by element takes long and shows no more
    replicas = [Replica(replayer_for(config, start.clone(), chunk)) for chunk in chunks]
    for round_index in range(2):
        federation.round(round_index, [1, 3])
        (assignment,) = federation.server.assign(round_index + 1, [1]).values()
        assert all(isinstance(decode(frame), RoundUpdate) for frame in assignment.catch_up)
        for replica in replicas:
            replica.follow(assignment.catch_up, assignment.digest)
            assert_equal_bits(replica, federation)


@pytest.mark.parametrize("case", ["mezo, decay", "forward, momentum and decay", "forward, adam and decay"])
def test_a_client_that_missed_rounds_gets_their_scalars(world: World, case: str) -> None:
    federation = Federation(world.config(SCALAR_CASES[case]), separate_workers=True)
    federation.round(0)
    for round_index in range(1, 4):
        federation.round(round_index, [1, 2])
    assigned = federation.server.assign(4, [1, 4])
    missed = [decode(frame) for frame in assigned[4].catch_up]
    assert all(isinstance(record, RoundUpdate) for record in missed)
    assert [record.round_index for record in missed] == [0, 1, 2, 3]
    assert [decode(frame).round_index for frame in assigned[1].catch_up] == [3]
    assert sum(map(len, assigned[4].catch_up)) <= federation.server.trainables.bytes
    for record, following in itertools.pairwise(missed):
        assert record.digest_after == following.digest_before
    assert_equal_bits(follow(federation, assigned[4]), federation)


@pytest.mark.parametrize("case", ["mezo, decay", "forward, momentum and decay", "forward, adam and decay"])
def test_a_client_that_missed_very_many_rounds_gets_the_parameters(world: World, case: str) -> None:
    """As soon as the records outweigh the parameters, and never earlier."""
    federation = Federation(world.config(SCALAR_CASES[case]), separate_workers=True)
    server, budget = federation.server, federation.server.trainables.bytes
    federation.round(0)
    sizes = []
    for round_index in range(1, 40):
        (assignment,) = server.assign(round_index, [1]).values()
        sizes.append(len(assignment.catch_up[-1]))
        federation.server.absorb([federation.work(assignment)])
        if sum(sizes) > budget:
            break
    else:
        pytest.fail("the rounds never outweighed the parameters")
    (assignment,) = server.assign(round_index + 1, [4]).values()
    (state,) = map(decode, assignment.catch_up)
    assert isinstance(state, DenseState)
    assert state.has_momentum == ("mezo" not in case)
    assert state.has_second_moment == ("adam" in case)
    size = len(assignment.catch_up[0])
    assert 0 < size - budget * (1 + state.has_momentum + state.has_second_moment) < 100
    assert_equal_bits(follow(federation, assignment), federation)
    server.absorb([federation.work(assignment)])
    (after,) = server.assign(round_index + 2, [4]).values()
    assert isinstance(decode(after.catch_up[0]), RoundUpdate)
    assert_equal_bits(follow(federation, after), federation)


def test_the_log_of_rounds_never_outgrows_the_parameters(world: World) -> None:
    federation = Federation(world.config(_MEZO))
    held = []
    for round_index in range(30):
        federation.round(round_index, [1, 2])
        frames = [value for name, value in federation.server.state_tensors().items() if name.startswith("catch_up.")]
        held.append(sum(frame.numel() for frame in frames))
    assert max(held) <= federation.server.trainables.bytes
    assert held[0] < held[1] < max(held)


def test_a_client_that_never_got_its_assignment_can_still_follow(world: World) -> None:
    """The server may not take for known what it only sent."""
    federation = Federation(world.config(_FORWARD), separate_workers=True)
    federation.round(0)
    for round_index in range(1, 4):
        assigned = federation.server.assign(round_index, federation.clients)
        reached = [federation.work(assigned[client]) for client in (1, 2)]
        report = federation.server.absorb(reached)
        assert report.rejected == {3: "no_answer", 4: "no_answer"}
    federation.round(4)
    (assignment,) = federation.server.assign(5, [4]).values()
    assert_equal_bits(follow(federation, assignment), federation)


def test_rounds_without_a_usable_answer_leave_everybody_where_they_are(world: World) -> None:
    federation = Federation(world.config({**_FORWARD, "fwdllm.server_momentum": 0.9}), separate_workers=True)
    federation.round(0)
    before = federation.server.digest
    federation.round(1, meddle=lambda updates: [])
    assert federation.server.digest == before
    federation.round(2)
    assert federation.server.digest != before
    for assignment in federation.server.assign(3, federation.clients).values():
        assert_equal_bits(follow(federation, assignment), federation)


def test_a_replica_elsewhere_says_that_it_is_lost(world: World) -> None:
    """One flipped bit is enough, and is found before any work is done."""
    federation = Federation(world.config(_MEZO), separate_workers=True)
    federation.round(0)
    federation.round(1)
    (assignment,) = federation.server.assign(2, [1]).values()
    replica = federation.worker(1).replica
    with torch.no_grad():
        replica.trainables.tensors[0].view(torch.int32).view(-1)[0] ^= 1 << 12  # a last bit may be rounded away
    with pytest.raises(DivergenceError, match="the parameters differ"):
        replica.follow(assignment.catch_up, assignment.digest)


@pytest.mark.parametrize("case", [*SCALAR_CASES, *methods_where(lambda facts: not facts.measures_slopes)])
def test_work_leaves_the_clients_parameters_as_they_were(world: World, case: str) -> None:
    federation = Federation(world.config(SCALAR_CASES.get(case) or METHODS[case]))
    federation.round(0)
    worker, server = federation.worker(1), federation.server
    for assignment in server.assign(1, [1, 2]).values():
        follow(federation, assignment)
        before = bits_held(worker)
        federation.work(assignment)
        assert bits_held(worker) == before
        assert before[-1] == worker.replica.digest == server.digest
        assert all(tensor.grad is None for tensor in worker.trainables.tensors)
        assert not worker.objective.model.training


@pytest.mark.parametrize("method", METHODS)
def test_so_does_work_that_fails_half_way(world: World, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"train.local_update_steps": 3}
    federation = Federation(world.config({**METHODS[method], **steps}))
    worker = federation.worker(1)
    (assignment,) = federation.server.assign(0, [1]).values()
    follow(federation, assignment)
    before, original, calls = bits_held(worker), worker.objective.on, []

    def fail_at_the_third(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            raise MemoryError
        return original(batch)

    monkeypatch.setattr(worker.objective, "on", fail_at_the_third)
    with pytest.raises(MemoryError):
        federation.work(assignment)
    assert bits_held(worker) == before
    monkeypatch.setattr(worker.objective, "on", original)
    untouched = Federation(federation.config)
    expected = untouched.work(untouched.server.assign(0, [1])[1])
    assert federation.work(assignment).values.tobytes() == expected.values.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", methods_where(lambda facts: not facts.trains_blocks))
def test_a_run_never_writes_to_the_base(world: World, method: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of everything frozen, before and after a whole run with evaluations and saving."""
    opened: list[Session] = []
    hashes: list[str] = []
    original = Session.open.__func__  # type: ignore[attr-defined]

    def remember(cls: type[Session], config: Any) -> Session:
        opened.append(original(cls, config))
        hashes.append(bits_of(opened[0].loaded.model, trained=False))
        return opened[0]

    monkeypatch.setattr(Session, "open", classmethod(remember))
    run(world.config({**METHODS[method], "fwdllm.base.compute_dtype": dtype, "federate.total_round_num": 3}))
    model = opened[0].loaded.model
    assert bits_of(model, trained=False) == hashes[0]
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert getattr(torch, dtype) in frozen


def test_the_digest_sees_what_two_replicas_could_disagree_on(world: World) -> None:
    """Another seed, another direction or another order of tensors is another digest."""
    digests = set()
    for settings in ({}, {"seed": 6}, {"fwdllm.direction": "gaussian"}, {"fwdllm.probes": 5}):
        federation = Federation(world.config({**_FORWARD, **settings}))
        federation.round(0)
        digests.add(federation.server.digest)
    assert len(digests) == 4


def test_momentum_that_moves_no_parameter_is_still_followed(world: World) -> None:
    """A step too small to change a bit of a parameter changes the momentum all the same; a later step shows it."""
    settings = {
        **_FORWARD, "fwdllm.server_momentum": 0.9, "train.optimizer.lr": 1e-9,
        "llm.adapter.args": [{"adapter_method": "layernorm"}],
    }  # fmt: skip
    federation = Federation(world.config(settings))
    server, start = federation.server, federation.server.trainables
    start.load_values([torch.ones_like(tensor) for tensor in start.tensors])  # near zero every step would show
    server.load_state(server.state_tensors(), server.state_numbers())
    distribution = make_distribution("rademacher")
    replica = Replica(Replayer(start.clone(), federation.config.seed, distribution))
    for round_index, slope in enumerate((1.0, 1e5, 1.0)):
        (assignment,) = server.assign(round_index, [1]).values()
        replica.follow(assignment.catch_up, assignment.digest)
        assert_equal_bits(replica, federation)
        server.absorb([an_answer(assignment, slope)])
    assert len({assignment.digest, server.digest, start.digest()}) > 1


def an_answer(assignment: Assignment, slope: float) -> ScalarUpdate:
    """An answer with one slope everywhere."""
    return ScalarUpdate(
        round_index=assignment.round_index, client=assignment.client, digest=assignment.digest, samples=1, loss=1.0,
        forward_passes=0, backward_passes=0, values=np.full(assignment.steps * sum(assignment.probes), slope),
    )  # fmt: skip
