"""The folders of this package's own adapters: settings in JSON, tensors in safetensors.

An adapter that PEFT does not know leaves ``METHOD_config.json`` and ``METHOD_model.safetensors``: what was trained, by
the names of the model's parameters, and the fixed tensors that lie beside it in the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.model.bottleneck import BOTTLENECK_CONFIG_FILE, BOTTLENECK_WEIGHTS_FILE, bottleneck_settings
from fs_fwdllm.model.output_residual import output_residual_settings

__all__ = ["OWN_FOLDERS", "OwnFolder"]


@dataclass(frozen=True)
class OwnFolder:
    """How one of the package's adapters is saved.

    Attributes:
        kind: the name of the adapter's module within the layer it is hung on, and of its format.
        config_file: name of the file of settings.
        weights_file: name of the file of tensors.
        settings: of an adapter's arguments those that decide which tensors there are, as they came to be.
        basis: the last parts of the names of those tensors that ``basis`` gives.
    """

    kind: str
    config_file: str
    weights_file: str
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    basis: frozenset[str]

    def fixed(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors of the adapter that are saved, and are not trained."""
        return {name: tensor for name, tensor in model.named_buffers() if f".{self.kind}." in name}

    def tensors(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """All that is saved, by public name: what is trained in ``model`` (a new head, too), and what is fixed."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield public_name(name), parameter
        yield from self.fixed(model).items()


OWN_FOLDERS = {
    "bottleneck": OwnFolder(
        "bottleneck",
        BOTTLENECK_CONFIG_FILE,
        BOTTLENECK_WEIGHTS_FILE,
        bottleneck_settings,
        frozenset({"down_basis", "up_basis"}),
    ),
    "output_residual": OwnFolder(
        "output_residual",
        "output_residual_config.json",
        "output_residual_model.safetensors",
        output_residual_settings,
        frozenset({"down"}),
    ),
}
