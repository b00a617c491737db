"""Clients that come back, evaluate or fail: the server knows what they hold, and sends what they lack."""

from __future__ import annotations

import pytest
import torch

from fs_fwdllm.core.wire import Assignment, decode, encode
from fs_fwdllm.errors import TrainingStalledError
from fs_fwdllm.method.cybgd.records import BlockValues
from tests.host.small import Federation, World
from tests.method.cybgd.settings import blocks
from tests.method.cybgd.test_visits import opened, play


def brought_back(federation: Federation, client: int) -> None:
    """``client`` says what it holds, as it does when it joins again."""
    federation.server.note_holds(client, federation.worker(client).replica.digest)


RETURNING = {
    "exact": blocks(schedule="ascending"),
    "bfloat16 model": {**blocks(schedule="ascending"), "fwdllm.base.compute_dtype": "bfloat16"},
    "quantised": blocks(schedule="ascending", download_inactive="int8"),
    "state on the server": blocks(schedule="fixed", optimizer_state="server"),
}


@pytest.mark.parametrize("evaluates", [False, True], ids=["", "after an evaluation"])
@pytest.mark.parametrize("case", RETURNING)
def test_a_client_that_was_started_anew_is_sent_its_visit_again(world: World, case: str, evaluates: bool) -> None:
    """Clients 1, 2, 3 visit, 4 is restarted after it was given work: its answer to the new frame is taken."""
    federation = Federation(world.config(RETURNING[case]), separate_workers=True)
    for round_index in range(3):
        play(federation, round_index)
    if evaluates:
        evaluate_at(federation, 4)
        brought_back(federation, 4)
    (given,) = opened(federation, 3).values()
    federation.worker(4).work(given, federation.session.data.clients[4].train)
    federation.restart(4)
    brought_back(federation, 4)
    again = federation.server.reassign(4)
    assert (again.learning_rate, again.batch_index) == (given.learning_rate, given.batch_index)
    report = federation.server.absorb([federation.work(again)])
    assert report.rejected == {}


def evaluate_at(federation: Federation, client: int) -> int:
    """Bring a client up to date without work; the bytes it took."""
    frame = encode(federation.server.current_state_for(client))
    assignment = decode(frame)
    assert isinstance(assignment, Assignment)
    federation.worker(client).replica.follow(assignment.catch_up, assignment.digest)
    return len(frame)


def test_an_evaluation_by_clients_sends_each_block_once(world: World) -> None:
    federation = Federation(world.config(blocks(schedule="ascending", zstandard=False)), separate_workers=True)
    play(federation, 0)
    first = evaluate_at(federation, 3)
    assert first > 4 * federation.server.store.count(0)
    assert evaluate_at(federation, 3) == first, "what is not confirmed is sent again"
    brought_back(federation, 3)
    assert evaluate_at(federation, 3) < 500
    play(federation, 1)
    assert evaluate_at(federation, 3) < first + 500, "only what has changed since"
    assert federation.worker(3).replica.digest == federation.server.digest
    brought_back(federation, 3)
    (assignment,) = opened(federation, 2).values()
    assert assignment.client == 3 and not assignment.catch_up
    assert federation.server.absorb([federation.work(assignment)]).rejected == {}


@pytest.mark.parametrize("case", ["exact", "quantised"])
def test_a_client_ahead_of_a_server_that_went_back_is_sent_everything(world: World, case: str) -> None:
    config = world.config(RETURNING[case])
    federation, earlier = Federation(config, separate_workers=True), Federation(config)
    for round_index in range(5):
        play(federation, round_index)
    worker, server = federation.worker(1), earlier.server
    server.note_holds(1, worker.replica.digest)
    (assignment,) = opened(earlier, 0).values()
    kinds = [record.block for record in map(decode, assignment.catch_up) if isinstance(record, BlockValues)]
    assert kinds == list(range(len(server.plan.parts)))
    update = worker.work(assignment, earlier.session.data.clients[1].train)
    assert server.absorb([update]).rejected == {}


def test_a_failed_visit_leaves_the_base_model_s_block_exact(world: World) -> None:
    """Also where inactive blocks are quantised: the next visit to the unchanged block starts from what is there."""
    federation = Federation(world.config({**RETURNING["quantised"], "federate.client_num": 1}))
    assert play(federation, 0, lambda updates: []).rejected == {1: "no_answer"}
    assert play(federation, 1).rejected == {}


@pytest.mark.parametrize("upload", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_loss_is_not_finite_is_refused_until_training_stops(
    world: World, upload: str, value: float
) -> None:
    """A client whose model is broken: real losses and gradients, not a made-up message."""
    federation = Federation(world.config(blocks(upload=upload)))
    before = federation.server.digest
    (embeddings,) = [p for name, p in federation.session.parts.model.named_parameters() if "word_embeddings" in name]
    sound = embeddings.detach().clone()
    with torch.no_grad():
        embeddings.fill_(value)  # frozen: no digest looks at it
    for round_index in range(2):
        report = play(federation, round_index)
        assert set(report.rejected.values()) == {"not_finite"} and report.digest == before
    with pytest.raises(TrainingStalledError, match="not_finite"):
        play(federation, 2)
    assert federation.server.digest == before
    with torch.no_grad():
        embeddings.copy_(sound)
    federation.server.failed_rounds = 0
    for round_index in range(3, 8):  # everybody, also those that met the broken model
        assert play(federation, round_index).rejected == {}, "what was not finite is not kept, error feedback included"
