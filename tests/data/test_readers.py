"""Every name and format gives the fields a task needs; every mistake names the file, the place and what is allowed."""

from __future__ import annotations

import json

import pytest

from fs_fwdllm.data.conversations import MESSAGES
from fs_fwdllm.data.files import read_table
from fs_fwdllm.data.readers import parse_data_type, read_test_table, read_train_table
from fs_fwdllm.data.table import Table, category_codes, name_of, sorted_names
from fs_fwdllm.errors import ConfigError, DataError

ALPACA = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "greet", "output": "hi"}]
DOLLY = [{"instruction": "add", "context": "1 2", "response": "3", "category": "sums", "client": 4}]
GSM8K = [{"question": "1+2?", "answer": "Add.\n#### 3"}]
ROSETTA = [
    {"instruction": "loop", "input": "Go", "output": "for {}"},
    {"instruction": "loop", "input": "X86-64 Assembly", "output": "jmp"},
]


def parts(table: Table) -> list[tuple]:
    """What the user says, the input beside it, the answer, and the group of each row."""
    found = []
    for record in table.records:
        user, answer = record[MESSAGES]
        found.append((user["content"], user.get("input"), answer["content"], record["category"]))
    return found


@pytest.mark.parametrize(
    ("data_type", "file", "rows", "expected"),
    [
        ("alpaca@llm", "alpaca_data.json", ALPACA, [("add", "1 2", "3", None), ("greet", None, "hi", None)]),
        ("Alpaca_Cleaned@LLM", "alpaca_data_cleaned.json", ALPACA[:1], [("add", "1 2", "3", None)]),
        ("dolly-15k@llm", "databricks-dolly-15k.jsonl", DOLLY, [("add", "1 2", "3", "sums")]),
        ("gsm8k@llm", "gsm8k_train.jsonl", GSM8K, [("1+2?", None, "Add.\nThe answer is 3", None)]),
        ("rosetta_alpaca@llm", "rosetta_alpaca.json", ROSETTA[:1], [("loop", "Go", "for {}", "Go")]),
        ("code_alpaca@llm", "rosetta_alpaca.json", ROSETTA[:1], [("loop", "Go", "for {}", "Go")]),
        ("own.json@llm", "own.json", ALPACA[:1], [("add", "1 2", "3", None)]),
        ("own.jsonl@llm", "own.jsonl", DOLLY, [("add", "1 2", "3", "sums")]),
        ("own.jsonl@llm", "own.jsonl", GSM8K, [("1+2?", None, "Add.\nThe answer is 3", None)]),
    ],
)
def test_instruction_data(write, configure, data_type, file, rows, expected) -> None:
    write(file, rows)
    assert parts(read_train_table(configure(data_type))) == expected


def test_other_fields_of_a_row_stay(write, configure) -> None:
    write("own.jsonl", DOLLY)
    assert read_train_table(configure("own.jsonl@llm")).records[0]["client"] == 4


def test_meta_leaves_out_the_category_the_host_leaves_out(write, configure) -> None:
    write("rosetta_alpaca.json", ROSETTA)
    assert len(read_train_table(configure("rosetta_alpaca@llm", {"data.splitter": "lda"}))) == 2
    table = read_train_table(configure("rosetta_alpaca@llm", {"data.splitter": "meta"}))
    assert [record["category"] for record in table.records] == ["Go"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", 'text,label\n"a, ""b""\nc",1\n\nd,2\n'),
        ("x.CSV", '\ufefftext,label\r\n"a, ""b""\nc",1\r\nd,2\r\n'),
        ("x.jsonl", [{"text": 'a, "b"\nc', "label": "1"}, {"text": "d", "label": "2"}]),
        ("x.json", [{"text": 'a, "b"\nc', "label": "1"}, {"text": "d", "label": "2"}]),
        ("x.json", '{"text": "a, \\"b\\"\\nc", "label": "1"}\n{"text": "d", "label": "2"}\n'),
    ],
)
def test_every_format_gives_the_same_rows(write, configure, name, content) -> None:
    write(name, content)
    table = read_train_table(configure(f"{name}@text"))
    assert table.records == [{"text": 'a, "b"\nc', "label": "1"}, {"text": "d", "label": "2"}]
    assert table.numbers == [1, 2]


