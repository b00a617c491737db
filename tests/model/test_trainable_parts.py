"""One matrix: every method on every architecture trains exactly the tensors it should and leaves the base alone."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fs_fwdllm.config import parse_config
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.structure import attention_projections, feed_forward_outputs, head_modules, norm_layers
from fs_fwdllm.model.trainable_parts import PARTS, adapter_request
from tests.model.tiny import ARCHITECTURES, DECODERS, ENCODERS, HIDDEN, LAYERS, save_tiny_model, tiny_batch, tiny_config

HEADS = re.compile(r"^(classifier|score|pre_classifier)\.")

# What each method trains outside a classifier's head, by the names the architectures really use.
NORM = r"(layernorm|layer_norm|ln_\w+|norm)$"
TRAINED = {
    "lora": {
        **{name: r"(query|value)\.lora_[AB]$" for name in ("bert", "roberta", "albert")},
        **{name: r"self_attn\.(q|v)_proj\.lora_[AB]$" for name in ("llama", "qwen2")},
        "distilbert": r"(q|v)_lin\.lora_[AB]$",
        "gpt2": r"attn\.c_attn\.lora_[AB]$",
        "bloom": r"query_key_value\.lora_[AB]$",
    },
    "ia3": {
        **{name: r"(key|value|output\.dense)\.ia3_l$" for name in ("bert", "roberta")},
        "albert": r"(key|value|ffn_output)\.ia3_l$",
        "llama": r"(k_proj|v_proj|down_proj)\.ia3_l$",
        "qwen2": r"(q_proj|v_proj|down_proj)\.ia3_l$",
        "distilbert": r"(k_lin|v_lin|lin2)\.ia3_l$",
        "gpt2": r"(attn\.c_attn|mlp\.c_proj)\.ia3_l$",
        "bloom": r"(query_key_value|dense_4h_to_h)\.ia3_l$",
    },
}
# Tensors outside the head: (per layer, once).
NORM_COUNTS = {
    "bert": (4, 2),
    "roberta": (4, 2),
    "distilbert": (4, 2),
    "gpt2": (4, 2),
    "bloom": (4, 2),
    "llama": (2, 1),
    "qwen2": (1, 0),
}


def cases():
    for architecture in ARCHITECTURES:
        for method in PARTS:
            yield architecture, method, True
            if architecture in DECODERS:
                yield architecture, method, False


def impossible(architecture, method, classifier):
    return (method == "bitfit" and architecture == "llama") or (
        (method == "head" and not classifier and architecture in ("gpt2", "bloom"))
        or (method == "output_residual" and classifier)
    )


def plain(name: str) -> str:
    """A parameter's name in the base model: PEFT's wrappings removed."""
    name = re.sub(r"\.(modules_to_save|ln_tuning_layers)\.default|\.base_layer|\.original_module", "", name)
    return re.sub(r"\.default(\.weight)?$", "", name).removeprefix("base_model.model.")


def trained_names(model):
    return [plain(name) for name, parameter in model.named_parameters() if parameter.requires_grad]


def load(folder, method, classifier=True, **changes):
    config = tiny_config(folder, method, classifier=classifier, **changes)
    return load_model(config, load_tokenizer(config), 3)


def base_model(folder, classifier):
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return auto.from_pretrained(folder, num_labels=3) if classifier else auto.from_pretrained(folder)


@pytest.mark.parametrize(("architecture", "method", "classifier"), [case for case in cases() if not impossible(*case)])
def test_exactly_the_expected_parameters_are_trained(tmp_path, architecture, method, classifier):
    folder = save_tiny_model(tmp_path / "m", architecture)
    base = base_model(folder, classifier)
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    model = load(folder, method, classifier).model
    trained = trained_names(model)
    heads = [name for name in trained if HEADS.match(name)]
    rest = [name for name in trained if not HEADS.match(name)]

    assert heads == ([name for name in before if HEADS.match(name)] if classifier else [])
    if method in TRAINED:
        assert rest
        assert all(re.search(TRAINED[method][architecture], name) for name in rest), rest
    elif method == "layernorm":
        per_layer, once = NORM_COUNTS.get(architecture, (0, 6))  # ALBERT shares its block
        assert len(rest) == LAYERS * per_layer + once
        assert all(re.search(NORM, name.rpartition(".")[0].lower()) for name in rest), rest
    elif method == "bitfit":
        assert rest == [name for name in before if name.endswith(".bias") and not HEADS.match(name)]
    elif method == "bottleneck":
        assert len(rest) == 4 * (1 if architecture == "albert" else LAYERS)
        assert all(".bottleneck." in name for name in rest)
    elif method == "output_residual":
        assert rest == ["lm_head.output_residual.up", "lm_head.output_residual.bias"]
    elif method == "head":
        assert rest == ([] if classifier else ["lm_head.weight"])
    else:
        assert trained == list(before)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)

    for name, parameter in model.named_parameters(remove_duplicate=False):
        if plain(name) in before and not HEADS.match(plain(name)):
            assert torch.equal(parameter, before[plain(name)]), name


@pytest.mark.parametrize(("architecture", "method", "classifier"), [case for case in cases() if not impossible(*case)])
def test_an_untrained_adapter_changes_nothing(tmp_path, architecture, method, classifier):
    folder = save_tiny_model(tmp_path / "m", architecture)
    batch = tiny_batch(classifier=classifier)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        adapted = load(folder, method, classifier).model(**inputs).logits
        whole = load(folder, "full", classifier).model(**inputs).logits
    assert torch.equal(adapted, whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_count_follows_the_formula(tmp_path, architecture):
    folder = save_tiny_model(tmp_path / "m", architecture)
    base = base_model(folder, True)
    rank = 3
    expected = 0
    for name, module in base.named_modules():
        if re.search(r"\.(query|value|q_proj|v_proj|q_lin|v_lin|c_attn|query_key_value)$", name):
            sides = module.weight.shape
            assert isinstance(module, (nn.Linear, Conv1D))
            expected += rank * sum(sides)
    model = load(folder, "lora", r=rank, lora_alpha=6, lora_dropout=0.5).model
    found = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad)
    assert found == expected > 0
    scalings = {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)}
    assert scalings == {2.0}


def test_lora_dropout_is_inactive(tmp_path):
    model = load(save_tiny_model(tmp_path / "m", "bert"), "lora", lora_dropout=0.9).model
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.ones_(parameter)
    batch = tiny_batch()
    runs = [model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits for _ in range(2)]
    assert torch.equal(*runs)


def test_peft_keywords_reach_peft(tmp_path):
    folder = save_tiny_model(tmp_path / "m", "llama")
    model = load(folder, "lora", False, target_modules=["o_proj"], layers_to_transform=[1]).model
    assert {name.partition(".lora")[0] for name in trained_names(model)} == {"model.layers.1.self_attn.o_proj"}
    model = load(folder, "ia3", False, target_modules=["k_proj"]).model
    assert {name.rpartition(".")[0] for name in trained_names(model)} == {
        f"model.layers.{layer}.self_attn.k_proj" for layer in range(LAYERS)
    }
    model = load(folder, "layernorm", False, target_modules=["input_layernorm"]).model
    assert len(trained_names(model)) == LAYERS


def test_no_adapter_is_full_training(tmp_path):
    config = parse_config({"llm": {"adapter": {"use": False, "args": [{"adapter_method": "lora"}]}}})
    assert adapter_request(config) == ("full", {})
    assert adapter_request(parse_config({"llm": {"adapter": {"use": True}}})) == ("lora", {})
    published = [{"adapter_package": "peft", "adapter_method": "lora", "r": 8, "lora_alpha": 32, "lora_dropout": 0.05}]
    method, arguments = adapter_request(parse_config({"llm": {"adapter": {"use": True, "args": published}}}))
    assert (method, arguments) == ("lora", {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([{"adapter_method": "lorra"}], ["adapter_method", "'lorra'", "did you mean 'lora'", "bottleneck"]),
        ([{"adapter_method": "prefix"}], ["adapter_method", "'prefix'", "ia3"]),
        ([{"adapter_package": "pefft", "adapter_method": "lora"}], ["adapter_package", "did you mean 'peft'"]),
        ([{"adapter_method": "lora", "lora_alhpa": 3}], ["'lora_alhpa'", "did you mean 'lora_alpha'"]),
        ([{"adapter_method": "lora", "task_type": "CAUSAL_LM"}], ["'task_type'"]),
        ([{"adapter_method": "bottleneck", "reduction": 3}], ["did you mean 'reduction_factor'"]),
        ([{"adapter_method": "bitfit", "r": 3}], ["'r'", "(none)"]),
        ([{}, {}], ["llm.adapter.args", "holds 2"]),
    ],
)
def test_malformed_adapter(args, words):
    with pytest.raises(ConfigError) as error:
        adapter_request(parse_config({"llm": {"adapter": {"use": True, "args": args}}}))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 0}, "PEFT refuses.*'r': 0"),
        ({"r": "eight"}, "PEFT refuses"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*pissa"),
    ],
)
def test_arguments_peft_cannot_use(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        load(save_tiny_model(tmp_path / "m", "bert"), "lora", **changes)


def test_parts_a_model_does_not_have(tmp_path):
    llama = save_tiny_model(tmp_path / "llama", "llama")
    for classifier in (True, False):
        with pytest.raises(ModelError, match="no bias parameters"):
            load(llama, "bitfit", classifier)
    with pytest.raises(ModelError, match="tied to the input embeddings"):
        load(save_tiny_model(tmp_path / "gpt2", "gpt2"), "head", False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_structure_agrees_with_the_names(tmp_path, architecture):
    model = base_model(save_tiny_model(tmp_path / "m", architecture), True)
    outputs = feed_forward_outputs(model)
    assert all(
        re.search(r"(\.\d+\.output\.dense|ffn_output|lin2|down_proj|mlp\.c_proj|dense_4h_to_h)$", n) for n, _ in outputs
    )
    assert len(outputs) == (1 if architecture == "albert" else LAYERS)
    assert len(attention_projections(model, "q")) == len(outputs)
    assert all(name.startswith(("score", "classifier", "pre_classifier")) for name in head_modules(model))
    assert all(model.get_submodule(name).weight.shape in {(HIDDEN,), (16,)} for name in norm_layers(model))


@pytest.mark.parametrize("architecture", ENCODERS)
def test_feed_forward_output_is_found_when_the_widths_are_equal(tmp_path, architecture):
    width = "hidden_dim" if architecture == "distilbert" else "intermediate_size"
    folder = save_tiny_model(tmp_path / "m", architecture, **{width: HIDDEN})
    names = [name for name, _ in feed_forward_outputs(base_model(folder, True))]
    assert all(re.search(r"(\d\.output\.dense|ffn_output|lin2)$", name) for name in names)


def test_something_that_is_no_transformer():
    with pytest.raises(ModelError, match="no list of transformer blocks"):
        feed_forward_outputs(nn.Sequential(nn.Linear(2, 2)))
