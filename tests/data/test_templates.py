"""What a language model is taught, token by token."""

from __future__ import annotations

import copy
import json
import logging

import pytest

from fs_fwdllm.data.conversations import as_conversations
from fs_fwdllm.data.examples import classification_examples, conversation_examples
from fs_fwdllm.data.labels import label_indices
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.templates import PromptTemplate, user_says
from fs_fwdllm.errors import ConfigError, DataError
from tests.data.chat_template_kinds import KINDS, TURNS
from tests.data.conftest import word_tokenizer
from tests.data.tokenizer_families import family

ROW = {"instruction": "add the numbers", "input": "one two", "output": "three"}


def table_of(*records: dict) -> Table:
    return Table("rows.json", list(records), list(range(1, len(records) + 1)))


def instruction_examples(table, tokenizer, tok_len):
    return conversation_examples(as_conversations(table), PromptTemplate("alpaca", tokenizer), tok_len)


def instruction_prompt(row, template="alpaca") -> str:
    (record,) = as_conversations(table_of({**row, "output": ""})).records
    messages = record["fs_fwdllm messages"][:-1]
    return PromptTemplate(template, word_tokenizer(start=True)).prompt(messages)


@pytest.mark.parametrize("absent", [None, "", "  \n", "missing"])
def test_an_absent_input_is_absent(absent) -> None:
    row = {**ROW, "input": absent}
    if absent == "missing":
        del row["input"]
    prompt = instruction_prompt(row)
    assert "None" not in prompt and "### Input" not in prompt and "add the numbers" in prompt
    assert prompt.endswith("### Response:")


def test_an_input_is_shown() -> None:
    prompt = instruction_prompt(ROW)
    assert "### Input:\none two\n" in prompt and "paired with an input" in prompt
    assert instruction_prompt({**ROW, "input": 0}).count("### Input:\n0\n") == 1


def test_braces_in_the_data_are_text() -> None:
    assert "{input} {0}" in instruction_prompt({**ROW, "instruction": "{input} {0}"})


def test_only_the_answer_and_the_end_are_labels(tokenizer) -> None:
    (example,), rows = instruction_examples(table_of(ROW), tokenizer, 200)
    three = tokenizer.convert_tokens_to_ids("three")
    prompt = tokenizer(instruction_prompt(ROW), add_special_tokens=False)["input_ids"]
    expected = [tokenizer.bos_token_id, *prompt, three, tokenizer.eos_token_id]
    assert rows == [0]
    assert example.input_ids.tolist() == expected
    assert example.labels.tolist() == [-100] * (1 + len(prompt)) + expected[-2:]
    assert example.input_ids.dtype == example.labels.dtype == "int32"


def test_the_start_token_is_there_only_if_the_tokenizer_adds_it(tokenizer, tokenizer_without_start) -> None:
    with_start = instruction_examples(table_of(ROW), tokenizer, 200)[0][0].input_ids.tolist()
    without = instruction_examples(table_of(ROW), tokenizer_without_start, 200)[0][0].input_ids.tolist()
    assert with_start == [tokenizer.bos_token_id, *without]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_cuts_the_end(tokenizer, side, caplog) -> None:
    tokenizer.truncation_side = side
    try:
        row = {**ROW, "output": "one two three four five"}
        ((whole,), _) = instruction_examples(table_of(row), tokenizer, 200)
        length = len(whole.input_ids)
        ((cut,), _) = instruction_examples(table_of(row), tokenizer, length - 2)
        assert cut.input_ids.tolist() == whole.input_ids.tolist()[:-2]
        assert cut.labels.tolist() == whole.labels.tolist()[:-2]
    finally:
        tokenizer.truncation_side = "right"


