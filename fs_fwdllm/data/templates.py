"""What a language model reads: a conversation as one text, and which parts of it are taught.

A :class:`PromptTemplate` writes messages (:mod:`~fs_fwdllm.data.conversations`) as a text, and says which characters
are the assistant's; the loss is on those alone, in every turn. What a model was taught with it must be asked with, so a
template is also a handful of facts (:meth:`PromptTemplate.to_facts`) that are saved with the model.

==============  =====================================================================================================
name            text
==============  =====================================================================================================
``alpaca``      the prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, Apache-2.0), as FederatedScope
                writes it: ``### Instruction:``, perhaps ``### Input:``, ``### Response:``, the answer, the end
                token. A system message takes the place of the introduction, and earlier turns come before, as in
                LLaMA-Factory's template of that name
``chat``        the tokenizer's own chat template
``plain``       ``System: ...``, ``Human: ...``, ``Assistant: ...``, a line each, the end token after every answer, as
                in LLaMA-Factory's ``default``
``none``        the messages' texts one after another, and the end token: a prompt and its completion as they are
==============  =====================================================================================================

``fwdllm.data.template`` names one. By itself, instruction rows take ``alpaca``, prompt and completion ``none``,
conversations ``chat``, or ``plain`` where the tokenizer has no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fs_fwdllm.data.chat_templates import ChatForm, chat_template_of
from fs_fwdllm.data.rendering import Form, Messages, Rendered, WrittenForm
from fs_fwdllm.data.whole_text import Frame, frame_of, inner_ids, taught_positions
from fs_fwdllm.errors import ConfigError, DataError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TEMPLATES", "PromptTemplate", "choose_template", "user_says"]

TEMPLATES = ("alpaca", "chat", "plain", "none")


def user_says(text: str, system: str = "") -> list[dict[str, Any]]:
    """The messages of a user's first question, perhaps after a system message."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


class PromptTemplate:
    """How a conversation becomes the text, and the tokens, that a model reads.

    Args:
        name: one of :data:`TEMPLATES`.
        tokenizer: the model's; its end token is used, and for ``chat`` its chat template.

    Raises:
        ConfigError: the name is none of them, or ``chat`` and the tokenizer has no chat template.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        if name not in TEMPLATES:
            raise ConfigError(f"the prompt template {shown(name)} is not known; known are {', '.join(TEMPLATES)}")
        if name == "chat" and not chat_template_of(tokenizer):
            raise ConfigError("fwdllm.data.template: chat needs a tokenizer with a chat template; use plain")
        self.name = name
        self.tokenizer = tokenizer
        end = tokenizer.eos_token
        self._form: Form = ChatForm(tokenizer) if name == "chat" else WrittenForm(name, "" if end is None else str(end))
        self._frame = Frame() if self._form.has_specials else frame_of(tokenizer)

    def to_facts(self) -> dict[str, Any]:
        """What is saved with a model, ready for JSON; a chat template is saved with the tokenizer."""
        return {"name": self.name}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
        """The template that a model was taught with.

        Raises:
            ConfigError: see the class.
            DataError: the facts name no template.
        """
        if not isinstance(facts.get("name"), str):
            raise DataError(
                f"a prompt template needs the name of one of {', '.join(TEMPLATES)}, but has {shown(facts)}"
            )
        return cls(facts["name"], tokenizer)

    def render(self, messages: Messages) -> Rendered:
        """A whole conversation as a text, with the parts that are taught.

        Args:
            messages: ``{"role", "content"}``, perhaps with ``input`` (Alpaca's) and ``weight`` (0: not taught).

        Raises:
            DataError: the chat template refuses the messages, or hides what the assistant says.
        """
        return self._form.render(messages)

    def prompt(self, messages: Messages) -> str:
        """The text that a model goes on from when it is asked for the next answer. Raises as :meth:`render`."""
        return self._form.prompt(messages)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The tokens of :meth:`prompt`, after the special tokens that come before a text."""
        return [*self._frame.before, *inner_ids(self.tokenizer, [self.prompt(messages)])[0]]

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the end token, and the mark that a chat template ends an answer with."""
        end = self.tokenizer.eos_token_id
        ends = [] if end is None else [int(end)]
        if self.name == "chat":
            ((tokens, taught),) = self.encode([self.render([*user_says("a"), {"role": "assistant", "content": "b"}])])
            special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
            last = [token for token, is_taught in zip(tokens, taught, strict=True) if is_taught][-1:]
            ends += [token for token in last if token in special and token not in ends]
        return ends

    def encode(self, texts: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
        """The tokens of each whole text as the tokenizer has them, and which of them are taught."""
        found = []
        positions = taught_positions(self.tokenizer, [one.text for one in texts], [one.answers for one in texts])
        for one, (inner, parts) in zip(texts, positions, strict=True):
            tokens = [*self._frame.before, *inner, *(() if one.ends else self._ending)]
            taught = [False] * len(tokens)
            for (first, last), (_, end) in zip(parts, one.answers, strict=True):
                start = len(self._frame.before) + first
                stop = len(tokens) if end == len(one.text) else len(self._frame.before) + last
                taught[start:stop] = [True] * (stop - start)
            found.append((tokens, taught))
        return found

    @property
    def _ending(self) -> tuple[int, ...]:
        """What comes after a text that does not say itself where it ends."""
        end, after = self.tokenizer.eos_token_id, self._frame.after
        return after if end is None or end in after else (*after, int(end))


def choose_template(setting: str, form: str, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """The template of a run.

    Args:
        setting: ``fwdllm.data.template``; ``auto`` leaves the choice to the rows.
        form: what the rows are: ``instruction``, ``conversation`` or ``completion``.

    Raises:
        ConfigError: the setting is ``chat``, but the tokenizer has no chat template.
    """
    name = setting
    if setting == "auto":
        conversations = "chat" if chat_template_of(tokenizer) else "plain"
        name = {"instruction": "alpaca", "completion": "none"}.get(form, conversations)
    return PromptTemplate(name, tokenizer)
