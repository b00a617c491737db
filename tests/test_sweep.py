"""A sweep chooses on validation rows alone, loses no finished point, and survives those that diverge."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from fs_fwdllm.config import load_config
from fs_fwdllm.config.yaml_text import dump_yaml, parse_yaml
from fs_fwdllm.data.batches import collate
from fs_fwdllm.data.splitters import divide_shares
from fs_fwdllm.errors import ConfigError, TrainingStalledError
from fs_fwdllm.running.session import Session
from fs_fwdllm.sweep import Outcome, Point, best_of, parse_grid, row_noise, run_sweep, settings_of, warnings_of
from tests.host.fixtures import models, world
from tests.host.small import World, read_jsonl

__all__ = ["models", "world"]

LR = "train.optimizer.lr"


@pytest.fixture
def cfg(world: World) -> Path:
    """A file of a user's: FedAvg on made-up sentences, test rows but no validation rows."""
    path = world.root / "mine.yaml"
    changes = {"federate.method": "FedAvg", "federate.total_round_num": 3, "train.local_update_steps": 2}
    tree = world.tree({**changes, "outdir": "elsewhere", "data.subsample": 1.0})
    del tree["expname"], tree["seed"]
    path.write_text(dump_yaml(tree), encoding="utf-8")
    return path


@pytest.fixture
def sweep(cfg: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command on that file, on a terminal of 80 columns, with its result below ``out``."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    given = ["sweep", str(cfg)]
    return lambda *words: CliRunner().invoke(app, [*given, *map(str, words), "--out", str(world.root / "out")])


# Words to points


def test_keys_with_several_values_are_axes_and_those_with_one_are_set() -> None:
    grid = parse_grid(["data.root", "x y", LR, "0.1", "1", "-1", "fwdllm.probes", "2", "4", "seed", "3", "4"])
    assert grid.fixed == (("data.root", "x y"),)
    assert grid.axes == ((LR, ("0.1", "1", "-1")), ("fwdllm.probes", ("2", "4")))
    assert grid.seeds == (3, 4)
    assert len(grid.points()) == 12 == len({point.name for point in grid.points()})


def test_a_value_is_what_stands_behind_a_key_whatever_it_looks_like() -> None:
    grid = parse_grid(["data.root", "seed", "seed", "1", "2"])
    assert grid.fixed == (("data.root", "seed"),) and grid.seeds == (1, 2)


def test_sections_of_other_packages_have_keys_below_them() -> None:
    assert parse_grid(["fwdllm.ext.mine.depth", "1", "2"]).axes == (("fwdllm.ext.mine.depth", ("1", "2")),)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["train.optimiser.lr", "1", "2"], "did you mean 'train.optimizer.lr'"),
        ([LR, "1", "2", "fwdllm.prbes", "3"], "'fwdllm.prbes': is no key.*did you mean 'fwdllm.probes'"),
        ([LR], "stands without a value"),
        ([LR, "1", "2", LR, "3"], "stands twice"),
        ([LR, "1"], "nothing to compare"),
        ([LR, "1", "1"], "nothing to compare"),
        ([], "nothing to compare"),
        (["eval.split", "[test]", "seed", "1", "2"], "chooses on validation rows"),
        (["outdir", "x", "seed", "1", "2"], "--out"),
        (["seed", "1", "x"], "whole number"),
    ],
)
def test_a_wrong_grid_is_explained(words: list[str], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        parse_grid(words)


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=3), st.integers(0, 99))
def test_a_points_folder_is_one_name_and_its_own(values: list[str], seed: int) -> None:
    point = Point(tuple((f"k{index}", value) for index, value in enumerate(values)), seed)
    other = Point((*point.values[:-1], (point.values[-1][0], point.values[-1][1] + "_")), seed)
    assert Path(point.name).name == point.name and len(point.name.encode()) < 255
    assert point.name != other.name


# Which rows


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.05, 0.2, 0.4]),
)
def test_test_rows_do_not_depend_on_the_share_of_validation(sizes: list[int], test: float, held_out: float) -> None:
    starts = np.cumsum([0, *sizes])
    parts = [np.arange(first, last) for first, last in pairwise(starts)]
    without = divide_shares(parts, (round(1 - test, 9), 0.0, test), 3)
    with_some = divide_shares(parts, (round(1 - test - held_out, 9), held_out, test), 3)
    for (train, _, tested), (less, chosen, tested_too) in zip(without, with_some, strict=True):
        assert tested.tolist() == tested_too.tolist()
        assert sorted([*less, *chosen]) == train.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"data.splits": [0.6, 0.2, 0.2]}, {"fwdllm.data.test_file": "more.jsonl"}])
