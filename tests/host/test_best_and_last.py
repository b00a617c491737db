"""What a run leaves at its end: the round that was best, by a split that may choose, and the last one beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fs_fwdllm.config import Config
from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.errors import CheckpointError, ConfigError, TrainingStalledError
from fs_fwdllm.forecast.plan import make_plan
from fs_fwdllm.report import RunFolder
from fs_fwdllm.running import keeping
from fs_fwdllm.running.checkpoint import read_checkpoint
from fs_fwdllm.running.local import resume, run
from fs_fwdllm.running.session import Session
from tests.host.small import METHODS, PLAIN_MEAN, World, read_jsonl

pytestmark = pytest.mark.slow

#: A rate at which the training loss falls and the validation loss rises.
_OVERFITS = {
    **METHODS["fedavg"], "train.optimizer.lr": 0.5, "data.splits": [0.6, 0.2, 0.2], "federate.total_round_num": 6
}  # fmt: skip
#: With it the validation loss improves in rounds 1, 3 and 5.
_IMPROVES_LATE = {"train.optimizer.lr": 1.5, "seed": 1, **PLAIN_MEAN}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path / "metrics.jsonl")


def values_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def equal(one: Path, other: Path) -> bool:
    first, second = values_in(one), values_in(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def measured(path: Path, name: str) -> dict[str, Any]:
    """The evaluation of a saved folder, as a run that starts from it reports it before its first round."""
    config = RunFolder(path).config()
    config.fwdllm.init_adapter = str(path / name)
    session = Session.open(config)
    found = session.evaluate(session.parts.trainables)
    assert found is not None
    return found


@pytest.mark.parametrize("key", ["val_loss", "val_accuracy", "test_loss"])
def test_the_best_round_is_what_the_key_says(world: World, key: str) -> None:
    config = world.config({**_OVERFITS, "eval.best_res_update_round_wise_key": key})
    path = run(config)
    *rounds, final = lines_of(path)[1:]
    values = [line["eval"]["loss" if key == "test_loss" else key] for line in rounds]
    best = max(values) if key == "val_accuracy" else min(values)
    assert (final["best"], final["chosen_by"]) == (best, key)
    assert final["saved_round"] == 1 + values.index(best), "the first of equally good rounds"
    line = rounds[final["saved_round"] - 1]
    assert final["saved_digest"] == line["digest"] and final["digest"] == rounds[-1]["digest"]
    assert measured(path, "adapter") == line["eval"]
    assert measured(path, "adapter-last") == rounds[-1]["eval"]


def test_the_console_says_which_round_is_where(world: World) -> None:
    path = run(world.config(_OVERFITS))
    final, log = lines_of(path)[-1], (path / "console.log").read_text()
    said = f"adapter/ holds round {final['saved_round']}, the best by val_loss (smaller is better)"
    assert said in log and "adapter-last/ holds round 6, the last" in log
    assert "on the test split" not in log


def test_a_test_split_that_chooses_is_said_loudly(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    config = world.config({**METHODS["fedavg"], "federate.total_round_num": 1})
    (remark,) = (remark for remark in make_plan(config).remarks if "on the test split" in remark)
    assert "fwdllm.saved_round: last" in remark
    run(config)
    assert " ".join(remark.split()) in " ".join(capsys.readouterr().out.split())
    config.fwdllm.saved_round = "last"
    assert not any("test split" in remark for remark in make_plan(config).remarks)


def test_no_round_better_than_the_start_is_said(world: World) -> None:
    path = run(world.config({**_OVERFITS, "train.optimizer.lr": 2.0, "seed": 2}))
    start, *rounds, _ = lines_of(path)
    assert min(line["eval"]["val_loss"] for line in rounds) > start["eval"]["val_loss"]
    assert "no round was as good as the model before training" in (path / "console.log").read_text()


def test_last_keeps_no_best(world: World) -> None:
    path = run(world.config({**_OVERFITS, "fwdllm.saved_round": "last"}))
    assert not (path / "adapter-last").exists() and not (path / "checkpoint" / "best.safetensors").exists()
    final = lines_of(path)[-1]
    assert (final["saved"], final["saved_round"], final["saved_digest"]) == ("adapter", 6, final["digest"])
    assert "chosen_by" not in final
    assert all("val_loss" not in line["eval"] for line in lines_of(path)[:-1]), "nothing is measured for nothing"
    assert equal(path / "adapter", run(world.config(_OVERFITS)) / "adapter-last")


def test_without_a_sample_to_evaluate_on_the_last_round_is_saved(world: World) -> None:
    path = run(world.config({**METHODS["fedavg"], "data.splits": [1.0, 0.0, 0.0], "early_stop.patience": 1}))
    assert lines_of(path)[-1]["saved_round"] == 5 and not (path / "adapter-last").exists()


def test_a_method_that_trains_blocks_saves_both_models(world: World) -> None:
    settings = {**METHODS["cybgd"], "train.optimizer.lr": 0.05, "data.splits": [0.6, 0.2, 0.2], "seed": 3}
    path = run(world.config({**settings, "eval.best_res_update_round_wise_key": "val_accuracy"}))
    final = lines_of(path)[-1]
    assert (final["saved"], final["saved_last"]) == ("model", "model-last")
    assert final["saved_round"] < 5 and not equal(path / "model", path / "model-last")
    assert measured(path, "model") == lines_of(path)[final["saved_round"]]["eval"]


@pytest.mark.parametrize("moment", ["before its checkpoint", "after its checkpoint", "while it is written"])
def test_the_best_survives_a_kill_bit_for_bit(world: World, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """With checkpoints in every third round only, the file on disk is younger than what a run goes on from."""
    config = world.config({**_OVERFITS, **PLAIN_MEAN, "fwdllm.checkpoint_every": 3, **_IMPROVES_LATE})
    whole = run(config)
    improving = lines_of(whole)[-1]["saved_round"]
    assert improving == 5
    write, save = keeping.write_state, keeping.write_checkpoint

    def write_then_die(path: Path, about: Any, *rest: Any) -> None:
        if moment != "while it is written" or about["round"] < improving:
            write(path, about, *rest)
        if about["round"] == improving and moment != "after its checkpoint":
            raise KeyboardInterrupt

    def save_then_die(folder: Path, checkpoint: Any, **proven: bool) -> None:
        save(folder, checkpoint, **proven)
        if checkpoint.next_round >= improving and moment == "after its checkpoint":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "write_state", write_then_die)
        patch.setattr(keeping, "write_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    path = Path(config.outdir) / "small-2"
    resume(path)
    ours, theirs = lines_of(path)[-1], lines_of(whole)[-1]
    names = ("saved_round", "best", "saved_digest", "digest")
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    assert equal(path / "adapter", whole / "adapter") and equal(path / "adapter-last", whole / "adapter-last")


def test_a_damaged_best_round_is_refused_by_name(world: World) -> None:
    path = run(world.config(_OVERFITS))
    best = path / "checkpoint" / "best.safetensors"
    best.write_bytes(best.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"best\.safetensors: damaged"):
        resume(path)


class TestEarlyStop:
    def test_a_run_ends_when_nothing_improves_and_a_resumed_one_at_the_same_round(self, world: World) -> None:
        config = world.config({**_OVERFITS, "early_stop.patience": 2, "federate.total_round_num": 30})
        path = run(config)
        *rounds, final = lines_of(path)
        assert final["stopped_early"] is True and final["round"] == rounds[-1]["round"] < 30
        assert final["round"] == final["saved_round"] + 2
        assert "stopped early" in (path / "console.log").read_text()
        assert read_checkpoint(path / "checkpoint").next_round == final["round"]
        resume(path)
        assert [line["digest"] for line in lines_of(path)] == [line["digest"] for line in (*rounds, final)]

    def test_patience_goes_on_counting_after_a_stop(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        config = world.config({**_OVERFITS, "early_stop.patience": 3, "federate.total_round_num": 30})
        whole = run(config)
        stop = lines_of(whole)[-1]["round"] - 1
        write = keeping.write_checkpoint

        def die(folder: Path, checkpoint: Any, **proven: bool) -> None:
            write(folder, checkpoint, **proven)
            if checkpoint.next_round == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(keeping, "write_checkpoint", die)
            with pytest.raises(KeyboardInterrupt):
                run(config)
        path = Path(config.outdir) / "small-2"
        resume(path)
        assert lines_of(path)[-1]["round"] == stop + 1
        assert equal(path / "adapter", whole / "adapter") and equal(path / "adapter-last", whole / "adapter-last")

    def test_only_evaluations_count(self, world: World) -> None:
        config = world.config({**_OVERFITS, "early_stop.patience": 2, "eval.freq": 3, "federate.total_round_num": 30})
        final = lines_of(run(config))[-1]
        assert final["stopped_early"] and final["round"] % 3 == 0 and final["round"] >= 9


def ruined_from(round_number: int, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Let evaluations from that round on give ``value`` for every loss."""
    original = Session.evaluate
    rounds = iter(range(100))

    def evaluate(self: Session, trainables: Any) -> Any:
        found = original(self, trainables)
        if next(rounds) >= round_number and found is not None:
            return {**found, "loss": value, **({"val_loss": value} if "val_loss" in found else {})}
        return found

    monkeypatch.setattr(Session, "evaluate", evaluate)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e16])
