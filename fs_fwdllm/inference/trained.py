"""A trained model ready to be used, from the folder a run left.

    >>> import fs_fwdllm
    >>> trained = fs_fwdllm.load("runs/demo")                    # doctest: +SKIP
    >>> trained.predict(["Where is my parcel?"])[0].label        # doctest: +SKIP
    'shipping'

The same call loads whatever was trained (LoRA, IA3, norms, biases, the bottleneck, the head, all parameters), gives
texts the training's template and length, and answers with the classes' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fs_fwdllm.config import Config
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.files import read_table
from fs_fwdllm.data.rendering import Messages
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.templates import PromptTemplate, user_says
from fs_fwdllm.data.tokenising import Tokeniser
from fs_fwdllm.data.types import Task
from fs_fwdllm.errors import ConfigError, DataError, ModelError
from fs_fwdllm.inference.generation import Conversation, Sampling, longest_text, questions_of, write_answers
from fs_fwdllm.inference.prediction import Prediction, answer_questions, classify, text_fields
from fs_fwdllm.model import LoadedModel, SavedFacts, find_saved, load_saved
from fs_fwdllm.model.objective import Objective

__all__ = ["TrainedModel", "load"]

_DEFAULT_BATCH_SIZE = 32
#: Answers that are written together.
_TEXTS_AT_ONCE = 8


@dataclass
class TrainedModel:
    """A model as a run evaluated it. Make one with :func:`load`.

    Attributes:
        folder: the saved folder, absolute.
        loaded: model, tokenizer and source as :func:`~fs_fwdllm.model.load_model` gives them.
        config: the configuration that loads the model and makes its tokens.
        facts: what the folder says of itself.
    """

    folder: Path
    loaded: LoadedModel
    config: Config
    facts: SavedFacts

    @property
    def model(self) -> nn.Module:
        """The model in eval mode, with its adapter."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as the training used it."""
        return self.loaded.tokenizer

    @property
    def task(self) -> Task:
        """What the labels of the training meant."""
        return self.facts.task

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes by name, in index order; empty for tasks without."""
        return self.facts.classes

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @cached_property
    def objective(self) -> Objective:
        """The model's losses and logits on batches."""
        trainables = Trainables.of_model(self.model, half=True)
        return Objective(
            self.model, trainables, self.task, label_tokens=self._label_tokens, conduct=self.loaded.conduct
        )

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, batch_size: int = _DEFAULT_BATCH_SIZE
    ) -> list[Prediction]:
        """What the model says of texts, in their order.

        Args:
            texts: to classify; for question answering the questions.
            pairs: the second text of each, where the training had pairs; for question answering the contexts.
            batch_size: texts in one forward pass.

        Raises:
            DataError: there are not as many ``pairs`` as ``texts``, or a needed one is missing.
            ConfigError: the model writes texts; use :meth:`generate`.
        """
        self._refuse_a_single_text(texts)
        self._check_pairs(texts, pairs)
        if not texts:
            return []
        if self.task == "question_answering":
            return answer_questions(self, texts, pairs or (), batch_size)
        first, second = text_fields(self.config)[0], self.config.fwdllm.data.text_pair
        records: list[dict[str, Any]] = [{first: text} for text in texts]
        if pairs is not None:
            records = [{**record, second: pair} for record, pair in zip(records, pairs, strict=True)]
        return classify(self, Table("the texts", records, list(range(1, len(records) + 1))), batch_size)

    def predict_file(
        self, file: str | Path, *, batch_size: int = _DEFAULT_BATCH_SIZE
    ) -> tuple[list[dict[str, Any]], list[Prediction]]:
        """The rows of a CSV, TSV, JSON or JSON-lines file with the training's text fields, and a prediction for each.

        Raises:
            DataError: the file cannot be read, or a row lacks a field.
            ConfigError: as :meth:`predict`.
        """
        self._refuse_a_writer("predict")
        table = self._read(file)
        if self.task == "question_answering":
            questions, contexts = table.texts("question"), table.texts("context")
            return table.records, answer_questions(self, questions, contexts, batch_size)
        return table.records, classify(self, table, batch_size)

    @cached_property
    def template(self) -> PromptTemplate:
        """How the training wrote a conversation.

        Raises:
            ConfigError: the model does not write texts.
        """
        if self.task != "causal_lm":
            raise ConfigError(f"{self.folder}: this model was trained for {self.task} and writes no texts; use predict")
        return PromptTemplate(self.config.fwdllm.data.template, self.tokenizer)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        system: str = "",
        sampling: Sampling | None = None,
        batch_size: int = _TEXTS_AT_ONCE,
    ) -> list[str]:
        """What the model answers to each prompt.

        Args:
            system: a system message before every prompt.
            sampling: how answers are written; greedy, up to 128 tokens, unless told.
            batch_size: prompts that are answered together.

        Raises:
            ConfigError: the model has classes; use :meth:`predict`.
            DataError: a prompt is longer than the model has positions for.
        """
        if isinstance(prompts, str):
            raise DataError("generate takes a list of prompts; write generate([prompt]) for a single one")
        return self._answers([user_says(prompt, system) for prompt in prompts], sampling, batch_size)

    def generate_file(
        self, file: str | Path, *, sampling: Sampling | None = None, batch_size: int = _TEXTS_AT_ONCE
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows of a file of instructions or conversations, and the model's answer to each. Raises as above."""
        table = self._read(file)
        return table.records, self._answers(questions_of(table), sampling, batch_size)

    def chat(self, *, system: str = "", sampling: Sampling | None = None) -> Conversation:
        """A conversation with the model: ``chat().say("Hello")``. Raises as :meth:`generate`."""
        template, chosen = self.template, sampling or Sampling()
        positions = longest_text(self.model)
        return Conversation(
            answer=lambda messages: write_answers(self.model, template, [messages], chosen)[0],
            length=lambda messages: len(template.prompt_ids(messages)),
            limit=None if positions is None else max(1, positions - chosen.max_new_tokens),
            system=system,
        )

    def _read(self, file: str | Path) -> Table:
        return read_table(Path(file), self.config.fwdllm.data.columns, self.config.fwdllm.data.encoding)

    def _answers(self, questions: Sequence[Messages], sampling: Sampling | None, batch_size: int) -> list[str]:
        chosen, template = sampling or Sampling(), self.template
        groups = (questions[first : first + batch_size] for first in range(0, len(questions), batch_size))
        return [answer for group in groups for answer in write_answers(self.model, template, group, chosen)]

    @property
    def _label_tokens(self) -> list[int]:
        return Tokeniser(self.config, self.tokenizer, self.task, list(self.classes)).label_tokens

    def _refuse_a_writer(self, what: str) -> None:
        if self.task == "causal_lm":
            raise ConfigError(f"{self.folder}: this model writes texts and has no classes to {what}; use generate")

    def _refuse_a_single_text(self, texts: Sequence[str]) -> None:
        self._refuse_a_writer("predict")
        if isinstance(texts, str):
            raise DataError("predict takes a list of texts; write predict([text]) for a single one")

    def _check_pairs(self, texts: Sequence[str], pairs: Sequence[str] | None) -> None:
        questions = self.task == "question_answering"
        wanted = "context" if questions else self.config.fwdllm.data.text_pair
        if wanted and pairs is None:
            raise DataError(f"this model was trained on pairs; give the second text ({wanted}) of each in pairs")
        if not wanted and pairs is not None:
            raise DataError("this model was trained on single texts; leave pairs out")
        if pairs is not None and len(pairs) != len(texts):
            raise DataError(f"there are {len(texts)} texts, but {len(pairs)} pairs")


def load(path: str | Path, device: str = "cpu") -> TrainedModel:
    """The trained model of a run folder, or of an ``adapter`` or ``model`` folder that was moved elsewhere.

    Args:
        path: the folder.
        device: where to put the model, in PyTorch's words (``cpu``, ``cuda``).

    Raises:
        ModelError: there is no trained model, it is damaged, its base is not found, or ``device`` is none.
    """
    folder = find_saved(path).absolute()
    loaded, config, facts = load_saved(folder)
    try:
        loaded.model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r}: the model cannot be put there ({str(error).splitlines()[0]})") from error
    return TrainedModel(folder, loaded, config, facts)
