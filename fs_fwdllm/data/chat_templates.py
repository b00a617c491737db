"""Conversations as a tokenizer's own chat template writes them, and where the assistant's words are in that.

A template that marks them (``{% generation %}``) is believed. For the others two things are looked at. An answer begins
where the text goes beyond the conversation before it, with the header of an answer (``add_generation_prompt``): that is
what a model has read when it is asked. It ends with the mark that follows it: a character that no text has is written
in the answer's place, and what stands behind that, up to where the texts of a shorter and of the whole conversation
part, is the mark. White space after the mark is not taught.

A template that shows the date always shows the same one, so that rows do not depend on the day.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fs_fwdllm.data.rendering import Messages, Rendered, joined
from fs_fwdllm.data.whole_text import common_start
from fs_fwdllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatForm", "chat_template_of"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIXED_DAY = (
    "{%- macro strftime_now(form) -%}{{ form | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') "
    "| replace('%m', '07') | replace('%Y', '2024') | replace('%y', '24') | replace('%A', 'Friday') }}{%- endmacro -%}"
)
#: Stands in an answer's place; from Unicode's private area, so that no text has it.
_MARK = "\ue0f5\ue0f6"


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template; empty if it has none, or several and none by default."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return ""


class ChatForm:
    """The tokenizer's chat template."""

    has_specials = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = chat_template_of(tokenizer)
        self._tokenizer = tokenizer
        self._marks_answers = bool(_GENERATION.search(template))
        self._template = (_FIXED_DAY if "strftime_now" in template else "") + template

    def render(self, messages: Messages) -> Rendered:
        if self._marks_answers:
            text, answers = self._marked(messages)
        else:
            text = self._write(messages)
            numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            answers = [self._answer(messages, number, text) for number in numbers]
        weights = [message.get("weight") for message in messages if message["role"] == "assistant"]
        if len(weights) == len(answers):
            answers = [answer for answer, weight in zip(answers, weights, strict=True) if weight != 0]
        return Rendered(text, tuple(answers), ends=True)

    def prompt(self, messages: Messages) -> str:
        return self._write(messages, add_generation_prompt=True)

    def _write(self, messages: Messages, **options: Any) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                _plain(messages), chat_template=self._template, tokenize=False, **options
            )
        except Exception as error:  # a template is foreign code: it may fail in any way
            raise DataError(_refusal(error)) from error
        return str(text)

    def _marked(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text and the parts that the template itself calls the assistant's."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotations name one of its two results
        try:
            texts, marked = render(
                [_plain(messages)], chat_template=self._template, return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception as error:  # as above
            raise DataError(_refusal(error)) from error
        return texts[0], [(int(first), int(last)) for first, last in marked[0]]

    def _answer(self, messages: Messages, number: int, text: str) -> tuple[int, int]:
        """First and last-plus-one character of message ``number`` in the text of all messages."""
        earlier, later = list(messages[:number]), list(messages[number + 1 :])
        marked = {**messages[number], "content": _MARK}
        head, _, tail = self._write([*earlier, marked, *later]).partition(_MARK)
        if not text.startswith(head) or not text.endswith(tail):
            raise DataError(
                f"the tokenizer's chat template changes the text around message {number + 1}, so that what the "
                "assistant says cannot be found; use a template with {% generation %}, or fwdllm.data.template: plain"
            )
        after = len(text) - len(tail)
        ending = tail[: common_start(tail, self._write([*earlier, marked]).partition(_MARK)[2])]
        return min(len(head), self._asked(earlier, text)), max(len(head), after) + len(ending.rstrip() or ending)

    def _asked(self, earlier: Messages, text: str) -> int:
        """How much of ``text`` a model has read when it is asked to go on; all of it if that cannot be told."""
        if not earlier:
            return len(text)
        bare, asked = self._write(earlier), self._write(earlier, add_generation_prompt=True)
        agreeing = common_start(asked, text)
        return agreeing if agreeing >= common_start(bare, asked) else len(text)


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """Messages as templates know them."""
    return [
        {**{key: value for key, value in message.items() if key not in ("input", "weight")}, "content": joined(message)}
        for message in messages
    ]


def _refusal(error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the tokenizer's chat template refuses the conversation: {reason} (fwdllm.data.template: plain needs none)"
