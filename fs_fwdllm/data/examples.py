"""From rows to tokenised examples: conversations, and texts with classes.

A conversation's labels are its answers' tokens and what ends them; a classifier's label is the class's index, beside
the text as its tokenizer frames it. All are cut at ``llm.tok_len``. A row with nothing left to learn (a prompt that
fills ``llm.tok_len``, a text without tokens) is no example: it is left out, and counted in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fs_fwdllm.data.conversations import MESSAGES
from fs_fwdllm.data.rendering import Rendered
from fs_fwdllm.data.squad import gold_answers, question_names
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.templates import PromptTemplate
from fs_fwdllm.data.types import IGNORED_LABEL, Example, Reference
from fs_fwdllm.data.whole_text import token_ids
from fs_fwdllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["classification_examples", "conversation_examples", "report_left_out"]

logger = logging.getLogger("fs_fwdllm.data")


def conversation_examples(table: Table, template: PromptTemplate, tok_len: int) -> tuple[list[Example], list[int]]:
    """Tokenise rows that hold a conversation (:func:`~fs_fwdllm.data.conversations.as_conversations`).

    Returns:
        The examples (labels as long as the input, unshifted, ``-100`` over what is not taught), and for each the row it
        is of.

    Raises:
        DataError: a row's conversation cannot be written with the template, or every answer is cut off.
    """
    if template.tokenizer.eos_token_id is None and template.name != "chat":
        logger.warning("the tokenizer has no end token: answers are taught without an end")
    encoded = template.encode([_rendered(table, row, template) for row in range(len(table))])
    examples, rows, starts, names = [], [], [], question_names(table)
    for row, (tokens, taught) in enumerate(encoded):
        taught[:1] = [False] * len(taught[:1])  # nothing precedes a text's first token that could predict it
        starts.append(taught.index(True) if True in taught else len(tokens))
        if True in taught[:tok_len]:
            ids = np.array(tokens[:tok_len], dtype=np.int32)
            labels = np.where(np.array(taught[:tok_len]), ids, np.int32(IGNORED_LABEL))
            examples.append(Example(ids, labels, reference=_reference(table, row, names[row])))
            rows.append(row)
    if not examples:
        raise DataError(
            f"{table.source}: none of the {len(table)} rows has a label within llm.tok_len {tok_len}: the answers "
            f"begin after {min(starts)} to {max(starts)} tokens; set llm.tok_len well above that"
        )
    report_left_out(table, len(examples), f"no answer token within llm.tok_len {tok_len}")
    return examples, rows


def _rendered(table: Table, row: int, template: PromptTemplate) -> Rendered:
    try:
        return template.render(table.records[row][MESSAGES])
    except DataError as error:
        raise DataError(f"{table.place(row)}: {error}") from error


def classification_examples(
    table: Table,
    texts: Sequence[str],
    labels: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    tok_len: int,
    pairs: Sequence[str] | None = None,
) -> tuple[list[Example], list[int]]:
    """Tokenise texts, or pairs of texts, with their class indices (or numbers). The longer text of a pair is cut first.

    Returns:
        The examples (labels of shape ``[]``), and for each the row it is of.
    """
    examples, rows = [], []
    framed = token_ids(tokenizer, texts, pairs, truncation=True, max_length=tok_len)
    for row, (tokens, label) in enumerate(zip(framed, labels, strict=True)):
        if tokens:
            kind = np.float32 if isinstance(label, float) else np.int32
            examples.append(Example(np.array(tokens, dtype=np.int32), np.array(label, dtype=kind)))
            rows.append(row)
    report_left_out(table, len(examples), "no token")
    return examples, rows


def report_left_out(table: Table, kept: int, reason: str) -> None:
    """Warn of rows that became no example."""
    if kept < len(table):
        logger.warning("%s: %d of %d rows are left out: %s", table.source, len(table) - kept, len(table), reason)


def _reference(table: Table, row: int, name: str) -> Reference | None:
    """What a generated answer is compared with; only rows with a list of right answers have one."""
    if not isinstance(table.records[row].get("answers"), list | dict) or not table.records[row].get("context"):
        return None
    (answers,) = gold_answers(table.take([row]))
    return Reference(name, tuple(answer["text"] for answer in answers))