def test_a_row_without_room_for_an_answer_is_left_out_and_counted(tokenizer, caplog) -> None:
    short, long = {**ROW, "input": None}, {**ROW, "instruction": "one " * 90}
    ((whole,), _) = instruction_examples(table_of(short), tokenizer, 200)
    prompt_tokens = int((whole.labels == -100).sum())
    with caplog.at_level(logging.WARNING, "fs_fwdllm.data"):
        examples, rows = instruction_examples(table_of(long, short, long), tokenizer, prompt_tokens + 1)
    assert rows == [1] and len(examples) == 1 and int((examples[0].labels != -100).sum()) == 1
    assert "2 of 3 rows are left out" in caplog.text and f"llm.tok_len {prompt_tokens + 1}" in caplog.text
    with pytest.raises(
        DataError, match=f"within llm.tok_len {prompt_tokens}: the answers begin after {prompt_tokens} to"
    ):
        instruction_examples(table_of(short), tokenizer, prompt_tokens)


def test_an_empty_answer_still_teaches_to_stop(tokenizer) -> None:
    (example,), _ = instruction_examples(table_of({**ROW, "output": ""}), tokenizer, 200)
    assert example.labels[example.labels != -100].tolist() == [tokenizer.eos_token_id]


def test_many_rows_give_what_single_rows_give(tokenizer) -> None:
    records = [{**ROW, "output": "one two three".rsplit(" ", number % 3)[0]} for number in range(1003)]
    together, rows = instruction_examples(table_of(*records), tokenizer, 60)
    assert rows == list(range(1003))
    for number in (0, 1, 2, 999, 1000, 1002):
        (alone,), _ = instruction_examples(table_of(records[number]), tokenizer, 60)
        assert alone.input_ids.tolist() == together[number].input_ids.tolist()


def test_classification_frames_and_cuts_the_text(tokenizer) -> None:
    examples, rows = classification_examples(table_of({}, {}), ["one two three", "red"], [1, 0], tokenizer, 3)
    tokens = [tokenizer.convert_ids_to_tokens(example.input_ids.tolist()) for example in examples]
    assert tokens == [["[BOS]", "one", "two"], ["[BOS]", "red"]] and rows == [0, 1]
    assert [(int(example.labels), example.labels.shape) for example in examples] == [(1, ()), (0, ())]


def test_a_text_without_tokens_is_left_out(tokenizer_without_start) -> None:
    examples, rows = classification_examples(table_of({}, {}), ["", "red"], [1, 0], tokenizer_without_start, 8)
    assert rows == [1] and len(examples) == 1


def test_label_indices_follow_the_order_given() -> None:
    table = table_of({"y": 2}, {"y": "1"}, {"y": 2.0})
    assert label_indices(table, "y", ["2", "1"]) == [0, 1, 0]


def test_a_label_outside_the_classes_names_row_label_and_allowed() -> None:
    with pytest.raises(DataError) as error:
        label_indices(table_of({"y": "sports"}, {"y": "sport"}), "y", ["world", "sports"])
    assert all(part in str(error.value) for part in ("row 2", "'sport'", "'world', 'sports'", "did you mean 'sports'"))


def test_a_pair_is_framed_as_the_tokenizer_frames_pairs(tokenizer):
    table = Table("made up", [{"a": "w3 w4", "b": "w5"}, {"a": "w6", "b": "w7 w8 w9"}], [1, 2])
    examples, rows = classification_examples(table, table.texts("a"), [0, 1], tokenizer, 16, table.texts("b"))
    assert rows == [0, 1]
    for example, record in zip(examples, table.records, strict=True):
        assert example.input_ids.tolist() == tokenizer(record["a"], record["b"])["input_ids"]
    short, _ = classification_examples(table, table.texts("a"), [0, 1], tokenizer, 3, table.texts("b"))
    assert [len(example.input_ids) for example in short] == [3, 3]


def test_system_and_history_are_read_and_every_answer_is_taught(tokenizer) -> None:
    row = {**ROW, "system": "add red", "history": [["one", "two"], ["red", "green"]]}
    (record,) = as_conversations(table_of(row)).records
    rendered = PromptTemplate("alpaca", tokenizer).render(record["fs_fwdllm messages"])
    assert rendered.text == (
        "add red\n\n### Instruction:\none\n\n### Response:two[EOS]\n\n### Instruction:\nred\n\n### Response:green[EOS]"
        "\n\n### Instruction:\nadd the numbers\n\n### Input:\none two\n\n### Response:three"
    )
    assert [rendered.text[first:last] for first, last in rendered.answers] == ["two[EOS]", "green[EOS]", "three"]
    ((example,), _) = instruction_examples(table_of(row), tokenizer, 200)
    taught = tokenizer.convert_ids_to_tokens(example.labels[example.labels != -100].tolist())
    assert taught == ["two", "[EOS]", "green", "[EOS]", "three", "[EOS]"]


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_system_or_history_changes_nothing(empty) -> None:
    assert instruction_prompt({**ROW, "history": empty}) == instruction_prompt(ROW)
    assert instruction_prompt({**ROW, "system": empty or None}) == instruction_prompt(ROW)


