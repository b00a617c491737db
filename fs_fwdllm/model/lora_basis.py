"""LoRA with a fixed ``A``: the directions of a layer's input, of which only the combination is trained.

LoRA adds ``B A x`` to a layer's output. Where the rows of ``A`` are given by a basis (principal directions of ``x``,
from public text) they are frozen, and ``B`` alone is trained, half of the parameters or fewer. What is saved is an
ordinary LoRA adapter with both matrices, which PEFT loads. Drawing and freezing ``A`` is LoRA-FA (Zhang et al. 2023,
arXiv 2308.03303), here the control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.model.activations import Moments, Place, Rows
from fs_fwdllm.model.basis_file import basis_rows

__all__ = ["fix_lora_a", "lora_places"]


@torch.no_grad()
def fix_lora_a(model: nn.Module, basis: Any, seed: int) -> None:
    """Let every ``A`` of a PEFT model be the rows of a basis, and train it no more.

    Raises:
        ConfigError: an adapter is not that of a linear layer, or the basis cannot be used.
    """
    for name, layer in _input_layers(model):
        rank, width = layer.weight.shape
        layer.weight.copy_(basis_rows(basis, name, rank, width, seed))
        layer.weight.requires_grad_(False)


def lora_places(model: nn.Module, arguments: Mapping[str, Any]) -> list[Place]:
    """Where the adapters of ``model`` read: the inputs of the layers they are beside."""
    return [
        Place(layer, Moments(layer.in_features), (Rows(name, layer.out_features),))
        for name, layer in _input_layers(model)
    ]


def _input_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """``(name of its weight as PEFT saves it, A)`` of every adapter."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name or ".lora_B." in name:
            continue
        layer = model.get_submodule(name.rpartition(".")[0]) if ".lora_A." in name else None
        if not isinstance(layer, nn.Linear) or "lora_parameter" in name or parameter.dim() != 2:
            raise ConfigError(
                f"llm.adapter.args basis: {name} is not LoRA beside a linear layer, whose input has directions; leave "
                "basis out, or name linear layers in target_modules"
            )
        yield name.replace(".default.", "."), layer
