"""One client that sends large numbers, or says that it has seen many samples, is one client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.rewriting import rewritten
from fs_fwdllm.core.wire import ClientUpdate
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.running.local import run
from tests.host.small import METHODS, PLAIN_MEAN, SCALAR_METHODS, Federation, World, read_jsonl

LIAR = 2
every_method = pytest.mark.parametrize("method", METHODS)


def times(federation: Federation, factor: float) -> Callable[[list[ClientUpdate]], list[ClientUpdate]]:
    """The liar's update is multiplied by ``factor``, as far as float32 goes."""

    def spoil(values: np.ndarray) -> np.ndarray:
        largest = np.finfo(np.float32).max
        return np.clip(values.astype(np.float64) * factor, -largest, largest).astype(np.float32)

    return lambda updates: [
        rewritten(federation.server, update, spoil) if update.client == LIAR else update for update in updates
    ]


def moved(world: World, method: str, factor: float, **settings: Any) -> tuple[float, dict[int, float]]:
    """How far a round moves the server, and who was clipped by how much."""
    federation = Federation(world.config({**METHODS[method], **settings}))
    start = federation.parameters()
    report = federation.round(0, meddle=times(federation, factor))
    return float(np.linalg.norm(federation.parameters() - start)), report.clipped


@every_method
@pytest.mark.parametrize("factor", [-1e3, 1e30])
def test_a_large_update_moves_the_server_no_farther_than_an_honest_round(
    world: World, method: str, factor: float
) -> None:
    honest, _ = moved(world, method, 1.0, **PLAIN_MEAN)
    lied_to, clipped = moved(world, method, factor)
    assert lied_to <= 5 * honest  # which is a mean of four that do not agree
    assert clipped[LIAR] < 0.01
    believed, _ = moved(world, method, factor, **PLAIN_MEAN)
    assert believed > 50 * honest


@every_method
def test_how_large_a_lie_is_makes_no_difference(world: World, method: str) -> None:
    one, other = (Federation(world.config(METHODS[method])) for _ in range(2))
    one.round(0, meddle=times(one, -1e3))
    other.round(0, meddle=times(other, -1e4))
    np.testing.assert_allclose(one.parameters(), other.parameters(), rtol=1e-5, atol=1e-7)


@every_method
def test_who_reports_a_world_of_samples_counts_as_its_steps_can_hold(world: World, method: str) -> None:
    lied_to, honest = (Federation(world.config(METHODS[method])) for _ in range(2))
    most = honest.server.settings.plans[LIAR].samples

    def claim(samples: int) -> Callable[[list[ClientUpdate]], list[ClientUpdate]]:
        return lambda updates: [replace(u, samples=samples) if u.client == LIAR else u for u in updates]

    report, expected = lied_to.round(0, meddle=claim(1 << 62)), honest.round(0, meddle=claim(most))
    assert most == honest.config.train.local_update_steps * honest.config.dataloader.batch_size
    assert lied_to.server.digest == honest.server.digest
    assert report.capped == {LIAR: 1 << 62} and expected.capped == {}
    assert replace(report, capped={}) == expected


def test_a_size_that_the_client_told_itself_is_held_against_the_others(world: World) -> None:
    """With epochs, what a client's steps can hold follows from the size that it tells."""
    settings = {**METHODS["fedavg"], "train.batch_or_epoch": "epoch"}
    federation = Federation(world.config(settings))
    plans = federation.server.settings.plans
    plans[LIAR] = replace(plans[LIAR], samples=1 << 40)
    updates = federation.answers(0)
    usual = sorted(update.samples for update in updates)[1]
    report = federation.server.absorb([replace(u, samples=1 << 40) if u.client == LIAR else u for u in updates])
    shares = {update.client: update.samples for update in updates} | {LIAR: 10 * usual}
    losses = {update.client: update.loss for update in updates}
    mean = sum(shares[client] * losses[client] for client in shares) / sum(shares.values())
    assert report.capped == {LIAR: 1 << 40} and report.train_loss == pytest.approx(mean)


