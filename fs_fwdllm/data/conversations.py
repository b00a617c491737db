"""From the rows people have to one form: a conversation, a list of ``{"role": ..., "content": ...}``.

Instruction data comes in many shapes, told apart by a row's fields:

======================================  ============================================================================
fields                                  who writes it so
======================================  ============================================================================
``instruction``, ``input``, ``output``  Stanford Alpaca; ``system`` and ``history`` (pairs of earlier turns) as
                                        LLaMA-Factory has them
``instruction``, ``context``,           Databricks Dolly
``response``
``question``, ``answer``                GSM8K
``question``, ``context``, ``answers``  SQuAD
``messages``                            OpenAI, Hugging Face: ``role`` and ``content``
``conversations``                       ShareGPT: ``from`` (``human``, ``gpt``, ``system``) and ``value``
``prompt``, ``completion``              TRL: texts, or two lists of messages
======================================  ============================================================================

The part of an instruction that a template shows in a place of its own, Alpaca's input, stays apart as ``input`` of the
user's message. Other fields of a message (tool calls) are handed to the tokenizer's chat template as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from fs_fwdllm.data.squad import gold_answers
from fs_fwdllm.data.table import Table, required, text_of
from fs_fwdllm.errors import DataError, shown

__all__ = [
    "ALPACA", "DOLLY", "FORM", "GSM8K", "LAYOUTS", "MESSAGES", "ROSETTA", "SQUAD", "Layout", "as_conversations",
    "form_of", "recognise",
]  # fmt: skip

#: The field of a row that holds its conversation once it has been read.
MESSAGES = "fs_fwdllm messages"
#: The field of such a row that says what it was: an instruction, a conversation, or a prompt and its completion.
FORM = "fs_fwdllm form"

_Message = dict[str, Any]

Form = Literal["instruction", "conversation", "completion"]


@dataclass(frozen=True)
class Layout:
    """How a file writes a conversation.

    Attributes:
        name: for people.
        fields: a row that has all of these is written so.
        read: ``(record, place)`` to the messages.
        category: the field that groups rows for ``data.splitter`` meta and lda; ``None`` without one.
        form: what the rows are, which decides the template where nobody names one.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[dict[str, Any], str], list[_Message]]
    category: str | None = None
    form: Form = "instruction"


def as_conversations(table: Table, layout: Layout | None = None) -> Table:
    """The rows with their conversation in :data:`MESSAGES` and their group in ``category``.

    Raises:
        DataError: the fields are none that are known, or a row lacks one or is malformed.
    """
    layout = layout or recognise(table)
    records = []
    for row, record in enumerate(table.records):
        messages = layout.read(record, table.place(row))
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{table.place(row)}: holds no answer (a message of the assistant), so it teaches nothing")
        category = record.get(layout.category) if layout.category else None
        records.append({**record, MESSAGES: messages, FORM: layout.form, "category": category})
    return Table(table.source, records, table.numbers)


def form_of(table: Table) -> Form:
    """What the rows of a table of conversations were."""
    form: Form = table.records[0][FORM]
    return form


def recognise(table: Table) -> Layout:
    """How the table's rows write a conversation, by the fields of the first row.

    Raises:
        DataError: they have none of the known combinations of fields.
    """
    first = table.records[0]
    for present in ({name for name, value in first.items() if value is not None}, first.keys()):
        for layout in LAYOUTS:
            if present >= set(layout.fields):
                is_chat = layout is _COMPLETION and isinstance(first["prompt"], list)
                return _CHAT_COMPLETION if is_chat else layout
    allowed = ", ".join(f"({', '.join(map(repr, layout.fields))})" for layout in LAYOUTS)
    raise DataError(
        f"{table.place(0)}: instruction data needs the fields of one of {allowed}; it has "
        f"{', '.join(map(repr, table.records[0])) or 'none'}"
    )


def _text(record: dict[str, Any], field: str, place: str) -> str:
    """The text of a field that a row must have."""
    return text_of(required(record, field, place), field, place)


def _optional(record: dict[str, Any], field: str, place: str) -> str:
    """The text of a field that a row may have; empty without one."""
    return "" if record.get(field) is None else _text(record, field, place)


def _system(record: dict[str, Any], place: str) -> list[_Message]:
    text = _optional(record, "system", place)
    return [{"role": "system", "content": text}] if text.strip() else []


def _instruction_reader(instruction: str, context: str | None, output: str) -> Callable[[dict[str, Any], str], Any]:
    def read(record: dict[str, Any], place: str) -> list[_Message]:
        user: _Message = {"role": "user", "content": _text(record, instruction, place)}
        extra = _optional(record, context, place) if context else ""
        if extra.strip():
            user["input"] = extra
        answer = {"role": "assistant", "content": _text(record, output, place)}
        return [*_system(record, place), *_history(record, place), user, answer]

    return read


