"""What a classifier makes of each class: rows, precision, recall and F1, from the confusion counts of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from fs_fwdllm.report.record import RunRecord
from fs_fwdllm.report.terminal import compact_table

__all__ = ["ClassScore", "class_scores", "class_table", "scores_of"]


@dataclass(frozen=True)
class ClassScore:
    """One class: its evaluation rows, and shares that are ``None`` where they are 0/0."""

    name: str
    rows: int
    precision: float | None
    recall: float | None
    f1: float | None


def class_scores(record: RunRecord) -> list[ClassScore]:
    """The classes of a run's last evaluation that has ``per_class``; none if there is no such evaluation."""
    evaluations = (line.get("eval") or {} for line in reversed(record.rounds))
    found = next((evaluation["per_class"] for evaluation in evaluations if evaluation.get("per_class")), None)
    return scores_of(found) if found else []


def scores_of(per_class: Mapping[str, Any]) -> list[ClassScore]:
    """The classes of an evaluation's ``per_class``."""
    table = per_class["confusion"]
    return [_score(name, table, code) for code, name in enumerate(per_class["labels"])]


def _score(name: str, table: list[list[int]], code: int) -> ClassScore:
    right, rows, answers = table[code][code], sum(table[code]), sum(row[code] for row in table)
    return ClassScore(
        name=name,
        rows=rows,
        precision=right / answers if answers else None,
        recall=right / rows if rows else None,
        f1=2 * right / (rows + answers) if rows + answers else None,
    )


def class_table(scores: list[ClassScore]) -> Table:
    """One line a class."""
    table = compact_table("class", "rows", "precision", "recall", "F1", title="classes")
    for score in scores:
        shares = ("-" if value is None else f"{value:.3f}" for value in (score.precision, score.recall, score.f1))
        table.add_row(Text(score.name), f"{score.rows:,}", *shares)
    return table