def test_no_checkpoint_follows_an_exploded_loss(world: World, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    config = world.config({**_OVERFITS, "train.optimizer.lr": 0.05})
    whole = run(config)
    with monkeypatch.context() as patch:
        ruined_from(4, patch, value)
        path = run(config)
    assert read_checkpoint(path / "checkpoint").next_round == 3
    log = (path / "console.log").read_text()
    assert log.count("the loss has exploded, so that no checkpoint is written; the last good one stays") == 1
    assert "train.optimizer.lr" in log
    assert lines_of(path)[-1]["saved_round"] <= 3
    resume(path)
    assert lines_of(path)[-1]["digest"] == lines_of(whole)[-1]["digest"]


def test_a_ruin_from_the_first_round_on_claims_no_checkpoint(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ruined_from(1, monkeypatch, math.nan)
    path = run(world.config({**_OVERFITS, "fwdllm.check_saved": False}))  # only what is reported is ruined here
    assert "no checkpoint is written; there is none yet" in (path / "console.log").read_text()
    assert lines_of(path)[-1]["saved_round"] == 6 and "saved_last" not in lines_of(path)[-1]
    assert "no evaluation gave a value to choose by" in (path / "console.log").read_text()
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        resume(path)


def test_a_run_that_leaves_the_range_of_numbers_leaves_its_best_round(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three good rounds, then steps that no float32 holds, until the run stops with an error."""
    original = Schedule.__call__

    def too_fast(self: Schedule, round_index: int) -> float:
        return original(self, round_index) * (1e30 if round_index >= 3 else 1.0)

    monkeypatch.setattr(Schedule, "__call__", too_fast)
    config = world.config({**METHODS["fedsgd"], "data.splits": [0.6, 0.2, 0.2], "federate.total_round_num": 60})
    with pytest.raises(TrainingStalledError) as stopped:
        run(config)
    assert "intact" not in str(stopped.value)
    path = Path(config.outdir) / "small"
    log = (path / "console.log").read_text()
    assert f"the best so far; start from it with fwdllm.init_adapter {path / 'adapter'}" in log
    assert measured(path, "adapter") in [line["eval"] for line in lines_of(path)[1:4]]
    assert read_checkpoint(path / "checkpoint").next_round == 3


def test_a_run_that_explodes_at_once_has_nothing_to_go_on_from(world: World) -> None:
    config = world.config({**METHODS["fedsgd"], "data.splits": [0.6, 0.2, 0.2], "train.optimizer.lr": 1e10})
    with pytest.raises(TrainingStalledError):
        run(config)
    path = Path(config.outdir) / "small"
    log = (path / "console.log").read_text()
    assert "there is none yet" in log and "go on with" not in log and "adapter/ holds" not in log
    assert not RunFolder(path).has_checkpoint and not RunFolder(path).best_path.exists()


def test_what_nobody_looked_at_does_not_replace_the_last_proven_checkpoint(world: World) -> None:
    """Evaluations are rare; the clients' losses of the next round tell that a step was bad, and go back before it."""
    config = world.config({**_OVERFITS, "train.optimizer.lr": 0.05, "eval.freq": -1})
    path = Path(config.outdir) / "small"
    from fs_fwdllm.method import RoundServer

    original = RoundServer.absorb
    with pytest.MonkeyPatch.context() as patch:

        def absorb(self: RoundServer, updates: Any) -> Any:
            report = original(self, updates)
            if report.round_index == 3:
                report.losses = dict.fromkeys(report.losses, 1e9)
            if report.round_index == 4:
                raise KeyboardInterrupt
            return report

        patch.setattr(RoundServer, "absorb", absorb)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert read_checkpoint(path / "checkpoint").next_round == 2, "of 3 the clients said that it was bad"
    left = sorted(file.name for file in (path / "checkpoint").glob("[!.]*"))
    assert left == ["previous.safetensors", "state.safetensors"]
    resume(path)
    assert lines_of(path)[-1]["digest"] == lines_of(run(config))[-1]["digest"]


class TestSaveTo:
    def test_the_best_the_last_and_every_nth_round(self, world: World) -> None:
        place = world.root / "a folder" / "not there yet" / "trained"
        config = world.config({**_OVERFITS, "federate.save_to": f"{place}.ckpt", "federate.save_freq": 2})
        path = run(config)
        names = {item.name for item in place.parent.iterdir()} - {"base_model"}
        assert names == {"trained", "final_trained", "2_trained", "4_trained"}
        assert equal(place, path / "adapter") and equal(place.with_name("final_trained"), path / "adapter-last")
        assert measured(path, str(place.with_name("2_trained.ckpt"))) == lines_of(path)[2]["eval"]
        run(config)  # what a run saved is replaced
        assert equal(place, path / "adapter")

    @pytest.mark.parametrize("taken", ["file", "folder"])
    def test_what_no_run_saved_is_not_replaced(self, world: World, taken: str) -> None:
        place = world.root / "mine"
        if taken == "folder":
            place.mkdir()
        (place / "work.txt" if taken == "folder" else place).write_text("years of work")
        with pytest.raises(ConfigError, match=r"federate.save_to .*mine exists and is not a folder that a run saved"):
            run(world.config({**_OVERFITS, "federate.save_to": str(place)}))

    def test_restore_from_starts_there(self, world: World) -> None:
        path = run(world.config(_OVERFITS))
        again = run(world.config({**_OVERFITS, "federate.restore_from": str(path / "adapter-last"), "expname": "b"}))
        assert lines_of(again)[0]["eval"] == lines_of(path)[-2]["eval"]

    def test_no_pickled_file_is_read(self, world: World) -> None:
        pickled = world.root / "trained.ckpt"
        torch.save({"cur_round": 1, "model": {}}, pickled)
        with pytest.raises(ConfigError, match=r"federate.restore_from .*pickled files are never read; name a folder"):
            run(world.config({**_OVERFITS, "federate.restore_from": str(pickled)}))

    def test_two_starts_are_one_too_many(self, world: World) -> None:
        two = {"federate.restore_from": "a", "fwdllm.init_adapter": "b"}
        with pytest.raises(ConfigError, match=r"restore_from 'a': contradicts fwdllm\.init_adapter 'b'"):
            run(world.config({**_OVERFITS, **two}))


def test_none_of_these_keys_is_said_to_mean_nothing_here() -> None:
    config = Config()
    config.federate.save_to, config.federate.restore_from, config.federate.save_freq = "a", "b", 2
    config.early_stop.patience, config.early_stop.delta, config.early_stop.improve_indicator_mode = 1, 0.1, "mean"
    config.eval.best_res_update_round_wise_key = "test_loss"
    assert config.ignored_keys() == []
    assert json.dumps(config.model_dump(mode="json"))