def _history(record: dict[str, Any], place: str) -> list[_Message]:
    """Earlier turns, as LLaMA-Factory writes them: a list of pairs of the user's text and the answer."""
    history = record.get("history")
    if history is None or history == "":
        return []
    if not isinstance(history, list):
        raise DataError(f"{place}: field 'history' must be a list of pairs [question, answer], but is {shown(history)}")
    messages: list[_Message] = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"{place}: field 'history' must hold pairs [question, answer], but has {shown(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _read_question(record: dict[str, Any], place: str) -> list[_Message]:
    """SQuAD's rows: the context beside the question; the answer of a question without one is empty."""
    user: _Message = {"role": "user", "content": _text(record, "question", place)}
    user["input"] = _text(record, "context", place)
    (answers,) = gold_answers(Table(place, [record], [1]))
    return [user, {"role": "assistant", "content": answers[0]["text"].rstrip() if answers else ""}]


def _read_gsm8k(record: dict[str, Any], place: str) -> list[_Message]:
    answer = _text(record, "answer", place).replace("####", "The answer is")
    return [{"role": "user", "content": _text(record, "question", place)}, {"role": "assistant", "content": answer}]


#: Spellings of who speaks, in small letters.
_ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function": "function", "ipython": "ipython",
}  # fmt: skip


def _message_reader(field: str) -> Callable[[dict[str, Any], str], list[_Message]]:
    def read(record: dict[str, Any], place: str) -> list[_Message]:
        messages = _messages(required(record, field, place), field, place)
        has_system = messages[0]["role"] == "system"
        return messages if has_system else [*_system(record, place), *messages]

    return read


def _messages(value: Any, field: str, place: str) -> list[_Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: field {field!r} must be a list of messages, but is {shown(value)}")
    return [_message(item, f"{place}, message {number} of {field!r}") for number, item in enumerate(value, start=1)]


def _message(item: Any, place: str) -> _Message:
    names = ("role", "content") if isinstance(item, dict) and "role" in item else ("from", "value")
    if not isinstance(item, dict) or names[0] not in item:
        raise DataError(f"{place}: must have 'role' and 'content', or 'from' and 'value', but is {shown(item)}")
    role = _ROLES.get(str(item[names[0]]).strip().lower())
    if role is None:
        raise DataError(f"{place}: {names[0]!r} must be one of {', '.join(_ROLES)}, but is {shown(item[names[0]])}")
    others = {key: value for key, value in item.items() if key not in names}
    return {"role": role, "content": _content(item.get(names[1]), others, place), **others}


def _content(value: Any, others: dict[str, Any], place: str) -> str:
    """A message's text; a list of parts is joined, as long as all of them are text."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if value is None and others.get("tool_calls"):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: the content must be text, but is {shown(value)}")
    return value


def _read_completion(record: dict[str, Any], place: str) -> list[_Message]:
    prompt, completion = (required(record, field, place) for field in ("prompt", "completion"))
    if not isinstance(prompt, list):
        user = {"role": "user", "content": _text(record, "prompt", place)}
        return [*_system(record, place), user, {"role": "assistant", "content": _text(record, "completion", place)}]
    if not isinstance(completion, list):
        raise DataError(f"{place}: 'prompt' is a list of messages, so 'completion' must be one too")
    earlier = _messages(prompt, "prompt", place)
    # what the prompt's assistant said is given, not taught
    earlier = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in earlier]
    return [*earlier, *_messages(completion, "completion", place)]


ALPACA = Layout("alpaca", ("instruction", "output"), _instruction_reader("instruction", "input", "output"), "category")
DOLLY = Layout(
    "dolly", ("instruction", "response"), _instruction_reader("instruction", "context", "response"), "category"
)
ROSETTA = Layout("rosetta", ("instruction", "output"), _instruction_reader("instruction", "input", "output"), "input")
SQUAD = Layout("squad", ("question", "context", "answers"), _read_question, "title")
GSM8K = Layout("gsm8k", ("question", "answer"), _read_gsm8k)
_MESSAGES = Layout("messages", ("messages",), _message_reader("messages"), "category", "conversation")
_SHAREGPT = Layout("conversations", ("conversations",), _message_reader("conversations"), "category", "conversation")
_COMPLETION = Layout("prompt and completion", ("prompt", "completion"), _read_completion, "category", "completion")
_CHAT_COMPLETION = replace(_COMPLETION, form="conversation")

#: In the order in which they are tried.
LAYOUTS = (_MESSAGES, _SHAREGPT, ALPACA, DOLLY, SQUAD, GSM8K, _COMPLETION)
