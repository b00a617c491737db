"""Starting from an adapter that exists: the same bits go on, and what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fs_fwdllm.errors import CheckpointError, ConfigError, ModelError
from fs_fwdllm.model import LoadedModel, load_model, load_tokenizer, save_trained
from fs_fwdllm.model.trainable_parts import PARTS
from fs_fwdllm.running.local import resume, run
from tests.host.fixtures import models, world
from tests.host.small import METHODS, World, read_jsonl
from tests.model.test_bottleneck import shake
from tests.model.test_trainable_parts import cases, impossible
from tests.model.tiny import save_tiny_model, tiny_config

__all__ = ["models", "world"]

CLASSES = ("animal", "plant", "stone")


def load(base: Path, method: str, start: Path | None = None, classifier: bool = True, **changes: Any) -> LoadedModel:
    config = tiny_config(base, method, classifier=classifier, **changes)
    if start is not None:
        config.fwdllm.init_adapter = str(start)
    return load_model(config, load_tokenizer(config), CLASSES if classifier else 0)


def trained(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    parameters = loaded.model.named_parameters()
    return {name: tensor.detach().clone() for name, tensor in parameters if tensor.requires_grad}


def assert_same(one: LoadedModel, other: LoadedModel) -> None:
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(trained(one)[name], value) for name, value in trained(other).items())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "m", "bert")


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of a classifier, of rank 4."""
    return save_trained(shake_up(load(base, "lora", r=4, lora_alpha=8)), tmp_path / "run")


def shake_up(loaded: LoadedModel) -> LoadedModel:
    shake(loaded.model)
    return loaded


@pytest.mark.parametrize(
    ("architecture", "method", "classifier"),
    [case for case in cases() if not impossible(*case) and case[0] in ("bert", "gpt2", "llama", "distilbert")],
)
def test_what_was_saved_goes_on_with_the_same_bits(
    tmp_path: Path, architecture: str, method: str, classifier: bool
) -> None:
    base = save_tiny_model(tmp_path / "m", architecture)
    loaded = shake_up(load(base, method, None, classifier))
    written = save_trained(loaded, tmp_path / "run")
    assert_same(load(base, method, written, classifier), loaded)
    assert_same(load(base, method, tmp_path / "run", classifier), loaded)


@pytest.mark.parametrize("method", ["lora", "layernorm", "bottleneck", "full"])
def test_tied_and_half_precision_bases(tmp_path: Path, method: str) -> None:
    base = save_tiny_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    half = {"fwdllm.base.compute_dtype": "bfloat16"} if PARTS[method].saved_as != "model" else {}
    loaded = shake_up(load(base, method, None, False, **half))
    assert_same(load(base, method, save_trained(loaded, tmp_path / "run"), False, **half), loaded)


