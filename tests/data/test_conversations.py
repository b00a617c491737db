"""Rows as people write them, and the conversation each holds; what is malformed is refused by file, row and field."""

from __future__ import annotations

import pytest

from fs_fwdllm.data import load_federated_data
from fs_fwdllm.data.conversations import MESSAGES, as_conversations, form_of
from fs_fwdllm.data.table import Table
from fs_fwdllm.errors import DataError

TURNS = [("user", "one"), ("assistant", "two"), ("user", "red"), ("assistant", "green")]
OPENAI = [{"role": role, "content": text} for role, text in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]


def table_of(*records):
    return Table("rows.jsonl", list(records), list(range(1, len(records) + 1)))


def said(*records):
    table = as_conversations(table_of(*records))
    return [[(message["role"], message["content"]) for message in record[MESSAGES]] for record in table.records]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": OPENAI}, "conversation"),
        ({"conversations": SHAREGPT}, "conversation"),
        ({"conversations": OPENAI}, "conversation"),
        ({"messages": SHAREGPT, "prompt": "an id", "prompt_id": 4}, "conversation"),
        ({"messages": OPENAI, "instruction": None, "output": None}, "conversation"),
        ({"prompt": OPENAI[:3], "completion": OPENAI[3:]}, "conversation"),
        ({"instruction": "red", "input": "", "output": "green", "history": [["one", "two"]]}, "instruction"),
        (
            {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in OPENAI]},
            "conversation",
        ),
    ],
)
def test_all_shapes_hold_the_same_conversation(row, form) -> None:
    assert said(row) == [TURNS]
    assert form_of(as_conversations(table_of(row))) == form


def test_a_prompt_and_its_completion() -> None:
    assert said({"prompt": "one ", "completion": "two"}) == [[("user", "one "), ("assistant", "two")]]
    assert form_of(as_conversations(table_of({"prompt": "one", "completion": "two"}))) == "completion"


def test_what_the_prompt_already_says_is_not_taught() -> None:
    (record,) = as_conversations(table_of({"prompt": OPENAI[:3], "completion": OPENAI[3:]})).records
    assert [message.get("weight") for message in record[MESSAGES]] == [None, 0, None, None]


@pytest.mark.parametrize(
    "row", [{"messages": OPENAI}, {"conversations": SHAREGPT}, {"instruction": "red", "output": "green"}]
)
def test_a_system_field_comes_first(row) -> None:
    assert said({**row, "system": "be red"})[0][0] == ("system", "be red")
    own = [{"role": "system", "content": "be blue"}, *OPENAI]
    assert said({"messages": own, "system": "be red"})[0][:2] == [("system", "be blue"), TURNS[0]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "hello"}, r"field 'messages' must be a list of messages, but is 'hello'"),
        ({"messages": []}, r"field 'messages' must be a list of messages"),
        ({"messages": [*OPENAI, "bye"]}, r"message 5 of 'messages': must have 'role' and 'content'"),
        ({"messages": [{"role": "owl", "content": "hu"}]}, r"message 1 of 'messages': 'role' must be one of .*'owl'"),
        (
            {"messages": [OPENAI[0], {"role": "assistant", "content": None}]},
            r"message 2 .*content must be text, but is None",
        ),
        ({"messages": [OPENAI[0], {"role": "assistant", "content": [{"image": 1}]}]}, r"message 2 .*must be text"),
        ({"messages": OPENAI[:1]}, r"holds no answer"),
        ({"conversations": [{"from": "human"}]}, r"message 1 of 'conversations': the content must be text"),
        ({"prompt": OPENAI, "completion": "text"}, r"'completion' must be one too"),
        ({"prompt": "one", "completion": ["two"]}, r"field 'completion' must be text"),
        ({"instruction": "a", "output": "b", "history": "c"}, r"'history' must be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"'history' must hold pairs .*\['c'\]"),
        ({"instruction": "a", "output": "b", "system": ["c"]}, r"field 'system' must be text"),
        ({"chosen": "a", "rejected": "b"}, r"needs the fields of one of \('messages'\), .*it has 'chosen', 'rejected'"),
    ],
)
def test_what_is_malformed_names_file_row_and_field(row, reason) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1.*" + reason):
        as_conversations(table_of(row))


def test_a_row_of_another_shape_is_refused_by_its_number() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: has no field 'messages'; it has 'instruction'"):
        as_conversations(table_of({"messages": OPENAI}, {"instruction": "a"}))


def test_a_run_teaches_every_answer_and_says_how_it_was_asked(write, configure, tokenizer) -> None:
    write("chats.json", [{"messages": OPENAI}] * 6)
    data = load_federated_data(configure("chats.json@llm", {"llm.tok_len": 40}), tokenizer)
    assert data.template is not None and data.template.to_facts() == {"name": "plain"}
    example = data.clients[1].train[0]
    assert tokenizer.decode(example.labels[example.labels != -100]).split() == ["two", "[EOS]", "green", "[EOS]"]
    named = configure("chats.json@llm", {"llm.tok_len": 200, "fwdllm.data.template": "alpaca"})
    assert load_federated_data(named, tokenizer).template.to_facts() == {"name": "alpaca"}


def test_a_test_file_is_written_as_the_training_file_is(write, configure, tokenizer) -> None:
    write("chats.jsonl", [{"messages": OPENAI}] * 6)
    write("test.jsonl", [{"prompt": "one", "completion": "two"}])
    settings = {"llm.tok_len": 40, "fwdllm.data.test_file": "test.jsonl"}
    data = load_federated_data(configure("chats.jsonl@llm", settings), tokenizer)
    assert tokenizer.decode(data.test[0].input_ids).split() == [
        "[BOS]",
        "[UNK]",
        ":",
        "one",
        "[UNK]",
        ":",
        "two",
        "[EOS]",
    ]
