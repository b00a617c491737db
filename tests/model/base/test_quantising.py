"""``fs-fwdllm quantise``: interrupted, on a full disk, twice, of every layout; and what others read of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.base import shards
from fs_fwdllm.model.base.checkpoint import SafetensorsCheckpoint
from fs_fwdllm.model.base.packing import Form
from fs_fwdllm.model.base.quantising import quantise_folder
from tests.model.sentence import save_tiny_encoder
from tests.model.tiny import save_tiny_model, tiny_batch, tiny_config

FORM = Form("int4", 32)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", "llama")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["quantise", *map(str, arguments)], env={"COLUMNS": "300", "NO_COLOR": "1"})


def test_the_command_says_what_it_did(llama: Path, tmp_path: Path) -> None:
    done = call(llama, tmp_path / "packed", "--int4", "--group", 32)
    assert done.exit_code == 0, done.output
    assert "layers packed" in done.output and str(tmp_path / "packed") in done.output
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors" and settings["ignore"] == ["lm_head", "model.embed_tokens"]
    assert sum(len(group["targets"]) for group in settings["config_groups"].values()) == 14


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--int4", "--nf4"], "choose one"),
        (["--nf4", "--asymmetric"], "nf4 has no zeros"),
        (["--group", "4"], "8"),
    ],
)
def test_contradictions_are_named(llama: Path, tmp_path: Path, arguments: list[str], pattern: str) -> None:
    done = call(llama, tmp_path / "packed", *arguments)
    assert done.exit_code == 2 and re.search(pattern, done.output) and not (tmp_path / "packed").exists()


def test_what_is_no_float_model_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        quantise_folder(tmp_path / "nowhere", tmp_path / "packed", FORM)
    quantise_folder(llama, tmp_path / "packed", FORM)
    with pytest.raises(ModelError, match=r"packed already \(compressed-tensors\)"):
        quantise_folder(tmp_path / "packed", tmp_path / "again", FORM)
    assert not (tmp_path / "again").exists()


def test_a_place_that_holds_something_else_is_left_alone(llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="something else"):
        quantise_folder(llama, place, FORM)
    assert files(place) == {"letter.txt": b"dear"}


def in_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)


def test_shards_hold_together_what_one_file_holds(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantise_folder(llama, tmp_path / "one", FORM)
    in_small_shards(monkeypatch)
    quantise_folder(llama, tmp_path / "many", FORM)
    one, many = SafetensorsCheckpoint(tmp_path / "one"), SafetensorsCheckpoint(tmp_path / "many")
    assert len({entry.file for entry in many.entries.values()}) > 3
    assert one.entries.keys() == many.entries.keys()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.entries)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, os.strerror(28))])
def test_an_interrupted_one_goes_on_where_it_stopped(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    in_small_shards(monkeypatch)
    quantise_folder(llama, tmp_path / "whole", FORM)
    place, told = tmp_path / "packed", []

    def stop(done: int, count: int) -> None:
        told.append((done, count))
        if done > count // 2:
            raise error

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ModelError
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "disk is full.*go on where"):
        quantise_folder(llama, place, FORM, stop)
    assert not (place / "config.json").exists() and not list(place.glob(".writing*"))
    kept = {file: file.stat().st_mtime_ns for file in place.glob("*.safetensors")}
    assert kept
    with pytest.raises(ConfigError, match="unfinished folder of another model or form"):
        quantise_folder(llama, place, Form("int8", 32))
    quantise_folder(llama, place, FORM)
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
    assert files(place) == files(tmp_path / "whole")


_SLOWLY = """
import sys, time
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.base import quantising, shards
from fs_fwdllm.model.base.packing import Form
shards.SHARD_BYTES = 20_000
quantising.quantise_folder(sys.argv[1], sys.argv[2], Form("int4", 32), lambda done, count: time.sleep(0.05))
"""


def test_a_killed_one_goes_on_where_it_stopped(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "packed"
    process = subprocess.Popen([sys.executable, "-c", _SLOWLY, str(llama), str(place)])
    until = time.monotonic() + 60
    while len(list(place.glob("*.safetensors"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "config.json").exists()
    in_small_shards(monkeypatch)
    quantise_folder(llama, place, FORM)
    quantise_folder(llama, tmp_path / "whole", FORM)
    assert {name: text for name, text in files(place).items() if ".writing" not in name} == files(tmp_path / "whole")


def test_weights_that_are_not_numbers_are_named(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers that are not finite"):
        quantise_folder(llama, tmp_path / "packed", FORM)


def test_a_sentence_encoder_keeps_its_layout(tmp_path: Path) -> None:
    root = save_tiny_encoder(tmp_path / "encoder")
    quantise_folder(root, tmp_path / "packed", FORM)
    kept = {name for name in files(root) if not name.endswith(("model.safetensors", "config.json"))}
    assert kept <= files(tmp_path / "packed").keys() and any("Pooling" in name for name in files(tmp_path / "packed"))


def test_code_in_the_folder_stays_behind(llama: Path, tmp_path: Path) -> None:
    (llama / "modeling_own.py").write_text("raise SystemExit")
    (llama / "extra").mkdir()
    shutil.copyfile(llama / "config.json", llama / "extra" / "notes.json")
    quantise_folder(llama, tmp_path / "packed", FORM)
    assert "modeling_own.py" not in files(tmp_path / "packed") and "extra/notes.json" in files(tmp_path / "packed")


@pytest.mark.parametrize("form", [FORM, Form("int8", 32)], ids=lambda form: form.name)
def test_transformers_computes_the_same_with_the_library_that_knows_the_format(
    llama: Path, tmp_path: Path, form: Form
) -> None:
    pytest.importorskip("compressed_tensors")
    quantise_folder(llama, tmp_path / "packed", form)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    config = tiny_config(tmp_path / "packed", "lora", classifier=False)
    ours = load_model(config, load_tokenizer(config)).model
    ids = tiny_batch(classifier=False).input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
