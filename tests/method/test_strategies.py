"""Per-client learning rates against a slow reference that keeps all of history and looks through it every time.

Servers here are real, answers are made up: what is tested is what a server makes of them. The reference walks every
client's local steps in float64, with directions of its own, and never uses the package's strategy or norm code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_fwdllm.config import parse_config
from fs_fwdllm.core.direction import Rademacher
from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.core.wire import Assignment, ClientUpdate, DenseUpdate, RoundUpdate, ScalarUpdate, decode, encode
from fs_fwdllm.errors import ConfigError, WireError
from fs_fwdllm.method import Replica
from fs_fwdllm.method.client_rates import ClientRates, StrategySettings, random_rate, spread_rates
from fs_fwdllm.method.first_order.dense import AverageServer
from fs_fwdllm.method.mezo.recipe import coefficients
from fs_fwdllm.method.mezo.server import SteppingServer
from fs_fwdllm.method.replay_server import ReplayServer
from fs_fwdllm.method.server import ServerSettings, WorkPlan
from fs_fwdllm.running.local import run
from tests.host.small import METHODS, PLAIN_MEAN, Federation, World, methods_where, read_jsonl
from tests.method.reference import direction

SEED, BASE, SPAN, DECAY, ROUNDS = 11, 0.02, 0.015, 0.4, 14
SHAPES = {"matrix": (9, 14), "bias": (5,), "large": (21, 17), "one": (1, 1)}
STRATEGIES = ("frozen", "random", "round-wise", "five-round", "model-diff")
WINDOWS = {"round-wise": 1, "five-round": 5, "model-diff": 1}


def start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def a_server(name: str, clients: int, kind: type[ReplayServer] = SteppingServer, **changes: Any) -> ReplayServer:
    """A server of clients that take different numbers of steps."""
    schedule = Schedule(BASE, "cosine", ROUNDS)
    plans = {client: WorkPlan(1 + client % 3, (2,)) for client in range(1, clients + 1)}
    strategy = StrategySettings(name, SPAN, SEED)
    own = ServerSettings(**{"plans": plans, "schedule": schedule, "strategy": strategy, **changes})
    replayer = Replayer(Trainables(start()), SEED, Rademacher())
    return SteppingServer(replayer, own, coefficients) if kind is SteppingServer else AverageServer(replayer, own)


def an_answer(server: ReplayServer, assignment: Assignment, rng: np.random.Generator, **changes: Any) -> ClientUpdate:
    kind = ScalarUpdate if isinstance(server, SteppingServer) else DenseUpdate
    values = rng.normal(size=server.expected_values(assignment)).astype(np.float32)
    fields = {
        "round_index": assignment.round_index, "client": assignment.client, "digest": assignment.digest,
        "samples": int(rng.integers(1, 9)), "loss": float(rng.normal()), "forward_passes": 0, "backward_passes": 0,
    }  # fmt: skip
    return kind(**{**fields, "values": values, **changes})


class Reference:
    """All that clients have reported: per completed round, ``{client: statistic}``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rounds: list[dict[int, float]] = []

    def rate(self, base: float, round_index: int, client: int) -> float:
        if self.name == "frozen":
            return base
        if self.name == "random":
            return max(0.0, base + SPAN * (2 * uniform(round_index, client) - 1))
        window = WINDOWS[self.name]
        if len(self.rounds) < window:
            return base
        statistics = {}
        for someone in {known for line in self.rounds for known in line}:
            own = [line[someone] for line in self.rounds if someone in line]
            statistics[someone] = np.mean(own[-window:])
        if client not in statistics:
            return base
        deviations = {key: value - np.mean(list(statistics.values())) for key, value in statistics.items()}
        largest = max(abs(value) for value in deviations.values())
        if largest <= 1e-6 * max(map(abs, statistics.values())):  # equal but for the rounding of this reference
            return base
        return max(0.0, base + SPAN * deviations[client] / largest)


