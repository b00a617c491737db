"""A first rate without a sweep: resolved once, told, safe, and refused where nothing is known."""

from __future__ import annotations

from typing import Any

import pytest

from fs_fwdllm.core.safe_rate import curvature_of_standardised, safe_rate
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.running.local import resume, run
from fs_fwdllm.running.session import Session
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl
from tests.model.sentence import save_tiny_encoder
from tests.model.tiny import HIDDEN

__all__ = ["models", "world"]


def settings(world: World, **own: Any) -> dict[str, Any]:
    folder = world.models / "encoder"
    if not folder.exists():
        save_tiny_encoder(folder)
    return {
        "federate.method": "fedfwd", "model.type": f"{folder}@transformers", "train.optimizer.lr": 0.1,
        "llm.adapter.args": [{"adapter_method": "head"}], "fwdllm.estimator": "closed_form", "fwdllm.probes": 20,
        "fwdllm.first_rate": "safe", **{f"fwdllm.{key}": value for key, value in own.items()},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "clients", "scalars", "momentum"),
    [
        ({}, 4, 20, 0.0),
        ({"fwdllm.server_momentum": 0.9}, 4, 20, 0.9),
        ({"federate.sample_client_num": 2}, 2, 20, 0.0),
        ({"fwdllm.directions": "common"}, 1, 20, 0.0),
        ({"fwdllm.fleet": [{"clients": 1, "scalars": 5}]}, 4, 5, 0.0),
        ({"federate.method": "fedmezo"}, 1, 20, 0.0),
        ({"federate.method": "FedSGD"}, 4, 0, 0.0),
    ],
)
def test_the_rate_is_the_bounds(
    world: World, changes: dict[str, Any], clients: int, scalars: int, momentum: float
) -> None:
    session = Session.open(world.config({**settings(world), **changes}))
    curvature = curvature_of_standardised(HIDDEN, 3, at_start=True)
    expected = safe_rate(curvature, clients=clients, scalars=scalars, momentum=momentum)
    assert session.config.train.optimizer.lr == pytest.approx(expected)
    assert any("fwdllm.first_rate: safe" in remark and f"{expected:.3g}" in remark for remark in session.remarks())


def test_a_run_learns_at_it_and_goes_on_at_it(world: World) -> None:
    """Every client's whole data in every step, so that what falls is the loss that the bound is about."""
    config = world.config({**settings(world), "federate.total_round_num": 6, "dataloader.batch_size": 64})
    folder = run(config)
    lines = read_jsonl(folder / "metrics.jsonl")
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert losses[-1] < losses[0]
    rates = {rate for line in lines for rate in line.get("learning_rate", {}).values()}
    resume(folder, rounds=8)
    more = [line for line in read_jsonl(folder / "metrics.jsonl") if line.get("learning_rate")]
    assert len(more) == 8 and {rate for line in more for rate in line["learning_rate"].values()} == rates


def test_it_is_refused_where_a_rate_is_given_or_nothing_is_known(world: World) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer\.lr 0\.3.*finds the rate itself"):
        Session.open(world.config({**settings(world), "train.optimizer.lr": 0.3}))
    for changes in ({"fwdllm.pooling": "none"}, {"fwdllm.feature_scale": "none"}):
        with pytest.raises(ConfigError, match=r"first_rate 'safe'.*feature_scale layer_norm.*sweep"):
            Session.open(world.config({**settings(world), **changes}))


CARRIED = {"federate.method": "fedfwd", "fwdllm.probes": 4, "train.optimizer.lr": 0.5}


def carried(world: World, known: int, **own: Any) -> tuple[Session, float]:
    """A session whose rate of 0.5 was found with ``known`` trainables, and the rate that it takes."""
    settings = {**CARRIED, "fwdllm.rate_for_trainables": known, **own}
    session = Session.open(world.config(settings))
    return session, session.config.train.optimizer.lr


@pytest.mark.parametrize(
    ("own", "slopes"),
    [
        ({}, 4 * 4),
        ({"federate.sample_client_num": 2}, 2 * 4),
        ({"fwdllm.directions": "common", "fwdllm.estimator": "projected"}, 4),
        ({"federate.method": "fedmezo"}, 4),
        ({"fwdllm.fleet": [{"clients": [1], "slopes": "central", "probes": 2}]}, 4 * 2),
    ],
    ids=["pooled", "two a round", "in common", "local steps", "a fleet"],
)
def test_a_rate_is_divided_by_what_the_estimate_has_grown(world: World, own: dict[str, Any], slopes: int) -> None:
    session, rate = carried(world, 50, **own)
    count = session.parts.trainables.count
    assert count > 50
    assert rate == pytest.approx(0.5 * (1 + 49 / slopes) / (1 + (count - 1) / slopes))
    told = [remark for remark in session.remarks() if "fwdllm.rate_for_trainables" in remark]
    assert len(told) == 1 and f"{rate:.3g}" in told[0] and "0.5" in told[0]


def test_a_rate_is_never_raised_nor_lowered_without_need(world: World) -> None:
    count = carried(world, 0)[0].parts.trainables.count
    for known in (0, count, count + 1, 100 * count):
        session, rate = carried(world, known)
        assert rate == 0.5 and not any("trainables (fwdllm" in remark for remark in session.remarks())


def test_a_run_at_a_carried_rate_goes_on_at_it(world: World) -> None:
    folder = run(world.config({**CARRIED, "fwdllm.rate_for_trainables": 50, "federate.total_round_num": 2}))
    resume(folder, rounds=3)
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if line.get("learning_rate")]
    assert len(lines) == 3 and len({rate for line in lines for rate in line["learning_rate"].values()}) == 1


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"federate.method": "FedAvg"}, "clients of this method send no slopes"),
        ({"fwdllm.first_rate": "safe", "train.optimizer.lr": 0.1}, "finds the rate itself"),
        ({"fwdllm.parts": [{"match": "*", "slopes": "central", "probes": 4}]}, "a rate of its own"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(world: World, own: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"fwdllm\.rate_for_trainables 50: .*{reason}.*leave it out"):
        carried(world, 50, **own)