@pytest.mark.parametrize("visits", [1, 6])
def test_a_single_visitor_is_held_against_earlier_visits_and_what_its_optimiser_can_do(
    world: World, visits: int
) -> None:
    one_visit = {"fwdllm.blocks.parallel_blocks": 1, "fwdllm.blocks.clients_per_block": 1}
    federation = Federation(world.config({**METHODS["cybgd"], **one_visit}))
    usual = 0.0
    for round_index in range(visits):
        start = federation.parameters()
        lies = round_index == visits - 1
        honest = federation.answers(round_index)
        spoil = (lambda values: np.clip(values * np.float32(-1e6), -1e30, 1e30)) if lies else np.copy
        report = federation.server.absorb([rewritten(federation.server, update, spoil) for update in honest])
        step = float(np.abs(federation.parameters() - start).max())
        usual = usual if lies else max(usual, step)
    assert min(report.clipped.values()) < 1e-4
    rate, steps = federation.config.train.optimizer.lr, federation.config.train.local_update_steps
    # By no more than what is usual, as a root mean square; and in no case by more than Adam can.
    assert step < (5 * usual if visits > 1 else 20 * rate * steps)


def test_a_resumed_server_remembers_what_is_usual(world: World) -> None:
    one_visit = {"fwdllm.blocks.parallel_blocks": 1, "fwdllm.blocks.clients_per_block": 1}
    config = world.config({**METHODS["cybgd"], **one_visit})
    straight = Federation(config)
    for round_index in range(4):
        straight.round(round_index)
    resumed = Federation(config)
    resumed.server.load_state(straight.server.state_tensors(), straight.server.state_numbers())
    assert resumed.server.belief.lengths.state() == straight.server.belief.lengths.state() != []


def test_a_round_says_who_was_shortened_and_a_lie_is_told_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from fs_fwdllm.method.probing import ProbingWorker

    honest = ProbingWorker.answer

    def lying(self: ProbingWorker, assignment: Any, *arguments: Any) -> ClientUpdate:
        update = honest(self, assignment, *arguments)
        if assignment.client != LIAR:
            return update
        return replace(update, values=update.values * np.float32(1e6), loss=1e30, samples=1 << 50)

    monkeypatch.setattr(ProbingWorker, "answer", lying)
    folder = run(world.config({**METHODS["forward_gradient"], "federate.total_round_num": 3}))
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "clipped" in line]
    assert len(lines) == 3
    assert all(line["clipped"][str(LIAR)] < 1e-4 and line["capped"] == {str(LIAR): 1 << 50} for line in lines)
    log = (folder / "console.log").read_text(encoding="utf-8")
    assert log.count(f"client {LIAR}'s update was ") == 1
    assert "diverges" not in log and "exploded" not in log
    assert (folder / "checkpoint" / "state.safetensors").is_file()


VOTES = {"fwdllm.directions": "common", "federate.client_num": 5, **PLAIN_MEAN}


@pytest.mark.parametrize("statistic", ["median", "trimmed", "krum"])
@pytest.mark.parametrize("method", SCALAR_METHODS)
def test_clients_with_the_same_directions_outvote_a_liar(world: World, method: str, statistic: str) -> None:
    vote = VOTES | {"fwdllm.robust.statistic": statistic}
    honest, _ = moved(world, method, 1.0, **VOTES)
    lied_to, _ = moved(world, method, -1e6, **vote)
    believed, _ = moved(world, method, -1e6, **VOTES)
    assert lied_to <= 5 * honest < 1000 * honest < believed


@pytest.mark.parametrize("method", SCALAR_METHODS)
def test_who_is_outvoted_is_named_and_replicas_follow(world: World, method: str) -> None:
    settings = METHODS[method] | VOTES | {"fwdllm.robust.statistic": "krum"}
    federation = Federation(world.config(settings), separate_workers=True)
    report = federation.round(0, meddle=times(federation, -1e6))
    assert report.outvoted == [LIAR]
    federation.round(1)
    assignment = federation.server.assign(2, federation.clients)[1]
    replica = federation.worker(1).replica
    replica.follow(assignment.catch_up, assignment.digest)
    assert replica.digest == federation.server.digest


@pytest.mark.parametrize("statistic", ["median", "trimmed", "krum"])
@pytest.mark.parametrize(
    ("method", "own", "words"),
    [
        ("forward_gradient", {"fwdllm.directions": "own"}, "fwdllm.directions 'own'"),
        ("mezo", {"train.batch_or_epoch": "epoch"}, "train.batch_or_epoch 'epoch'"),
        ("fedavg", {"fwdllm.directions": "own"}, "sends no slopes"),
        ("cybgd", {"fwdllm.directions": "own"}, "sends no slopes"),
    ],
)
def test_a_vote_needs_the_same_questions(
    world: World, method: str, own: dict[str, Any], words: str, statistic: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Federation(world.config(METHODS[method] | VOTES | own | {"fwdllm.robust.statistic": statistic}))
    assert words in str(caught.value)