def test_a_point_is_judged_on_rows_that_are_not_tested_on(world: World, cfg: Path, given: dict[str, Any]) -> None:
    world.texts(20, "more.jsonl")
    words = [word for key, value in given.items() for word in (key, str(value))]
    grid = parse_grid([*words, LR, "0.1", "1"])
    own = Session.open(load_config(cfg, words))
    tried = Session.open(grid.configuration(cfg, grid.points()[0], world.root, 0.1))

    def rows(examples: list[Any]) -> list[tuple[int, ...]]:
        return sorted(tuple(example.input_ids) for example in examples)

    assert rows(tried.data.test) == rows(own.data.test)
    assert tried.config.eval.split == ["val"] and tried.data.val
    assert sum(map(len, tried.evaluation_batches)) == len(tried.data.val)
    held = [row for data in (own.data, tried.data) for row in [sorted(rows(_train(data)) + rows(data.val))]]
    assert held[0] == held[1], "training and validation rows together are the file's own"


def _train(data: Any) -> list[Any]:
    return [example for client in data.clients.values() for example in client.train]


def test_too_large_a_share_is_refused(cfg: Path, world: World) -> None:
    grid = parse_grid([LR, "0.1", "1"])
    with pytest.raises(ConfigError, match=r"data.splits \[0.8, 0.0, 0.2\].*--validation"):
        grid.configuration(cfg, grid.points()[0], world.root, 0.8)


# Runs


def test_from_the_command_to_a_configuration_that_runs(sweep: Callable[..., Result], cfg: Path, world: World) -> None:
    done = sweep(LR, "0.001", "0.05", "--seeds", 1, 2, "federate.total_round_num", 2)
    assert done.exit_code == 0, done.output
    assert max(map(len, (line for line in done.output.splitlines() if line[:1] in "┏┃┡│└"))) <= 80
    assert "5 validation rows" in done.output and "standard error" in done.output
    points = list(csv.DictReader((world.root / "out" / "sweep.csv").open()))
    assert [(row[LR], row["seed"]) for row in points] == [(lr, s) for lr in ("0.001", "0.05") for s in "12"]
    for row in points:
        evaluated = [line["eval"] for line in read_jsonl(world.root / "out" / row["folder"] / "metrics.jsonl")[:-1]]
        assert float(row["loss"]) == evaluated[-1]["loss"]
    means = {lr: statistics.fmean(float(row["loss"]) for row in points if row[LR] == lr) for lr in ("0.001", "0.05")}
    best = load_config(world.root / "out" / "best.yaml")
    chosen = min(means, key=lambda lr: means[lr])
    assert best == load_config(cfg, [LR, chosen]), "nothing of the trial is left but the value"
    text = (world.root / "out" / "best.yaml").read_text()
    assert text.startswith("# Written by fs-fwdllm sweep") and "federate.total_round_num 2" in text