def uniform(round_index: int, client: int) -> float:
    """A number in [0, 1) from its name, by hand."""
    import hashlib

    name = json.dumps(["learning rate", SEED, round_index, client]).encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8")
    return (int(np.random.Philox(key=key.astype(np.uint64)).random_raw()) >> 11) / 2**53


def walked(server: ReplayServer, update: ClientUpdate, rate: float) -> dict[str, np.ndarray]:
    """The client's change, by taking its steps one after the other in float64."""
    pairs = zip(server.trainables.names, server.trainables.tensors, strict=True)
    here = {name: tensor.detach().double().clone() for name, tensor in pairs}
    if isinstance(update, DenseUpdate):
        pieces = np.split(update.values.astype(np.float64), np.cumsum([value.numel() for value in here.values()])[:-1])
        return dict(zip(here, pieces, strict=True))
    plan = server.settings.plans[update.client]
    point = {name: value.clone() for name, value in here.items()}
    for step, slopes in enumerate(update.values.reshape(plan.steps, plan.directions)):
        for value in point.values():
            if value.dim() > 1:
                value *= 1 - rate * server.settings.weight_decay
        for probe, slope in enumerate(slopes):
            z = direction(here, SEED, update.round_index, update.client, step, probe)
            for name, value in point.items():
                value -= rate / plan.directions * float(slope) * z[name]
    return {name: (point[name] - here[name]).numpy().ravel() for name in here}


def distances(changes: dict[int, dict[str, np.ndarray]]) -> dict[int, float]:
    """Sum over tensors of the norm of the difference from the plain mean; nothing for a single change."""
    if len(changes) == 1:
        return {}
    mean = {name: np.mean([change[name] for change in changes.values()], axis=0) for name in SHAPES}
    return {
        client: sum(float(np.linalg.norm(change[name] - mean[name])) for name in SHAPES)
        for client, change in changes.items()
    }


def play(
    server: ReplayServer, reference: Reference, taking_part: Sequence[int], round_index: int, rng: np.random.Generator
) -> None:
    """One round, in which some answers are bad and some never come; checks the rate of every client."""
    base = server.settings.schedule(round_index)
    assigned = server.assign(round_index, taking_part)
    for client, assignment in assigned.items():
        expected = reference.rate(base, round_index, client)
        assert assignment.learning_rate == pytest.approx(expected, rel=0, abs=2e-5 * SPAN)
    good, bad = {}, []
    for client, assignment in assigned.items():
        fate = rng.random()
        if fate < 0.1:
            bad.append(an_answer(server, assignment, rng, loss=math.nan))
        elif fate > 0.1 + 0.08:
            good[client] = an_answer(server, assignment, rng)
    changes = {}
    if reference.name == "model-diff":
        changes = {client: walked(server, update, assigned[client].learning_rate) for client, update in good.items()}
    report = server.absorb([*bad, *good.values()])
    assert report.learning_rates == {client: assigned[client].learning_rate for client in good}
    if good:
        losses = {client: update.loss for client, update in good.items()}
        reference.rounds.append(distances(changes) if changes else losses)


@pytest.mark.parametrize("kind", [SteppingServer, AverageServer])
@pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])
@pytest.mark.parametrize("clients", [1, 2, 3, 8])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_rate_is_the_references(name: str, clients: int, partial: bool, kind: type[ReplayServer]) -> None:
    rng = np.random.default_rng([clients, partial])
    server = a_server(name, clients, kind, weight_decay=DECAY, max_failed_rounds=99)
    reference, seen = Reference(name), set()
    for round_index in range(ROUNDS):
        count = int(rng.integers(1, clients + 1)) if partial else clients
        taking_part = rng.choice(np.arange(1, clients + 1), count, replace=False).tolist()
        play(server, reference, taking_part, round_index, rng)
        base = server.settings.schedule(round_index)
        seen |= {a.learning_rate - base for a in server.assigned.values()}
    assert len(reference.rounds) >= 6
    # Two changes are equally far from their mean.
    moves = name == "random" or (name != "frozen" and clients > (2 if name == "model-diff" else 1))
    assert (len(seen) > 2) == moves
    if moves and name != "random":
        assert max(seen) == pytest.approx(SPAN) or min(seen) < -0.5 * SPAN


