"""What was trained comes back: the matrix of methods, replaced values, ties, and folders never half written."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil

import pytest
import torch
import yaml
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.errors import ModelError
from fs_fwdllm.model import (
    SavedFacts,
    find_saved,
    load_bottleneck,
    load_model,
    load_saved,
    load_tokenizer,
    save_trained,
)
from fs_fwdllm.model.saving import write_folder
from fs_fwdllm.model.trainable_parts import PARTS
from tests.model.test_bottleneck import logits, shake
from tests.model.test_trainable_parts import cases, impossible
from tests.model.tiny import save_tiny_model, tiny_batch, tiny_config


def load(folder, method, classifier=True, **changes):
    config = tiny_config(folder, method, classifier=classifier, **changes)
    return load_model(config, load_tokenizer(config), 3)


OF_CLASSIFIERS = [method for method in PARTS if method != "output_residual"]


OF_PEFT = [method for method in PARTS if PARTS[method].saved_as in ("peft", "parameters")]


def reload(method, base, written, classifier, dtype=torch.float32):
    """What a user does with nothing but transformers, peft and :func:`load_bottleneck`, where these know the method."""
    if PARTS[method].saved_as == "output_residual":
        return load_saved(written)[0].model
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    labels = {"num_labels": 3} if classifier else {}
    if PARTS[method].saved_as == "model":
        return auto.from_pretrained(written, dtype=dtype).eval()
    model = auto.from_pretrained(base, dtype=dtype, **labels)
    model.config.pad_token_id = 1
    if PARTS[method].saved_as == "bottleneck":
        return load_bottleneck(model, written)
    return PeftModel.from_pretrained(model, written).eval()


CLASSES = ("Billing", "shipping & returns", "other")


def test_a_saved_classifier_answers_with_the_names_of_its_classes(tmp_path):
    config = tiny_config(save_tiny_model(tmp_path / "m", "bert"), "full")
    written = save_trained(load_model(config, load_tokenizer(config), CLASSES), tmp_path / "run")
    (answers,) = pipeline("text-classification", model=str(written), top_k=None, device="cpu")(["w5 w6 w7"])
    assert sorted(answer["label"] for answer in answers) == sorted(CLASSES)
    assert AutoConfig.from_pretrained(written).label2id == {name: index for index, name in enumerate(CLASSES)}


def test_names_change_no_bit_of_a_model(tmp_path):
    config = tiny_config(save_tiny_model(tmp_path / "m", "bert"), "lora")
    named, numbered = (load_model(config, load_tokenizer(config), classes).model for classes in (CLASSES, 3))
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), numbered.parameters(), strict=True))


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_an_adapter_knows_its_base_and_its_tokenizer_from_any_folder(tmp_path, monkeypatch, method):
    save_tiny_model(tmp_path / "m", "bert")
    monkeypatch.chdir(tmp_path)
    config = tiny_config("m", method)
    tokenizer = load_tokenizer(config)
    written = save_trained(load_model(config, tokenizer, CLASSES), tmp_path / "run")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    settings = [json.loads(path.read_text()) for path in written.glob("*config.json")]
    bases = [own["base_model_name_or_path"] for own in settings if "base_model_name_or_path" in own]
    assert bases == [str(tmp_path / ("run/base_model" if method == "lora" else "m"))]
    assert SavedFacts.read(written).base_location == str(tmp_path / "m")
    assert AutoTokenizer.from_pretrained(written)("w5 w6")["input_ids"] == tokenizer("w5 w6")["input_ids"]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("architecture", "method", "classifier"), [case for case in cases() if not impossible(*case)])
def test_reloaded_model_gives_the_same_logits(tmp_path, architecture, method, classifier):
    base = save_tiny_model(tmp_path / "m", architecture)
    loaded = load(base, method, classifier)
    batch = tiny_batch(classifier=classifier)
    untrained = logits(loaded.model, batch)
    shake(loaded.model)
    before = snapshot(loaded.model)
    trained = logits(loaded.model, batch)
    assert not torch.allclose(untrained, trained)

    written = save_trained(loaded, tmp_path / "run")
    assert written == tmp_path / "run" / ("model" if PARTS[method].saved_as == "model" else "adapter")
    torch.manual_seed(99)  # what the base lacks is drawn anew, and must come from the folder
    assert torch.equal(logits(reload(method, base, written, classifier), batch), trained)

    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    left = sorted(path.name for path in (tmp_path / "run").iterdir() if path.name != "base_model")
    assert left == [written.name]
    files = {path.suffix for path in written.iterdir()}
    assert ".safetensors" in files
    assert not files & {".bin", ".pt", ".pkl"}


@pytest.mark.parametrize("method", OF_CLASSIFIERS)
def test_given_values_are_written_and_the_model_keeps_its_own(tmp_path, method):
    base = save_tiny_model(tmp_path / "m", "bert")
    loaded, other = load(base, method), load(base, method)
    shake(other.model, seed=4)
    values = {public_name(n): p.detach() for n, p in other.model.named_parameters() if p.requires_grad}
    batch = tiny_batch()
    before = logits(loaded.model, batch)
    written = save_trained(loaded, tmp_path / "run", values)
    assert torch.equal(logits(reload(method, base, written, True), batch), logits(other.model, batch))
    assert torch.equal(logits(loaded.model, batch), before)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_given_values_reach_tied_weights(tmp_path, architecture):
    base = save_tiny_model(tmp_path / "m", architecture, tie_word_embeddings=True)
    loaded = load(base, "full", classifier=False)
    values = {name: 1.5 * parameter.detach() for name, parameter in loaded.model.named_parameters()}
    assert len([name for name in values if "wte" in name or "embed_tokens" in name or "lm_head" in name]) == 1
    model = reload("full", base, save_trained(loaded, tmp_path / "run", values), False)
    reference = load(base, "full", classifier=False).model
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.5)
    batch = tiny_batch(classifier=False)
    assert torch.equal(logits(model, batch), logits(reference, batch))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", OF_CLASSIFIERS)
def test_half_precision_bases(tmp_path, method, dtype):
    base = save_tiny_model(tmp_path / "m", "bert")
    loaded = load(base, method, **{"fwdllm.base.compute_dtype": dtype})
    shake(loaded.model)
    written = save_trained(loaded, tmp_path / "run")
    tensors = load_file(next(written.glob("*.safetensors")))
    assert not any("parametrizations" in name for name in tensors)
    # The masters are stored unrounded; another program that loads them in half precision rounds norms and heads.
    stored = torch.cat([tensor.float().flatten() for tensor in tensors.values()]).sort().values
    masters = torch.cat([p.detach().flatten() for p in loaded.model.parameters() if p.requires_grad])
    assert torch.isin(masters, stored).all()
    batch = tiny_batch()
    half = torch.float32 if method == "full" else getattr(torch, dtype)
    close = logits(reload(method, base, written, True, half), batch).float()
    torch.testing.assert_close(close, logits(loaded.model, batch).float(), rtol=0.05, atol=0.05)


def test_lora_over_a_half_base_reloads_exactly(tmp_path):
    base = save_tiny_model(tmp_path / "m", "llama")
    loaded = load(base, "lora", False, **{"fwdllm.base.compute_dtype": "bfloat16"})
    shake(loaded.model)
    model = reload("lora", base, save_trained(loaded, tmp_path / "run"), False, torch.bfloat16)
    batch = tiny_batch(classifier=False)
    assert torch.equal(logits(model, batch), logits(loaded.model, batch))


def test_folders_say_where_the_base_is(tmp_path):
    base = save_tiny_model(tmp_path / "m", "llama")
    for method, file in (("lora", "adapter_config.json"), ("bottleneck", "bottleneck_config.json")):
        written = save_trained(load(base, method, classifier=False), tmp_path / method)
        settings = json.loads((written / file).read_text())
        assert settings["base_model_name_or_path"] == str(base)
    assert json.loads((tmp_path / "lora/adapter/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", PARTS)
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_what_is_saved_is_loaded_with_the_same_bits(tmp_path, architecture, method, dtype):
    """The law of the saved folder: for every part, dtype and kind of model, the run's own logits, from files alone."""
    classifier = architecture == "bert"
    if impossible(architecture, method, classifier):
        pytest.skip("this architecture has nothing of that kind to train")
    base = save_tiny_model(tmp_path / "m", architecture)
    loaded = load(base, method, classifier, **{"fwdllm.base.compute_dtype": dtype})
    untrained = logits(loaded.model, tiny_batch(classifier=classifier))
    shake(loaded.model)
    written = save_trained(loaded, tmp_path / "run")
    torch.manual_seed(99)
    again, _, facts = load_saved(written)
    batch = tiny_batch(classifier=classifier)
    trained = logits(loaded.model, batch)
    assert torch.equal(logits(again.model, batch), trained)
    assert not torch.equal(trained, untrained)
    assert facts.trained == method
    if PARTS[method].saved_as == "model":  # complete without the base
        shutil.rmtree(base)
        assert torch.equal(logits(load_saved(written)[0].model, batch), trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["head", "bitfit"])
