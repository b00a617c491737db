"""The texts of conversations that need no Jinja, and what every way of writing one has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Form", "Messages", "Rendered", "WrittenForm", "joined"]

Messages = Sequence[dict[str, Any]]

_INTRODUCTION = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."


@dataclass(frozen=True)
class Rendered:
    """A conversation as a text.

    Attributes:
        text: without the special tokens that a tokenizer puts around a text of its own accord.
        answers: ``(first, last plus one)`` character of each part that is taught, in order.
        ends: whether the text itself says where it ends; else the end token comes after it, and is taught with an
            answer that reaches up to it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    ends: bool


class Form(Protocol):
    """A way of writing a conversation. ``has_specials``: its text contains every special token already."""

    has_specials: bool

    def render(self, messages: Messages) -> Rendered: ...

    def prompt(self, messages: Messages) -> str: ...


def joined(message: dict[str, Any]) -> str:
    """A message's text and its input below, for templates that have no place of its own for that."""
    return f"{message['content']}\n{message['input']}" if message.get("input") else str(message["content"])


@dataclass(frozen=True)
class WrittenForm:
    """Headers before the messages, and the end token after every answer.

    Attributes:
        name: ``alpaca``, ``plain`` or ``none``.
        end: the tokenizer's end token as text; empty without one.
    """

    name: str
    end: str
    has_specials = False

    def render(self, messages: Messages) -> Rendered:
        text, answers = "", []
        last = len(messages) - 1
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                text += self._before(message, is_first=number == 0)
                continue
            text += _HEADERS[self.name]
            start = len(text)
            text += _SPACES[self.name] + message["content"] + (self.end if number < last else "")
            if message.get("weight") != 0:
                answers.append((start, len(text)))
            text += _GAPS[self.name] if number < last else ""
        return Rendered(text, tuple(answers), ends=messages[last]["role"] != "assistant")

    def prompt(self, messages: Messages) -> str:
        return self.render(messages).text + _HEADERS[self.name]

    def _before(self, message: dict[str, Any], is_first: bool) -> str:
        role, content = message["role"], message["content"]
        if self.name == "none":
            return joined(message)
        if self.name == "plain":
            return f"{'Human' if role == 'user' else role.capitalize()}: {joined(message)}\n"
        if role == "system":
            return f"{content}\n\n"
        extra = message.get("input")
        introduction = f"{_INTRODUCTION}{_WITH_INPUT if extra else ''}{_REQUEST}\n\n" if is_first else ""
        header = "Instruction" if role == "user" else role.capitalize()
        return f"{introduction}### {header}:\n{content}\n\n" + (f"### Input:\n{extra}\n\n" if extra else "")


#: What announces an answer, what stands between that and the answer, and between an answer and the next message.
_HEADERS = {"alpaca": "### Response:", "plain": "Assistant:", "none": ""}
_SPACES = {"alpaca": "", "plain": " ", "none": ""}
_GAPS = {"alpaca": "\n\n", "plain": "\n", "none": ""}
