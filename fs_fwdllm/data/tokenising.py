"""From rows to examples, by task: one object that is made once per run and used for every split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fs_fwdllm.config.schema import Config
from fs_fwdllm.data.examples import classification_examples, conversation_examples
from fs_fwdllm.data.label_words import LabelWords, label_word_examples
from fs_fwdllm.data.labels import label_indices, label_numbers
from fs_fwdllm.data.squad import span_examples
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.templates import PromptTemplate
from fs_fwdllm.data.types import Example, Task
from fs_fwdllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokeniser"]


class Tokeniser:
    """Tokenises tables for a task.

    Args:
        labels: the classes in index order; empty for tasks without.
        template: how a conversation is written; only a language model's answers need one.
        unanswerable: a question may have no answer, though ``fwdllm.data.unanswerable`` does not say so.

    Raises:
        ConfigError: there are not as many ``fwdllm.data.label_words`` as classes, or the tokenizer cannot tell them
            apart.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        labels: list[str],
        template: PromptTemplate | None = None,
        unanswerable: bool = False,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._task = task
        self._labels = labels
        self._template = template
        self._unanswerable = unanswerable or config.fwdllm.data.unanswerable
        self._words: LabelWords | None = None
        if task == "label_words":
            words = config.fwdllm.data.label_words or labels
            if len(words) != len(labels):
                raise ConfigError(f"fwdllm.data.label_words: {words} are not one for each of the classes {labels}")
            self._words = LabelWords(config.fwdllm.data.prompt, words, tokenizer)

    @property
    def label_tokens(self) -> list[int]:
        """The token that stands for each class; empty unless classes are words."""
        return self._words.tokens if self._words else []

    def __call__(self, table: Table) -> tuple[list[list[Example]], list[int]]:
        """The examples of each row, and for each the row it is of; rows without examples are left out.

        Raises:
            DataError: a row lacks a field or has a label outside the classes, or nothing is left.
        """
        tok_len = self._config.llm.tok_len
        if self._task == "question_answering":
            groups, rows = span_examples(
                table, self._tokenizer, tok_len, self._config.fwdllm.data.stride, self._unanswerable
            )
        else:
            examples, rows = self._one_each(table, tok_len)
            groups = [[example] for example in examples]
        if not groups:
            raise DataError(f"{table.source}: none of the {len(table)} rows has a label within llm.tok_len {tok_len}")
        return groups, rows

    def _one_each(self, table: Table, tok_len: int) -> tuple[list[Example], list[int]]:
        if self._template is not None:
            return conversation_examples(table, self._template, tok_len)
        own = self._config.fwdllm.data
        texts = table.joined(own.text, "fwdllm.data.text")
        if self._words is not None:
            return label_word_examples(
                table, texts, label_indices(table, own.label, self._labels), self._words, tok_len
            )
        numbers = self._task == "regression"
        labels = label_numbers(table, own.label) if numbers else label_indices(table, own.label, self._labels)
        pairs = table.texts(own.text_pair, "fwdllm.data.text_pair") if own.text_pair else None
        return classification_examples(table, texts, labels, self._tokenizer, tok_len, pairs)