@pytest.mark.slow
def test_what_is_finished_is_not_run_again_and_more_values_add_to_it(
    sweep: Callable[..., Result], world: World
) -> None:
    sweep(LR, "0.01", "0.05")
    before = {path: path.stat().st_mtime_ns for path in (world.root / "out").rglob("metrics.jsonl")}
    done = sweep(LR, "0.01", "0.03", "0.05")
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert done.output.count("as it was") == 2
    assert len(list((world.root / "out").rglob("metrics.jsonl"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("left", ["a checkpoint", "a folder"])
def test_an_unfinished_point_ends_as_if_it_had_not_been_stopped(
    sweep: Callable[..., Result], world: World, left: str
) -> None:
    sweep(LR, "0.01", "0.05", "fwdllm.checkpoint_every", 1)
    folder = world.root / "out" / f"{LR}=0.05,seed=0"
    lines = read_jsonl(folder / "metrics.jsonl")
    written = "".join(json.dumps(line) + "\n" for line in lines if not line.get("final"))
    (folder / "metrics.jsonl").write_text(written if left == "a checkpoint" else "")
    if left == "a folder":
        shutil.rmtree(folder / "checkpoint")
    done = sweep(LR, "0.01", "0.05", "fwdllm.checkpoint_every", 1)
    assert done.exit_code == 0, done.output
    again = read_jsonl(folder / "metrics.jsonl")
    assert again[-1]["final"] and again[-1]["digest"] == lines[-1]["digest"]
    assert [line["eval"] for line in again[:-1]] == [line["eval"] for line in lines[:-1]]


def test_a_point_that_diverges_is_a_row_and_is_not_tried_again(sweep: Callable[..., Result], world: World) -> None:
    given = (LR, "0.05", "1e30", "fwdllm.max_failed_rounds", 1)
    done = sweep(*given)
    assert done.exit_code == 0, done.output
    assert "diverged" in done.output and f"{LR} 0.05, " in done.output
    assert f"{LR} 0.05 is the smallest that was tried" in " ".join(done.output.split())
    again = sweep(*given)
    assert again.output.count("as it was") == 2


@pytest.mark.slow
def test_where_all_diverge_there_is_no_best(sweep: Callable[..., Result], world: World) -> None:
    done = sweep(LR, "1e29", "1e30")
    assert done.exit_code == 2 and "no setting ended" in done.stderr and "diverged" in done.output
    assert not (world.root / "out" / "best.yaml").exists() and (world.root / "out" / "sweep.csv").exists()


@pytest.mark.slow
def test_another_configurations_runs_are_not_taken_for_these(sweep: Callable[..., Result]) -> None:
    sweep(LR, "0.01", "0.05")
    done = sweep(LR, "0.01", "0.05", "dataloader.batch_size", 3)
    assert done.exit_code == 2 and "another dataloader.batch_size" in done.stderr


def test_what_every_point_would_fail_at_is_told_once(sweep: Callable[..., Result]) -> None:
    done = sweep(LR, "0.01", "0.05", "data.root", "nowhere")
    assert done.exit_code == 2 and "nowhere" in done.stderr and "[1/2]" not in done.output


def test_a_value_that_cannot_be_is_refused_before_the_first_run(sweep: Callable[..., Result], world: World) -> None:
    done = sweep("federate.sample_client_num", "2", "x")
    assert done.exit_code == 2 and "federate.sample_client_num" in done.stderr
    assert not (world.root / "out").exists()


@pytest.mark.slow
def test_a_metric_that_there_is_not_is_named(sweep: Callable[..., Result]) -> None:
    done = sweep(LR, "0.01", "0.05", "--by", "acuracy")
    assert done.exit_code == 2 and "did you mean 'accuracy'" in done.stderr


# The choice


def outcome(lr: str, seed: int, loss: float, accuracy: float = 0.5, problem: str = "") -> Outcome:
    end = {"loss": loss, "accuracy": accuracy}
    return Outcome(Point(((LR, lr),), seed), Path(), {"loss": 2.0, "accuracy": 0.3}, end, "accuracy", 1, 1, problem)


def test_the_best_has_the_best_mean_and_ended_with_every_seed() -> None:
    found = [
        outcome("1", 1, 0.9, 0.6), outcome("1", 2, 1.3, 0.6),
        outcome("2", 1, 1.0, 0.5), outcome("2", 2, 1.0, 0.5),
        outcome("3", 1, 0.1, 0.9), outcome("3", 2, math.nan, 0.9, "diverged"),
    ]  # fmt: skip
    groups = settings_of(found)
    assert dict(best_of(groups, "loss").values) == {LR: "2"}
    assert dict(best_of(groups, "accuracy").values) == {LR: "1"}
    assert groups[0].mean("loss") == pytest.approx(1.1) and groups[0].deviation("loss") == pytest.approx(0.08**0.5)
    assert "diverged" in groups[2].problem
    with pytest.raises(TrainingStalledError, match="no setting ended"):
        best_of(groups[2:], "loss")


@pytest.mark.parametrize(
    ("values", "chosen", "said"),
    [
        (("1", "2", "3"), "2", []),
        (("3", "1", "2"), "1", ["smallest"]),
        (("1e-3", "1e-2"), "1e-2", ["largest"]),
        (("sgd", "adam"), "adam", []),
    ],
)
def test_a_best_value_at_the_end_of_its_axis_is_told(values: tuple[str, ...], chosen: str, said: list[str]) -> None:
    best = settings_of([outcome(chosen, 1, 1.0)])[0]
    told = warnings_of(best, [(LR, values)], "loss")
    assert len(told) == len(said) and all(word in line for word, line in zip(said, told, strict=True))


def test_that_nothing_is_learned_is_told() -> None:
    best = settings_of([outcome("2", 1, 2.0, 0.3)])[0]
    for metric in ("loss", "accuracy"):
        assert "nothing is learned" in warnings_of(best, [(LR, ("1", "2", "3"))], metric)[0]


@pytest.mark.slow
@pytest.mark.parametrize("language_model", [False, True])
def test_the_standard_error_is_that_of_rows(world: World, language_model: bool, tmp_path: Path) -> None:
    """Against one row at a time; where a row is one label the ratio is a plain mean."""
    tree = world.tree({"federate.method": "FedAvg", "federate.total_round_num": 2}, language_model=language_model)
    path = tmp_path / "a.yaml"
    path.write_text(dump_yaml(tree))
    grid = parse_grid([LR, "0.01", "0.05"])
    outcomes = run_sweep(path, grid, tmp_path / "out", 0.3, lambda line: None)
    loss = outcomes[0].end["loss"]
    rows, error = row_noise(outcomes[0].folder, "loss", loss)
    session = Session.open(load_config(outcomes[0].folder / "config.yaml"))
    sums, labels = _row_by_row(session, outcomes[0].folder)
    assert rows == len(sums) and math.fsum(sums) / sum(labels) == pytest.approx(loss, rel=1e-5)
    residuals = [amount - loss * count for amount, count in zip(sums, labels, strict=True)]
    expected = statistics.stdev([*residuals]) / math.sqrt(rows) / statistics.fmean(labels)
    assert error == pytest.approx(expected, rel=0.02)
    assert row_noise(outcomes[0].folder, "accuracy", 0.25)[1] == pytest.approx(math.sqrt(0.1875 / rows))


def _row_by_row(session: Session, folder: Path) -> tuple[list[float], list[int]]:
    from fs_fwdllm.method import assemble_server
    from fs_fwdllm.report import RunFolder
    from fs_fwdllm.running.driver import read_own_checkpoint

    server = assemble_server(session.parts, session.client_samples)
    checkpoint = read_own_checkpoint(RunFolder.open(folder))
    server.load_state(checkpoint.tensors, checkpoint.numbers)
    sums, labels = [], []
    with session.at(server.trainables), torch.no_grad():
        for example in session.data.val:
            loss = session.parts.objective.on(collate([example], session.loaded.tokenizer.pad_token_id))
            labels.append(len(loss.targets))
            sums.append(float(loss.here()) * labels[-1])
    return sums, labels


# config keys, config show


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1"})


def test_every_key_is_listed_once_with_what_it_means_and_fits_the_terminal() -> None:
    from fs_fwdllm.config.keys import schema_keys

    done = call("config", "keys")
    assert done.exit_code == 0 and max(map(len, done.output.splitlines())) <= 80
    heads = [line.partition(":")[0] for line in done.output.splitlines() if not line.startswith(" ")]
    for key in schema_keys():
        assert heads.count(key.name) == 1, key.name
        assert key.description or key.hosts == "FederatedScope only", f"{key.name} says nothing of itself"
    shown = parse_yaml(call("config", "show", "demo").output)
    assert {key.name.split(".")[0] for key in schema_keys()} >= set(shown)


@pytest.mark.parametrize(
    ("pattern", "wanted", "other"),
    [("optimizer.lr", LR, "seed"), ("fwdllm.gate.*", "fwdllm.gate.kind", "fwdllm.probes"), ("PEFT", "llm.adapter", LR)],
)
def test_keys_are_found_by_name_pattern_and_meaning(pattern: str, wanted: str, other: str) -> None:
    heads = [line.partition(":")[0] for line in call("config", "keys", pattern).output.splitlines()]
    assert any(head.startswith(wanted) for head in heads) and other not in heads


def test_an_unknown_pattern_is_an_error_with_the_nearest_key() -> None:
    done = call("config", "keys", "train.optimiser.lr")
    assert done.exit_code == 2 and "did you mean 'train.optimizer.lr'" in done.stderr


def test_what_is_shown_is_what_would_run(tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    for words in (["demo"], ["--cfg", "demo"]):
        path.write_text(call("config", "show", *words, LR, "0.3").output)
        assert load_config(path) == load_config("demo", [LR, "0.3"])


# Words of other commands


def test_run_takes_the_file_as_its_first_word(tmp_path: Path) -> None:
    done = call("run", "dmeo", "seed", "7")
    assert done.exit_code == 2 and "did you mean 'demo'" in done.stderr
    done = call("plan", str(tmp_path / "none.yaml"))
    assert done.exit_code == 2 and "No such file" in done.stderr


@pytest.mark.parametrize("named", [["demo"], ["--cfg", "demo"]])
def test_a_list_that_the_shell_has_cut_is_put_together_in_the_advice(named: list[str]) -> None:
    for words in (["[exact_match,", "f1]"], ["[a,", "b,", "c]"]):
        done = call("plan", *named, "eval.metrics", *words)
        assert done.exit_code == 2 and f"quoted: '{' '.join(words)}'" in done.stderr
    done = call("plan", *named, "seed")
    assert done.exit_code == 2 and "'seed' stands alone" in done.stderr and "quoted" in done.stderr


def _commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    found = []
    for name, command in group.commands.items():
        deeper = (*path, name)
        found += _commands(command, deeper) if hasattr(command, "commands") else [(" ".join(deeper), command.help)]
    return found


def test_every_commands_help_has_an_example() -> None:
    found = dict(_commands(typer.main.get_command(app)))
    assert {"run", "config keys", "sweep"} <= set(found)
    for name, text in found.items():
        # The tree below fedml is FedML's own.
        assert name == "fedml" or f"Example: fs-fwdllm {name} " in f"{text} ".replace("\n", " "), name
