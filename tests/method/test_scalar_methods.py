"""MeZO and forward gradients against trajectories that were walked step by step, and against their dense form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.core.learning_rate import decay_factor
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.running.session import Session
from tests.host.small import METHODS, PLAIN_MEAN, SCALAR_METHODS, Federation, World
from tests.method.reference import Point, central_slopes, direction, to_flat, trained

LEARNING_RATE, DECAY, RADIUS, BETA = 0.05, 0.4, 0.01, 0.8
_MEZO = {
    **METHODS["mezo"], **PLAIN_MEAN, "train.local_update_steps": 3, "fwdllm.radius": RADIUS,
    "train.optimizer.lr": LEARNING_RATE,
}  # fmt: skip
_FORWARD = {**METHODS["forward_gradient"], **PLAIN_MEAN, "fwdllm.radius": RADIUS, "train.optimizer.lr": LEARNING_RATE}

#: What the rounding of two float32 losses can do to a parameter, through the radius and some steps; moves are 0.01.
TOLERANCE = 5e-5


def start_of(federation: Federation) -> Point:
    return {name: value.detach().double().clone() for name, value in trained(federation.session.loaded.model).items()}


def decayed(point: Point, factor: float) -> Point:
    """Matrices shrink; biases, norms and other vectors do not."""
    return {name: value * factor if value.dim() > 1 else value.clone() for name, value in point.items()}


def walk(federation: Federation, client: int, point: Point, round_index: int, weight_decay: float) -> Point:
    """One client's MeZO round: decay, then step against the mean slope, batch after batch."""
    probes = federation.server.settings.plans[client].directions
    model = federation.session.loaded.model
    for step, batch in enumerate(federation.batches(client, round_index)):
        signs = [direction(point, federation.config.seed, round_index, client, step, p) for p in range(probes)]
        slopes = central_slopes(model, point, batch, signs, RADIUS)
        moved = decayed(point, 1 - LEARNING_RATE * weight_decay)
        for slope, z in zip(slopes, signs, strict=True):
            moved = {name: moved[name] - LEARNING_RATE / probes * slope * z[name] for name in moved}
        point = moved
    return point


def weighted_mean(points: list[Point], weights: list[float]) -> Point:
    return {
        name: sum(weight * point[name] for weight, point in zip(weights, points, strict=True)) for name in points[0]
    }


