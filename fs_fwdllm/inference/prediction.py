"""From texts to predictions: the training's own tokens, the training's own readout, and names in place of indices.

A text becomes tokens by the very :class:`~fs_fwdllm.data.tokenising.Tokeniser` that made the training examples, and is
read by the same :class:`~fs_fwdllm.model.objective.Objective`, so a prediction is what an evaluation would have
counted. The tokeniser wants labels, which a text to be classified has not: every row is given the first class, and
nobody looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fs_fwdllm.config import Config
from fs_fwdllm.data.batches import evaluation_batches
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.tokenising import Tokeniser
from fs_fwdllm.data.types import Example, Task
from fs_fwdllm.errors import DataError
from fs_fwdllm.evaluation.answers import BestSpans
from fs_fwdllm.model.objective import Objective

__all__ = ["Prediction", "Predictor", "answer_questions", "classify", "text_fields"]


class Predictor(Protocol):
    """What a prediction needs: :class:`~fs_fwdllm.inference.TrainedModel` has it."""

    @property
    def config(self) -> Config:
        """Makes the tokens."""

    @property
    def tokenizer(self) -> Any:
        """As the training used it."""

    @property
    def task(self) -> Task:
        """What the labels of the training meant."""

    @property
    def classes(self) -> tuple[str, ...]:
        """By name, in index order."""

    @property
    def objective(self) -> Objective:
        """The model's logits."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one text.

    Attributes:
        label: the likeliest class by its name; for a question the answer, cut from the context, empty if the model
            finds none; for a model of numbers the number. Empty for a text without a token, of which a model can say
            nothing.
        probabilities: ``{class: probability}`` in the order of the classes; empty for questions and numbers.
    """

    label: str
    probabilities: dict[str, float]

    @property
    def probability(self) -> float | None:
        """The probability of :attr:`label`; ``None`` where there are no probabilities."""
        return self.probabilities.get(self.label)


def text_fields(config: Config) -> list[str]:
    """The fields that make up a text, as the training's file has them."""
    return [part.strip() for part in config.fwdllm.data.text.split("+")]


def classify(trained: Predictor, table: Table, batch_size: int) -> list[Prediction]:
    """A prediction for every row of a table that has the training's text fields."""
    config = trained.config
    table.joined(config.fwdllm.data.text, "fwdllm.data.text")  # an absent text is told before a label is made up
    numbers = trained.task == "regression"
    placeholder = "0" if numbers else trained.classes[0]
    labelled = [{**record, config.fwdllm.data.label: placeholder} for record in table.records]
    groups, rows = _tokenised(trained, Table(table.source, labelled, table.numbers))
    predictions = [Prediction("", {}) for _ in range(len(table))]
    for index, outputs in zip(*_outputs(trained, groups, rows, batch_size), strict=True):
        if numbers:
            predictions[index] = Prediction(f"{float(outputs):.6g}", {})
            continue
        by_class = dict(zip(trained.classes, torch.softmax(outputs, dim=-1).tolist(), strict=True))
        predictions[index] = Prediction(max(by_class, key=by_class.__getitem__), by_class)
    return predictions


def _outputs(
    trained: Predictor, groups: list[list[Example]], rows: list[int], batch_size: int
) -> tuple[list[int], list[torch.Tensor]]:
    """The rows, those of like length together, and the model's outputs for each, ``[classes]``."""
    examples = [group[0] for group in groups]
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    found: list[torch.Tensor] = []
    for batch in evaluation_batches(examples, batch_size, trained.tokenizer.pad_token_id):
        found += trained.objective.on(batch).logits().cpu().unbind()
    return [rows[index] for index in order], found


def answer_questions(
    trained: Predictor, questions: Sequence[str], contexts: Sequence[str], batch_size: int
) -> list[Prediction]:
    """For each question the span of its context that the model points at."""
    records = list(_unanswered(questions, contexts))
    groups, _ = _tokenised(trained, Table("the questions", records, list(range(1, len(records) + 1))))
    spans = BestSpans()
    windows = [window for group in groups for window in group]
    for batch in evaluation_batches(windows, batch_size, trained.tokenizer.pad_token_id):
        spans.add(trained.objective.on(batch).logits(), batch.references)
    return [Prediction(spans.answers.get(record["id"], ""), {}) for record in records]


def _unanswered(questions: Sequence[str], contexts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, (question, context) in enumerate(zip(questions, contexts, strict=True), start=1):
        start = next((place for place, letter in enumerate(context) if not letter.isspace()), None)
        if start is None:
            raise DataError(f"the context of question {number} is empty; a question is answered from a text")
        placeholder = {"text": context[start], "answer_start": start}
        yield {"id": str(number), "question": question, "context": context, "answers": [placeholder]}


def _tokenised(trained: Predictor, table: Table) -> tuple[list[list[Example]], list[int]]:
    return Tokeniser(trained.config, trained.tokenizer, trained.task, list(trained.classes))(table)
