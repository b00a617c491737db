"""The block plan: disjoint, complete, found in every architecture, ties and random heads in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from fs_fwdllm.config.own_sections import BlocksConfig
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.cybgd.blocks import BlockPlan, block_plan
from fs_fwdllm.model import load_model, load_tokenizer
from tests.host.small import World
from tests.method.cybgd.settings import blocks
from tests.model.tiny import ARCHITECTURES, DECODERS, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY

EVERYTHING = {"embeddings": "in", "head": "in", "norm": "in"}
_QWEN3 = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": INTERMEDIATE, "head_dim": 8, "vocab_size": VOCABULARY,
}  # fmt: skip


def load(folder: Path, kind: str) -> torch.nn.Module:
    auto = {"lm": "AutoModelForCausalLM", "classifier": "AutoModelForSequenceClassification"}[kind]
    return getattr(transformers, auto).from_pretrained(folder)


def model_of(world: World, architecture: str) -> torch.nn.Module:
    if architecture == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_QWEN3))
    return load(world.model(architecture), "lm" if architecture in DECODERS else "classifier")


def check(plan: BlockPlan, model: torch.nn.Module) -> None:
    """Disjoint; of the model; what is in no part is what is counted as frozen."""
    named = [name for part in plan.parts for name in part.parameters]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert len(named) == len(set(named)) and set(named) <= set(sizes)
    assert plan.frozen_count == sum(size for name, size in sizes.items() if name not in plan.names())
    assert plan.total_count == sum(sizes.values())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3"])
@pytest.mark.parametrize("granularity", ["layer", "attention-mlp", "matrix"])
def test_every_architecture_has_a_complete_plan(world: World, architecture: str, granularity: str) -> None:
    model = model_of(world, architecture)
    plan = block_plan(model, BlocksConfig(granularity=granularity, **EVERYTHING))
    check(plan, model)
    assert plan.frozen_count == 0
    layers = 1 if architecture == "albert" else LAYERS  # ALBERT's layers share one set of parameters
    inside = [block for block in plan.blocks if block.layers]
    least = {"layer": 1, "attention-mlp": 2, "matrix": 4}[granularity]
    assert len(plan.layer_names) == layers and len(inside) >= least * layers
    if granularity != "matrix":
        assert len(inside) == least * layers
    only_layers = block_plan(model, BlocksConfig(granularity=granularity))
    check(only_layers, model)
    assert len(only_layers.blocks) == len(inside) and 0 < only_layers.frozen_count < only_layers.total_count
    assert "frozen" in only_layers.describe()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3"])
def test_halves_split_attention_from_the_rest(world: World, architecture: str) -> None:
    model = model_of(world, architecture)
    plan = block_plan(model, BlocksConfig(granularity="attention-mlp"))
    for block in plan.blocks:
        matrices = [name for name in block.parameters if model.get_parameter(name).dim() > 1]
        inside = ["attn" in name or "attention" in name.removeprefix(plan.layer_names[0]) for name in matrices]
        assert all(inside) if block.name.endswith("attention") else not any(inside)


@pytest.mark.parametrize(("layers", "size"), [(5, 2), (4, 4), (7, 3), (3, 9)])
def test_groups_of_layers_cover_all_of_them(layers: int, size: int) -> None:
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=layers,
                                      num_attention_heads=2, vocab_size=10)  # fmt: skip
    plan = block_plan(transformers.LlamaForCausalLM(config), BlocksConfig(group_size=size))
    assert [index for block in plan.blocks for index in block.layers] == list(range(layers))
    assert len(plan.blocks) == -(-layers // size)


def test_layer_1_is_not_taken_for_layer_10() -> None:
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=12,
                                      num_attention_heads=2, vocab_size=10)  # fmt: skip
    plan = block_plan(transformers.LlamaForCausalLM(config), BlocksConfig())
    assert len({len(block.parameters) for block in plan.blocks}) == 1
    assert all(name.startswith("model.layers.1.") for name in plan.blocks[1].parameters)


def test_a_tied_output_layer_is_in_the_plan_once_as_the_embeddings(world: World) -> None:
    model = load(world.model("gpt2"), "lm")
    assert model.lm_head.weight is model.transformer.wte.weight
    out = block_plan(model, BlocksConfig(head="always"))
    assert out.always is None and "transformer.wte.weight" not in out.names()
    inside = block_plan(model, BlocksConfig(embeddings="in", head="in", norm="in"))
    assert inside.blocks[0].parameters[0] == "transformer.wte.weight"
    assert inside.blocks[-1].name == "norm"


@pytest.mark.parametrize("head", ["out", "in", "always"])
def test_a_random_head_is_trained_in_every_visit(world: World, head: str) -> None:
    config = world.config(blocks(head=head))
    loaded = load_model(config, load_tokenizer(config), 3)
    assert loaded.fresh == {"classifier.weight", "classifier.bias"}
    plan = block_plan(loaded.model, config.fwdllm.blocks, loaded.fresh)
    check(plan, loaded.model)
    assert plan.always is not None and loaded.fresh <= set(plan.always.parameters)
    pooler = "bert.pooler.dense.weight"  # in the checkpoint, so not random
    assert (pooler in plan.always.parameters) == (head == "always")
    assert any(pooler in block.parameters for block in plan.blocks) == (head == "in")


def test_the_whole_model_as_one_block(world: World) -> None:
    model = load(world.model("llama"), "lm")
    plan = block_plan(model, BlocksConfig(schedule="full", **EVERYTHING))
    assert len(plan.blocks) == 1 and plan.names() == {name for name, _ in model.named_parameters()}


def test_impossible_plans_are_refused(world: World) -> None:
    model = load(world.model("llama"), "lm")
    with pytest.raises(ConfigError, match="first_block 2: the model has 2 blocks; allowed are 0 to 1"):
        block_plan(model, BlocksConfig(schedule="fixed", first_block=2))
    with pytest.raises(ConfigError, match="parallel_blocks 3: the cycle has 2 blocks"):
        block_plan(model, BlocksConfig(parallel_blocks=3))
