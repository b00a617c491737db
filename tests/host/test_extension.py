"""A run that is given more rounds ends as one that had them from the beginning, or says why it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from fs_fwdllm.errors import CheckpointError, ConfigError
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running import keeping
from fs_fwdllm.running.extension import depends_on_total_rounds, describe_extension
from fs_fwdllm.running.local import resume, run
from fs_fwdllm.running.session import Session
from tests.host.small import METHODS, World, read_jsonl
from tests.host.test_resume import comparable

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "mezo": METHODS["mezo"],
    "five-round rates": {
        **METHODS["mezo"], "train.train_strategy": "five-round", "fwdllm.strategy_span": 0.04
    },
    "momentum": {**METHODS["forward_gradient"], "fwdllm.server_momentum": 0.9, "federate.sample_client_num": 3},
    "fedavg": {**METHODS["fedavg"], "train.optimizer.type": "AdamW"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_extended_run_is_the_longer_run(world: World, case: str) -> None:
    settings = {**CASES[case], "data.splits": [0.6, 0.2, 0.2]}
    whole = run(world.config({**settings, "federate.total_round_num": 7}))
    path = run(world.config({**settings, "federate.total_round_num": 3}))
    assert resume(path, rounds=7) == path
    assert comparable(path) == comparable(whole)
    assert RunFolder(path).config().federate.total_round_num == 7
    log = (path / "console.log").read_text()
    assert "was started for 3 rounds and goes on to 7" in log and "warning: was started" not in log


def test_an_unfinished_run_can_be_extended_and_killed_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**METHODS["forward_gradient"], "federate.total_round_num": 8}
    whole = run(world.config(settings))
    write = keeping.write_checkpoint

    def dies_at(round_number: int) -> Any:
        def die(folder: Path, checkpoint: Any, **proven: bool) -> None:
            if checkpoint.next_round == round_number:
                raise KeyboardInterrupt
            write(folder, checkpoint, **proven)

        return die

    config = world.config({**settings, "federate.total_round_num": 5})
    path = Path(config.outdir) / "small-2"
    for round_number, rounds in ((2, None), (4, 8)):
        with monkeypatch.context() as patch:
            patch.setattr(keeping, "write_checkpoint", dies_at(round_number))
            with pytest.raises(KeyboardInterrupt):
                run(config) if rounds is None else resume(path, rounds=rounds)
    resume(path)
    assert comparable(path) == comparable(whole)


def test_a_kill_right_after_the_new_number_was_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**METHODS["mezo"], "federate.total_round_num": 4}
    whole = run(world.config(settings))
    path = run(world.config({**settings, "federate.total_round_num": 2}))

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "open", die)
        with pytest.raises(KeyboardInterrupt):
            resume(path, rounds=4)
    resume(path)
    assert comparable(path) == comparable(whole)


@pytest.mark.parametrize("schedule", [{"type": "cosine"}, {"type": "linear"}, {"warmup_ratio": 0.5}])
def test_a_schedule_over_all_rounds_is_said_loudly(world: World, schedule: dict[str, Any]) -> None:
    ((name, value),) = schedule.items()
    settings = {**METHODS["mezo"], f"train.scheduler.{name}": value}
    path = run(world.config({**settings, "federate.total_round_num": 3}))
    resume(path, rounds=6)
    log = " ".join((path / "console.log").read_text().split())
    assert f"warning: was started for 3 rounds and goes on to 6: train.scheduler.{name} {value}" in log
    assert "rounds 1 to 3 had the rates of 3 rounds" in log
    longer = run(world.config({**settings, "federate.total_round_num": 6}))
    digests = [read_jsonl(folder / "metrics.jsonl")[-1]["digest"] for folder in (path, longer)]
    assert digests[0] != digests[1], "or the warning would be idle"


def test_a_schedule_inside_a_visit_depends_on_no_number_of_rounds(world: World) -> None:
    settings = {**METHODS["cybgd"], "train.scheduler.type": "cosine"}
    config = world.config(settings)
    assert depends_on_total_rounds(config) == ""
    assert "warning" not in describe_extension(config, 3, 3)
    config.fwdllm.blocks.learning_rate_over = "run"
    assert depends_on_total_rounds(config) == "train.scheduler.type cosine"


def test_what_cannot_be_given_is_refused_by_name(world: World) -> None:
    path = run(world.config({**METHODS["mezo"], "federate.total_round_num": 3}))
    before = comparable(path)
    for rounds in (1, 2):
        with pytest.raises(ConfigError, match=rf"--rounds {rounds}: .* has done 3 rounds; allowed are 4 and more"):
            resume(path, rounds=rounds)
    assert comparable(path) == before
    resume(path, rounds=3)
    assert comparable(path) == before


def test_a_run_that_stopped_early_stays_stopped(world: World) -> None:
    settings = {**METHODS["fedavg"], "early_stop.patience": 1, "early_stop.delta": 1000.0}
    path = run(world.config(settings))
    with pytest.raises(ConfigError, match=r"--rounds 9: .*early_stop\.patience 1.*fwdllm\.init_adapter"):
        resume(path, rounds=9)
    assert RunFolder(path).config().federate.total_round_num == 5


def test_other_changes_are_still_refused(world: World) -> None:
    path = run(world.config({**METHODS["mezo"], "federate.total_round_num": 2}))
    config = RunFolder(path).config_path
    config.write_text(config.read_text().replace("lr: 0.05", "lr: 0.06"))
    with pytest.raises(CheckpointError, match="was changed after the checkpoint was written"):
        resume(path, rounds=4)


def test_the_command(world: World) -> None:
    path = run(world.config({**METHODS["mezo"], "federate.total_round_num": 2}))
    done = CliRunner().invoke(app, ["resume", str(path), "--rounds", "3"])
    assert done.exit_code == 0, done.output
    assert read_jsonl(path / "metrics.jsonl")[-1]["round"] == 3
    (path / "federatedscope.txt").write_text("")
    refused = CliRunner().invoke(app, ["resume", str(path), "--rounds", "5"])
    assert refused.exit_code == 2
    said = " ".join(refused.output.split())
    assert f"federate.restore_from {path} federate.total_round_num 5" in said
