"""Runs that differ only in their seed are one; a legend says what differs; unlike tasks are warned of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fs_fwdllm.report import RunFolder, RunRecord, compare_runs
from fs_fwdllm.report.caption import caption_of
from fs_fwdllm.report.groups import RunGroup, group_runs
from tests.report.conftest import make_line
from tests.report.test_pictures import rows


def groups_of(*folders: RunFolder) -> list[RunGroup]:
    return group_runs([RunRecord.load(folder.path) for folder in folders])


def shifted(amount: float) -> Callable[[int], dict[str, Any]]:
    def line(number: int) -> dict[str, Any]:
        evaluation = {"loss": 1.0, "accuracy": 0.5 + amount, "majority_accuracy": 0.25}
        return make_line(number, eval=evaluation, upload_bytes=100 * number + round(10 * amount))

    return line


def test_seeds_are_one_line_with_mean_and_spread(write_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    runs = [write_run(4, finished=False, line=shifted(seed / 10), seed=seed) for seed in (1, 2, 3)]
    (group,) = groups_of(*runs)
    assert len(group.records) == 3 and "(3 seeds)" in group.label
    curve = group.curve("round", "eval.accuracy")
    assert curve.x == [1, 2, 3, 4]
    assert curve.y == pytest.approx([0.7] * 4) and curve.spread == pytest.approx([0.1] * 4)
    assert group.curve("bytes", "eval.accuracy").x[0] == pytest.approx(400 + 2)
    compared = compare_runs([run.path for run in runs], tmp_path / "c.png")
    assert rows(compared.result)["1 small and 2 more"]["end"] == "0.7000 ± 0.1"


def test_a_seed_that_comes_twice_is_not_averaged_with_itself(write_run: Callable[..., RunFolder]) -> None:
    """One run on two hosts: two curves, which the picture shows on top of each other."""
    first, second = groups_of(write_run(2, finished=False), write_run(2, finished=False))
    assert (first.label, second.label) == ("small", "small-2")
    assert not any(first.curve("round", "train_loss").spread)


def test_only_rounds_that_all_have_are_averaged(write_run: Callable[..., RunFolder]) -> None:
    (group,) = groups_of(write_run(3, seed=1, finished=False), write_run(5, seed=2, finished=False))
    assert group.curve("round", "train_loss").x == [1, 2, 3]


def test_a_label_says_what_differs_and_nothing_else(write_run: Callable[..., RunFolder]) -> None:
    rates = groups_of(
        write_run(1, finished=False, train={"optimizer": {"lr": 0.5}}),
        write_run(1, train={"optimizer": {"lr": 1e-5}}, seed=4),
    )
    assert [group.label for group in rates] == ["lr 0.5", "lr 1e-05"]
    adapter = {"use": True, "args": [{"adapter_package": "peft", "adapter_method": "lora", "r": 4}]}
    trained = groups_of(write_run(1, finished=False), write_run(1, finished=False, llm={"adapter": adapter}))
    assert [group.label for group in trained] == ["all parameters", "lora r=4"]


def test_a_fleet_is_called_by_all_its_ways(write_run: Callable[..., RunFolder]) -> None:
    fleet = [{"clients": [2], "slopes": "one_sided", "probes": 5}]
    mixed = {"estimator": "closed_form", "probes": 8, "fleet": fleet}
    first, second = groups_of(
        write_run(1, finished=False, fwdllm=mixed), write_run(1, finished=False, federate={"method": "FedSGD"})
    )
    assert first.label == "forward gradient (closed form, 8 scalars | one sided, 5 probes)"
    assert second.label.startswith("FedSGD (backpropagation)") and "fleet" not in second.label


def test_a_rate_that_was_found_is_told_instead_of_the_default(write_run: Callable[..., RunFolder]) -> None:
    given = write_run(2, finished=False, train={"optimizer": {"lr": 0.5}})
    found = write_run(2, finished=False, fwdllm={"estimator": "closed_form", "first_rate": "safe"})
    untold = write_run(
        1, finished=False, line=lambda number: make_line(number, learning_rate={}), fwdllm={"first_rate": "safe"}
    )
    assert "learning rate 0.5 (" in caption_of(RunRecord.load(given.path))
    assert "learning rate 0.2, found by the run (" in caption_of(RunRecord.load(found.path)), "of the first round"
    assert "learning rate found by the run (" in caption_of(RunRecord.load(untold.path))


def test_many_differences_are_counted_not_listed(write_run: Callable[..., RunFolder]) -> None:
    other = {
        "train": {"optimizer": {"lr": 0.5}, "local_update_steps": 3}, "dataloader": {"batch_size": 9},
        "llm": {"tok_len": 7}, "grad": {"grad_clip": 2.0}, "federate": {"method": "fedfwd", "client_num": 3},
    }  # fmt: skip
    first, _ = groups_of(write_run(1, finished=False), write_run(1, finished=False, **other))
    assert "more keys" in first.label and len(first.label) < 120


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": {"type": "other@transformers"}}, "model"),
        ({"data": {"type": "other.csv@text"}}, "data"),
        ({"data": {"splits": [0.5, 0.0, 0.5]}}, "split"),
        ({"data": {"subsample": 0.5}}, "data"),
        ({"fwdllm": {"probes": 8, "data": {"max_test_samples": 5}}}, "data"),
    ],
)
def test_runs_of_unlike_tasks_are_warned_of(
    write_run: Callable[..., RunFolder], tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    pair = [write_run(1, finished=False, **changes).path for changes in ({}, change)]
    assert f"differ in {word}" in compare_runs(pair, tmp_path / "c.png").warning
