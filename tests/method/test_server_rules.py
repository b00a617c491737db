"""Whom the server believes: one bad answer costs that answer, never the round, never the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from benchmarks.rewriting import rewritten
from fs_fwdllm.config.methods import METHODS as FACTS
from fs_fwdllm.core.wire import ClientUpdate, DenseUpdate, ScalarUpdate
from fs_fwdllm.errors import DataError, TrainingStalledError
from fs_fwdllm.method import RoundReport
from tests.host.small import METHODS, Federation, World

LIAR = 2
LARGEST = float(np.finfo(np.float32).max)


#: How a client's answer is spoilt; the federation knows how it is written.
Change = Callable[[Federation, ClientUpdate], ClientUpdate]


def with_value(value: float) -> Change:
    def spoil(values: np.ndarray) -> np.ndarray:
        values[len(values) // 2] = value
        return values

    return lambda federation, update: rewritten(federation.server, update, spoil)


def other_kind(_: Federation, update: ClientUpdate) -> ClientUpdate:
    kind = DenseUpdate if isinstance(update, ScalarUpdate) else ScalarUpdate
    return kind(**{field.name: getattr(update, field.name) for field in fields(kind)})


#: ``{what the client did: (how, the reason the server gives)}``
LIES: dict[str, tuple[Change, str]] = {
    "answers an earlier round": (lambda _, u: replace(u, round_index=u.round_index - 1), "other_round"),
    "answers a later round": (lambda _, u: replace(u, round_index=u.round_index + 1), "other_round"),
    "starts from other parameters": (lambda _, u: replace(u, digest=bytes(16)), "other_digest"),
    "sends another kind": (other_kind, "other_kind"),
    "sends too few values": (lambda _, u: replace(u, values=u.values[:-1]), "wrong_length"),
    "sends too many values": (lambda _, u: replace(u, values=np.append(u.values, u.values[:1])), "wrong_length"),
    "sends no value": (lambda _, u: replace(u, values=u.values[:0]), "wrong_length"),
    "saw no sample": (lambda _, u: replace(u, samples=0), "no_samples"),
    "sends NaN": (with_value(math.nan), "not_finite"),
    "sends infinity": (with_value(math.inf), "not_finite"),
    "sends minus infinity": (with_value(-math.inf), "not_finite"),
    "reports a NaN loss": (lambda _, u: replace(u, loss=math.nan), "not_finite"),
    "reports an infinite loss": (lambda _, u: replace(u, loss=math.inf), "not_finite"),
}
every_method = pytest.mark.parametrize("method", METHODS)


def reason_for(method: str, reason: str) -> str:
    """How the method's server puts it: how many bytes a block's delta has depends on how it is written."""
    return "malformed" if FACTS[method].trains_blocks and reason == "wrong_length" else reason


def without(updates: list[ClientUpdate], client: int) -> list[ClientUpdate]:
    return [update for update in updates if update.client != client]


def opened(world: World, method: str, **settings: Any) -> Federation:
    """A federation in its second round."""
    federation = Federation(world.config({**METHODS[method], **settings}))
    federation.round(0)
    return federation


@pytest.mark.parametrize("lie", LIES)
@every_method
def test_a_bad_answer_is_left_out_and_the_round_goes_on(world: World, method: str, lie: str) -> None:
    change, reason = LIES[lie]
    lied_to, honest = opened(world, method), opened(world, method)
    report = lied_to.round(
        1, meddle=lambda updates: [change(lied_to, update) if update.client == LIAR else update for update in updates]
    )
    expected = honest.round(1, meddle=lambda updates: without(updates, LIAR))
    assert report.rejected == {LIAR: reason_for(method, reason)}
    assert expected.rejected == {LIAR: "no_answer"}
    assert lied_to.server.digest == honest.server.digest == report.digest
    assert replace(report, rejected={}) == replace(expected, rejected={})
    assert LIAR not in report.losses and LIAR not in report.learning_rates
    assert lied_to.server.failed_rounds == 0


@every_method
def test_an_answer_nobody_asked_for_is_left_out(world: World, method: str) -> None:
    uninvited, honest, elsewhere = (opened(world, method) for _ in range(3))
    extra = elsewhere.answers(1, [4])
    stranger = replace(extra[0], client=77)
    report = uninvited.round(1, [1, 2, 3], meddle=lambda updates: [*extra, *updates, stranger])
    expected = honest.round(1, [1, 2, 3])
    assert report.rejected == {4: "not_assigned", 77: "not_assigned"}
    assert replace(report, rejected={}) == expected
    assert uninvited.server.digest == honest.server.digest


@every_method
def test_the_first_answer_counts(world: World, method: str) -> None:
    twice, once = opened(world, method), opened(world, method)

    def repeat(updates: list[ClientUpdate]) -> list[ClientUpdate]:
        again = [replace(update, values=update.values * 2) for update in updates if update.client == LIAR]
        return [*updates, *again, *again]

    report, expected = twice.round(1, meddle=repeat), once.round(1)
    assert report.rejected == {LIAR: "duplicate"}
    assert replace(report, rejected={}) == expected
    assert twice.server.digest == once.server.digest


@every_method
def test_a_late_answer_does_not_shut_out_the_right_one(world: World, method: str) -> None:
    """What a slow client sent for the last round arrives first; its answer for this round follows."""
    slow, prompt = opened(world, method), opened(world, method)
    late = slow.answers(1, [LIAR])
    slow.server.absorb([])
    prompt.answers(1, [LIAR])
    prompt.server.absorb([])
    report, expected = slow.round(2, meddle=lambda updates: [*late, *updates]), prompt.round(2)
    assert report.rejected == {LIAR: "other_round"}
    assert LIAR in report.losses
    assert slow.server.digest == prompt.server.digest
    assert replace(report, rejected={}) == expected


@every_method
def test_clients_that_do_not_answer_are_named(world: World, method: str) -> None:
    federation = opened(world, method)
    report = federation.round(1, meddle=lambda updates: updates[:1])
    assert report.rejected == {2: "no_answer", 3: "no_answer", 4: "no_answer"}
    assert set(report.losses) == {1}


@every_method
def test_a_round_of_liars_changes_nothing_and_training_stops_in_time(world: World, method: str) -> None:
    federation = opened(world, method, **{"fwdllm.max_failed_rounds": 3})
    before, state = federation.server.digest, federation.server.state_tensors()
    spoil = with_value(math.nan)

    def all_bad(updates: list[ClientUpdate]) -> list[ClientUpdate]:
        return [spoil(federation, update) for update in updates]

    for round_index in (1, 2):
        report = federation.round(round_index, meddle=all_bad)
        assert report.rejected == dict.fromkeys(federation.clients, "not_finite")
        assert report.digest == federation.server.digest == before
        assert math.isnan(report.train_loss) and report.forward_passes == 0
    with pytest.raises(TrainingStalledError) as stopped:
        federation.round(3, meddle=all_bad)
    for fragment in ("round 3", "3 rounds in a row", "not_finite", "train.optimizer.lr", "fwdllm.radius",
                     "fwdllm.max_failed_rounds"):  # fmt: skip
        assert fragment in str(stopped.value)
    after = federation.server.state_tensors()
    assert after.keys() == state.keys()
    assert all(after[name].equal(value) for name, value in state.items())
    federation.server.note_parameters_changed()  # so that the digest is taken anew
    assert federation.server.digest == before


@every_method
def test_one_good_answer_ends_the_count_of_failed_rounds(world: World, method: str) -> None:
    federation = opened(world, method, **{"fwdllm.max_failed_rounds": 2})
    for round_index in range(1, 7):
        failing = round_index % 2 == 0
        federation.round(round_index, meddle=lambda updates, failing=failing: [] if failing else updates[:1])
    with pytest.raises(TrainingStalledError, match="no_answer"):
        federation.round(7, meddle=lambda updates: [])


@every_method
def test_nothing_a_client_reports_can_break_the_server(world: World, method: str) -> None:
    """Finite but absurd: losses and weights whose sums and products leave the range of numbers."""
    absurd = [
        {1: {"loss": 1e308}, 2: {"loss": 1e308}},
        {1: {"loss": 1e308, "samples": 2**62}, 2: {"loss": -1e308, "samples": 2**62}},
        {1: {"forward_passes": 2**62, "backward_passes": 2**62}},
    ]
    federation = Federation(world.config(METHODS[method]))
    for round_index, changes in enumerate(absurd):
        report: RoundReport = federation.round(
            round_index,
            meddle=lambda updates, changes=changes: [
                replace(update, **changes.get(update.client, {})) for update in updates
            ],
        )
        assert report.rejected == {}
        assert np.isfinite(federation.parameters()).all()


@pytest.mark.filterwarnings("ignore:overflow encountered")
@every_method
def test_a_step_out_of_the_range_of_numbers_stops_training(world: World, method: str) -> None:
    """Every value is finite, their sum is not: no further round, and no checkpoint, is built on the result."""
    federation = opened(world, method, **{"train.optimizer.lr": 100.0, "train.optimizer.type": "SGD"})
    with pytest.raises(TrainingStalledError, match=r"round [12]: .*train.optimizer.lr.*"):
        for round_index in (1, 2):
            federation.round(round_index, meddle=lambda updates: [far_away(federation, update) for update in updates])


def far_away(federation: Federation, update: ClientUpdate) -> ClientUpdate:
    """The answer of a client that went as far as numbers go, whatever it measured where the last one led."""
    return replace(rewritten(federation.server, update, lambda values: np.full_like(values, LARGEST)), loss=1.0)


def test_work_without_samples_is_an_error_of_the_caller(world: World) -> None:
    federation = Federation(world.config(METHODS["mezo"]))
    (assignment,) = federation.server.assign(0, [1]).values()
    with pytest.raises(DataError, match="client 1 was given work but holds no training sample"):
        federation.worker(1).work(assignment, [])