@pytest.mark.parametrize(
    ("steps", "probes", "weight_decay", "language_model"),
    [
        pytest.param(1, 1, 0.0, False, id="1-1-classifier"),
        pytest.param(3, 2, 0.0, False, id="3-2-classifier"),
        pytest.param(1, 3, DECAY, False, id="1-3-decay-classifier"),
        pytest.param(3, 2, DECAY, False, id="3-2-decay-classifier"),
        pytest.param(3, 2, 0.0, True, id="3-2-language model"),
        pytest.param(3, 2, DECAY, True, id="3-2-decay-language model"),
        pytest.param(4, 1, DECAY, True, id="4-1-decay-language model"),
    ],
)
def test_mezo_unrolled_is_the_clients_own_trajectory(
    world: World, steps: int, probes: int, weight_decay: float, language_model: bool
) -> None:
    settings = {
        **_MEZO, "train.local_update_steps": steps, "fwdllm.probes": probes, "federate.client_num": 1,
        "train.optimizer.weight_decay": weight_decay,
    }  # fmt: skip
    federation = Federation(world.config(settings, language_model=language_model))
    point = start = start_of(federation)
    for round_index in range(2):
        point = walk(federation, 1, point, round_index, weight_decay)
        federation.round(round_index)
    np.testing.assert_allclose(federation.parameters(), to_flat(point), rtol=0, atol=TOLERANCE)
    assert np.abs(to_flat(point) - to_flat(start)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("ignore_weight", [False, True])
@pytest.mark.parametrize("unit", ["batch", "epoch"])
def test_mezo_averages_where_the_clients_end(world: World, unit: str, ignore_weight: bool) -> None:
    """Clients of different sizes; with ``epoch`` they also take different numbers of steps, so decay differs."""
    rows = [{"text": f"w{3 + row} w{40 + row % 7}", "label": "ab"[row % 2], "owner": "xyyyzzzzz"[row % 9]}
            for row in range(27)]  # fmt: skip
    settings = {
        **_MEZO, "data.type": world.write_rows("owned.jsonl", rows) + "@text", "data.splitter": "natural",
        "fwdllm.data.natural": "owner", "federate.client_num": 0, "data.splits": [1.0, 0.0, 0.0],
        "train.local_update_steps": 2, "train.batch_or_epoch": unit, "train.optimizer.weight_decay": DECAY,
        "federate.ignore_weight": ignore_weight,
    }  # fmt: skip
    federation = Federation(world.config(settings))
    assert federation.session.client_samples == {1: 3, 2: 9, 3: 15}
    start = start_of(federation)
    ends = [walk(federation, client, start, 0, DECAY) for client in (1, 2, 3)]
    steps = [len(federation.batches(client)) for client in (1, 2, 3)]
    assert steps == ([2, 2, 2] if unit == "batch" else [2, 6, 8])
    processed = [sum(len(batch) for batch in federation.batches(client)) for client in (1, 2, 3)]
    weights = [1 / 3] * 3 if ignore_weight else [count / sum(processed) for count in processed]
    federation.round(0)
    expected = to_flat(weighted_mean(ends, weights))
    np.testing.assert_allclose(federation.parameters(), expected, rtol=0, atol=TOLERANCE)
    wrong = to_flat(weighted_mean(ends, [0.2, 0.3, 0.5]))
    assert np.abs(wrong - expected).max() > 10 * TOLERANCE


@pytest.mark.parametrize("momentum", [0.0, BETA])
def test_a_forward_gradient_round_is_one_step_on_the_mean_estimate(world: World, momentum: float) -> None:
    """Three rounds, rebuilt in float64 from slopes this test measured itself."""
    settings = {
        **_FORWARD, "train.local_update_steps": 2, "fwdllm.server_momentum": momentum, "fwdllm.probes": 2,
        "train.optimizer.weight_decay": DECAY, "train.scheduler.type": "linear", "federate.total_round_num": 4,
    }  # fmt: skip
    federation = Federation(world.config(settings))
    model, plans = federation.session.loaded.model, federation.server.settings.plans
    point = start = start_of(federation)
    velocity = {name: torch.zeros_like(value) for name, value in point.items()}
    for round_index in range(3):
        gradient = {name: torch.zeros_like(value) for name, value in point.items()}
        batches = {client: federation.batches(client, round_index) for client in federation.clients}
        samples = {client: sum(map(len, own)) for client, own in batches.items()}
        for client, own in batches.items():
            for step, batch in enumerate(own):
                count = plans[client].directions
                signs = [direction(point, federation.config.seed, round_index, client, step, p) for p in range(count)]
                slopes = central_slopes(model, point, batch, signs, RADIUS)
                share = samples[client] / sum(samples.values()) / (count * len(own))
                for slope, z in zip(slopes, signs, strict=True):
                    gradient = {name: gradient[name] + share * slope * z[name] for name in gradient}
        rate = LEARNING_RATE * (1 - round_index / 4)
        velocity = {name: momentum * velocity[name] + gradient[name] for name in gradient}
        shrunk = decayed(point, 1 - rate * DECAY)
        point = {name: shrunk[name] - rate * velocity[name] for name in point}
        federation.round(round_index)
    np.testing.assert_allclose(federation.parameters(), to_flat(point), rtol=0, atol=TOLERANCE)
    assert np.abs(to_flat(point) - to_flat(start)).max() > 100 * TOLERANCE


DENSE_PAIRS: dict[str, dict[str, Any]] = {
    "mezo, one step": {**_MEZO, "train.local_update_steps": 1},
    "mezo, three steps": _MEZO,
    "mezo, epochs": {**_MEZO, "train.batch_or_epoch": "epoch"},
    "mezo, rates of their own": {**_MEZO, "train.train_strategy": "random", "fwdllm.strategy_span": 0.04},
    "forward": _FORWARD,
    "forward, momentum": {**_FORWARD, "fwdllm.server_momentum": BETA},
}


def dense_pairs() -> list[Any]:
    """Every case without decay and with it; with a classifier, and where vectors are in the way without."""
    pairs = []
    for case in DENSE_PAIRS:
        local_decay = case in ("mezo, three steps", "mezo, epochs")
        pairs.append(pytest.param(case, 0.0, False, id=f"{case}-classifier"))
        pairs.append(pytest.param(case, DECAY, False, id=f"{case}-decay-classifier"))
        if local_decay:
            pairs.append(pytest.param(case, DECAY, True, id=f"{case}-decay-language model"))
    return pairs


@pytest.mark.parametrize(("case", "weight_decay", "language_model"), dense_pairs())
def test_scalars_and_dense_vectors_lead_to_the_same_place(
    world: World, case: str, weight_decay: float, language_model: bool
) -> None:
    """The published systems send the vector; a scalar a probe stands for all of it."""
    settings = {**DENSE_PAIRS[case], "train.optimizer.weight_decay": weight_decay}
    scalars = Federation(world.config(settings, language_model=language_model))
    dense = Federation(world.config({**settings, "fwdllm.upload": "dense"}, language_model=language_model))
    start = scalars.parameters()
    for round_index in range(3):
        one, other = scalars.round(round_index), dense.round(round_index)
        assert one.rejected == other.rejected == {}
        assert (one.forward_passes, one.backward_passes) == (other.forward_passes, 0)
        np.testing.assert_allclose(dense.parameters(), scalars.parameters(), rtol=0, atol=TOLERANCE)
    assert np.abs(scalars.parameters() - start).max() > 50 * TOLERANCE


@pytest.mark.parametrize("method", SCALAR_METHODS)
def test_decay_folded_into_one_scalar_is_decay_at_every_step(world: World, method: str) -> None:
    """Slopes of zero leave decay alone: matrices shrink by the factor of every step, vectors keep their bits."""
    settings = {
        **METHODS[method], "train.optimizer.weight_decay": DECAY, "train.optimizer.lr": LEARNING_RATE,
        "llm.adapter.use": False, "llm.adapter.args": [{}],
    }  # fmt: skip
    federation = Federation(world.config(settings))
    start = [tensor.detach().clone() for tensor in federation.server.trainables.tensors]
    rounds = 3
    for round_index in range(rounds):
        federation.round(
            round_index, meddle=lambda updates: [replace(u, values=np.zeros_like(u.values)) for u in updates]
        )
    steps = rounds * (2 if method == "mezo" else 1)
    factor = decay_factor(LEARNING_RATE, DECAY) ** steps
    assert 0.1 < factor < 0.95
    names = federation.server.trainables.names
    for name, before, after in zip(names, start, federation.server.trainables.tensors, strict=True):
        if before.dim() > 1:
            torch.testing.assert_close(after.double(), before.double() * factor, rtol=1e-6, atol=0)
        else:
            assert torch.equal(after, before), name
    assert {tensor.dim() for tensor in start} >= {1, 2}


def test_a_schedule_reaches_client_and_server(world: World) -> None:
    settings = {**_MEZO, "train.scheduler.type": "cosine", "train.scheduler.warmup_ratio": 0.5,
                "federate.total_round_num": 4, "train.local_update_steps": 1}  # fmt: skip
    federation = Federation(world.config(settings))
    rates, lengths = [], []
    for round_index in range(4):
        before = federation.parameters()
        report = federation.round(round_index, meddle=lambda updates: [
            replace(update, values=np.ones_like(update.values)) for update in updates
        ])  # fmt: skip
        assert len(set(report.learning_rates.values())) == 1
        rates.append(report.learning_rates[1])
        lengths.append(float(np.linalg.norm(federation.parameters() - before)))
    np.testing.assert_allclose(rates, [0.025, 0.05, 0.05, 0.025])
    ratios = np.array(lengths) / np.array(rates)
    assert ratios.max() < 1.2 * ratios.min()


@pytest.mark.parametrize(("estimator", "passes"), [("central", 2 * 4), ("one_sided", 1 + 4), ("forward_mode", 1 + 4)])
def test_forward_passes_are_counted(world: World, estimator: str, passes: int) -> None:
    settings = {**_FORWARD, "fwdllm.estimator": estimator}
    if estimator == "forward_mode":
        settings["fwdllm.probes_per_batch"] = 4
    federation = Federation(world.config(settings))
    report = federation.round(0)
    assert (report.forward_passes, report.backward_passes) == (len(federation.clients) * passes, 0)


@pytest.mark.parametrize("estimator", ESTIMATORS.names())
@pytest.mark.parametrize("method", SCALAR_METHODS)
def test_it_learns(world: World, method: str, estimator: str) -> None:
    """Every forward-only method with every estimator lowers the loss of data that can be learned."""
    settings = {
        **METHODS[method], "fwdllm.estimator": estimator, "federate.client_num": 2, "dataloader.batch_size": 20,
        "fwdllm.probes": 4, "llm.adapter.args": [{"adapter_method": "head"}], "train.optimizer.lr": 1.0,
    }  # fmt: skip
    federation = Federation(world.config(settings))
    losses = [federation.round(round_index).train_loss for round_index in range(20)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02


def test_server_momentum_with_mezo_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=r"fwdllm.server_momentum 0.9.*federate.method: fedfwd"):
        Federation(world.config({**_MEZO, "fwdllm.server_momentum": 0.9}))


@pytest.mark.parametrize(
    ("method", "trainer", "name"),
    [
        ("FedAvg", "mezotrainer", "mezo"), ("fedmezo", "", "mezo"), ("FedMeZO", "MeZOTrainer", "mezo"),
        ("fedfwd", "fwdtrainer", "forward_gradient"), ("FedAvg", "fwdtrainer", "forward_gradient"),
    ],
)  # fmt: skip
def test_every_spelling_of_a_method_is_that_method(world: World, method: str, trainer: str, name: str) -> None:
    settings = {"fwdllm.probes": 2, "train.local_update_steps": 2}
    one = Federation(world.config({**settings, **METHODS[name], "federate.method": method, "trainer.type": trainer}))
    other = Federation(world.config({**settings, **METHODS[name]}))
    one.round(0)
    other.round(0)
    assert one.server.digest == other.server.digest


def test_the_clients_own_model_is_opened_once(world: World) -> None:
    """One base model however many clients are simulated: worker, evaluation and saving share the session's."""
    federation = Federation(world.config(_MEZO))
    session: Session = federation.session
    worker = federation.worker(1)
    assert worker.objective.model is session.loaded.model is federation.worker(4).objective.model
    assert federation.server.trainables is not worker.trainables