def test_an_adapter_that_peft_made_elsewhere(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "m", "llama")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = shake(get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings))
    theirs.save_pretrained(tmp_path / "elsewhere")
    ours = load(base, "lora", tmp_path / "elsewhere", False, r=4, lora_alpha=8)
    expected = {name: tensor for name, tensor in theirs.named_parameters() if tensor.requires_grad}
    found = trained(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    again = save_trained(ours, tmp_path / "run")
    reloaded = AutoPeftModelForCausalLM.from_pretrained(again, low_cpu_mem_usage=False)
    state = dict(reloaded.named_parameters())
    assert all(torch.equal(state[name], expected[name]) for name in found)


def test_a_list_of_full_names_means_the_same_modules(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "m", "llama")
    names = [f"model.layers.{layer}.self_attn.{role}_proj" for layer in (0, 1) for role in "qv"]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "elsewhere")
    load(base, "lora", tmp_path / "elsewhere", False, r=4, lora_alpha=8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 2, "lora_alpha": 8}, r"llm\.adapter\.args r: is 2 here, but 4 in fwdllm\.init_adapter"),
        ({"r": 4, "lora_alpha": 16}, r"llm\.adapter\.args lora_alpha: is 16 here, but 8 in"),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, r"llm\.adapter\.args use_rslora: is True here, but "),
        (
            {"r": 4, "lora_alpha": 8, "target_modules": ["query"]},
            r"llm\.adapter\.args target_modules: is \['query'\] here, but \['query', 'value'\] in",
        ),
        (
            {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "key"]},
            r"llm\.adapter\.args target_modules: is \['key', 'query', 'value'\] here, but \['query', 'value'\] in",
        ),
    ],
)
def test_settings_that_disagree_are_refused_with_both_values(
    base: Path, saved: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load(base, "lora", saved, **changes)


def test_another_reduction_factor_or_other_layers(base: Path, tmp_path: Path) -> None:
    saved = save_trained(load(base, "bottleneck", reduction_factor=8), tmp_path / "run")
    with pytest.raises(ConfigError, match="reduction_factor: is 4 here, but 8 in"):
        load(base, "bottleneck", saved, reduction_factor=4)
    with pytest.raises(ConfigError, match=r"layers: is \[0\] here, but None in"):
        load(base, "bottleneck", saved, reduction_factor=8, layers=[0])


def test_another_kind_of_adapter(base: Path, saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a PEFT adapter, but llm\.adapter trains 'bottleneck'"):
        load(base, "bottleneck", saved)
    with pytest.raises(
        ConfigError, match=r"holds a PEFT adapter, but llm\.adapter trains 'full', which starts from a w"
    ):
        load(base, "full", saved)
    with pytest.raises(ConfigError, match=r"llm\.adapter\.args peft_type: is 'IA3' here, but 'LORA' in"):
        load(base, "ia3", saved)


def rewrite(folder: Path, change: Any) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors) if "lora_A" in name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(_first(tensors)), r"lacks the tensor '.*lora_A\.weight'"),
        (lambda tensors: tensors.update(stranger=torch.ones(2)), r"this run does not train, the tensor 'stranger'"),
        (
            lambda tensors: tensors.update({_first(tensors): torch.ones(3, 32)}),
            r"has shape \(3, 32\), and here .*\(4, ",
        ),
        (
            lambda tensors: tensors[_first(tensors)].fill_(float("nan")),
            r"holds a value that is not finite",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(
    base: Path, saved: Path, change: Any, said: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(ModelError, match=said):
        load(base, "lora", saved, r=4, lora_alpha=8)


@pytest.mark.parametrize("method", ["head", "bitfit"])
def test_a_model_of_another_base_is_refused(base: Path, tmp_path: Path, method: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    rewrite(other, lambda tensors: next(value for name, value in tensors.items() if "query.weight" in name).add_(1.0))
    saved = save_trained(load(other, "full"), tmp_path / "run")
    with pytest.raises(ModelError, match=r"its frozen .* is not that of model\.type: it was made on another base"):
        load(base, method, saved)


@pytest.mark.parametrize("method", ["head", "bitfit"])
def test_some_parameters_start_from_a_whole_model_too(base: Path, tmp_path: Path, method: str) -> None:
    """As earlier versions saved them, and as Hugging Face does."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "elsewhere")
    found = trained(load(base, method, tmp_path / "elsewhere"))
    expected = dict(model.named_parameters())
    assert found and all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("method", "other"), [("head", "bitfit"), ("bitfit", "head"), ("lora", "head"), ("head", "lora")]
)
def test_parameters_that_are_not_those_to_be_trained_are_refused(
    base: Path, tmp_path: Path, method: str, other: str
) -> None:
    saved = save_trained(load(base, other), tmp_path / "run")
    with pytest.raises((ConfigError, ModelError), match=r"fwdllm\.init_adapter .*(lacks|has, and|holds a)"):
        load(base, method, saved)


@pytest.mark.parametrize("method", ["full", "head", "lora", "bottleneck"])
def test_classes_in_another_order_are_refused(base: Path, tmp_path: Path, method: str) -> None:
    saved = save_trained(load(base, method), tmp_path / "run")
    config = tiny_config(base, method)
    config.fwdllm.init_adapter = str(saved)
    with pytest.raises(ConfigError, match=r"was trained on the classes \['animal', .*fwdllm\.data\.labels"):
        load_model(config, load_tokenizer(config), CLASSES[::-1])


def test_folders_that_are_none(base: Path, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled.ckpt").write_bytes(b"\x80\x04K\x01.")
    for place, said in (
        (tmp_path / "rum", r"there is no such folder; .*did you mean '.*run"),
        (tmp_path / "empty", r"is no saved adapter or model: it has none of adapter_config\.json, "),
        (tmp_path / "pickled.ckpt", "is a file, and pickled files are never read"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(base, "lora", place)
    for file in saved.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"no \.safetensors file, and pickled files are never read"):
        load(base, "lora", saved, r=4, lora_alpha=8)


@pytest.mark.parametrize("text", ["", "[]", '{"r": ', "\0"])
def test_a_damaged_folder_is_refused(base: Path, saved: Path, text: str) -> None:
    (saved / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config\.json: "):
        load(base, "lora", saved)


def test_damaged_tensors_are_refused(base: Path, saved: Path) -> None:
    (path,) = saved.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="its tensors cannot be read"):
        load(base, "lora", saved, r=4, lora_alpha=8)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_what_another_has_saved(world: World, method: str) -> None:
    first = run(world.config(METHODS[method]))
    *_, last, _ = read_jsonl(first / "metrics.jsonl")
    place = first / ("model-last" if METHODS[method].get("llm.adapter.use") is False else "adapter-last")
    path = run(world.config({**METHODS[method], "fwdllm.init_adapter": str(place), "federate.total_round_num": 2}))
    start, *_ = lines = read_jsonl(path / "metrics.jsonl")
    assert start["eval"] == last["eval"]
    assert len({line["digest"] for line in lines[:-1]}) == 3
    assert f"starts from the parameters in {place}" in " ".join((path / "console.log").read_text().split())


@pytest.mark.slow
def test_its_files_are_part_of_what_a_run_began_with(world: World) -> None:
    first = run(world.config(METHODS["fedavg"]))
    settings = {**METHODS["fedavg"], "fwdllm.init_adapter": str(first / "adapter"), "federate.total_round_num": 2}
    path = run(world.config(settings))
    resume(path)
    rewrite(first / "adapter", lambda tensors: next(iter(tensors.values())).add_(1.0))
    with pytest.raises(CheckpointError, match="the initial adapter's files changed after the checkpoint was written"):
        resume(path)
    assert json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])["final"]
