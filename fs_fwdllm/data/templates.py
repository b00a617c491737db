"""From rows to tokenised examples: what the model reads, and which tokens it is taught.

A language model reads an instruction in the prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca,
Apache-2.0), the form instruction data is commonly trained and evaluated in, followed by the answer and the end token.
Only the answer and the end token are labels. Prompt and answer are tokenised apart and joined, so that the first answer
token is predicted from exactly the tokens a prompt has when the model is used. A row without input takes the prompt
without input: "no input" is an absent field, an empty one, or ``null``.

A classifier reads the text as its tokenizer frames it, and its label is the class's index.

A language model classifies by the word it would put after a prompt (Gao et al., arXiv:2012.15723): the text is put in a
prompt of the user's, every class has a word, and the words' first tokens compete. A start that all words share
(the space of a SentencePiece tokenizer) joins the prompt. A long text is cut so that the prompt's end stays.

All are cut at ``tok_len``. A row with nothing left to learn (a prompt that fills ``tok_len``, a text without tokens)
is no example: it is left out, and counted in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from fs_fwdllm.data.table import Table
from fs_fwdllm.data.types import IGNORED_LABEL, Example, Reference
from fs_fwdllm.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "LabelWords",
    "classification_examples",
    "instruction_examples",
    "instruction_prompt",
    "label_indices",
    "label_word_examples",
    "label_words",
]

logger = logging.getLogger("fs_fwdllm.data")

_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

#: Texts handed to the tokenizer at once: enough to use its threads, few enough to bound memory.
_TEXTS_PER_CALL = 1000


def instruction_prompt(record: dict[str, Any]) -> str:
    """The prompt of one row with ``instruction`` and perhaps ``input``."""
    context = record.get("input")
    if context is None or not str(context).strip():
        return _PROMPT.format(instruction=record["instruction"])
    return _PROMPT_WITH_INPUT.format(instruction=record["instruction"], input=context)


def instruction_examples(
    table: Table, tokenizer: PreTrainedTokenizerBase, tok_len: int
) -> tuple[list[Example], list[int]]:
    """Tokenise rows with ``instruction``, ``input`` and ``output``.

    Returns:
        The examples (labels as long as the input, unshifted, ``-100`` over the prompt), and for each the row it is of.
    """
    start = [tokenizer.bos_token_id] if _adds_start_token(tokenizer) else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not end:
        logger.warning("the tokenizer has no end token: answers are taught without an end")
    prompts = _token_ids(tokenizer, [instruction_prompt(record) for record in table.records])
    answers = _token_ids(tokenizer, [record["output"] for record in table.records])
    examples, rows = [], []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        prefix = start + prompt
        tokens = (prefix + answer + end)[:tok_len]
        if len(tokens) > len(prefix):
            labels = [IGNORED_LABEL] * len(prefix) + tokens[len(prefix) :]
            reference = _reference(table, row)
            ids = np.array(tokens, dtype=np.int32)
            examples.append(Example(ids, np.array(labels, dtype=np.int32), reference=reference))
            rows.append(row)
    _report_left_out(table, len(examples), f"no answer token within llm.tok_len {tok_len}")
    return examples, rows


def classification_examples(
    table: Table,
    texts: Sequence[str],
    labels: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    tok_len: int,
    pairs: Sequence[str] | None = None,
) -> tuple[list[Example], list[int]]:
    """Tokenise texts, or pairs of texts, with their class indices. The longer text of a pair is cut first.

    Returns:
        The examples (labels of shape ``[]``), and for each the row it is of.
    """
    examples, rows = [], []
    framed = _token_ids(tokenizer, texts, pairs, add_special_tokens=True, truncation=True, max_length=tok_len)
    for row, (tokens, label) in enumerate(zip(framed, labels, strict=True)):
        if tokens:
            examples.append(Example(np.array(tokens, dtype=np.int32), np.array(label, dtype=np.int32)))
            rows.append(row)
    _report_left_out(table, len(examples), "no token")
    return examples, rows


@dataclass(frozen=True)
class LabelWords:
    """A prompt and the words that may follow it, as tokens.

    Attributes:
        before, after: tokens of the prompt around the text.
        tokens: the token that stands for each class, in index order; all different.
    """

    before: list[int]
    after: list[int]
    tokens: list[int]


def label_words(prompt: str, words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> LabelWords:
    """Tokenise a prompt and the words of the classes.

    Raises:
        ConfigError: the prompt does not contain ``{text}`` once, or two words start with the same token.
    """
    if prompt.count("{text}") != 1:
        raise ConfigError(f"fwdllm.data.prompt: must contain {{text}} once, but is {prompt!r}")
    before, after = prompt.split("{text}")
    start = [tokenizer.bos_token_id] if _adds_start_token(tokenizer) else []
    spelled = list(_token_ids(tokenizer, [f" {word}" for word in words]))
    shared = _shared_start(spelled)
    first: dict[int, str] = {}
    for word, tokens in zip(words, spelled, strict=True):
        if len(tokens) <= shared or tokens[shared] in first:
            other = first[tokens[shared]] if len(tokens) > shared else next(name for name in words if name != word)
            raise ConfigError(
                f"fwdllm.data.label_words: {word!r} and {other!r} start with the same token; give the classes words "
                "that this tokenizer tells apart at once"
            )
        first[tokens[shared]] = word
    ends = list(_token_ids(tokenizer, [part for part in (before, after) if part]))
    parts = {part: ids for part, ids in zip([part for part in (before, after) if part], ends, strict=True)}
    return LabelWords(start + parts.get(before, []), parts.get(after, []) + spelled[0][:shared], list(first))


def _shared_start(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    agreeing = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    return sum(1 for _ in agreeing)


def label_word_examples(
    table: Table,
    texts: Sequence[str],
    labels: Sequence[int],
    words: LabelWords,
    tokenizer: PreTrainedTokenizerBase,
    tok_len: int,
) -> tuple[list[Example], list[int]]:
    """Tokenise texts in a prompt, with their class indices.

    Returns:
        The examples (labels of shape ``[]``), and for each the row it is of.
    """
    examples, rows = [], []
    room = tok_len - len(words.before) - len(words.after)
    for row, (tokens, label) in enumerate(zip(_token_ids(tokenizer, texts), labels, strict=True)):
        if room > 0 and tokens:
            ids = np.array(words.before + tokens[:room] + words.after, dtype=np.int32)
            examples.append(Example(ids, np.array(label, dtype=np.int32)))
            rows.append(row)
    _report_left_out(table, len(examples), f"no token of the text within llm.tok_len {tok_len}")
    return examples, rows


def label_indices(table: Table, field: str, allowed: Sequence[str]) -> list[int]:
    """The class index of every row.

    Raises:
        DataError: a row has no label, or one that is not allowed.
    """
    index = {name: number for number, name in enumerate(allowed)}
    names = table.names(field, "fwdllm.data.label")
    for row, name in enumerate(names):
        if name not in index:
            raise DataError(
                f"{table.place(row)}: the label {name!r} is none of the {len(index)} classes "
                f"{', '.join(map(repr, allowed))} (fwdllm.data.labels sets them){nearest(name, allowed)}"
            )
    return [index[name] for name in names]


def _reference(table: Table, row: int) -> Reference | None:
    """What a generated answer is compared with; only rows with a list of right answers have one."""
    answers = table.records[row].get("answers")
    if not isinstance(answers, list):
        return None
    name = str(table.records[row].get("id", table.numbers[row]))
    return Reference(name, tuple(str(answer["text"]) for answer in answers if isinstance(answer, dict)))


def _adds_start_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    framed = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return len(framed) > len(bare) and framed[0] == tokenizer.bos_token_id


def _token_ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    add_special_tokens: bool = False,
    **options: Any,
) -> Iterator[list[int]]:
    for first in range(0, len(texts), _TEXTS_PER_CALL):
        window = slice(first, first + _TEXTS_PER_CALL)
        given = [list(texts[window])] + ([list(pairs[window])] if pairs is not None else [])
        yield from tokenizer(*given, add_special_tokens=add_special_tokens, verbose=False, **options)["input_ids"]


def _report_left_out(table: Table, kept: int, reason: str) -> None:
    if kept < len(table):
        logger.warning("%s: %d of %d rows are left out: %s", table.source, len(table) - kept, len(table), reason)
