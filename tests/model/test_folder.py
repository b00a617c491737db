"""Folders that hold no model for us are refused in words: what was found where, and what to do."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fs_fwdllm.errors import FwdLLMError, ModelError
from fs_fwdllm.model import load_model, load_tokenizer, save_trained
from tests.model.architectures import ARCHITECTURES
from tests.model.tiny import save_tiny_model, tiny_config

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A folder of one's own to damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def refusal(folder: Path, method: str = "lora") -> str:
    """What opening the tokenizer says, which comes before everything else."""
    with pytest.raises(ModelError) as error:
        load_tokenizer(tiny_config(folder, method, classifier=False))
    return str(error.value)


def change(folder: Path, **settings: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "by 'mxfp4'"),
        ({"quantization_config": {"quant_method": "quark", "bits": 4}}, "by 'quark'"),
        ({"compression_config": {"quant_method": "sparse"}}, "by 'sparse'"),
        ({"quantization_config": ["int4"]}, "quantised by"),
    ],
)
def test_models_that_are_quantised_in_other_ways_are_refused_by_name(
    folder: Path, settings: dict[str, Any], word: str
) -> None:
    change(folder, **settings)
    said = refusal(folder)
    assert word in said and str(folder) in said and "float model" in said


def test_older_marks_of_quantisation(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text('{"bits": 4}')
    assert "hf_quant_config.json" in refusal(folder)


def test_packed_weights_without_any_mark(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.self_attn.q_proj.qweight"] = np.zeros((4, 4), dtype=np.int32)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert re.search(r"qweight is saved as I32.*quantised or damaged", refusal(folder))


def test_code_in_the_folder_is_named_and_not_run(folder: Path) -> None:
    change(folder, model_type="homemade", auto_map={"AutoModelForCausalLM": "modeling_homemade.Homemade"})
    (folder / "modeling_homemade.py").write_text("raise SystemExit('ran')")
    said = refusal(folder)
    assert "'homemade'" in said and "modeling_homemade.py" in said and "never run" in said


def test_an_unknown_architecture_names_its_neighbour(folder: Path) -> None:
    change(folder, model_type="lama")
    assert re.search(r"no model_type 'lama'; did you mean 'llama'", refusal(folder))


def test_pickled_weights_come_with_the_way_to_convert_them(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    said = refusal(folder)
    assert "pytorch_model.bin" in said and "save_pretrained" in said and str(folder) in said


@pytest.mark.parametrize("file", ["model.Q4_K_M.gguf", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack"])
def test_other_forms_of_weights_are_named(folder: Path, file: str) -> None:
    (folder / WEIGHTS).rename(folder / file)
    assert file in refusal(folder)


def test_an_adapter_is_sent_to_its_key(llama: Path, tmp_path: Path) -> None:
    config = tiny_config(llama, "lora", classifier=False)
    adapter = save_trained(load_model(config, load_tokenizer(config)), tmp_path)
    said = refusal(adapter)
    assert "fwdllm.init_adapter" in said and str(llama) in said
    assert "fwdllm.init_adapter" in refusal(tmp_path)


def test_folders_without_a_configuration(folder: Path) -> None:
    assert "'model' in it" not in refusal(folder.parent) and "model in it" in refusal(folder.parent)
    (folder / CONFIG).unlink()
    assert re.search(r"holds no config\.json \(but .*model\.safetensors", refusal(folder))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00\xff", '{"a":' * 100_000])
def test_configurations_that_are_no_json_object(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    assert str(folder / CONFIG) in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_weights_that_are_cut_short(folder: Path, keep: int) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:keep])
    assert re.search(rf"{re.escape(str(folder / WEIGHTS))}: is damaged or cut short", refusal(folder))


def test_an_index_that_names_missing_or_foreign_files(folder: Path) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    for wrong, words in [
        ({"weight_map": places | {names[0]: "model-00002-of-00002.safetensors"}}, "not there .*00002-of-00002"),
        ({"weight_map": places | {names[0]: "../../secret.safetensors"}}, "not in this folder"),
        ({"weight_map": {}}, "must hold weight_map"),
        ({"weight_map": {names[0]: 3}}, "must hold weight_map"),
        ({}, "must hold weight_map"),
    ]:
        (folder / INDEX).write_text(json.dumps(wrong))
        assert re.search(words, refusal(folder))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = tiny_config(folder, "lora", classifier=False)
    assert load_model(config, load_tokenizer(config)).trial


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_attention_heads", 0, "num_attention_heads must be a whole number above 0, but is 0"),
        ("hidden_size", -32, "hidden_size must be a whole number above 0"),
        ("vocab_size", 0, "vocab_size must be"),
        ("num_hidden_layers", "two", "num_hidden_layers must be"),
        ("num_hidden_layers", 10**9, r"num_hidden_layers is 1,000,000,000, more layers than there are tensors"),
        ("vocab_size", 10**12, "more than all weights"),
        ("max_position_embeddings", 10**15, "max_position_embeddings is"),
    ],
)
def test_impossible_numbers_name_the_file_and_the_key(folder: Path, key: str, value: object, words: str) -> None:
    change(folder, **{key: value})
    said = refusal(folder)
    assert str(folder / CONFIG) in said and re.search(words, said)


#: What a hand or a program may leave in a configuration.
ODD = (-1, 0, 3, 10**9, "x", None, 1.5, [], {}, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5/classes"])
def test_any_change_of_a_configuration_ends_in_an_error_of_ours_or_a_model(tmp_path: Path, name: str) -> None:
    row = ARCHITECTURES[name]
    folder = row.save(tmp_path / "model")
    settings = json.loads((folder / CONFIG).read_text())
    outcomes = set()
    for key in settings:
        for value in ODD:
            (folder / CONFIG).write_text(json.dumps(settings | {key: value}))
            started, config = time.monotonic(), row.run_config(folder, "lora")
            try:
                load_model(config, load_tokenizer(config), 3)
                outcomes.add("a model")
            except FwdLLMError as error:
                outcomes.add(type(error).__name__)
            assert time.monotonic() - started < 20, (key, value)
    assert {"a model", "ModelError"} <= outcomes


def test_a_shape_that_is_not_the_configurations(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for classifier in (False, True):
        config = tiny_config(folder, "lora", classifier=classifier)
        with pytest.raises(ModelError, match=re.escape(str(folder))):
            load_model(config, load_tokenizer(config), 3)


def test_weights_that_are_not_numbers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = tiny_config(folder, "lora", classifier=False)
    with pytest.raises(ModelError, match=r"first forward pass gives NaN.*damaged"):
        load_model(config, load_tokenizer(config))
