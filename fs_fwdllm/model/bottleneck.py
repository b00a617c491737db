"""The bottleneck adapter: a narrow detour after each feed-forward output.

Source: Houlsby et al. 2019 (arXiv 1902.00751), placed once per layer as in Pfeiffer et al. 2021 (arXiv 2005.00247),
which is where FwdLLM (arXiv 2308.13894) puts it. With hidden size ``h`` and width ``b = h // reduction_factor``::

    x  ->  x + up(relu(down(x)))        down: h -> b,  up: b -> h,  up = 0 at the start

so an untrained adapter is the identity, and one layer adds ``2*h*b + b + h`` parameters. The adapter is a child of the
feed-forward output layer and acts through a forward hook: no parameter of the base changes its name or its place. It
computes in float32 whatever the base's dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model.initialisation import draw_uniform_, private_torch_rng
from fs_fwdllm.model.structure import feed_forward_outputs

__all__ = [
    "BOTTLENECK_CONFIG_FILE",
    "BOTTLENECK_WEIGHTS_FILE",
    "DEFAULT_REDUCTION_FACTOR",
    "Bottleneck",
    "attach_bottleneck",
    "load_bottleneck",
]

BOTTLENECK_CONFIG_FILE = "bottleneck_config.json"
BOTTLENECK_WEIGHTS_FILE = "bottleneck_model.safetensors"
DEFAULT_REDUCTION_FACTOR = 16
_CHILD = "bottleneck"


class Bottleneck(nn.Module):
    """``x + up(relu(down(x)))`` in float32, returned in the dtype of ``x``.

    Args:
        hidden_size: width of ``x``.
        width: width of the detour.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, width, dtype=torch.float32)
        self.up = nn.Linear(width, hidden_size, dtype=torch.float32)

    @torch.no_grad()
    def initialise(self, seed: int, name: str) -> None:
        """Draw ``down`` (uniform, +-1/sqrt(hidden_size)) from ``(seed, name)``; everything else is zero."""
        draw_uniform_(self.down.weight, 1.0 / math.sqrt(self.down.in_features), seed, f"{name}.down.weight")
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            zero.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden``: ``[..., hidden_size]``, any floating dtype."""
        wide = hidden.float()
        moved: torch.Tensor = wide + self.up(torch.relu(self.down(wide)))
        return moved.to(hidden.dtype)


def attach_bottleneck(
    model: nn.Module,
    reduction_factor: int = DEFAULT_REDUCTION_FACTOR,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> list[str]:
    """Add a trainable adapter to ``model`` after each feed-forward output; return the adapters' names.

    Args:
        model: a transformer in the Hugging Face sense. ALBERT's shared block gets one adapter, shared likewise.
        reduction_factor: hidden size over adapter width.
        layers: indices of the blocks that get one; ``None`` is all.
        seed: key of the initial values.

    Raises:
        ConfigError: ``reduction_factor`` or an index in ``layers`` is out of range.
        ModelError: a feed-forward output cannot be found, or there is an adapter already.
    """
    outputs = feed_forward_outputs(model)
    names = []
    for index in _chosen_layers(layers, len(outputs)):
        name, linear = outputs[index]
        if hasattr(linear, _CHILD):
            raise ModelError(f"{name}: has a bottleneck adapter already")
        hidden_size = linear.out_features if isinstance(linear, nn.Linear) else int(linear.nf)  # type: ignore[arg-type]
        adapter = _new_adapter(hidden_size, reduction_factor).to(next(linear.parameters()).device)
        adapter.initialise(seed, f"{name}.{_CHILD}")
        linear.add_module(_CHILD, adapter)
        linear.register_forward_hook(_apply)
        names.append(f"{name}.{_CHILD}")
    return names


def load_bottleneck(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the adapters saved in ``folder`` to ``model`` (the base they were trained on) and return it in eval mode.

    A classifier's trained head is part of the folder and overwrites the model's.

    Raises:
        ModelError: a file is missing or malformed, or its tensors do not fit ``model``.
    """
    place = Path(folder)
    settings = _read_settings(place / BOTTLENECK_CONFIG_FILE)
    try:
        tensors = load_file(place / BOTTLENECK_WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{place / BOTTLENECK_WEIGHTS_FILE}: cannot be read ({error})") from error
    attach_bottleneck(model, settings["reduction_factor"], settings["layers"])
    parameters = dict(model.named_parameters())
    adapters = {name for name in parameters if f".{_CHILD}." in name}
    misfits = {name for name in tensors if name not in parameters or parameters[name].shape != tensors[name].shape}
    if wrong := sorted(misfits | (adapters - set(tensors))):
        raise ModelError(f"{place}: does not fit this model: {', '.join(wrong[:3])} is missing or has another shape")
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)
    return model.eval()


def _new_adapter(hidden_size: int, reduction_factor: int) -> Bottleneck:
    valid = isinstance(reduction_factor, int) and not isinstance(reduction_factor, bool)
    if not valid or not 1 <= reduction_factor <= hidden_size:
        raise ConfigError(
            f"llm.adapter.args reduction_factor: must be a whole number from 1 to the hidden size {hidden_size}, "
            f"but the value is {reduction_factor!r}"
        )
    with private_torch_rng(0):
        return Bottleneck(hidden_size, hidden_size // reduction_factor)


def _chosen_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    whole = isinstance(layers, (list, tuple)) and all(type(index) is int and 0 <= index < count for index in layers)
    if not whole or not layers:
        raise ConfigError(
            f"llm.adapter.args layers: must be a list of indices from 0 to {count - 1}, but the value is {layers!r}"
        )
    return sorted(set(layers))


def _apply(linear: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    adapted: torch.Tensor = getattr(linear, _CHILD)(output)
    return adapted


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error})") from error
    if not isinstance(settings, dict) or {"reduction_factor", "layers"} - set(settings):
        raise ModelError(f"{file}: must be an object with the keys reduction_factor and layers")
    return settings