def test_a_csv_field_may_be_as_long_as_it_is(write) -> None:
    text = "long, " * 40_000
    assert read_table(write("x.csv", f'text,label\n"{text}",1\n')).records == [{"text": text, "label": "1"}]


def test_tsv_has_no_quoting_and_columns_replace_a_header(write) -> None:
    path = write("x.tsv", 'a "b\t1\r\n\nc" \t2\n')
    assert read_table(path, ["t", "l"]).records == [{"t": 'a "b', "l": "1"}, {"t": 'c" ', "l": "2"}]


def test_line_ends_inside_json_strings_do_not_end_a_line(write) -> None:
    path = write("x.jsonl", '{"t": "a\u2028b\u0085c"}\n\n{"t": "d"}')
    assert [record["t"] for record in read_table(path).records] == ["a\u2028b\u0085c", "d"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": \n', r"x\.jsonl:2: is not JSON"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', r"x\.jsonl:2: must be an object .* is a list"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl:2: is not UTF-8"),
        ("x.jsonl", "\n\n", r"x\.jsonl: has no rows"),
        ("x.jsonl", "[" * 100_000, r"x\.jsonl:1: is not JSON"),
        ("x.json", '[\n{"a": 1},\n{]', r"x\.json:3: is not JSON"),
        ("x.json", '[{"a": 1}] and more', r"x\.json:1: is not JSON"),
        ("x.json", '{"a": 1}\n{"a": \n', r"x\.json:2: is not JSON"),
        ("x.json", '{"a": 1}', r"x\.json: must hold a list of objects, but holds a dict"),
        ("x.json", '[{"a": 1}, 5]', r"x\.json, row 2: must be an object"),
        ("x.csv", "text,label\na,1\nb\n", r"x\.csv:3: has 1 values for the 2 columns \['text', 'label'\]"),
        ("x.csv", 'text,label\na,1\n"b,2\n', r"x\.csv:3: is not CSV"),
        ("x.csv", "text,text\na,1\n", r"x\.csv:1: two columns share a name"),
        ("x.csv", "text,label\n", r"x\.csv: has no rows"),
        ("x.tsv", "a\tb\n1\t2\n1\t2\t3\n", r"x\.tsv:3: has 3 values"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(write, name, content, message) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(name, content))


def test_a_missing_file_is_named_with_its_nearest_neighbour(write, configure) -> None:
    write("alpaca_dat.json", ALPACA)
    with pytest.raises(DataError, match=r"alpaca_data\.json: does not exist.*data\.root.*mean 'alpaca_dat\.json'"):
        read_train_table(configure("alpaca@llm"))
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        read_train_table(configure("alpaca@llm", {"data.root": "nowhere"}))


def test_a_folder_is_not_a_file(tmp_path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("data_type", "hint"),
    [("alpacca@llm", "'alpaca@llm'"), ("dolly@llm", "'dolly-15k@llm'"), ("installed_docstring@text", "_docstrings")],
)
def test_an_unknown_name_lists_the_known_ones(data_type, hint) -> None:
    with pytest.raises(ConfigError) as error:
        parse_data_type(data_type)
    assert "data.type" in str(error.value) and "gsm8k@llm" in str(error.value)
    assert "did you mean" in str(error.value) and hint in str(error.value).partition("did you mean")[2]


@pytest.mark.parametrize("data_type", ["", "alpaca", "x.json", "x.parquet@text", "alpaca@text", ".csv@text", "x.csv@"])
def test_a_type_without_a_known_kind_is_refused(data_type) -> None:
    with pytest.raises(ConfigError, match=r"data\.type"):
        parse_data_type(data_type)