@pytest.mark.parametrize("name", ["round-wise", "five-round", "model-diff"])
def test_the_first_rounds_have_the_schedules_rate(name: str) -> None:
    rng = np.random.default_rng(0)
    server = a_server(name, 3)
    for round_index in range(WINDOWS[name] + 1):
        assigned = server.assign(round_index, [1, 2, 3])
        rates = {assignment.learning_rate for assignment in assigned.values()}
        if round_index < WINDOWS[name]:
            assert rates == {server.settings.schedule(round_index)}
        else:
            assert len(rates) == 3
        server.absorb([an_answer(server, assignment, rng) for assignment in assigned.values()])


def test_the_published_numbers() -> None:
    """Three clients with losses 1, 2 and 6: deviations -2, -1 and 3 of the mean 3."""
    rates = ClientRates(StrategySettings("round-wise", 3e-6))
    assert rates.rates(1e-5, 0, [1, 2, 3]) == dict.fromkeys([1, 2, 3], 1e-5)
    rates.complete_round({1: 1.0, 2: 2.0, 3: 6.0})
    assert rates.rates(1e-5, 1, [1, 2, 3]) == pytest.approx({1: 8e-6, 2: 9e-6, 3: 1.3e-5}, rel=1e-12)
    assert rates.rates(1e-5, 1, [2, 4]) == pytest.approx({2: 9e-6, 4: 1e-5}, rel=1e-12)
    rates.complete_round({3: 4.5})  # 1 and 2 missed the round; a client's rate follows its own latest loss
    assert rates.rates(1e-5, 2, [1, 2, 3]) == pytest.approx({1: 7.75e-6, 2: 9.25e-6, 3: 1.3e-5}, rel=1e-12)


@pytest.mark.parametrize("name", ["round-wise", "five-round", "model-diff"])
@pytest.mark.parametrize("clients", [1, 2, 3, 7, 49, 103])
def test_equal_reports_leave_the_schedules_rate(name: str, clients: int) -> None:
    """To the bit: a difference made up by rounding would be blown up to the whole span."""
    rates = ClientRates(StrategySettings(name, SPAN))
    everyone = range(clients)
    for round_index in range(12):
        assert rates.rates(BASE, round_index, everyone) == dict.fromkeys(everyone, BASE)
        rates.complete_round({client: 0.1 for client in everyone if (client + round_index) % 3 or round_index < 2})


def test_equal_changes_leave_the_schedules_rate() -> None:
    server = a_server("model-diff", 5, AverageServer)
    values = np.random.default_rng(0).normal(size=server.trainables.count)
    for round_index in range(4):
        assigned = server.assign(round_index, range(1, 6))
        assert {a.learning_rate for a in assigned.values()} == {server.settings.schedule(round_index)}
        rng = np.random.default_rng(1)
        server.absorb([an_answer(server, assignment, rng, values=values) for assignment in assigned.values()])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_report(value: float) -> None:
    spoiled, honest = (ClientRates(StrategySettings("round-wise", SPAN)) for _ in range(2))
    for rates, last in ((spoiled, {1: value, 2: 5.0, 4: value}), (honest, {2: 5.0})):
        rates.complete_round({1: 1.0, 2: 2.0, 3: 3.0})
        rates.complete_round(last)
    assert spoiled.rates(BASE, 2, [1, 2, 3, 4]) == honest.rates(BASE, 2, [1, 2, 3, 4])
    assert spoiled.rates(BASE, 2, [4]) == {4: BASE}


