"""Trainables in parts, clients in groups: who measures what, what it takes, and that nothing spills over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fs_fwdllm.config.sources import counts_of, describe_sources, division_of, matches, sources_of
from fs_fwdllm.core.direction import Rademacher
from fs_fwdllm.core.division import Division
from fs_fwdllm.errors import ConfigError, EstimatorError, WireError
from fs_fwdllm.method.forward.pool import Pool, PoolEntry
from fs_fwdllm.method.weights import part_shares
from tests.host.small import METHODS, PLAIN_MEAN, Federation, World

HEAD, ADAPTER = {"match": "classifier"}, {"match": "lora_*"}
CLOSED = {"match": "classifier", "slopes": "closed_form", "scalars": 40}
PROBED = {"match": "*", "slopes": "one_sided", "probes": 3, "rate": 0.5}
FROZEN = {"match": "*", "slopes": "frozen"}


def forward(**own: Any) -> dict[str, Any]:
    return {**METHODS["forward_gradient"], **PLAIN_MEAN, **{f"fwdllm.{key}": value for key, value in own.items()}}


def rounds(federation: Federation, count: int = 3) -> list[Any]:
    return [federation.round(index) for index in range(count)]


def tensors_by_part(federation: Federation) -> list[list[np.ndarray]]:
    division = federation.server.replayer.division
    values = [tensor.detach().numpy().copy() for tensor in federation.server.trainables.tensors]
    return [[values[index] for index in sorted(division.tensor_ids(part))] for part in range(division.parts)]


@pytest.mark.parametrize("method", ["mezo", "forward_gradient"])
def test_one_part_has_the_bytes_of_no_parts(world: World, method: str) -> None:
    """Directions, coefficients and passes are those that trainables without parts have."""
    parted = {**METHODS[method], "fwdllm.parts": [{"match": "*"}]}
    plain, one = (Federation(world.config(settings)) for settings in (METHODS[method], parted))
    assert [vars(report) for report in rounds(plain)] == [vars(report) for report in rounds(one)]
    assert plain.server.digest == one.server.digest


@pytest.mark.parametrize(("method", "momentum"), [("mezo", 0.0), ("forward_gradient", 0.0), ("forward_gradient", 0.9)])
def test_a_frozen_part_keeps_every_bit(world: World, method: str, momentum: float) -> None:
    settings = {**METHODS[method], "fwdllm.parts": [CLOSED, FROZEN], "fwdllm.server_momentum": momentum}
    federation = Federation(world.config(settings), separate_workers=True)
    before = tensors_by_part(federation)
    rounds(federation)
    after = tensors_by_part(federation)
    assert all((old == new).all() for old, new in zip(before[1], after[1], strict=True))
    assert all((old != new).any() for old, new in zip(before[0], after[0], strict=True))


def test_what_a_part_does_is_nothing_to_another(world: World) -> None:
    """The same closed form beside a frozen part and beside one that is probed: one step, the same bytes."""
    alone, beside = (Federation(world.config(forward(parts=[CLOSED, other]))) for other in (FROZEN, PROBED))
    for federation in (alone, beside):
        federation.round(0)
    ours, theirs = tensors_by_part(alone), tensors_by_part(beside)
    assert all((one == other).all() for one, other in zip(ours[0], theirs[0], strict=True))
    assert any((one != other).any() for one, other in zip(ours[1], theirs[1], strict=True))


def test_a_step_is_every_parts_own_estimate_at_its_own_rate(world: World) -> None:
    """Against the sum written out, direction by direction, in float64."""
    federation = Federation(world.config(forward(parts=[CLOSED, PROBED])))
    division, trainables = federation.server.replayer.division, federation.server.trainables
    before = [tensor.detach().double().numpy().copy() for tensor in trainables.tensors]
    answers = federation.answers(0)
    samples = sum(answer.samples for answer in answers)
    expected = [value.copy() for value in before]
    for answer in answers:
        seeds = federation.worker(answer.client).seeds(federation.server.assigned[answer.client], 0)
        for part, (first, count, rate) in enumerate([(0, 40, 1.0), (40, 3, 0.5)]):
            for seed, slope in zip(seeds[first : first + count], answer.values[first : first + count], strict=True):
                for index in division.tensor_ids(part):
                    size = before[index].size
                    z = (
                        Rademacher()
                        .values([(federation.config.seed, seed)], index, 0, size)[0]
                        .reshape(before[index].shape)
                    )
                    expected[index] -= 0.05 * rate * answer.samples / samples / count * float(slope) * z
    federation.server.absorb(answers)
    for tensor, value in zip(trainables.tensors, expected, strict=True):
        np.testing.assert_allclose(tensor.detach().numpy(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "forward_passes", "backward_passes"),
    [
        ([CLOSED, FROZEN], 1, 0),
        ([CLOSED, PROBED], 1 + 3, 0),  # the pass of the closed form is the clean pass of the difference
        ([PROBED | {"match": "classifier"}, PROBED], 1 + 3 + 3, 0),
        ([CLOSED, PROBED | {"slopes": "central"}], 1 + 6, 0),
        ([CLOSED, {"match": "*", "slopes": "projected", "scalars": 9}], 2, 1),
        ([{"match": "classifier", "slopes": "projected", "scalars": 5}, {"match": "*", "slopes": "projected"}], 1, 1),
    ],
)
def test_parts_share_the_passes_they_can(
    world: World, parts: list[dict[str, Any]], forward_passes: int, backward_passes: int
) -> None:
    federation = Federation(world.config(forward(parts=parts)))
    ran: list[int] = []
    federation.session.loaded.model.register_forward_pre_hook(lambda *_: ran.append(1))
    federation.round(0)  # finds the output layer, with a pass of its own
    ran.clear()
    report = federation.round(1)
    clients = len(federation.clients)
    assert (report.forward_passes, report.backward_passes) == (clients * forward_passes, clients * backward_passes)
    assert len(ran) == clients * forward_passes


def test_local_steps_work_with_every_source(world: World) -> None:
    settings = {**METHODS["mezo"], "train.local_update_steps": 3, "fwdllm.parts": [CLOSED, PROBED]}
    federation = Federation(world.config(settings), separate_workers=True)
    first = rounds(federation)[0]
    assert first.forward_passes == len(federation.clients) * 3 * 4
    for assignment in federation.server.assign(3, federation.clients).values():
        replica = federation.worker(assignment.client).replica
        replica.follow(assignment.catch_up, assignment.digest)
        assert replica.digest == federation.server.digest


FLEET = [
    {"clients": 2, "slopes": "closed_form", "scalars": 30},
    {"clients": [4], "slopes": "projected", "scalars": 50},
]
HEAD_ONLY = {"llm.adapter.args": [{"adapter_method": "head"}]}


def test_a_mixed_fleet_trains_one_model(world: World) -> None:
    """Closed form, backpropagation and probes side by side; every client rebuilds the same bits."""
    config = world.config({**forward(fleet=FLEET, estimator="one_sided", probes=5), **HEAD_ONLY})
    federation = Federation(config, separate_workers=True)
    assert [counts_of(config, client) for client in (1, 2, 3, 4)] == [(30,), (30,), (5,), (50,)]
    report = federation.round(0)
    assert report.forward_passes == 1 + 1 + 6 + 1 and report.backward_passes == 1
    federation.round(1)
    for assignment in federation.server.assign(2, federation.clients).values():
        replica = federation.worker(assignment.client).replica
        replica.follow(assignment.catch_up, assignment.digest)
        assert replica.digest == federation.server.digest == federation.server.replayer.digest()


def test_weights_by_precision_have_the_least_variance() -> None:
    """Of all weights that sum to one, among independent estimates whose variance is (1 + spread/n) / samples."""
    samples, slopes, spread = {1: 8, 2: 8, 3: 4}, {1: 100, 2: 5, 3: 1540}, 1539.0
    shares = part_shares(samples, slopes, spread, equal=False)
    assert sum(shares.values()) == pytest.approx(1)

    def variance(weights: dict[int, float]) -> float:
        return sum(weights[c] ** 2 * (1 + spread / slopes[c]) / samples[c] for c in samples)

    least = variance(shares)
    rng = np.random.default_rng(3)
    for _ in range(200):
        other = rng.dirichlet(np.ones(3))
        assert variance(dict(zip(samples, other, strict=True))) >= least * (1 - 1e-12)
    by_samples = part_shares(samples, slopes, None, equal=False)
    assert by_samples == {1: 0.4, 2: 0.4, 3: 0.2}


def test_who_sends_nothing_of_a_part_has_no_weight_in_it() -> None:
    assert part_shares({1: 3, 2: 9}, {1: 7, 2: 0}, 10.0, equal=False) == {1: 1.0, 2: 0.0}
    assert part_shares({1: 3, 2: 9}, {1: 0, 2: 0}, 10.0, equal=False) == {1: 0.0, 2: 0.0}


def test_the_noise_of_a_mixed_pool_is_as_derived() -> None:
    """``E|G - g|^2`` over many draws of directions, against the law from the scalars alone."""
    d, rng = 12, np.random.default_rng(5)
    gradients = {1: rng.normal(size=d), 2: rng.normal(size=d), 3: rng.normal(size=d)}
    counts, samples = {1: 40, 2: 4, 3: 12}, {1: 8, 2: 8, 3: 2}
    pool = Pool(False, (1.0,), (d - 1.0,))
    errors, laws = [], []
    for _ in range(3000):
        pool.clear()
        estimate, directions = np.zeros(d), {}
        for client, count in counts.items():
            directions[client] = rng.choice([-1.0, 1.0], size=(count, d))
            slopes = (directions[client] @ gradients[client]).astype(np.float32)
            pool.add([PoolEntry(0, client, samples[client], slopes[None])])
        weights = pool.client_weights()
        for client, coefficients in zip(
            counts, np.split(pool.coefficients(), np.cumsum(list(counts.values()))[:-1]), strict=True
        ):
            estimate += coefficients @ directions[client]
        errors.append(float(np.square(estimate - sum(weights[c] * gradients[c] for c in counts)).sum()))
        laws.append(pool.noise([d - 1.0]))
    assert np.mean(laws) == pytest.approx(np.mean(errors), rel=0.05)


def test_names_match_by_words_or_by_patterns() -> None:
    name = "base_model.model.classifier.modules_to_save.default.weight"
    assert matches(name, "classifier") and matches(name, "default.weight") and matches(name, "*.weight")
    assert not matches(name, "class") and not matches(name, "classifier*") and not matches(name, "weight.default")


def test_sources_in_words(world: World) -> None:
    config = world.config(forward(parts=[CLOSED, PROBED]))
    assert describe_sources(sources_of(config)) == "closed form, 40 scalars; one sided, 3 probes"
    assert division_of(config, ["a.classifier.weight", "b"]) == Division((0, 1), (1.0, 0.5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parts": [HEAD]}, ["in no part", "match: '*', slopes: frozen"]),
        ({"parts": [{"match": "nothing"}, {"match": "*"}]}, ["fwdllm.parts[0].match 'nothing'", "lora_A"]),
        ({"parts": [{"slopes": "frozen"}]}, ["every part is frozen"]),
        ({"parts": [{"slopes": "frozen", "probes": 3}]}, ["fwdllm.parts[0]", "leave both out"]),
        ({"parts": [CLOSED | {"scalars": 0, "probes": 4}, PROBED]}, ["fwdllm.parts[0].probes 4", "write scalars"]),
        ({"parts": [{"slopes": "central", "scalars": 4}]}, ["fwdllm.parts[0].scalars 4", "write probes"]),
        ({"fleet": [{"clients": 2}, {"clients": [2, 3]}]}, ["fwdllm.fleet[1].clients", "client 2"]),
        ({"fleet": [{"clients": 0}]}, ["fwdllm.fleet[0].clients 0", "from 1"]),
        ({"fleet": [{"clients": 3}, {"clients": [5, 6]}]}, ["fwdllm.fleet[1]", "5 to 6", "none of them", "1 to 4"]),
        ({"parts": [CLOSED, FROZEN], "fleet": [{"clients": 1, "parts": [HEAD]}]}, ["must match what fwdllm.parts"]),
        ({"parts": [HEAD, PROBED], "fleet": [{"clients": 1, "parts": [HEAD, PROBED]}]}, ["one rate for all clients"]),
        ({"parts": [CLOSED, PROBED], "gate.kind": "published"}, ["fwdllm.gate.kind 'published'", "relative"]),
        ({"parts": [CLOSED, PROBED], "sampling.kind": "corrected"}, ["sampling.kind", "leave fwdllm.parts out"]),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_by_key(world: World, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Federation(world.config(forward(**settings)))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_source_that_cannot_reach_its_part_is_refused_before_the_first_round(world: World) -> None:
    with pytest.raises(EstimatorError, match=r"closed_form: '.*lora"):
        Federation(world.config(forward(estimator="closed_form")))


def test_parts_are_refused_where_no_slopes_are_sent(world: World) -> None:
    with pytest.raises(ConfigError, match=r"fwdllm\.parts: says where slopes come from"):
        Federation(world.config({**METHODS["fedavg"], "fwdllm.parts": [CLOSED, FROZEN]}))


def test_a_client_that_is_configured_otherwise_says_so(world: World) -> None:
    server = Federation(world.config(forward(probes=5)))
    client = Federation(world.config(forward(probes=6)))
    assignment = server.server.assign(0, [1])[1]
    with pytest.raises(WireError, match=r"asked for \[5\] slopes a step.*says \[6\]"):
        client.worker(1).work(assignment, client.session.data.clients[1].train)


COMMON = {**HEAD_ONLY, **forward(estimator="closed_form", directions="common", probes=9)}


def test_directions_in_common_cost_the_same_download_whatever_the_number_of_clients(world: World) -> None:
    sizes = []
    for clients in (2, 4):
        federation = Federation(world.config(COMMON | {"federate.client_num": clients}), separate_workers=True)
        rounds(federation, 2)
        frames = [assignment.catch_up for assignment in federation.server.assign(2, federation.clients).values()]
        sizes.append({len(frame) for catch_up in frames for frame in catch_up[-1:]})
        for client in federation.clients:
            replica = federation.worker(client).replica
            replica.follow(federation.server.assigned[client].catch_up, federation.server.assigned[client].digest)
            assert replica.digest == federation.server.digest
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("settings", [{}, {"fwdllm.server_momentum": 0.9}, {"train.local_update_steps": 2}])
def test_a_step_along_common_directions_is_the_projected_mean_gradient(world: World, settings: dict[str, Any]) -> None:
    """With as many rows as the matrix has, the step is the step of FedSGD, whose clients send whole gradients."""
    with_all = COMMON | {"fwdllm.probes": 128} | settings
    sgd = {
        **HEAD_ONLY,
        **PLAIN_MEAN,
        "federate.method": "FedSGD",
        "train.optimizer.momentum": with_all.get("fwdllm.server_momentum", 0),
    }
    ours = Federation(world.config(with_all))
    theirs = Federation(world.config(sgd | {key: value for key, value in settings.items() if "train" in key}))
    assert ours.server.trainables.count <= 128
    rounds(ours, 2), rounds(theirs, 2)
    np.testing.assert_allclose(ours.parameters(), theirs.parameters(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fwdllm.gate.kind": "relative"}, "fwdllm.gate.kind 'relative'"),
        ({"fwdllm.direction": "gaussian"}, "fwdllm.direction 'gaussian'"),
        ({"fwdllm.fleet": FLEET}, "fwdllm.fleet"),
    ],
)
def test_the_rows_of_a_matrix_do_not_go_with_everything(world: World, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Federation(world.config(COMMON | settings))
    assert words in str(caught.value)