def test_a_row_without_a_field_is_named(write, configure) -> None:
    write("x.json", [*ALPACA, {"instruction": "add", "output": None, "outputs": "3"}])
    with pytest.raises(DataError, match=r"row 3: has no field 'output'; it has 'instruction', 'outputs'; did you mean"):
        read_train_table(configure("x.json@llm"))
    write("x.json", [{"instruction": "add", "output": ["3"]}])
    with pytest.raises(DataError, match=r"row 1: field 'output' must be text, but is a list"):
        read_train_table(configure("x.json@llm"))
    write("x.json", [{"prompt": "add"}])
    with pytest.raises(DataError, match=r"row 1: instruction data needs .*'question'.*; it has 'prompt'"):
        read_train_table(configure("x.json@llm"))


def test_the_test_file_is_read_like_the_training_file(write, configure) -> None:
    write("test.jsonl", GSM8K)
    table = read_test_table(configure("gsm8k@llm", {"fwdllm.data.test_file": "test.jsonl"}))
    assert parts(table) == [("1+2?", None, "Add.\nThe answer is 3", None)]
    write("test.csv", "1,a\n")
    settings = {"fwdllm.data.test_file": "test.csv", "fwdllm.data.columns": ["label", "text"]}
    assert read_test_table(configure("x.jsonl@text", settings)).records == [{"label": "1", "text": "a"}]


def test_names_are_compared_as_text_and_ordered_as_numbers_where_they_are() -> None:
    assert [name_of(value) for value in (3, 3.0, " 3 ", True, 0.5, -2)] == ["3", "3", "3", "True", "0.5", "-2"]
    assert sorted_names(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert sorted_names(["10", "9", "a"]) == ["10", "9", "a"]
    assert category_codes(["b", "a", "b"]).tolist() == [1, 0, 1]


def test_a_taken_table_still_knows_its_rows() -> None:
    table = Table("f", [{"a": 1}, {"a": 2}, {}], [1, 2, 3]).take([1, 2]).take([1, 0])
    with pytest.raises(DataError, match="f, row 3: has no field 'a'"):
        table.column("a")


REAL = [
    ("alpaca", "alpaca_small_2000.json@llm", 2000, {}),
    ("dolly", "dolly_15k_shepherd10.jsonl@llm", 14931, {}),
    ("gsm8k", "train.jsonl@llm", 7473, {}),
    ("code_alpaca", "code_alpaca_2k.json@llm", 2017, {}),
    ("ag_news", "train_10k.jsonl@text", 9980, {}),
    ("ag_news", "test.csv@text", 7600, {"fwdllm.data.columns": ["label", "title", "text"]}),
    ("banking77", "train.csv@text", 10003, {"fwdllm.data.label": "category"}),
    ("glue", "CoLA/train.tsv@text", 8551, {"fwdllm.data.columns": ["source", "label", "mark", "text"]}),
    ("glue", "MRPC/train.tsv@text", 3668, {"fwdllm.data.text": "#1 String", "fwdllm.data.label": "Quality"}),
    ("yelp", "dev.jsonl@text", 5000, {"fwdllm.data.label": "stars"}),
]


@pytest.mark.parametrize(("folder", "data_type", "rows", "settings"), REAL, ids=[f"{r[0]}/{r[1]}" for r in REAL])
def test_real_files_have_every_row(shared_data, configure, folder, data_type, rows, settings) -> None:
    path = shared_data(f"{folder}/{data_type.partition('@')[0]}")
    root = path.parents[data_type.count("/")]
    config = configure(data_type, {"data.root": str(root), **settings})
    table = read_train_table(config)
    assert len(table) == rows
    if data_type.endswith("@llm"):
        assert all(
            [message["role"] for message in record[MESSAGES]] == ["user", "assistant"] for record in table.records
        )
        assert "####" not in json.dumps([record[MESSAGES] for record in table.records[:50]])
    else:
        assert len(table.texts(config.fwdllm.data.text)) == len(table.names(config.fwdllm.data.label)) == rows
