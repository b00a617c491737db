"""Texts from a trained language model, asked in the words it was taught with.

A model that learnt answers behind ``### Response:`` must be asked with ``### Response:``. The prompt of a question is
therefore written by the training's own :class:`~fs_fwdllm.data.templates.PromptTemplate`, and an answer ends where the
training's answers ended. Greedy by default, so that the same question has the same answer; with a temperature above
zero answers are drawn from a seed of their own, and the process's other random numbers stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TextStreamer

from fs_fwdllm.data.conversations import LAYOUTS
from fs_fwdllm.data.rendering import Messages
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.templates import PromptTemplate
from fs_fwdllm.errors import ConfigError, DataError
from fs_fwdllm.evaluation.generation import continue_prompts
from fs_fwdllm.model.structure import position_limit

__all__ = ["Conversation", "Sampling", "longest_text", "questions_of", "write_answers"]


@dataclass(frozen=True)
class Sampling:
    """How answers are written.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: share of the probability that tokens are drawn from.
        seed: of the draw.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wanted = {
            "max_new_tokens": (self.max_new_tokens >= 1, "a whole number from 1"),
            "temperature": (0 <= self.temperature < 1e6, "0 for the likeliest token, or a number above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (is_fine, allowed) in wanted.items():
            if not is_fine:
                raise ConfigError(f"{name}: must be {allowed}, but is {getattr(self, name)!r}")

    def options(self) -> dict[str, Any]:
        """In the words of transformers' ``generate``."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


def write_answers(
    model: Any,
    template: PromptTemplate,
    conversations: Sequence[Messages],
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """The next answer in each conversation.

    Args:
        conversations: messages ``{"role", "content"}``, the last of which is the user's.
        streamer: is handed the tokens of a single conversation as they are written.

    Raises:
        DataError: a prompt is longer than the model has positions for, or the template refuses the messages.
    """
    prompts = [np.array(template.prompt_ids(messages), dtype=np.int64) for messages in conversations]
    if not prompts:
        return []
    room = _room(model, prompts, sampling.max_new_tokens)
    stop = template.stop_ids() or None
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        texts = continue_prompts(
            model, prompts, template.tokenizer, room, stop, streamer=streamer, **sampling.options()
        )
    return [text.strip() for text in texts]


def longest_text(model: Any) -> int | None:
    """Tokens a text may have: the positions the model has a table for, or was made for; ``None`` has no end."""
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return position_limit(model) or (made_for if isinstance(made_for, int) and made_for > 0 else None)


def _room(model: Any, prompts: Sequence[np.ndarray], wanted: int) -> int:
    limit = longest_text(model)
    longest = max(map(len, prompts))
    if limit is not None and longest >= limit:
        raise DataError(f"a prompt has {longest} tokens, but the model has positions for {limit}; shorten it")
    return wanted if limit is None else min(wanted, limit - longest)


def questions_of(table: Table) -> list[list[dict[str, Any]]]:
    """The conversation of every row up to the answer that is wanted; rows may have one, which is left out.

    Raises:
        DataError: a row has none of the known combinations of fields, or no question.
    """
    return [_question(record, table.place(row)) for row, record in enumerate(table.records)]


def _question(record: dict[str, Any], place: str) -> list[dict[str, Any]]:
    present = {name for name, value in record.items() if value is not None}
    for layout in LAYOUTS:
        *asked, answer = layout.fields if len(layout.fields) > 1 else (*layout.fields, "")
        if present >= set(asked):
            messages = layout.read({answer: "-", **record} if answer else record, place)
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            if messages:
                return messages
    known = ", ".join(sorted({layout.fields[0] for layout in LAYOUTS}))
    raise DataError(f"{place}: has nothing to answer; a row needs one of the fields {known}")


class Conversation:
    """A chat: what was said so far is asked with, and the oldest turns are forgotten when there is no more room.

    Args:
        answer: writes the next answer to messages.
        length: counts the tokens of messages.
        limit: tokens that prompt and answer may have; ``None`` has no end.
        system: a message before everything, which is never forgotten.
    """

    def __init__(
        self,
        answer: Callable[[Messages], str],
        length: Callable[[Messages], int],
        limit: int | None = None,
        system: str = "",
    ) -> None:
        self._answer = answer
        self._length = length
        self._limit = limit
        self._system: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, Any]] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Everything that is still remembered, in order."""
        return [*self._system, *self._turns]

    def say(self, text: str) -> str:
        """The model's answer to what the user says. Raises as :func:`write_answers`; nothing is remembered of that."""
        turns = [*self._turns, {"role": "user", "content": text}]
        while self._limit is not None and len(turns) > 1 and self._length([*self._system, *turns]) > self._limit:
            del turns[:2]
        answer = self._answer([*self._system, *turns])
        self._turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def forget(self) -> None:
        """Start anew; the system message stays."""
        self._turns.clear()