def test_the_plain_template_by_hand(tokenizer) -> None:
    messages = [*user_says("one", system="be red"), {"role": "assistant", "content": "two"}, *user_says("three")]
    template = PromptTemplate("plain", tokenizer)
    assert template.prompt(messages) == "System: be red\nHuman: one\nAssistant: two[EOS]\nHuman: three\nAssistant:"
    rendered = template.render([*messages, {"role": "assistant", "content": "four"}])
    assert rendered.text == template.prompt(messages) + " four"
    assert [rendered.text[first:last] for first, last in rendered.answers] == [" two[EOS]", " four"]


@pytest.mark.parametrize("name", ["alpaca", "plain", "none"])
def test_what_a_model_is_asked_is_what_it_was_taught_after(tokenizer, name) -> None:
    """The text of a training row begins with the text of the question, answer by answer."""
    template = PromptTemplate(name, tokenizer)
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    whole = template.render(messages)
    for number, (first, _) in enumerate(whole.answers):
        assert template.prompt(messages[: 2 * number + 1]) == whole.text[:first]


def test_a_message_with_weight_0_is_not_taught(tokenizer) -> None:
    messages = [*user_says("a"), {"role": "assistant", "content": "b", "weight": 0}, *user_says("c")]
    rendered = PromptTemplate("plain", tokenizer).render([*messages, {"role": "assistant", "content": "d"}])
    assert [rendered.text[first:last] for first, last in rendered.answers] == [" d"]


@pytest.mark.parametrize("name", ["alpaca", "plain", "none"])
def test_a_template_comes_back_from_its_facts(tokenizer, name) -> None:
    template = PromptTemplate(name, tokenizer)
    again = PromptTemplate.from_facts(json.loads(json.dumps(template.to_facts())), tokenizer)
    assert again.prompt(user_says("add")) == template.prompt(user_says("add")) and again.name == name


def test_a_template_that_is_not_there_is_refused(tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"fwdllm\.data\.template: chat needs a tokenizer with a chat"):
        PromptTemplate("chat", tokenizer)
    with pytest.raises(ConfigError, match="'alpacca' is not known; known are alpaca, chat, plain, none"):
        PromptTemplate.from_facts({"name": "alpacca"}, tokenizer)
    with pytest.raises(DataError, match="needs the name of one of"):
        PromptTemplate.from_facts({}, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_found_in_chat_templates_of_every_kind(kind) -> None:
    template, expected = KINDS[kind]
    tokenizer = copy.deepcopy(family("byte-level"))
    tokenizer.chat_template = template
    chat = PromptTemplate("chat", tokenizer)
    rendered = chat.render(TURNS)
    assert rendered.text == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert [rendered.text[first:last] for first, last in rendered.answers] == expected


def test_the_users_words_are_never_taught() -> None:
    """Also where an answer repeats the question, and an earlier answer the later one."""
    words = ["yes", "yes", "yes", "yes"]
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, words, strict=True)]
    for kind, (template, _) in KINDS.items():
        tokenizer = copy.deepcopy(family("byte-level"))
        tokenizer.chat_template = template
        rendered = PromptTemplate("chat", tokenizer).render(turns)
        taught = "|".join(rendered.text[first:last] for first, last in rendered.answers)
        assert taught.count("yes") == 2, (kind, rendered.text, taught)


def test_a_template_that_shows_the_date_gives_the_same_rows_every_day() -> None:
    tokenizer = copy.deepcopy(family("byte-level"))
    tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}\n" + KINDS["header and end"][0]
    assert PromptTemplate("chat", tokenizer).prompt(user_says("a")).startswith("Today: 26 Jul 2024\n")
