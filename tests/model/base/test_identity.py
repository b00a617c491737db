"""The digest of a base is the same wherever its tensors lie, and another one for every change that matters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fs_fwdllm.config.base_section import BaseConfig
from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.base.identity import base_digest, refusal_of_base
from fs_fwdllm.model.base.packing import Form
from fs_fwdllm.model.base.quantising import quantise_folder
from fs_fwdllm.model.source import ModelSource
from tests.model.tiny import flip_a_bit, save_tiny_model

FLOATS = BaseConfig()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", "llama")


def digest(folder: Path, packing: BaseConfig = FLOATS) -> bytes:
    return base_digest(ModelSource(str(folder), str(folder), "causal_lm"), packing)


def reshard(folder: Path) -> None:
    """The same tensors, in three files."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    places = {name: f"model-0000{number % 3 + 1}-of-00003.safetensors" for number, name in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def settings(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


SAME: dict[str, Callable[[Path], None]] = {
    "copied": lambda folder: None,
    "resharded": reshard,
    "another version of transformers": lambda folder: settings(folder, transformers_version="0.0.1", _name_or_path="x"),
    "read in another dtype": lambda folder: settings(folder, dtype="bfloat16"),
    "another tokenizer file": lambda folder: (folder / "README.md").write_text("words") and None,
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_weights_have_the_same_digest(folder: Path, tmp_path: Path, change: str) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    SAME[change](other)
    assert digest(other) == digest(folder) and len(digest(folder)) == 16


OTHERS: dict[str, Callable[[Path], object]] = {
    "one bit": flip_a_bit,
    "a setting": lambda folder: settings(folder, rope_theta=5.0),
    "a tensor less": lambda folder: save_file(
        dict(list(load_file(folder / "model.safetensors").items())[1:]), folder / "model.safetensors"
    ),
    "another dtype": lambda folder: save_file(
        {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
    ),
}


@pytest.mark.parametrize("change", OTHERS)
def test_others_have_another(folder: Path, tmp_path: Path, change: str) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    OTHERS[change](other)
    assert digest(other) != digest(folder)


def test_packing_makes_another_base_of_it(folder: Path, tmp_path: Path) -> None:
    found = {digest(folder)}
    for packing in (BaseConfig(quantise="int4"), BaseConfig(quantise="int4", group=32), BaseConfig(quantise="int8")):
        found.add(digest(folder, packing))
    quantise_folder(folder, tmp_path / "packed", Form("int4", 32))
    found.add(digest(tmp_path / "packed"))
    assert len(found) == 5
    assert digest(folder, BaseConfig(compute_dtype="bfloat16", stream=True)) == digest(folder)


def test_a_name_on_the_hub_without_a_copy_here_has_none() -> None:
    assert base_digest(ModelSource("nobody/nothing", "nobody/nothing", "causal_lm"), FLOATS) == b""


def test_a_refusal_names_both_digests_and_the_way_out(folder: Path, tmp_path: Path) -> None:
    own, other = digest(folder), digest(flip_a_bit(shutil.copytree(folder, tmp_path / "other")))
    said = refusal_of_base(own, other)
    assert f"({other.hex()}, not {own.hex()})" in said
    assert "give it a copy of the same folder (model.type) and the same fwdllm.base, and start it again" in said


@pytest.mark.parametrize(("own", "other"), [(b"a", b"a"), (b"", b"a"), (b"a", b""), (b"", b"")])
def test_the_same_and_the_unknown_are_not_refused(own: bytes, other: bytes) -> None:
    assert refusal_of_base(own, other) == ""


def test_a_file_that_ends_early_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelError, match=str(file)):
        digest(folder)
