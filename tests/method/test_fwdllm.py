"""FwdLLM in a small federation: what rounds, pools, steps and reports do, and what happens when clients fail."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fs_fwdllm.core.direction import DirectionKey
from fs_fwdllm.core.wire import RoundUpdate, decode, encode
from fs_fwdllm.errors import ConfigError, TrainingStalledError
from fs_fwdllm.method.forward.client import LookingWorker
from fs_fwdllm.method.forward.server import PooledServer
from fs_fwdllm.method.replica import seeds_of
from fs_fwdllm.running.session import Session
from tests.host.small import Federation, World

_BASE = {"federate.method": "fwdllm", "fwdllm.probes": 4, "federate.total_round_num": 12}
#: Nothing is ever quiet enough: every step takes all the repeats it may.
_NEVER = {**_BASE, "fwdllm.gate.kind": "relative", "fwdllm.gate.threshold": 1e-9, "fwdllm.gate.max_repeats": 2}


def opened(world: World, settings: dict[str, Any], **more: Any) -> tuple[Federation, PooledServer]:
    federation = Federation(world.config({**settings, **more}))
    assert isinstance(federation.server, PooledServer)
    return federation, federation.server


def test_the_method_is_forward_gradients_by_another_name(world: World) -> None:
    for spelling in ({"federate.method": "fwdllm"}, {"federate.method": "FwdLLM", "trainer.type": "fwdtrainer"}):
        assert world.config(spelling).method.name == "forward_gradient"


def test_a_gate_of_one_exchange_changes_nothing(world: World) -> None:
    """Whatever passes at once is the plain method, bit for bit."""
    plain, _ = opened(world, _BASE)
    gated, _ = opened(world, _BASE, **{"fwdllm.gate.kind": "published", "fwdllm.gate.threshold": 1e9})
    for round_index in range(3):
        one, other = plain.round(round_index), gated.round(round_index)
        assert other.digest == one.digest
        assert not one.columns
        assert other.columns["gate"] == "accepted"


def test_waiting_rounds_move_nothing_and_ask_the_same_clients_for_the_same_batches(world: World) -> None:
    federation, server = opened(world, _NEVER)
    start, asked = server.digest, []
    for round_index in range(6):
        first = round_index // 3 * 3
        assert server.sampling_index_for(round_index) == first
        assigned = server.assign(round_index, federation.clients)
        assert {work.batch_index for work in assigned.values()} == {first}
        updates = [federation.work(work) for work in assigned.values()]
        asked.append(np.concatenate([update.values for update in updates]))
        before = server.digest
        columns = server.absorb(updates).columns
        assert columns["repeats"] == round_index % 3
        assert columns["pooled_probes"] == 16 * (round_index % 3 + 1)
        assert columns["gate"] == ("limit" if round_index % 3 == 2 else "waiting")
        assert (server.digest == before) == (columns["gate"] == "waiting")
        assert columns["server_step"] == (round_index + 1) // 3
    assert server.digest != start
    assert not np.array_equal(asked[0], asked[1]), "directions are fresh"


def test_the_last_round_steps_on_what_there_is(world: World) -> None:
    federation, _ = opened(world, _NEVER, **{"federate.total_round_num": 2})
    waiting, last = federation.round(0), federation.round(1)
    assert waiting.columns["gate"] == "waiting"
    assert last.columns["gate"] == "end" and last.digest != waiting.digest


def test_even_where_nobody_answers_in_it(world: World) -> None:
    federation, _ = opened(world, _NEVER, **{"federate.total_round_num": 2})
    waiting = federation.round(0)
    last = federation.round(1, meddle=lambda updates: [])
    assert last.columns["gate"] == "end" and last.columns["pooled_probes"] == 16
    assert last.digest != waiting.digest


def test_a_step_over_several_rounds_is_the_step_on_their_mean(world: World) -> None:
    """Same parameters, same mini-batches: pooling two rounds averages what each would have estimated."""
    federation, server = opened(world, {**_NEVER, "fwdllm.gate.max_repeats": 1, "train.optimizer.lr": 0.05})
    start = federation.parameters().astype(np.float64)
    answers = [federation.answers(0), None]
    server.absorb(answers[0] or [])
    answers[1] = federation.answers(1)
    server.absorb(answers[1])
    moved = federation.parameters().astype(np.float64) - start

    single, other = opened(world, {**_BASE, "train.optimizer.lr": 0.05})
    moves = []
    for round_index, updates in enumerate(answers):
        other.load_state(opened(world, _BASE)[1].state_tensors(), opened(world, _BASE)[1].state_numbers())
        single.server.assign(round_index, single.clients)
        other.absorb(updates or [])
        moves.append(single.parameters().astype(np.float64) - start)
    # The parameters' own rounding, 2^-24 of about one, on either side.
    np.testing.assert_allclose(moved, np.mean(moves, axis=0), rtol=0, atol=4e-7)


def test_a_client_missing_on_a_repeat_is_named_and_its_first_answer_counts(world: World) -> None:
    federation, server = opened(world, _NEVER)
    federation.round(0)
    report = federation.round(1, meddle=lambda updates: [update for update in updates if update.client != 3])
    assert report.rejected == {3: "no_answer"}
    assert report.columns["pooled_probes"] == 28
    assert set(server.pooled.pool.client_weights()) == set(federation.clients)
    final = federation.round(2)
    assert final.columns["gate"] == "limit"


def test_nan_on_a_repeat_stays_out_of_the_pool(world: World) -> None:
    federation, server = opened(world, _NEVER)
    federation.round(0)

    def spoil(updates: list[Any]) -> list[Any]:
        return [replace(u, values=u.values * math.nan) if u.client == 2 else u for u in updates]

    assert federation.round(1, meddle=spoil).rejected == {2: "not_finite"}
    assert all(np.isfinite(entry.slopes).all() for entry in server.pooled.pool.entries)
    assert server.pooled.pool.directions == 28


def test_a_pool_survives_rounds_without_an_answer_until_there_are_too_many(world: World) -> None:
    federation, server = opened(world, _NEVER, **{"fwdllm.max_failed_rounds": 2})
    federation.round(0)
    silent = federation.round(1, meddle=lambda updates: [])
    assert silent.columns["gate"] == "waiting" and silent.columns["repeats"] == 0
    assert server.sampling_index_for(2) == 0
    federation.round(2)
    federation.round(3, meddle=lambda updates: [])
    with pytest.raises(TrainingStalledError, match=r"fwdllm\.max_failed_rounds"):
        federation.round(4, meddle=lambda updates: [])


def test_an_empty_pool_asks_the_next_sample(world: World) -> None:
    """A first round without an answer leaves nothing that would bind the next one to its clients."""
    federation, server = opened(world, _NEVER)
    federation.round(0, meddle=lambda updates: [])
    assert server.sampling_index_for(1) == 1


def test_a_pool_holds_scalars_only(world: World) -> None:
    """A thousand clients, three repeats: 4 bytes a probe, and the numbers that name it."""
    federation, server = opened(world, _NEVER, **{"fwdllm.gate.max_repeats": 5})
    (answer,) = federation.answers(0, [1])
    pool = server.pooled.pool
    for round_index in range(3):
        for client in range(1000):
            entry = server.pooled
            entry.collect([replace(answer, client=client, round_index=round_index)], {client: server.assigned[1]})
    held = sum(entry.slopes.nbytes + entry.along_reference.nbytes + len(entry.choices) for entry in pool.entries)
    assert held == 4 * pool.directions == 4 * 3000 * 4


@pytest.mark.slow
def test_uploads_stay_at_four_bytes_a_probe(world: World) -> None:
    for kind in ("none", "published", "corrected"):
        federation, server = opened(world, {**_BASE, "fwdllm.probes": 50, "fwdllm.sampling.kind": kind})
        federation.round(0)
        for work in server.assign(1, federation.clients).values():
            assert bool(work.choices) == (kind == "published")
            assert bool(work.reference_scale) == (kind == "corrected")
            assert len(encode(federation.work(work))) <= 4 * 50 + 100


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sampling_looks_where_the_last_estimate_points(world: World, momentum: float) -> None:
    """Both signs of the reference: as a step (without momentum it holds minus the rate), and as a gradient."""
    settings = {**_BASE, "fwdllm.sampling.kind": "published", "fwdllm.sampling.candidates": 30, "fwdllm.probes": 20}
    federation, server = opened(world, {**settings, "fwdllm.server_momentum": momentum})
    start = federation.parameters()
    federation.round(0)
    downhill = federation.parameters() - start
    (work,) = server.assign(1, [1]).values()
    worker = federation.worker(1)
    assert isinstance(worker, LookingWorker) and worker.directions is not None
    worker.replica.follow(work.catch_up, work.digest)
    worker.aim(work)
    keys = [DirectionKey(federation.config.seed, seed) for seed in seeds_of([(1, 1, 1, 20)])]
    tensors = server.trainables.tensors
    z = np.concatenate([worker.directions.values(keys, i, 0, t.numel()) for i, t in enumerate(tensors)], 1)
    assert (z @ downhill < 0).all(), "every chosen direction points up the last step"


def test_every_second_step_may_go_without(world: World) -> None:
    federation, server = opened(world, {**_BASE, "fwdllm.sampling.kind": "corrected", "fwdllm.sampling.every": 2})
    aimed = []
    for round_index in range(5):
        assigned = server.assign(round_index, federation.clients)
        aimed.append(any(work.reference_scale for work in assigned.values()))
        server.absorb([federation.work(work) for work in assigned.values()])
    assert aimed == [False, True, False, True, False]


def test_adam_counts_server_steps_and_not_rounds(world: World) -> None:
    """A gate that makes every step take three rounds: the corrections are those of the first, second and third step."""
    federation, server = opened(
        world, _NEVER, **{"fwdllm.server_optimizer": "adam", "fwdllm.server_betas": [0.5, 0.75]}
    )
    corrections = []
    for round_index in range(9):
        federation.round(round_index)
        if server.pooled.pool.entries:
            continue  # waiting
        (assignment,) = server.assign(round_index + 1, [4]).values()
        record = decode(assignment.catch_up[-1])
        assert isinstance(record, RoundUpdate)
        corrections.append(record.adam[2:])
    assert corrections == [(1 / (1 - 0.5**step), 1 / (1 - 0.75**step)) for step in (1, 2, 3)]


def test_slopes_whose_square_float32_does_not_hold_stop_the_run(world: World) -> None:
    """The second moment would be infinite from then on, and nothing would move any more, in silence."""
    federation, _ = opened(world, _BASE, **{"fwdllm.server_optimizer": "adam"})
    with pytest.raises(TrainingStalledError, match=r"its square for fwdllm\.server_optimizer 'adam'"):
        federation.round(0, meddle=lambda updates: [replace(u, values=1e25 * u.values) for u in updates])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_trust_ratio_step_is_as_long_as_it_should_be(world: World, momentum: float) -> None:
    federation, _ = opened(
        world,
        {**_BASE, "fwdllm.step.control": "trust_ratio", "fwdllm.step.report_norms": True, "train.optimizer.lr": 0.03},
        **{"fwdllm.server_momentum": momentum},
    )
    for round_index in range(2 if not momentum else 1):
        norm = float(np.linalg.norm(federation.parameters().astype(np.float64)))
        columns = federation.round(round_index).columns
        assert columns["step_norm"] == pytest.approx(0.03 * norm, rel=1e-4)


@pytest.mark.parametrize("sampling", ["none", "corrected"])
def test_normalised_steps_do_not_know_the_scale_of_the_loss(world: World, sampling: str) -> None:
    settings = {**_BASE, "fwdllm.step.control": "normalised", "fwdllm.sampling.kind": sampling}
    ends = []
    for scale in (1.0, 256.0):
        federation, server = opened(world, settings)
        for round_index in range(2):
            updates = federation.answers(round_index)
            server.absorb([replace(update, values=update.values * scale) for update in updates])
            if round_index == 0:
                first = federation.parameters()
        ends.append(first)
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-6)


def test_the_cosine_is_to_the_gradient_of_the_same_batches(world: World) -> None:
    """So many probes that the estimate is nearly the gradient; the passes of the comparison are counted."""
    settings = {
        **_BASE, "fwdllm.probes": 400, "fwdllm.step.report_cosine": True, "federate.client_num": 2,
        "llm.adapter.args": [{"adapter_method": "head"}], "fwdllm.estimator": "forward_mode",
        "fwdllm.attention": "eager", "fwdllm.probes_per_batch": 100,
    }  # fmt: skip
    federation, server = opened(world, settings)
    report = federation.round(0)
    forward = report.forward_passes
    before = federation.session.parts.trainables.digest()
    federation.session.diagnose(server, report)
    count = server.trainables.count
    assert "cosine" in report.columns
    probes = 2 * 400
    assert report.columns["cosine"] == pytest.approx(math.sqrt(probes / (probes + count - 1)), abs=0.05)
    assert (report.forward_passes - forward, report.backward_passes) == (2, 2)
    assert federation.session.parts.trainables.digest() == before
    assert all(tensor.grad is None for tensor in federation.session.parts.trainables.tensors)
    assert "cosine" in report.columns


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"federate.method": "fedmezo", "fwdllm.gate.kind": "relative"}, ["fwdllm.gate.kind 'relative'", "fwdllm"]),
        ({"federate.method": "FedSGD", "fwdllm.step.control": "normalised"}, ["fwdllm.step.control", "FedSGD"]),
        ({**_BASE, "fwdllm.upload": "dense", "fwdllm.sampling.kind": "published"}, ["fwdllm.upload 'dense'"]),
        ({**_BASE, "fwdllm.probes": 1, "fwdllm.sampling.kind": "corrected"}, ["fwdllm.probes 1", "2 or more"]),
        ({**_BASE, "fwdllm.gate.kind": "relative", "fwdllm.gate.tensor": "x"}, ["fwdllm.gate.tensor 'x'"]),
    ],
)  # fmt: skip
def test_combinations_without_a_meaning_are_refused(
    world: World, settings: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        Session.open(world.config(settings))
    assert all(fragment in str(refused.value) for fragment in fragments)
