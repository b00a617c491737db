"""Finding the parts of a transformer by what they are, not by which architecture they belong to.

A transformer is a list of blocks; a block holds attention projections, a feed-forward pair and norms. These functions
find them from module types, widths and the few words every implementation uses in its names (``attn``/``attention``,
a leaf beginning with ``q``, ``k`` or ``v``), so that adapters can be placed in architectures nobody listed. Where a
name list would be needed to go on, they raise :class:`~fs_fwdllm.errors.ModelError` and say what to set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fs_fwdllm.errors import ModelError

__all__ = [
    "attention_projections",
    "biases",
    "feed_forward_outputs",
    "head_modules",
    "is_norm",
    "linear_layers",
    "norm_layers",
    "output_layer",
    "position_limit",
    "positions_skip_padding",
    "short_names",
    "transformer_blocks",
    "vocabulary_size",
]

_FUSED_PROJECTIONS = ("qkv", "query_key_value", "c_attn", "in_proj")
_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")


def transformer_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``(name, block)`` of every distinct transformer block, in order; a block shared by layers (ALBERT) counts once.

    Lists of blocks that all attend; where there is none (Mamba, FNet), the list with the most parameters.

    Raises:
        ModelError: there is no list of blocks.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(True for _ in module.parameters())
    }
    stacks = {name for name, module in lists.items() if all(_attends(name, block) for block in module)}
    innermost = [name for name in stacks if not any(other.startswith(f"{name}.") for other in stacks)]
    if not innermost and lists:  # state spaces, convolutions or a mixture of layers take the place of attention
        innermost = [max(lists, key=lambda name: sum(weights.numel() for weights in lists[name].parameters()))]
    blocks = [
        (f"{name}.{index}", block)
        for name in lists
        if name in innermost
        for index, block in lists[name].named_children()
    ]
    if not blocks:
        raise ModelError(f"{type(model).__name__}: no list of transformer blocks was found")
    return blocks


def feed_forward_outputs(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``(name, linear layer)`` that ends the feed-forward part of each block.

    It is the block's last linear layer outside attention whose output is as wide as the attention's own output.

    Raises:
        ModelError: a block has none, or has several experts.
    """
    found = []
    for block_name, block in transformer_blocks(model):
        linears = _linear_widths(block)
        attending = {name for name in linears if _in_attention(f"{block_name}.{name}")}
        attention_widths = [width for name, width in linears.items() if name in attending]
        outside = {name: width for name, width in linears.items() if name not in attending}
        if any("expert" in name for name, _ in block.named_modules()):
            raise ModelError(f"{block_name}: a mixture of experts has no single feed-forward output")
        candidates = [name for name, width in outside.items() if width == _hidden_size(model, attention_widths)]
        if not candidates:
            raise ModelError(f"{block_name}: no feed-forward output was found among {sorted(linears)}")
        found.append((f"{block_name}.{candidates[-1]}", block.get_submodule(candidates[-1])))
    return found


def attention_projections(model: nn.Module, roles: str) -> list[str]:
    """Full names of the attention projections whose role is in ``roles`` (letters of ``"qkv"``).

    A projection that computes several roles at once (``c_attn``, ``query_key_value``) belongs to each of them.

    Raises:
        ModelError: no projection was recognised.
    """
    found = []
    for block_name, block in transformer_blocks(model):
        for name in _linear_widths(block):
            leaf = name.rpartition(".")[2].lower()
            fused = any(word in leaf for word in _FUSED_PROJECTIONS)
            if _in_attention(f"{block_name}.{name}") and (
                fused or leaf[0] in roles or leaf[:2] in {f"w{role}" for role in roles}
            ):
                found.append(f"{block_name}.{name}")
    if not found:
        raise ModelError(f"{type(model).__name__}: no attention projections were recognised; set target_modules")
    return found


def linear_layers(model: nn.Module) -> list[str]:
    """Full names of all linear layers inside the transformer blocks.

    Raises:
        ModelError: there is none.
    """
    found = [f"{block}.{name}" for block, module in transformer_blocks(model) for name in _linear_widths(module)]
    if not found:
        raise ModelError(
            f"{type(model).__name__}: has no linear layer in its blocks that an adapter could be put beside; use "
            "adapter_method layernorm, bitfit or head, or train the whole model (llm.adapter.use False)"
        )
    return found


def norm_layers(model: nn.Module) -> list[str]:
    """Full names of the normalisation layers (LayerNorm, RMSNorm and their kin) that have a weight."""
    return [
        name
        for name, module in model.named_modules()
        if is_norm(module) and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]


def output_layer(model: Any) -> tuple[str, nn.Linear]:
    """``(name, linear layer)`` that turns a language model's hidden states into logits.

    Raises:
        ModelError: the model has none.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__}: has no linear output layer over its vocabulary")
    return next(name for name, module in model.named_modules() if module is head), head


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer."""
    return "norm" in type(module).__name__.lower()


def biases(model: nn.Module) -> list[str]:
    """Names of the parameters called ``bias``."""
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules with parameters that stand beside the encoder or decoder of a Hugging Face model."""
    body = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]


def short_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The shortest spelling of ``names`` for a matcher by suffix: leaf names where they match nothing else.

    Falls back to the full names, which are longer but always exact.
    """
    wanted = set(names)
    leaves = {name.rpartition(".")[2] for name in wanted}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if matched == wanted else wanted)


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence a learned position table allows, in tokens; ``None`` for relative or rotary positions."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _POSITION_TABLES and isinstance(module, nn.Embedding):
            offset = getattr(module, "offset", None)  # OPT and BART reserve the first rows
            if offset is None:
                offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings - offset)
    return None


def positions_skip_padding(model: nn.Module) -> bool:
    """Whether a table of positions is counted from the padding token, as RoBERTa and its kin have it."""
    tables = (module for name, module in model.named_modules() if name.rpartition(".")[2] in _POSITION_TABLES)
    return any(getattr(table, "padding_idx", None) is not None for table in tables)


def vocabulary_size(model: Any) -> int:
    """Tokens the input embeddings have rows for; by the configuration where a model keeps its table to itself."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return int(model.config.get_text_config().vocab_size)


def _attends(place: str, block: nn.Module) -> bool:
    return any(_in_attention(f"{place}.{name}") for name, _ in block.named_modules())


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


def _linear_widths(module: nn.Module) -> dict[str, int]:
    """Output widths of the linear layers by name, without those inside another one (adapters)."""
    widths: dict[str, int] = {}
    for name, child in module.named_modules():
        if any(name.startswith(f"{outer}.") for outer in widths):
            continue
        if isinstance(child, nn.Linear):
            widths[name] = child.out_features
        elif isinstance(child, Conv1D):
            widths[name] = child.nf
    return widths


def _hidden_size(model: nn.Module, attention_widths: list[int]) -> int | None:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    return int(size) if size is not None else (attention_widths[-1] if attention_widths else None)
