"""A header is read as the package gguf reads it, and whatever else lies in a file is refused with the file's name."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.gguf_file import GGUF_FORMS, read_gguf
from tests.model.base.test_reading import refusal
from tests.model.tiny_gguf import save_tiny_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", "Q4_K", extra={"pair": np.ones((2, 3))})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", "Q4_K")


def test_a_header_is_what_the_library_reads(plain: Path) -> None:
    ours, theirs = read_gguf(plain), gguf.GGUFReader(plain)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for name, tensor in zip(ours.tensors, theirs.tensors, strict=True):
        own = ours.tensors[name]
        assert own.form.name == tensor.tensor_type.name and own.shape == tuple(tensor.shape.tolist()[::-1])
        assert (own.offset, own.bytes) == (tensor.data_offset, tensor.n_bytes)
    assert ours.architecture == "llama" and ours.packed_forms == ["Q4_K"]
    arrays = gguf.GGUFValueType.ARRAY
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        if field.types[0] == arrays:
            assert ours.lengths[key] == len(field.data)
        else:
            assert ours.settings[key] == field.contents()


def test_sizes_of_forms_are_the_library_s() -> None:
    for number, form in GGUF_FORMS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == form.name and gguf.GGML_QUANT_SIZES[kind] == (form.numbers, form.bytes)


def test_a_header_without_its_vocabulary_says_the_same(plain: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(read_gguf(plain).without_vocabulary())
    theirs = gguf.GGUFReader(short)
    kept = {key: field.contents() for key, field in theirs.fields.items()}
    assert {key: kept[key] for key in read_gguf(plain).settings} == read_gguf(plain).settings
    assert [tensor.name for tensor in theirs.tensors] == list(read_gguf(plain).tensors)
    assert short.stat().st_size < 4_000 and kept["llama.vocab_size"] == 264


def test_what_is_not_read_is_named_with_the_way_out(file: Path) -> None:
    with pytest.raises(
        ModelError, match=rf"{re.escape(str(file))}: pair is of type F64, which is not read.*llama-quantize"
    ):
        read_gguf(file)


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (lambda raw: b"", "is cut short: it has 0 bytes"),
        (lambda raw: b"GGUF", "is cut short: it has 4 bytes"),
        (lambda raw: b"PK\x03\x04" + raw[4:], r"is no GGUF file: it begins with b'PK"),
        (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "version 1 of GGUF; read are 2 and 3"),
        (lambda raw: raw[:8] + struct.pack("<Q", 1 << 60) + raw[16:], "damaged or cut short"),
        (lambda raw: raw[:16] + struct.pack("<Q", 1 << 60) + raw[24:], "damaged or cut short"),
        (lambda raw: raw[:24] + struct.pack("<Q", 1 << 63) + raw[32:], "damaged or cut short"),
        (lambda raw: raw[:-100], "damaged or cut short .*has .* bytes from byte"),
        (lambda raw: raw[: len(raw) // 2], "damaged or cut short"),
        (lambda raw: raw[:400], "damaged or cut short"),
    ],
)
def test_damage_is_an_error_that_names_the_file(
    plain: Path, tmp_path: Path, damage: Callable[[bytes], bytes], pattern: str
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damage(plain.read_bytes()))
    said = refusal(broken)
    assert str(broken) in said and re.search(pattern, said), said


def test_files_for_other_machines_and_parts_of_files_are_refused(tmp_path: Path) -> None:
    big = save_tiny_gguf(tmp_path / "big.gguf", "F32", endianness=gguf.GGUFEndian.BIG)
    assert re.search(r"big\.gguf: was written for big-endian machines", refusal(big))
    part = save_tiny_gguf(tmp_path / "model-00001-of-00003.gguf", settings={"split.count": 3})
    assert re.search(r"is one of 3 parts; join them: llama-gguf-split --merge", refusal(part))


@pytest.mark.parametrize("key", ["llama.block_count", "llama.vocab_size", "llama.attention.head_count"])
@pytest.mark.parametrize("value", [0, 1 << 31])
def test_sizes_that_no_file_of_this_size_has_are_refused(tmp_path: Path, key: str, value: int) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", settings={key: value})
    said = refusal(file)
    assert str(file) in said and re.search(r"must be a whole number above 0|is 2,147,483,648, more", said), said


def test_stretched_positions_need_the_model_s_own_configuration(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", settings={"llama.rope.scaling.type": "yarn"})
    assert re.search(r"stretches its positions \(rope\.scaling\.type 'yarn'\).*own config\.json", refusal(file))


@settings(max_examples=150, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 9_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_byte_of_a_header_makes_more_than_an_error(
    plain: Path, tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    raw = bytearray(plain.read_bytes())
    for place, value in places:
        raw[place] = value
    broken = tmp_path_factory.mktemp("broken") / "broken.gguf"
    broken.write_bytes(raw)
    try:
        found = read_gguf(broken)
    except ModelError as error:
        assert str(broken) in str(error)
    else:
        assert all(tensor.offset + tensor.bytes <= len(raw) for tensor in found.tensors.values())
    os.unlink(broken)


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    file = save_tiny_gguf(tmp_path / "model.gguf", "Q8_0")
    assert read_gguf(file).packed_forms == ["Q8_0"]
    save_tiny_gguf(file, "Q4_0")
    assert read_gguf(file).packed_forms == ["Q4_0"]