@pytest.mark.parametrize("name", ["round-wise", "five-round", "model-diff"])
def test_a_failed_round_counts_for_nothing(name: str) -> None:
    failing, steady = a_server(name, 3), a_server(name, 3, schedule=Schedule(BASE, "constant", 1))
    failing.settings = replace(failing.settings, schedule=steady.settings.schedule)
    rng, same = np.random.default_rng(4), np.random.default_rng(4)
    for round_index in range(7):
        failing.assign(2 * round_index, [1, 2, 3])
        failing.absorb([])
        assigned = failing.assign(2 * round_index + 1, [1, 2, 3])
        report = failing.absorb([an_answer(failing, assignment, rng) for assignment in assigned.values()])
        assigned = steady.assign(2 * round_index + 1, [1, 2, 3])
        expected = steady.absorb([an_answer(steady, assignment, same) for assignment in assigned.values()])
        assert report.learning_rates == expected.learning_rates
    assert len(set(report.learning_rates.values())) == 3


def test_a_single_change_says_nothing_about_differences() -> None:
    """Its distance from the mean is zero by definition, not because the client agrees with the others."""
    rng = np.random.default_rng(5)
    server = a_server("model-diff", 3, schedule=Schedule(BASE, "constant", 1))
    server.absorb([an_answer(server, a, rng) for a in server.assign(0, [1, 2, 3]).values()])
    before = {client: a.learning_rate for client, a in server.assign(1, [1, 2, 3]).items()}
    server.absorb([an_answer(server, a, rng) for a in server.assign(1, [2]).values()])
    assert {client: a.learning_rate for client, a in server.assign(2, [1, 2, 3]).items()} == before
    assert len(set(before.values())) == 3


FINITE = st.floats(allow_nan=False, allow_infinity=False)
REPORTS = st.dictionaries(st.integers(0, 6), st.floats(), max_size=7)


@given(
    name=st.sampled_from(STRATEGIES), rounds=st.lists(REPORTS, max_size=9), base=st.floats(0, 1e6),
    span=st.floats(0, 1e6), seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_rates_are_finite_never_negative_and_within_the_span(
    name: str, rounds: list[dict[int, float]], base: float, span: float, seed: int
) -> None:
    rates = ClientRates(StrategySettings(name, span, seed))
    for round_index, reports in enumerate([{}, *rounds]):
        rates.complete_round(reports)
        for rate in rates.rates(base, round_index, range(8)).values():
            assert math.isfinite(rate) and max(0.0, base - span) <= rate <= base + span


@given(statistics=st.dictionaries(st.integers(0, 30), FINITE, min_size=2), base=st.floats(0.5, 2))
def test_order_and_extremes(statistics: dict[int, float], base: float) -> None:
    """A larger statistic never has the smaller rate, and unless all are equal somebody is moved by the whole span."""
    rates = spread_rates(base, 0.25, {client: Fraction(value) for client, value in statistics.items()})
    ordered = [rates[client] for client in sorted(statistics, key=statistics.__getitem__)]
    assert ordered == sorted(ordered)
    if len(set(statistics.values())) > 1:
        assert max(abs(rate - base) for rate in ordered) == pytest.approx(0.25)


def test_random_rates_are_uniform_and_keyed() -> None:
    places = [(round_index, client) for round_index in range(40) for client in range(50)]
    drawn = np.array([random_rate(1.0, 0.5, 3, *place) for place in places])
    assert len(set(drawn)) == drawn.size
    for share in (0.1, 0.25, 0.5, 0.9):
        assert (drawn < 0.5 + share).mean() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / drawn.size))
    assert random_rate(1.0, 0.5, 3, 0, 1) != random_rate(1.0, 0.5, 4, 0, 1)
    clamped = [random_rate(1e-6, 5e-6, 3, round_index, 1) for round_index in range(60)]
    assert min(clamped) == 0.0 and 0 < np.mean(np.array(clamped) == 0) < 1


