"""Questions about a context: SQuAD's file, and the windows an encoder reads to find an answer in it.

A row is a question: ``context``, ``question``, ``answers`` (a list of ``{"text", "answer_start"}``, the first of which
is taught), ``id`` and ``title`` (the article, a natural owner). JSON lines may hold such rows directly, also with the
lists that Hugging Face's copies have (``{"text": [...], "answer_start": [...]}``). A question with an empty list of
answers, or marked ``is_impossible``, has none (SQuAD v2).

An encoder reads question and context together. A context that does not fit is read in windows that overlap by
``stride`` tokens, so that every answer is whole in one of them. A window in which the taught answer is not whole has
the label ``-100``: it teaches nothing, and its scores still compete when the question is answered. Where some questions
have no answer, every window without one is taught to point at its first special token (BERT's ``[CLS]``), as in Devlin
et al., arXiv:1810.04805.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fs_fwdllm.data.table import Table, name_of
from fs_fwdllm.data.types import IGNORED_LABEL, Example, Reference
from fs_fwdllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["gold_answers", "has_unanswerable", "is_squad_document", "question_names", "span_examples", "squad_rows"]

logger = logging.getLogger("fs_fwdllm.data")

_ROWS_PER_CALL = 500


def is_squad_document(content: Any) -> bool:
    """Whether parsed JSON is SQuAD's object with articles under ``data``, not a list of rows."""
    return isinstance(content, dict) and isinstance(content.get("data"), list)


def squad_rows(content: dict[str, Any], source: str) -> Iterator[dict[str, Any]]:
    """One row per question of a SQuAD document; no answer for one that is marked as impossible.

    White space at the end of an answer is left out, as FedNLP's files have it.

    Raises:
        DataError: an article, paragraph or question lacks a part.
    """
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    given = [] if question.get("is_impossible") else question["answers"]
                    answers = [{**answer, "text": answer["text"].rstrip()} for answer in given]
                    yield {
                        "title": article["title"],
                        "id": name_of(question["id"]),
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": answers,
                    }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source}: is not a SQuAD document: {type(error).__name__} {error}") from error


def gold_answers(table: Table) -> list[list[dict[str, Any]]]:
    """The answers of every row; none for a question that has none.

    Raises:
        DataError: an answer lacks its text or place, or is not at that place in the context.
    """
    contexts = table.texts("context")
    found = []
    for row, given in enumerate(table.column("answers")):
        answers = [] if table.records[row].get("is_impossible") is True else _one_each(given)
        if not isinstance(answers, list):
            raise DataError(f"{table.place(row)}: field 'answers' must be a list of answers, but is {given!r:.80}")
        for answer in answers:
            _check_answer(answer, contexts[row], table.place(row))
        found.append(answers)
    return found


def question_names(table: Table) -> list[str]:
    """A name for every question: its ``id``, or its row where it has none, or where another has the same."""
    names = [name_of(record.get("id", "")) for record in table.records]
    counts = Counter(names)
    rows = zip(names, table.numbers, strict=True)
    return [name if name and counts[name] == 1 else f"{name}, row {number}".lstrip(", ") for name, number in rows]


def has_unanswerable(table: Table) -> bool:
    """Whether a question of the table has no answer. Raises as :func:`gold_answers`."""
    return not all(gold_answers(table))


def _one_each(answers: Any) -> Any:
    """A list of answers from the lists of their parts, as Hugging Face's copies have them; others as they are."""
    if not isinstance(answers, dict):
        return answers
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return answers
    return [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]


def _check_answer(answer: Any, context: str, place: str) -> None:
    if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
        raise DataError(f"{place}: an answer must be an object with 'text' and 'answer_start', but is {answer!r:.80}")
    text, start = answer["text"], answer.get("answer_start")
    whole = isinstance(start, int) and not isinstance(start, bool) and 0 <= start <= len(context)
    if not text or not whole or context[start : start + len(text)] != text:  # type: ignore[operator]
        raise DataError(f"{place}: the answer {text!r:.80} is not in the context at answer_start {start!r}")


