"""Rounds of block training, message by message: what is sent, what is believed, who is asked next."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fs_fwdllm.core.wire import Assignment, ClientUpdate, decode, encode
from fs_fwdllm.errors import ConfigError, DivergenceError, TrainingStalledError, UpdateRejected, WireError
from fs_fwdllm.method.cybgd.client import delta_encoding
from fs_fwdllm.method.cybgd.codec import decode_tensors
from fs_fwdllm.method.cybgd.records import BlockAssignment, BlockDelta, BlockValues
from tests.host.small import Federation, World
from tests.method.cybgd.settings import BLOCKS, blocks

EXACT_CASES: dict[str, dict[str, Any]] = {
    "changed blocks": blocks(),
    "all blocks": blocks(download_select="all"),
    "bfloat16 model": {**blocks(), "fwdllm.base.compute_dtype": "bfloat16"},
    "float16 model": {**blocks(), "fwdllm.base.compute_dtype": "float16"},
    "bfloat16 upload": blocks(upload="bfloat16"),
    "int8 upload": blocks(upload="int8"),
    "without zstandard": blocks(zstandard=False),
    "halves": blocks(granularity="attention-mlp", schedule="descending"),
    "matrices, everything in": blocks(granularity="matrix", embeddings="in", norm="in", head="in"),
    "two blocks at once": blocks(parallel_blocks=2, embeddings="in"),
    "two clients a block": blocks(clients_per_block=2, schedule="rotating"),
    "aggregate": blocks(clients_per_block=2, schedule="aggregate"),
    "the whole model": blocks(schedule="full"),
    "state on the server": blocks(optimizer_state="server", clients_per_block=2),
    "state on the client": blocks(optimizer_state="client", schedule="fixed"),
    "accumulation, clipping": {**blocks(), "grad.grad_accum_count": 2, "grad.grad_clip": 0.1},
    "checkpointing": {**blocks(), "fwdllm.gradient_checkpointing": True},
}
LOSSY_CASES: dict[str, dict[str, Any]] = {
    "int8": blocks(download_inactive="int8"),
    "int4, all blocks": blocks(download_inactive="int4", download_select="all"),
    "pruned": blocks(download_keep_ratio=0.3),
    "dropped": blocks(download_drop_ratio=0.99),
    "all of it, bfloat16": {
        **blocks(download_inactive="int4", download_keep_ratio=0.5, download_drop_ratio=0.99),
        "fwdllm.base.compute_dtype": "bfloat16",
    },
}


def play(federation: Federation, round_index: int, meddle: Any = list) -> Any:
    """A round with the clients the schedule wants."""
    wanted = federation.server.wanted_clients(federation.clients)
    return federation.round(round_index, wanted, meddle)


def opened(federation: Federation, round_index: int) -> dict[int, Assignment]:
    return federation.server.assign(round_index, federation.server.wanted_clients(federation.clients))


@pytest.mark.parametrize(
    ("case", "language_model"),
    [*((case, False) for case in EXACT_CASES), ("bfloat16 model", True), ("matrices, everything in", True)],
)
def test_a_client_holds_the_server_s_model_before_and_after_its_visit(
    world: World, case: str, language_model: bool
) -> None:
    """Every client is a model of its own; nothing but frames connects it to the server."""
    settings = EXACT_CASES[case]
    federation = Federation(world.config(settings, language_model=language_model), separate_workers=True)
    for round_index in range(5):
        for client, assignment in opened(federation, round_index).items():
            assert assignment.digest == federation.server.digest
            update = federation.work(assignment)
            replica = federation.worker(client).replica
            assert replica.digest == replica.store.digest() == federation.server.digest
            federation.server.absorb([update])
            break  # the others of the round do not answer
    assert federation.server.digest == federation.server.store.digest()


@pytest.mark.slow
@pytest.mark.parametrize("case", [*EXACT_CASES, *LOSSY_CASES])
def test_one_worker_for_all_clients_does_what_one_for_each_does(world: World, case: str) -> None:
    """A simulation is the same run: what a client holds follows from the messages to it."""
    config = world.config({**EXACT_CASES, **LOSSY_CASES}[case])
    digests = []
    for separate in (False, True):
        federation = Federation(config, separate_workers=separate)
        drop_first = lambda updates: updates[1:]  # noqa: E731
        digests.append([play(federation, index, drop_first if index == 2 else list).digest for index in range(7)])
    assert digests[0] == digests[1] and len(set(digests[0])) >= 6


@pytest.mark.parametrize("case", LOSSY_CASES)
def test_the_target_is_exact_whatever_happens_to_the_rest(world: World, case: str) -> None:
    federation = Federation(world.config(LOSSY_CASES[case]), separate_workers=True)
    for round_index in range(6):
        for client, assignment in opened(federation, round_index).items():
            assert isinstance(assignment, BlockAssignment)
            replica, store = federation.worker(client).replica, federation.server.store
            replica.follow(assignment.catch_up, assignment.digest)
            for part in store.plan.active(assignment.block):
                for ours, theirs in zip(replica.start(part), store.values(part), strict=True):
                    assert torch.equal(ours, theirs)
            assert not set(assignment.dropped) & set(store.plan.blocks[assignment.block].layers)
            federation.server.absorb([federation.work(assignment)])


def test_dropped_layers_are_skipped_and_keyed_by_run_cycle_and_client(world: World) -> None:
    def drawn(seed: int) -> list[tuple[int, ...]]:
        settings = {**LOSSY_CASES["dropped"], "seed": seed, "fwdllm.blocks.download.drop_ratio": 0.5}
        config = world.config({**settings, "model.type": f"{world.model('bert', num_hidden_layers=5)}@transformers"})
        server = Federation(config).server
        return [server.dropped_layers(0, cycle, client) for cycle in range(4) for client in range(1, 4)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 3 and {len(layers) for layers in drawn(1)} == {2}


@pytest.mark.parametrize("language_model", [False, True], ids=["tensor or tuple", "tensor"])
def test_a_skipped_layer_hands_its_input_on(world: World, language_model: bool) -> None:
    federation = Federation(world.config(blocks(), language_model=language_model))
    worker = federation.worker(1)
    objective, batch = federation.session.parts.objective, federation.batches(1)[0]
    with torch.no_grad():
        whole = objective.on(batch).here()
        with worker.skipper.skipping([0, 1]):
            first, again = objective.on(batch).here(), objective.on(batch).here()
        assert torch.equal(first, again) and not torch.equal(first, whole)
        assert torch.equal(objective.on(batch).here(), whole)


def test_only_changed_blocks_travel(world: World) -> None:
    federation = Federation(world.config(blocks(schedule="ascending")))
    sent = []
    for round_index in range(4):
        (assignment,) = opened(federation, round_index).values()
        records = [decode(frame) for frame in assignment.catch_up]
        sent.append([record.block for record in records if isinstance(record, BlockValues)])
        federation.server.absorb([federation.work(assignment)])
    head = len(federation.server.plan.blocks)
    # At first nothing has changed; then the earlier visit's block (and the head, which every visit trains).
    assert sent == [[], [0, head], [0, 1, head], [0, 1, head]]
    (assignment,) = opened(federation, 4).values()  # client 1 again, which left at version 0
    assert len(encode(assignment)) > 0 and assignment.client == 1


def test_int8_error_feedback_loses_nothing_but_the_last_remainder(world: World) -> None:
    """sum of decoded deltas = sum of true deltas - last remainder, which is below one level."""
    federation = Federation(world.config({**blocks(upload="int8", schedule="fixed"), "federate.client_num": 1}))
    worker, server = federation.worker(1), federation.server
    true, received = [], []
    original = worker.delta

    def spy(client: int, starts: dict[int, list[torch.Tensor]], ends: dict[int, list[torch.Tensor]]) -> Any:
        true.append(
            [end - begin for part, start in starts.items() for end, begin in zip(ends[part], start, strict=True)]
        )
        return original(client, starts, ends)

    worker.delta = spy  # type: ignore[method-assign]
    for round_index in range(12):
        (assignment,) = opened(federation, round_index).values()
        update = federation.work(assignment)
        shapes = [shape for part in server.plan.active(0) for shape in server.store.shapes(part)]
        received.append(decode_tensors(update.values, shapes, delta_encoding("int8"), compressed=update.compressed))
        server.absorb([update])
    owed = [value for part in server.plan.active(0) for value in worker.residuals[1, part]]
    one_visit = max(float((t - r).abs().max()) for t, r in zip(true[0], received[0], strict=True))
    assert one_visit > 0
    for index, remainder in enumerate(owed):
        lost = sum(delta[index].double() for delta in true) - sum(delta[index].double() for delta in received)
        torch.testing.assert_close(lost, remainder.double(), rtol=1e-3, atol=1e-7)
        assert float(remainder.abs().max()) <= 4 * one_visit


LIES: dict[str, tuple[Any, str]] = {
    "another block": (lambda u: dataclasses.replace(u, block=1 - u.block), "other_block"),
    "a stale version": (lambda u: dataclasses.replace(u, versions=(7, 7)), "stale_version"),
    "a foreign start": (lambda u: dataclasses.replace(u, digest_start=bytes(16)), "foreign_version"),
    "another model": (lambda u: dataclasses.replace(u, digest=bytes(16)), "other_digest"),
    "another round": (lambda u: dataclasses.replace(u, round_index=9), "other_round"),
    "another form": (lambda u: dataclasses.replace(u, form="bfloat16"), "other_form"),
    "too few bytes": (lambda u: dataclasses.replace(u, values=u.values[:-4]), "malformed"),
    "too many bytes": (lambda u: dataclasses.replace(u, values=np.append(u.values, np.uint8(0))), "malformed"),
    "no zstandard": (lambda u: dataclasses.replace(u, compressed=not u.compressed), "malformed"),
    "unwanted states": (lambda u: dataclasses.replace(u, states=(b"x",)), "malformed"),
    "NaN": (lambda u: with_first_value(u, np.nan), "not_finite"),
    "infinity": (lambda u: with_first_value(u, np.inf), "not_finite"),
    "a loss that is none": (lambda u: dataclasses.replace(u, loss=float("nan")), "not_finite"),
    "no samples": (lambda u: dataclasses.replace(u, samples=0), "no_samples"),
}


def with_first_value(update: BlockDelta, value: float) -> BlockDelta:
    """A delta whose first tensor is all ``value`` (uncompressed, bytes in planes)."""
    planes = np.asarray(update.values).copy()
    count = 32 * 32  # BERT's query projection
    planes[: 4 * count] = np.full(count, value, "<f4").view(np.uint8).reshape(-1, 4).T.reshape(-1)
    return dataclasses.replace(update, values=planes, compressed=False)


@pytest.mark.parametrize("lie", LIES)
def test_a_bad_delta_is_refused_and_its_block_is_due_again(world: World, lie: str) -> None:
    change, reason = LIES[lie]
    federation = Federation(world.config(blocks(zstandard=False, schedule="ascending")))
    before = federation.server.digest
    report = play(federation, 0, lambda updates: [change(update) for update in updates])
    assert report.rejected == {1: reason} and report.digest == before == federation.server.digest
    assert report.columns["reassigned_blocks"] == [0] and report.columns["block_visits"] == [0, 0]
    again = play(federation, 1)
    assert again.columns["blocks"] == {"2": 0} and again.columns["block_visits"] == [1, 0]
    assert play(federation, 2).columns["blocks"] == {"2": 1}


def test_the_refusal_is_typed(world: World) -> None:
    federation = Federation(world.config(blocks()))
    (assignment,) = opened(federation, 0).values()
    stale = dataclasses.replace(federation.work(assignment), versions=(3, 0))
    with pytest.raises(UpdateRejected, match="visited version"):
        federation.server.judge(stale, {})


def test_dropped_clients_stop_no_cycle_and_coverage_counts_them(world: World) -> None:
    model = f"{world.model('bert', num_hidden_layers=5)}@transformers"
    settings = {**blocks(schedule="random", parallel_blocks=2), "model.type": model}
    federation = Federation(world.config(settings))
    for round_index in range(12):
        report = play(federation, round_index, lambda updates: updates[:1] if round_index % 3 == 1 else updates)  # noqa: B023
    visits, server = report.columns["block_visits"], federation.server
    assert len(visits) == 5 and sum(visits) == 12 * 2 - 4 == server.queue.next_visit - len(server.queue.due)
    assert min(visits) >= 3 and all(visit.number >= server.queue.next_visit - 6 for visit in server.queue.due)


def test_nobody_ever_answers(world: World) -> None:
    federation = Federation(world.config(blocks()))
    with pytest.raises(TrainingStalledError, match="no_answer"):
        for round_index in range(9):
            play(federation, round_index, lambda updates: [])


def test_a_host_may_ask_others_than_the_schedule_wants(world: World) -> None:
    federation = Federation(world.config(blocks(schedule="ascending")))
    assigned = federation.server.assign(0, [3, 4])
    assert {client: assignment.block for client, assignment in assigned.items()} == {3: 0, 4: 1}
    report = federation.server.absorb([federation.work(assignment) for assignment in assigned.values()])
    assert report.columns["block_visits"] == [1, 1] and not report.rejected


def test_deltas_of_one_block_are_averaged_by_samples_and_of_two_blocks_are_added(world: World) -> None:
    settings = {**blocks(clients_per_block=2, schedule="ascending"), "dataloader.batch_size": 100,
                "federate.client_num": 3, "data.splitter": "lda", "data.splitter_args": [{"alpha": 0.5}]}  # fmt: skip
    federation = Federation(world.config(settings))
    store, before = federation.server.store, federation.parameters()
    updates = [federation.work(assignment) for assignment in opened(federation, 0).values()]
    assert len({update.samples for update in updates}) == 2
    federation.server.absorb(updates)
    shapes = [shape for part in store.plan.active(0) for shape in store.shapes(part)]
    deltas = []
    for update in updates:
        decoded = decode_tensors(update.values, shapes, delta_encoding("float32"), compressed=update.compressed)
        deltas.append(torch.cat([value.flatten() for value in decoded]))
    weights = np.array([update.samples for update in updates]) / sum(update.samples for update in updates)
    expected = sum(float(weight) * delta for weight, delta in zip(weights, deltas, strict=True))
    changed = torch.from_numpy(federation.parameters() - before)
    expected = torch.cat([expected, torch.zeros(len(changed) - len(expected))])  # the other blocks stay
    torch.testing.assert_close(changed.sort().values, expected.sort().values, rtol=1e-3, atol=1e-6)


def test_a_worker_refuses_another_base_model_and_other_records(world: World) -> None:
    federation = Federation(world.config(blocks()))
    (assignment,) = opened(federation, 0).values()
    examples = federation.session.data.clients[1].train
    with pytest.raises(DivergenceError, match="the client loaded a model"):
        federation.worker(1).work(dataclasses.replace(assignment, digest_base=bytes(16)), examples)
    with pytest.raises(DivergenceError, match="the weights differ"):
        federation.worker(1).work(dataclasses.replace(assignment, digest=bytes(16)), examples)
    with pytest.raises(DivergenceError, match="holds version 0 of block 1, but the server takes it to hold version 4"):
        federation.worker(1).work(dataclasses.replace(assignment, held=(1, 5, 1)), examples)
    with pytest.raises(WireError, match="2 blocks, but the plan has 3"):
        federation.worker(1).work(dataclasses.replace(assignment, held=(1, 5)), examples)
    plain = Assignment(0, 1, assignment.digest, 0.1, 1, (), batch_index=0)
    with pytest.raises(WireError, match="was sent a Assignment"):
        federation.worker(1).work(plain, examples)
    foreign = BlockValues(99, 1, "float32", 1.0, True, False)
    with pytest.raises(WireError, match="block 99"):
        federation.worker(1).work(dataclasses.replace(assignment, catch_up=(encode(foreign),)), examples)


def test_work_that_fails_leaves_the_model_as_it_was(world: World) -> None:
    federation = Federation(world.config(blocks()))
    (assignment,) = opened(federation, 0).values()
    worker, before = federation.worker(1), federation.worker(1).replica.store.digest()
    worker.objective.on = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        federation.work(assignment)
    worker.replica.store.forget_digests()
    assert worker.replica.store.digest() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llm.adapter.use": True}, "llm.adapter.use true"),
        ({"federate.sample_client_num": 3}, "the block schedule chooses the clients, 1 a round"),
        ({"fwdllm.blocks.granularity": "matrix", "fwdllm.blocks.group_size": 2}, "groups are of layers"),
        ({"fwdllm.blocks.schedule": "full", "fwdllm.blocks.parallel_blocks": 2}, "has one block"),
        ({"train.optimizer.momentum": 0.9}, "AdamW has none"),
        ({"fwdllm.blocks.clients_per_block": 9}, "only 4 hold training samples"),
        ({"federate.method": "fedmezo", "grad.grad_clip": 1.0}, "mezo does not clip"),
        ({"federate.method": "FedAvg", "grad.grad_accum_count": 2}, "fedavg does not accumulate"),
        ({"federate.method": "FedAvg", "train.optimizer.type": "Adam"}, "has 'SGD' and 'AdamW'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(world: World, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Federation(world.config({**BLOCKS, **settings}))


def test_updates_are_client_updates(world: World) -> None:
    federation = Federation(world.config(blocks()))
    (assignment,) = opened(federation, 0).values()
    update = federation.work(assignment)
    assert isinstance(update, ClientUpdate) and update.backward_passes == 3 and update.forward_passes == 3
