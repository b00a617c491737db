"""One metric is printed, drawn and compared: the first that was asked for; and what it is to be compared with stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from fs_fwdllm.config.host_sections import EvalConfig
from fs_fwdllm.report import RunFolder, RunRecord, compare_runs
from fs_fwdllm.report.classes import class_scores
from fs_fwdllm.report.record import evaluation_metric
from tests.report.conftest import make_line
from tests.report.test_pictures import rows

ALL = {"loss": 1.0, "accuracy": 0.5, "majority_accuracy": 0.4, "macro_f1": 0.3, "mcc": 0.2}
SQUAD = {"loss": 1.0, "exact_match": 0.5, "f1": 0.6}


@pytest.mark.parametrize(
    ("metrics", "evaluation", "expected"),
    [
        ([], ALL, "accuracy"),
        ([], SQUAD, "f1"),
        ([], {"loss": 1.0}, "loss"),
        ([], {}, None),
        (["macro_f1", "acc"], {"loss": 1.0, "macro_f1": 0.3, "accuracy": 0.5}, "macro_f1"),
        (["binary_f1", "acc"], {"loss": 1.0, "binary_f1": 0.7, "accuracy": 0.5}, "binary_f1"),
        (["loss", "acc"], {"loss": 1.0, "accuracy": 0.5}, "loss"),
        (["avg_loss"], {"loss": 1.0, "perplexity": 2.0}, "loss"),
        (["per_class", "mcc"], {"loss": 1.0, "per_class": {}, "mcc": 0.1, "majority_accuracy": 0.5}, "mcc"),
        (["per_class"], {"loss": 1.0, "per_class": {}, "majority_accuracy": 0.5}, "loss"),
        (["rmse"], {"loss": 1.0, "rmse": 0.5}, "rmse"),
        (["mcc"], {"loss": 1.0, "mcc": None}, "loss"),
    ],
)
def test_the_first_that_was_asked_for(metrics: list[str], evaluation: dict[str, Any], expected: str | None) -> None:
    assert evaluation_metric(evaluation, EvalConfig(metrics=metrics)) == expected


def asked_for(number: int) -> dict[str, Any]:
    scores = {"macro_f1": 0.1 * number, "accuracy": 0.5, "majority_accuracy": 0.25, "majority_macro_f1": 0.125}
    confusion = [[3, 1, 0], [2, 2, 0], [0, 0, 0]]
    per_class = {"labels": ["a", "b_[red]", "never"], "confusion": confusion, "recall": [0.75, 0.5, None]}
    return make_line(number, eval={"loss": 1.0, **scores, "per_class": per_class})


def test_it_is_printed_and_compared_and_the_most_frequent_class_beside_it(
    write_run: Callable[..., RunFolder], quiet: Console, tmp_path: Any
) -> None:
    folder = write_run(3, line=asked_for, eval={"metrics": ["macro_f1", "acc", "per_class"]})
    printed = quiet.file.getvalue()  # type: ignore[attr-defined]
    assert "macro-F1 0.3000" in printed and "accuracy 0.5" not in printed
    assert printed.count("always answering the most frequent class reaches macro-F1 0.1250") == 1
    compared = compare_runs([folder.path], tmp_path / "c.png")
    (row,) = rows(compared.result).values()
    assert (row["end"], row["best"], row["majority"]) == ("0.3000", "0.3000", "0.1250")
    assert "b_[red]" in printed


def test_classes_by_hand(write_run: Callable[..., RunFolder]) -> None:
    """Of class a, 3 of 4 rows are found, in 5 answers; the last class has neither rows nor answers."""
    a, b, never = class_scores(RunRecord.load(write_run(1, finished=False, line=asked_for).path))
    assert (a.rows, a.recall, a.precision) == (4, 0.75, 0.6)
    assert a.f1 == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    assert b.f1 == pytest.approx(4 / 7)
    assert (never.rows, never.precision, never.recall, never.f1) == (0, None, None, None)
