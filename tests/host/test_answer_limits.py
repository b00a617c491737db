"""A server says how long an answer may be: every right answer is no longer, and little is left above it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from fs_fwdllm.config.methods import METHODS as FACTS
from fs_fwdllm.core.wire import DenseUpdate, ScalarUpdate, decode, encode
from fs_fwdllm.method.cybgd.records import BlockDelta, OptimizerState
from fs_fwdllm.method.cybgd.state_bytes import pack_states
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.driver import RunDriver, answers
from fs_fwdllm.running.session import Session
from tests.host.small import METHODS, Federation, World
from tests.method.cybgd.settings import blocks

#: What integers of the largest size take in a header beyond those of a small run.
SLACK_BYTES = 60
CASES: dict[str, tuple[dict[str, Any], int]] = {
    **{method: (settings, SLACK_BYTES) for method, settings in METHODS.items() if not FACTS[method].trains_blocks},
    "mezo, epochs": ({**METHODS["mezo"], "train.batch_or_epoch": "epoch"}, SLACK_BYTES),
    "mezo, gradients travel": ({**METHODS["mezo"], "fwdllm.upload": "dense"}, SLACK_BYTES),
    "forward gradient, gradients travel": ({**METHODS["forward_gradient"], "fwdllm.upload": "dense"}, SLACK_BYTES),
}
BLOCK_CASES: dict[str, dict[str, Any]] = {
    "float32": blocks(zstandard=False),
    "compressed": blocks(),
    "bfloat16": blocks(upload="bfloat16", zstandard=False),
    "int8": blocks(upload="int8", zstandard=False),
    "state of AdamW": blocks(optimizer_state="server", zstandard=False, clients_per_block=2),
    "state of SGD": {**blocks(optimizer_state="server", zstandard=False), "train.optimizer.type": "SGD"},
    "state of SGD with momentum": {
        **blocks(optimizer_state="server", zstandard=False),
        "train.optimizer.type": "SGD", "train.optimizer.momentum": 0.9,
    },
}  # fmt: skip


def spare(settings: dict[str, Any], world: World) -> Iterator[int]:
    """How much longer than the answers of two rounds a frame might have been."""
    federation = Federation(world.config(settings))
    for round_index in range(2):
        for update in federation.answers(round_index):
            yield federation.server.answer_limit_bytes(update.client) - len(encode(update))
        assert federation.server.answer_limit_bytes(77) == 0
        federation.server.absorb([])


@pytest.mark.parametrize("case", CASES)
def test_the_limit_is_an_answer_with_the_largest_numbers(world: World, case: str) -> None:
    settings, slack = CASES[case]
    assert all(0 <= more <= slack for more in spare(settings, world))


@pytest.mark.parametrize("case", BLOCK_CASES)
def test_the_limit_of_a_visit_holds_for_what_travels_with_it(world: World, case: str) -> None:
    found = list(spare(BLOCK_CASES[case], world))
    assert all(more >= 0 for more in found)
    if case != "compressed":
        assert max(found) <= 2 * SLACK_BYTES


@pytest.fixture
def opened(world: World) -> Iterator[tuple[RunDriver, dict[int, bytes]]]:
    """The second round of a run, and what its clients answer."""
    config = world.config({**METHODS["forward_gradient"], "federate.total_round_num": 2})
    session = Session.open(config)
    with RunDriver(session, RunFolder.create(config)) as driver:
        examples = {client: held.train for client, held in session.data.clients.items()}
        worker = Federation(config).worker(1)
        yield driver, dict(answers(worker, driver.open_round(), examples))


def test_a_longer_frame_is_refused_and_named(opened: tuple[RunDriver, dict[int, bytes]]) -> None:
    driver, frames = opened
    limit = driver.expected_bytes(2)
    assert limit == driver.server.answer_limit_bytes(2) > len(frames[2])
    long = encode(replace(decode(frames[2], ScalarUpdate), values=np.zeros(1000)))
    other = decode(frames[3], ScalarUpdate)
    dense = encode(DenseUpdate(**{item.name: getattr(other, item.name) for item in fields(other)}))
    for client, frame in frames.items():
        driver.receive(client, {2: long, 3: dense}.get(client, frame))
        assert driver.expected_bytes(client) == 0
    assert driver.expected_bytes(77) == 0
    report = driver.close_round()
    assert report.rejected == {2: "unreadable", 3: "other_kind"} and set(report.losses) == {1, 4}


def test_an_optimiser_s_state_that_is_another_s_costs_its_sender_the_answer(world: World) -> None:
    """Averaged or sent on, it would have stopped the server, or the next client of the block."""
    federation = Federation(world.config(blocks(optimizer_state="server", zstandard=False, clients_per_block=2)))
    first, second = federation.answers(0)
    assert isinstance(second, BlockDelta)
    spoilt = []
    for frame in second.states:
        record = decode(frame, OptimizerState)
        shapes = federation.server.store.shapes(record.block)
        states = [{"foo": torch.zeros(shape)} for shape in shapes]
        spoilt.append(encode(replace(record, values=pack_states(states, compress=False))))
    report = federation.server.absorb([first, replace(second, states=tuple(spoilt))])
    assert report.rejected == {second.client: "malformed"} and set(report.losses) == {first.client}
