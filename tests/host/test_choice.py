"""By what rounds are compared, and when comparing them ends a run: FederatedScope's rules, as functions of values."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fs_fwdllm.config import Config
from fs_fwdllm.config.host_sections import EarlyStopConfig
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.running.choice import Choice, choose, is_time_to_stop


def config(key: str = "val_loss", split: list[str] | None = None) -> Config:
    chosen = Config()
    chosen.eval.best_res_update_round_wise_key = key
    chosen.eval.split = ["test", "val"] if split is None else split
    return chosen


@pytest.mark.parametrize(
    ("key", "splits", "expected"),
    [
        ("val_loss", {"val", "test"}, Choice("val", "loss", False)),
        ("val_loss", {"val"}, Choice("val", "loss", True)),
        ("val_loss", {"test"}, Choice("test", "loss", True)),
        ("test_acc", {"val", "test"}, Choice("test", "accuracy", True)),
        ("val_avg_loss", {"val", "test"}, Choice("val", "loss", False)),
        ("val_macro_f1", {"val", "test"}, Choice("val", "macro_f1", False)),
        ("val_loss", set(), None),
    ],
)
def test_a_validation_split_chooses_wherever_there_is_one(key: str, splits: set[str], expected: Choice | None) -> None:
    assert choose(config(key), "classification", splits) == expected


def test_a_validation_split_chooses_though_only_the_test_split_is_reported() -> None:
    chosen = choose(config(split=["test"]), "classification", {"val", "test"})
    assert chosen is not None and chosen.key == "val_loss" and not chosen.is_reported


@pytest.mark.parametrize("key", ["loss", "train_loss", "val", "val_", "", "val_token_accuracy", "val_per_class", "x_y"])
def test_a_key_that_means_nothing_here_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=r"eval\.best_res_update_round_wise_key"):
        choose(config(key), "classification", {"val", "test"})


def test_losses_fall_and_accuracies_rise() -> None:
    loss, accuracy = Choice("val", "loss", False), Choice("val", "accuracy", False)
    assert loss.is_better(0.4, 0.5) and not loss.is_better(0.5, 0.5) and not loss.is_better(0.6, 0.5)
    assert accuracy.is_better(0.6, 0.5) and not accuracy.is_better(0.5, 0.5)
    for choice in (loss, accuracy):
        assert choice.is_better(1.0, None) and choice.is_better(1.0, math.nan)
        assert not choice.is_better(math.nan, None) and not choice.is_better(math.nan, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "high"])
def test_what_is_no_finite_number_is_never_the_best(value: Any) -> None:
    choice = Choice("val", "loss", False)
    found = choice.value_in({"loss": 1.0, "val_loss": value})
    assert found is not None and math.isnan(found)
    assert choice.value_in(None) is None


def stops_after(values: list[float], *, lower_is_better: bool = True, **settings: Any) -> int | None:
    """The number of evaluations after which a run ends; ``None`` if it goes on."""
    chosen = EarlyStopConfig(**settings)
    counts = range(1, len(values) + 1)
    decided = (n for n in counts if is_time_to_stop(values[:n], chosen, lower_is_better=lower_is_better))
    return next(decided, None)


def test_patience_counts_evaluations_in_a_row_without_improvement() -> None:
    assert stops_after([3, 2, 2.5, 2.4, 2.3, 1], patience=3) == 5
    assert stops_after([3, 2, 2.5, 2.4, 1.9, 2, 2], patience=3) is None
    assert stops_after([3, 2.9, 2.8, 2.7], patience=2, delta=0.5) == 3
    assert stops_after([1, 2, 1, 1], patience=3, lower_is_better=False) is None
    assert stops_after([1, 2, 1, 1, 1], patience=3, lower_is_better=False) == 5
    assert stops_after([1] * 50, patience=0) is None


def test_a_value_that_is_not_finite_improves_on_nothing() -> None:
    assert stops_after([1, math.nan, math.nan, 0.5], patience=2) == 3
    assert stops_after([math.nan, math.nan, math.nan, 0.5], patience=2) == 3
    assert stops_after([1, 1, math.nan], patience=2, improve_indicator_mode="mean") == 3