def test_what_an_earlier_version_saved_with_all_of_the_model_is_loaded(tmp_path, method, dtype):
    loaded = load(save_tiny_model(tmp_path / "m", "bert"), method, **{"fwdllm.base.compute_dtype": dtype})
    shake(loaded.model)
    written = write_folder(dataclasses.replace(loaded, peft_method="full"), tmp_path / "model", {}, loaded.facts)
    shutil.rmtree(tmp_path / "m")
    again, _, facts = load_saved(written)
    assert facts.trained == method
    assert torch.equal(logits(again.model, tiny_batch()), logits(loaded.model, tiny_batch()))


@pytest.mark.parametrize("method", ["head", "bitfit", "lora"])
def test_tensors_that_are_gone_are_told_by_their_file(tmp_path, method):
    written = save_trained(load(save_tiny_model(tmp_path / "m", "bert"), method), tmp_path / "run")
    (written / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter/adapter_model\.safetensors: cannot be read"):
        load_saved(written)


def without_peft(name):
    """A parameter's name without what PEFT's wrappers add to it."""
    return re.sub(r"\.(default|modules_to_save)\b", "", public_name(name)).removeprefix("base_model.model.")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", OF_PEFT)
@pytest.mark.parametrize("classifier", [True, False])
def test_pefts_own_loading_needs_nothing_but_the_folder(tmp_path, monkeypatch, method, classifier, dtype):
    """The base says two classes and float32; the run used three, and the dtype it was told."""
    architecture = "bert" if classifier else "llama"
    if impossible(architecture, method, classifier):
        pytest.skip("this architecture has nothing of that kind to train")
    base = save_tiny_model(tmp_path / "m", architecture)
    loaded = load(base, method, classifier, **{"fwdllm.base.compute_dtype": dtype})
    shake(loaded.model)
    written = save_trained(loaded, tmp_path / "run")
    monkeypatch.chdir("/")
    auto = AutoPeftModelForSequenceClassification if classifier else AutoPeftModelForCausalLM
    torch.manual_seed(99)
    again = auto.from_pretrained(str(written)).eval()
    batch = tiny_batch(classifier=classifier)
    theirs, ours = logits(again, batch).float(), logits(loaded.model, batch).float()
    if dtype == "float32":
        assert torch.equal(theirs, ours)
    else:  # norms and heads are float32 then, and so is the whole: what was trained is there, unrounded
        masters = {without_peft(n): p for n, p in loaded.model.named_parameters() if p.requires_grad}
        kept = {without_peft(n): p for n, p in again.named_parameters()}
        assert masters
        assert all(torch.equal(kept[name].float(), value) for name, value in masters.items())
        torch.testing.assert_close(theirs, ours, rtol=0.05, atol=0.05)
    if classifier:
        assert again.config.id2label == dict(enumerate(("LABEL_0", "LABEL_1", "LABEL_2")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["bitfit", "head"])
def test_a_plain_load_of_a_whole_model_keeps_what_was_trained(tmp_path, method, dtype):
    loaded = load(save_tiny_model(tmp_path / "m", "bert"), method, **{"fwdllm.base.compute_dtype": dtype})
    shake(loaded.model)
    written = save_trained(loaded, tmp_path / "run")
    plain = dict(AutoModelForSequenceClassification.from_pretrained(written).named_parameters())
    masters = {public_name(n): p for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(plain[name], value) for name, value in masters.items())
    assert "dtype=torch.float32" in (written / "README.md").read_text()


def test_a_generating_model_gets_its_cache_back(tmp_path):
    written = save_trained(load(save_tiny_model(tmp_path / "m", "llama"), "full", classifier=False), tmp_path / "run")
    assert AutoConfig.from_pretrained(written).use_cache is True


def test_the_card_says_what_the_folder_is(tmp_path):
    config = tiny_config(save_tiny_model(tmp_path / "m", "bert"), "lora")
    loaded = load_model(config, load_tokenizer(config), ("a | b", "c`d"))
    facts = loaded.facts.with_results({"method": "MeZO", "rounds": 3, "eval": {"accuracy": 0.5}, "upload_bytes": 1234})
    card = (save_trained(loaded, tmp_path / "run", facts=facts) / "README.md").read_text()
    for text in ("MeZO", "| accuracy | 0.5 |", "| bytes uploaded | 1,234 |", "`a \\| b`, `c'd`", "fs_fwdllm.load"):
        assert text in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "peft" and metadata["pipeline_tag"] == "text-classification"
    assert "base_model" not in metadata  # a folder of this machine is none of the hub's names


def change_facts(folder, **changes):
    file = folder / "fs_fwdllm.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "fs_fwdllm.json").write_text("{"), "fs_fwdllm.json: cannot be read"),
        (lambda f: (f / "fs_fwdllm.json").write_text("[]"), "format_version is None"),
        (lambda f: (f / "fs_fwdllm.json").write_text('{"format_version": 1}'), "task, trained, .* missing"),
        (lambda f: (f / "fs_fwdllm.json").unlink(), "has no fs_fwdllm.json"),
        (lambda f: change_facts(f, tree={}), "tree.model.type: missing or of another kind"),
        (lambda f: change_facts(f, tree={"model": "bert"}), "tree.model.type: missing"),
        (lambda f: change_facts(f, tree={"model": {"type": [1]}}), "tree.model.type: missing"),
        (lambda f: change_facts(f, task="poetry"), "task: missing or of another kind"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 40),
            "adapter_model.safetensors: cannot be read",
        ),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: cannot be read"),
        (lambda f: save_file({"stranger": torch.zeros(2)}, f / "adapter_model.safetensors"), "does not fit its base"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, damage, message):
    written = save_trained(load(save_tiny_model(tmp_path / "m", "bert"), "lora"), tmp_path / "run")
    damage(written)
    with pytest.raises(ModelError, match=message):
        load_saved(written)


def test_the_saved_folder_is_found_in_a_run(tmp_path):
    written = save_trained(load(save_tiny_model(tmp_path / "m", "bert"), "lora"), tmp_path / "run")
    assert find_saved(tmp_path / "run") == find_saved(written) == written
    with pytest.raises(ModelError, match="holds no trained model"):
        find_saved(tmp_path / "m")
    with pytest.raises(ModelError, match="there is no such folder"):
        find_saved(tmp_path / "nowhere")


def test_a_whole_model_comes_with_its_tokenizer(tmp_path):
    written = save_trained(load(save_tiny_model(tmp_path / "m", "gpt2", pad=False), "full"), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(written)
    assert tokenizer("w7 w9")["input_ids"] == [7, 9]
    assert tokenizer.pad_token_id == 2
    assert json.loads((written / "config.json").read_text())["pad_token_id"] == 2


def test_unknown_name_and_wrong_shape(tmp_path):
    loaded = load(save_tiny_model(tmp_path / "m", "bert"), "head")
    with pytest.raises(ModelError, match=r"'classifier.wieght' is not a parameter.*did you mean 'classifier.weight'"):
        save_trained(loaded, tmp_path / "run", {"classifier.wieght": torch.zeros(3, 32)})
    with pytest.raises(ModelError, match=r"classifier.weight: shape \(2,\) is not the model's \(3, 32\)"):
        save_trained(loaded, tmp_path / "run", {"classifier.weight": torch.zeros(2)})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lora", "bottleneck", "head"])
def test_saving_again_replaces_and_a_failure_leaves_the_old_folder(tmp_path, method, monkeypatch):
    base = save_tiny_model(tmp_path / "m", "bert")
    loaded = load(base, method)
    written = save_trained(loaded, tmp_path / "run")
    (written / "stale").touch()
    shake(loaded.model)
    batch = tiny_batch()
    assert save_trained(loaded, tmp_path / "run") == written
    assert not (written / "stale").exists()
    kept = logits(loaded.model, batch)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    shake(loaded.model, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("fs_fwdllm.model.saving.os.replace", disk_full)
        with pytest.raises(OSError, match="No space left"):
            save_trained(loaded, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("fs_fwdllm.model.saving.save_file", disk_full)
        patch.setattr(type(loaded.model), "save_pretrained", disk_full)
        with pytest.raises(OSError, match="No space left"):
            save_trained(loaded, tmp_path / "run")
    assert torch.equal(logits(reload(method, base, written, True), batch), kept)
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"base_model"} == {written.name}


def test_a_failure_between_the_two_moves_restores_the_old_folder(tmp_path, monkeypatch):
    loaded = load(save_tiny_model(tmp_path / "m", "bert"), "bottleneck")
    written = save_trained(loaded, tmp_path / "run")
    before = (written / "bottleneck_model.safetensors").read_bytes()
    real, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("interrupted")
        real(source, target)

    monkeypatch.setattr("fs_fwdllm.model.saving.os.replace", second_fails)
    shake(loaded.model)
    with pytest.raises(OSError, match="interrupted"):
        save_trained(loaded, tmp_path / "run")
    assert (written / "bottleneck_model.safetensors").read_bytes() == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]