@given(
    weight_decay=st.sampled_from([0.0, DECAY]), clients=st.integers(2, 6), longest=st.sampled_from([7, 64, 1 << 12]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_distances_from_scalars_are_those_of_dense_changes(
    weight_decay: float, clients: int, longest: int, seed: int
) -> None:
    """In slices of any length, from three sides: scalars, the same changes as vectors, and the reference."""
    rng = np.random.default_rng(seed)
    server = a_server("model-diff", clients, weight_decay=weight_decay)
    dense = a_server("model-diff", clients, AverageServer)
    updates = [an_answer(server, a, rng) for a in server.assign(0, range(1, clients + 1)).values()]
    changes = {update.client: walked(server, update, BASE) for update in updates}
    vectors = [replace(an_answer(dense, a, rng), values=np.concatenate(list(changes[client].values())))
               for client, a in dense.assign(0, range(1, clients + 1)).items()]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fs_fwdllm.method.update_norms.BLOCK_ELEMENTS", 1)
        patch.setattr("fs_fwdllm.method.update_norms.SHORTEST_SLICE", longest)
        found, from_vectors = server.distances(updates), dense.distances(vectors)
    np.testing.assert_allclose(found, list(distances(changes).values()), rtol=2e-5)
    np.testing.assert_allclose(found, from_vectors, rtol=2e-5)


def test_asking_for_distances_changes_no_parameter() -> None:
    rng = np.random.default_rng(6)
    server = a_server("model-diff", 4, weight_decay=DECAY)
    updates = [an_answer(server, a, rng) for a in server.assign(0, [1, 2, 3, 4]).values()]
    server.distances(updates)
    assert server.trainables.digest() == Trainables(start()).digest() == server.digest


@pytest.mark.parametrize("weight_decay", [0.0, DECAY])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_replica_that_knows_only_the_records_has_the_servers_bits(name: str, weight_decay: float) -> None:
    rng = np.random.default_rng(7)
    server = a_server(name, 4, weight_decay=weight_decay)
    replica = Replica(Replayer(Trainables(start()), SEED, Rademacher(), chunk=13))
    for round_index in range(8):
        assigned = server.assign(round_index, [1, 2, 3, 4])
        server.absorb([an_answer(server, assignment, rng) for assignment in assigned.values()])
        record = decode(server.assign(round_index + 1, [1])[1].catch_up[-1])
        assert isinstance(record, RoundUpdate)
        rates = [assignment.learning_rate for assignment in assigned.values()]
        assert record.step_decay == (tuple(1 - rate * weight_decay for rate in rates) if weight_decay else ())
        replica.follow([encode(record)], server.digest)
        assert replica.replayer.digest() == server.trainables.digest()
    assert (len(set(rates)) > 1) == (name != "frozen")


def test_a_record_with_too_few_decay_factors_is_refused() -> None:
    replica = Replica(Replayer(Trainables(start()), SEED, Rademacher()))
    participants = ((0, 1, 1, 1), (0, 2, 1, 1))
    record = RoundUpdate(0, replica.digest, bytes(16), 1.0, (0.5,), 0.0, 0.0, participants, values=np.ones(2))
    with pytest.raises(WireError, match="2 participants but 1 decay factors"):
        replica.follow([encode(record)], bytes(16))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_restored_server_assigns_the_same_rates(name: str) -> None:
    """The state goes through JSON, as a checkpoint's does."""
    rng = np.random.default_rng(8)
    server, resumed = a_server(name, 4), a_server(name, 4)
    for round_index in range(9):
        assigned = server.assign(round_index, rng.choice([1, 2, 3, 4], 3, replace=False).tolist())
        server.absorb([an_answer(server, assignment, rng) for assignment in assigned.values()])
        tensors = {key: value.clone() for key, value in server.state_tensors().items()}
        resumed.load_state(tensors, json.loads(json.dumps(server.state_numbers())))
        one, other = (each.assign(round_index + 1, [1, 2, 3, 4]) for each in (server, resumed))
        assert {client: encode(a) for client, a in one.items()} == {client: encode(a) for client, a in other.items()}


_OWN_RATES = {"fwdllm.strategy_span": 0.04, "federate.sample_client_num": 3}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mezo", "fedavg"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_rate_is_in_the_metrics(world: World, name: str, method: str) -> None:
    path = run(world.config({**METHODS[method], **_OWN_RATES, "train.train_strategy": name, "eval.freq": -1,
                             "federate.total_round_num": 7}))  # fmt: skip
    lines = [line for line in read_jsonl(path / "metrics.jsonl") if line.get("round") and not line.get("final")]
    assert len(lines) == 7
    for line in lines:
        assert line["learning_rate"].keys() == line["loss"].keys() and len(line["loss"]) == 3
        assert all(0.05 - 0.04 <= rate <= 0.05 + 0.04 for rate in line["learning_rate"].values())
    moved = [any(rate != 0.05 for rate in line["learning_rate"].values()) for line in lines]
    first = {"frozen": 7, "random": 0, **WINDOWS}[name]
    assert moved == [False] * first + [True] * (7 - first)


@pytest.mark.parametrize("upload", ["scalars", "dense"])
def test_distances_do_not_depend_on_the_upload(world: World, upload: str) -> None:
    """What the server works out from slopes is what the clients would have sent."""
    settings = {**METHODS["mezo"], **PLAIN_MEAN, **_OWN_RATES, "train.train_strategy": "model-diff",
                "fwdllm.upload": upload, "train.optimizer.weight_decay": DECAY}  # fmt: skip
    federation = Federation(world.config(settings))
    federation.round(0, federation.clients)
    other = Federation(world.config({**settings, "fwdllm.upload": "scalars" if upload == "dense" else "dense"}))
    other.round(0, other.clients)
    one, two = (dict(each.server.state_numbers()["rate_reports"]) for each in (federation, other))
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    for client, (distance,) in one.items():
        assert two[client] == pytest.approx([distance], rel=1e-3) and distance > 0


@pytest.mark.parametrize("method", methods_where(lambda facts: not facts.clients_step))
@pytest.mark.parametrize("name", STRATEGIES[1:])
def test_where_the_server_steps_a_clients_rate_is_refused(world: World, name: str, method: str) -> None:
    with pytest.raises(ConfigError, match=rf"train_strategy '{name}'.*server takes the steps.*frozen.*fedmezo"):
        Federation(world.config({**METHODS[method], "train.train_strategy": name}))


def test_unknown_strategies_and_negative_spans_are_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=r"train.train_strategy"):
        parse_config(world.tree({"train.train_strategy": "round_wise"}))
    with pytest.raises(ConfigError, match=r"fwdllm.strategy_span"):
        parse_config(world.tree({"fwdllm.strategy_span": -1e-6}))
    assert world.config().fwdllm.strategy_span == -1


def test_the_span_follows_the_rate_unless_it_is_given() -> None:
    """Half of the rate: the published 5e-6 at the published 1e-5 to the bit, and as visible at any other rate."""

    def rates_at(base: float, *span: float) -> dict[int, float]:
        rates = ClientRates(StrategySettings("round-wise", *span))
        rates.complete_round({1: 1.0, 2: 2.0, 3: 6.0})
        return rates.rates(base, 1, [1, 2, 3])

    assert rates_at(1e-5) == rates_at(1e-5, 5e-6)
    assert rates_at(0.02) == pytest.approx({1: 0.02 / 3 * 2, 2: 0.02 / 6 * 5, 3: 0.03}, rel=1e-12)
    assert rates_at(0.02, 5e-6)[3] == pytest.approx(0.020005, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "span", "warned"), [("random", 0.05, True), ("random", 0.049, False), ("frozen", 1.0, False)]
)
def test_a_span_that_reaches_zero_is_announced(world: World, name: str, span: float, warned: bool) -> None:
    federation = Federation(
        world.config({**METHODS["mezo"], "train.train_strategy": name, "fwdllm.strategy_span": span})
    )
    said: list[str] = []
    federation.session.announce(said.append)
    assert any("fwdllm.strategy_span" in line and "0.05" in line for line in said) == warned
