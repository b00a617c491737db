"""Files as people have them: other separators, endings and encodings; and what cannot be read, refused by its place."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.data.files import FILE_ENDINGS, how_to_convert, read_table
from fs_fwdllm.data.readers import parse_data_type, read_train_table
from fs_fwdllm.errors import ConfigError, DataError

ROWS = [{"text": 'a, "b"; c|d\ne', "label": "x"}, {"text": "f\tg", "label": "y;z"}]


def csv_text(separator, end="\n"):
    quoted = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in ROWS]
    return end.join(separator.join(values) for values in [["text", "label"], *quoted]) + end


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["x.csv", "x.txt"])
def test_separators_line_ends_and_marks_are_seen(write, separator, end, encoding, name) -> None:
    assert read_table(write(name, csv_text(separator, end).encode(encoding))).records == ROWS


@pytest.mark.parametrize("text", ["a;b", "a, b, c", "a|b|c|d", "a\tb", "plain"])
def test_separators_inside_texts_do_not_mislead(write, text) -> None:
    path = write("x.csv", f'text,label\n"{text}",1\n"{text}",2\n')
    assert read_table(path).records == [{"text": text, "label": "1"}, {"text": text, "label": "2"}]
    path = write("y.csv", "text;label\nHello, world;1\nWell, well;2\n")
    assert read_table(path).records[0] == {"text": "Hello, world", "label": "1"}


def test_a_file_without_a_header_has_the_separator_that_gives_its_columns(write) -> None:
    path = write("x.csv", "1;Hello, world\n2;Well\n")
    assert read_table(path, ["label", "text"]).records[1] == {"label": "2", "text": "Well"}


def test_white_space_around_a_columns_name_is_not_part_of_it(write) -> None:
    assert read_table(write("x.csv", "text , label\na,1\n")).records == [{"text": "a", "label": "1"}]


def test_a_broken_row_is_named_whatever_the_separator(write) -> None:
    with pytest.raises(DataError, match=r"x\.csv:3: has 3 values for the 2 columns \['text', 'label'\].*quotes"):
        read_table(write("x.csv", "text;label\na;1\nb;c;2\n"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.ndjson", "x.txt"])
@pytest.mark.parametrize("form", ["lines", "list", "indented"])
def test_json_is_read_under_any_of_its_names(write, name, form) -> None:
    text = "\n".join(map(json.dumps, ROWS)) if form == "lines" else json.dumps(ROWS, indent=form == "indented" or None)
    assert read_table(write(name, text)).records == ROWS


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("value", ["a\\ud83d", "\\udc00", {"deep": ["\\uDBFFb"]}])
def test_half_a_character_is_refused_by_file_row_and_field(write, name, value) -> None:
    bad = json.dumps({"text": value}).replace("\\\\", "\\")
    lines = ['{"text": "\\ud83d\\ude00 \\u00e9"}', bad]
    path = write(name, "\n".join(lines) if name == "x.jsonl" else f"[{', '.join(lines)}]")
    with pytest.raises(DataError, match=rf"{name}(:2|, row 2): field 'text' holds half a character") as refused:
        read_table(path)
    str(refused.value).encode()  # and the message itself can be printed
    assert read_table(write(name, lines[0] if name == "x.jsonl" else f"[{lines[0]}]")).records == [{"text": "😀 é"}]


def test_another_encoding_is_named_with_the_way_out(write, configure) -> None:
    path = write("x.csv", "text,label\nfine,1\ncafé,2\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.csv:3: is not UTF-8 text.*fwdllm\.data\.encoding \(often cp1252"):
        read_table(path)
    config = configure("x.csv@text", {"fwdllm.data.encoding": "latin-1"})
    assert read_train_table(config).records[1] == {"text": "café", "label": "2"}
    with pytest.raises(ConfigError, match=r"fwdllm\.data\.encoding: 'latn' is no encoding"):
        read_table(path, (), "latn")
    with pytest.raises(DataError, match=r"x\.csv:3: is not ascii text"):
        read_table(path, (), "ascii")


def test_nul_characters_are_refused_by_line(write) -> None:
    with pytest.raises(DataError, match=r"x\.csv:2: holds a NUL character; if it is UTF-16"):
        read_table(write("x.csv", b"text,label\na\0b,1\n"))


@pytest.mark.parametrize(
    ("name", "way"),
    [("x.parquet", "read_parquet"), ("x.XLSX", "read_excel"), ("x.csv.gz", "gunzip"), ("x.arrow", "from_file")],
)
def test_files_that_are_not_read_say_how_to_convert_them(write, name, way) -> None:
    for refuse in (lambda: read_table(write(name, b"x")), lambda: parse_data_type(f"{name}@text")):
        with pytest.raises(ConfigError, match=rf"are not read; convert it first: .*{way}.*{name}"):
            refuse()
    assert how_to_convert("x.csv") == ""


@pytest.mark.parametrize("content", ['{"train": [{"text": "a"}]}', '{"text": {"0": "a"}, "label": {"0": 1}}'])
def test_an_object_of_columns_or_splits_says_what_is_wanted(write, content) -> None:
    with pytest.raises(DataError, match=r"holds a dict with '.*write a list of rows, or one object a line"):
        read_table(write("x.json", content))


@pytest.mark.parametrize("name", ["a\0b.csv", "x" * 300 + ".csv"])
def test_impossible_names_are_refused(tmp_path, name) -> None:
    with pytest.raises(DataError):
        read_table(tmp_path / name)


@given(content=st.binary(max_size=200), ending=st.sampled_from(FILE_ENDINGS))
def test_any_bytes_give_rows_or_an_error_of_ours(tmp_path_factory, content, ending) -> None:
    path = tmp_path_factory.mktemp("any") / f"x{ending}"
    path.write_bytes(content)
    try:
        table = read_table(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert len(table) and all(isinstance(record, dict) for record in table.records)