def span_examples(
    table: Table, tokenizer: PreTrainedTokenizerBase, tok_len: int, stride: int, unanswerable: bool = False
) -> tuple[list[list[Example]], list[int]]:
    """Tokenise questions with their contexts.

    Args:
        stride: tokens that neighbouring windows share.
        unanswerable: a question may have no answer; so it is in any case where one of the table has none.

    Returns:
        The windows of each question, and for each question the row it is of.

    Raises:
        ConfigError: the tokenizer cannot say which characters a token covers.
        DataError: a row lacks a part, or an answer is not where it says.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("data.type NAME@qa: needs a fast tokenizer, which knows the characters under a token")
    questions, contexts, answers = table.texts("question"), table.texts("context"), gold_answers(table)
    names = question_names(table)
    silence = _no_answer_token(tokenizer) if unanswerable or not all(answers) else None
    groups, rows = [], []
    for first in range(0, len(table), _ROWS_PER_CALL):
        part = range(first, min(first + _ROWS_PER_CALL, len(table)))
        framed = [_framed(questions[row], contexts[row], tokenizer, tok_len, stride) for row in part]
        for row, windows in zip(part, framed, strict=True):
            gold = Reference(names[row], tuple(answer["text"] for answer in answers[row]), contexts[row])
            examples = _windows(windows, gold, answers[row][:1], silence)
            if examples:
                groups.append(examples)
                rows.append(row)
    if len(rows) < len(table):
        logger.warning(
            "%s: %d of %d questions are left out: no room for the context within llm.tok_len %d",
            table.source,
            len(table) - len(rows),
            len(table),
            tok_len,
        )
    return groups, rows


def _framed(question: str, context: str, tokenizer: Any, tok_len: int, stride: int) -> Any:
    """Question and context in windows, or nothing if the question leaves less room than two strides."""
    length = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    room = tok_len - length - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 2:
        return None
    return tokenizer(
        question, context, truncation="only_second", max_length=tok_len, stride=min(stride, room // 2),
        return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True, verbose=False,
    )  # fmt: skip


def _no_answer_token(tokenizer: Any) -> int:
    """The special token that stands for "no answer"; ``-1`` takes a window's first token, whatever it is."""
    return next((int(token) for token in (tokenizer.cls_token_id, tokenizer.bos_token_id) if token is not None), -1)


def _windows(framed: Any, gold: Reference, taught: list[dict[str, Any]], silence: int | None) -> list[Example]:
    """The windows of a question.

    Args:
        gold: what is the same for all of them.
        taught: the answer that is taught, if there is one.
        silence: the token that stands for "no answer"; ``None`` where every question has one.
    """
    examples = []
    for window, tokens in enumerate(framed["input_ids"] if framed is not None else []):
        in_context = np.array([part == 1 for part in framed.sequence_ids(window)])
        offsets = np.where(in_context[:, None], np.array(framed["offset_mapping"][window]), -1).astype(np.int32)
        place = None if silence is None else (tokens.index(silence) if silence in tokens else 0)
        examples.append(
            Example(
                input_ids=np.array(tokens, dtype=np.int32),
                labels=_label(offsets, taught, place),
                segments=np.array(framed["token_type_ids"][window], dtype=np.int32),
                reference=replace(gold, offsets=offsets, no_answer=place),
            )
        )
    return examples


def _label(offsets: np.ndarray, taught: list[dict[str, Any]], silence: int | None) -> np.ndarray:
    """``[1, 2]``: where the answer begins and ends in a window, or where "no answer" is."""
    for answer in taught:
        first, last = answer["answer_start"], answer["answer_start"] + len(answer["text"].rstrip())
        span = _span_of(offsets, first, last)
        is_elsewhere = not ((offsets[:, 0] < last) & (offsets[:, 1] > first) & (offsets[:, 0] >= 0)).any()
        if silence is None or not is_elsewhere:
            return span
    return np.array([[silence, silence]], dtype=np.int32)


def _span_of(offsets: np.ndarray, first: int, last: int) -> np.ndarray:
    """``[1, 2]``: first and last token that touch the characters ``first`` to ``last``, if all of these are here."""
    here = np.flatnonzero((offsets[:, 0] < last) & (offsets[:, 1] > first) & (offsets[:, 0] >= 0))
    whole = len(here) and offsets[here[0], 0] <= first and offsets[here[-1], 1] >= last
    span = [here[0], here[-1]] if whole else [IGNORED_LABEL, IGNORED_LABEL]
    return np.array([span], dtype=np.int32)
