"""What a file of rows holds, before anybody trains on it: its format, classes, gaps, repetitions and lengths.

Two rows repeat each other when their texts are the same but for case, punctuation and white space. Such rows fall into
training and test alike, where they make a result look better than it is; with different labels they contradict.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fs_fwdllm.config.own_sections import FwdllmDataConfig
from fs_fwdllm.data.conversations import MESSAGES, as_conversations, form_of, recognise
from fs_fwdllm.data.labels import is_empty_label, label_numbers, look_like_numbers, similar_names
from fs_fwdllm.data.table import Table, name_of
from fs_fwdllm.data.templates import choose_template
from fs_fwdllm.data.whole_text import token_ids
from fs_fwdllm.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FileFacts", "inspect_table", "normal_text"]

_NOT_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class FileFacts:
    """What was found in a file.

    Attributes:
        format: in words.
        kind: the ``@KIND`` of ``data.type`` that reads it.
        rows: how many there are.
        fields: names of the first row's fields.
        classes: rows per class; empty where there are no labels.
        numbers: the labels, where they are numbers rather than classes.
        similar: groups of classes that differ only by case and white space.
        empty_labels, empty_texts: numbers of such rows in the file, from 1.
        repeated: groups of numbers of rows whose texts repeat each other.
        contradicting: those of these groups that have different labels.
        characters: length of each row's text.
        tokens: length of each row as the model reads it, special tokens included; empty without a tokenizer.
        prompt_tokens: tokens before the first answer of each row; empty without a tokenizer, or without answers.
        turns: answers of each row; empty where there are none.
    """

    format: str
    kind: str
    rows: int
    fields: list[str]
    classes: Counter[str] = field(default_factory=Counter)
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0))
    similar: list[list[str]] = field(default_factory=list)
    empty_labels: list[int] = field(default_factory=list)
    empty_texts: list[int] = field(default_factory=list)
    repeated: list[list[int]] = field(default_factory=list)
    contradicting: list[list[int]] = field(default_factory=list)
    characters: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    prompt_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    turns: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def inspect_table(
    table: Table, own: FwdllmDataConfig, kind: str = "", tokenizer: PreTrainedTokenizerBase | None = None
) -> FileFacts:
    """Look at the rows of a table.

    Args:
        own: names the fields of text and label, and the template.
        kind: ``llm``, ``text`` or ``qa``; empty goes by the fields.
        tokenizer: counts tokens.

    Raises:
        DataError: the rows have neither a known combination of fields nor those that ``own`` names.
    """
    fields = [name for name in table.records[0] if table.has(name) and not name.startswith("fs_fwdllm ")]
    if kind == "text" or (not kind and _has(table, own.text) and _has(table, own.label)):
        return _texts(table, own, fields, tokenizer)
    try:
        layout = recognise(table)
    except DataError as error:
        missing = next(name for name in (own.text, own.label) if not _has(table, name))
        raise DataError(
            f"{error}; for texts with labels name the fields (fwdllm.data.text and fwdllm.data.label, here --text and "
            f"--label): there is no {missing!r}{nearest(missing, fields)}"
        ) from error
    if layout.name == "squad" and kind != "llm":
        return _questions(table, fields, tokenizer)
    return _conversations(as_conversations(table, layout), layout.name, own, fields, tokenizer)


def normal_text(text: str) -> str:
    """A text without case, punctuation and the width of white space."""
    return _NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _has(table: Table, names: str) -> bool:
    return table.has(names) or any(table.has(part.strip()) for part in names.split("+"))


def _texts(
    table: Table, own: FwdllmDataConfig, fields: list[str], tokenizer: PreTrainedTokenizerBase | None
) -> FileFacts:
    parts = [part.strip() for part in own.text.split("+")] if not table.has(own.text) else [own.text]
    parts += [own.text_pair] if own.text_pair else []
    for part in (*parts, own.label):
        if not table.has(part):
            table.column(part)
    texts = [" ".join(str(record[part]) for part in parts if record.get(part) is not None) for record in table.records]
    labels = ["" if is_empty_label(record.get(own.label)) else name_of(record[own.label]) for record in table.records]
    classes = Counter(label for label in labels if label)
    numbers: list[float] = []
    if own.regression or look_like_numbers(classes):
        numbers = label_numbers(table.take(row for row, label in enumerate(labels) if label), own.label)
    repeated = _repeated(table, texts)
    label_of = dict(zip(table.numbers, labels, strict=True))
    return FileFacts(
        format=f"texts ({own.text}) with labels ({own.label})",
        kind="text",
        rows=len(table),
        fields=fields,
        classes=classes,
        numbers=np.array(numbers),
        similar=similar_names(list(classes)),
        empty_labels=[number for number, label in label_of.items() if not label],
        empty_texts=_empty(table, texts),
        repeated=repeated,
        contradicting=[group for group in repeated if len({label_of[number] for number in group} - {""}) > 1],
        characters=_lengths(texts),
        tokens=_lengths(list(token_ids(tokenizer, texts))) if tokenizer is not None else _lengths([]),
    )


def _questions(table: Table, fields: list[str], tokenizer: PreTrainedTokenizerBase | None) -> FileFacts:
    questions, contexts = table.texts("question"), table.texts("context")
    texts = [f"{question} {context}" for question, context in zip(questions, contexts, strict=True)]
    return FileFacts(
        format="questions with a context (SQuAD)",
        kind="qa",
        rows=len(table),
        fields=fields,
        empty_texts=_empty(table, questions),
        repeated=_repeated(table, texts),
        characters=_lengths(texts),
        tokens=_lengths(list(token_ids(tokenizer, questions, contexts))) if tokenizer is not None else _lengths([]),
    )


def _conversations(
    table: Table, name: str, own: FwdllmDataConfig, fields: list[str], tokenizer: PreTrainedTokenizerBase | None
) -> FileFacts:
    messages = [record[MESSAGES] for record in table.records]
    texts = [" ".join(message["content"] + message.get("input", "") for message in row) for row in messages]
    answers = [[message["content"] for message in row if message["role"] == "assistant"] for row in messages]
    encoded = []
    if tokenizer is not None:
        template = choose_template(own.template, form_of(table), tokenizer)
        encoded = template.encode([template.render(row) for row in messages])
    return FileFacts(
        format=f"{form_of(table)}s ({name})",
        kind="llm",
        rows=len(table),
        fields=fields,
        empty_texts=[table.numbers[row] for row, said in enumerate(answers) if not all(text.strip() for text in said)],
        repeated=_repeated(table, texts),
        characters=_lengths(texts),
        tokens=_lengths([tokens for tokens, _ in encoded]),
        prompt_tokens=np.array([taught.index(True) if True in taught else len(taught) for _, taught in encoded]),
        turns=_lengths(answers),
    )


def _lengths(values: Sequence[Sequence[object]]) -> np.ndarray:
    return np.array([len(value) for value in values], dtype=np.int64)


def _empty(table: Table, texts: Sequence[str]) -> list[int]:
    return [number for number, text in zip(table.numbers, texts, strict=True) if not text.strip()]


def _repeated(table: Table, texts: Sequence[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for number, text in zip(table.numbers, texts, strict=True):
        groups.setdefault(normal_text(text) or text.strip(), []).append(number)
    return [group for text, group in groups.items() if text and len(group) > 1]
