"""Classification by a language model: the word it would put after a prompt (Gao et al., arXiv:2012.15723).

The text is put in a prompt of the user's, every class has a word, and the tokens in which the words first differ
compete. Prompt and word are one text to the tokenizer (:mod:`~fs_fwdllm.data.whole_text`): a start that all words share
there (a "▁" of its own, a common syllable) belongs to what the model has read. A long text is cut at its end, so that
the prompt's end stays, and what is left is tokenised as a whole again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fs_fwdllm.data.examples import report_left_out
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.types import Example
from fs_fwdllm.data.whole_text import common_start, frame_of, inner_ids
from fs_fwdllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LabelWords", "label_word_examples"]

#: Stands for a text where only the prompt and the words matter.
_SOME_TEXT = "a"


class LabelWords:
    """A prompt and the words that may follow it.

    Attributes:
        tokens: the token that stands for each class, in index order; all different.

    Args:
        prompt: contains ``{text}`` once.
        words: of the classes, in index order.

    Raises:
        ConfigError: the prompt does not contain ``{text}`` once, or two words start with the same token.
    """

    def __init__(self, prompt: str, words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        if prompt.count("{text}") != 1:
            raise ConfigError(f"fwdllm.data.prompt: must contain {{text}} once, but is {prompt!r}")
        self._tokenizer = tokenizer
        self._before, self._after = prompt.split("{text}")
        self._frame = frame_of(tokenizer).before
        self._words = list(words)
        whole = inner_ids(tokenizer, [self._whole(_SOME_TEXT, word) for word in words])
        shared = common_start(*whole)
        self.tokens = _first_tokens(words, [tokens[shared:] for tokens in whole])
        #: The tokens of the first word from where the words differ.
        self._tail = whole[0][shared:]

    def _whole(self, text: str, word: str) -> str:
        # the word's space is the prompt's where that ends with one
        space = "" if self._after[-1:].isspace() else " "
        return f"{self._before}{text}{self._after}{space}{word}"

    def encode(self, texts: Sequence[str], tok_len: int) -> list[list[int] | None]:
        """For each text the tokens after which the classes' words compete, or ``None`` where the prompt leaves it none.

        Raises:
            DataError: the words become other tokens after one of the texts.
        """
        limit = tok_len - len(self._frame)
        room = limit - len(self._read(self._wholes([""])[0]))
        if room <= 0:
            return [None] * len(texts)
        kept = list(texts)
        encoded = [self._read(whole) for whole in self._wholes(kept)]
        while long := [row for row, tokens in enumerate(encoded) if len(tokens) > limit and kept[row]]:
            for row in long:
                kept[row] = self._cut(kept[row], len(encoded[row]) - limit)
            for row, whole in zip(long, self._wholes([kept[row] for row in long]), strict=True):
                encoded[row] = self._read(whole)
        return [[*self._frame, *tokens] if text.strip() else None for text, tokens in zip(kept, encoded, strict=True)]

    def _wholes(self, texts: Sequence[str]) -> list[list[int]]:
        return inner_ids(self._tokenizer, [self._whole(text, self._words[0]) for text in texts])

    def _read(self, whole: list[int]) -> list[int]:
        """The tokens before the words differ."""
        if whole[len(whole) - len(self._tail) :] != self._tail:
            raise DataError(
                f"fwdllm.data.prompt: after one of the texts the word {self._words[0]!r} becomes other tokens than "
                "after another; end the prompt with something else than {text}, such as a line 'Label:'"
            )
        return whole[: len(whole) - len(self._tail)]

    def _cut(self, text: str, tokens: int) -> str:
        """The text without about as many tokens at its end, at least one character shorter."""
        if getattr(self._tokenizer, "is_fast", False):
            offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            starts = [start for start, _ in offsets["offset_mapping"]]
            length = starts[-tokens] if tokens < len(starts) else 0
        else:
            count = len(inner_ids(self._tokenizer, [text])[0])
            length = int(len(text) * (1 - min(tokens / max(count, 1), 1)))
        return text[: min(length, len(text) - 1)]


def _first_tokens(words: Sequence[str], differing: Sequence[Sequence[int]]) -> list[int]:
    first: dict[int, str] = {}
    for word, tokens in zip(words, differing, strict=True):
        if not tokens or tokens[0] in first:
            other = first[tokens[0]] if tokens else next((name for name in words if name != word), word)
            raise ConfigError(
                f"fwdllm.data.label_words: {word!r} and {other!r} start with the same token; give the classes words "
                "that this tokenizer tells apart at once"
            )
        first[tokens[0]] = word
    return list(first)


def label_word_examples(
    table: Table, texts: Sequence[str], labels: Sequence[int], words: LabelWords, tok_len: int
) -> tuple[list[Example], list[int]]:
    """Tokenise texts in a prompt, with their class indices.

    Returns:
        The examples (labels of shape ``[]``), and for each the row it is of.
    """
    examples, rows = [], []
    for row, (tokens, label) in enumerate(zip(words.encode(texts, tok_len), labels, strict=True)):
        if tokens is not None:
            examples.append(Example(np.array(tokens, dtype=np.int32), np.array(label, dtype=np.int32)))
            rows.append(row)
    report_left_out(table, len(examples), f"no token of the text within llm.tok_len {tok_len}")
    return examples, rows
