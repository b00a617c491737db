"""What a language model is taught, token by token."""

from __future__ import annotations

import logging

import pytest

from fs_fwdllm.data.table import Table
from fs_fwdllm.data.templates import (
    classification_examples,
    instruction_examples,
    instruction_prompt,
    label_indices,
)
from fs_fwdllm.errors import DataError

ROW = {"instruction": "add the numbers", "input": "one two", "output": "three"}


def table_of(*records: dict) -> Table:
    return Table("rows.json", list(records), list(range(1, len(records) + 1)))


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
    assert instruction_examples(table_of(short), tokenizer, prompt_tokens)[0] == []


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
