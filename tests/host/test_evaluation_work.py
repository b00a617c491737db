"""What evaluations cost beside training: counted as runs count it, and told or left out where it is too much."""

from __future__ import annotations

from typing import Any

import pytest

from fs_fwdllm.report import RunFolder
from fs_fwdllm.running.evaluation_work import evaluates_first, remark_on_evaluations, rows_of_training
from fs_fwdllm.running.local import resume, run
from fs_fwdllm.running.session import Session
from tests.host.small import METHODS, World, methods_where, read_jsonl

#: 48 rows, of which 9 or 10 are test rows; two rounds of four clients.
SHORT = {"federate.total_round_num": 2}
LARGE = {**SHORT, "data.type": "large.jsonl@text", "data.splits": [0.1, 0.0, 0.9], "dataloader.batch_size": 2}


def lines_of(world: World, own: dict[str, Any]) -> list[dict[str, Any]]:
    return read_jsonl(RunFolder(run(world.config(own))).metrics_path)


@pytest.mark.parametrize("method", methods_where(lambda facts: not facts.trains_blocks))
@pytest.mark.parametrize(
    "own",
    [{}, {"federate.sample_client_num": 2}, {"train.batch_or_epoch": "epoch", "train.local_update_steps": 1}],
    ids=["all clients", "two a round", "whole epochs"],
)
def test_training_is_counted_as_a_run_counts_it(world: World, method: str, own: dict[str, Any]) -> None:
    """Where every client has equally many full batches; blocks ask fewer clients than there are."""
    settings = {**METHODS[method], "data.splits": [1.0, 0.0, 0.0], **own}
    config = world.config(settings)
    session = Session.open(config)
    last = lines_of(world, settings)[-1]
    passes = last["forward_passes"] + 2 * last["backward_passes"]
    assert rows_of_training(session.config, session.client_samples) == pytest.approx(4 * passes)


def test_the_first_evaluation_may_be_a_tenth_of_the_training(world: World) -> None:
    config = world.config(METHODS["mezo"])
    held = {client: 12 for client in range(1, 5)}
    trained = rows_of_training(config, held)
    assert trained > 0 and rows_of_training(config, {}) == 0
    assert evaluates_first(config, held, int(trained / 10)) and not evaluates_first(config, held, int(trained / 10) + 1)
    for word, wanted in (("always", True), ("never", False)):
        config.fwdllm.first_evaluation = word
        assert evaluates_first(config, held, 10**9) is evaluates_first(config, held, 1) is wanted


@pytest.mark.parametrize("word", ["auto", "always", "never"])
def test_a_run_leaves_a_long_first_evaluation_out_and_says_so(
    world: World, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it trains does not depend on it, nor do its figures break without one."""
    world.texts(400, "large.jsonl")
    settings = {**METHODS["forward_gradient"], **LARGE, "fwdllm.first_evaluation": word, "eval.freq": 1}
    first, *rounds = lines_of(world, settings)[:-1]
    told = "no evaluation before the first round: its 360 rows" in capsys.readouterr().out
    assert (first["eval"] is not None) is (word == "always") and told is (word == "auto")
    assert [line["eval"]["loss"] for line in rounds]
    assert rounds[-1]["digest"] == lines_of(world, settings | {"fwdllm.first_evaluation": "always"})[-1]["digest"]


def test_a_short_first_evaluation_takes_place(world: World) -> None:
    assert lines_of(world, {**METHODS["mezo"], "federate.total_round_num": 20})[0]["eval"]["loss"] > 0


def test_a_run_without_a_first_evaluation_goes_on(world: World) -> None:
    settings = {**METHODS["mezo"], **SHORT, "fwdllm.first_evaluation": "never"}
    folder = run(world.config(settings))
    lines = read_jsonl(RunFolder(resume(folder, rounds=3)).metrics_path)
    assert [line["eval"] is None for line in lines if "eval" in line][:4] == [True, False, False, False]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_evaluations_that_take_longer_than_training_are_told(world: World, method: str) -> None:
    world.texts(400, "large.jsonl")
    settings = {**METHODS[method], **LARGE}
    often = Session.open(world.config({**settings, "eval.freq": 1}))
    warned = [remark for remark in often.remarks() if "evaluations of 360 rows" in remark]
    assert len(warned) == 1 and "eval.freq" in warned[0] and "max_test_samples" in warned[0]
    rounds = {"federate.total_round_num": 4000, "eval.freq": -1}
    assert not any(
        "evaluations of" in remark for remark in Session.open(world.config({**settings, **rounds})).remarks()
    )


def test_who_holds_no_row_is_told_nothing(world: World) -> None:
    config = world.config(METHODS["fedavg"])
    assert remark_on_evaluations(config, {}, 0) is None
