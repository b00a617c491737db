"""Skipping transformer layers: the hidden state passes a dropped layer unchanged.

What a layer returns differs between architectures (a tensor, or a tuple that starts with it), so the first dropped
call of a kind of layer is still computed, to see the form of its result; later ones cost nothing.

**Bias.** A visit with dropped layers takes the gradient of another function: the model without them. For a target block
``b`` and a draw ``S`` of dropped layers the client follows ``grad_b f(theta without S)``. The mean of that over the
draws is the gradient of ``E_S f(theta without S)``, not of ``f(theta)``; the difference does not shrink with more
steps, clients or smaller rates, and the delta is still added to the whole model. Nothing rescales what remains, as
stochastic depth (arXiv 1603.09382) does at test time and layer dropout (arXiv 1909.11556) makes unnecessary by training
all layers that way from the start. The method as published sends such models (its ``compress``); here it is off unless
``fwdllm.blocks.download.drop_ratio`` is set. Quantised or pruned blocks approximate the whole function instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["LayerSkipper"]


class LayerSkipper:
    """Lets layers of a model be skipped for a while."""

    def __init__(self, model: nn.Module, layer_names: Iterable[str]) -> None:
        self._layers = [model.get_submodule(name) for name in layer_names]
        self._tuple_length: dict[type[nn.Module], int | None] = {}

    @contextmanager
    def skipping(self, dropped: Iterable[int]) -> Iterator[None]:
        """While the context is open, the layers with these numbers hand their input on."""
        layers = [self._layers[index] for index in dropped]
        try:
            for layer in layers:
                layer.forward = self._identity(layer, layer.forward)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def _identity(self, layer: nn.Module, original: Any) -> Any:
        kind = type(layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if kind not in self._tuple_length:
                with torch.no_grad():
                    output = original(*args, **kwargs)
                self._tuple_length[kind] = len(output) if isinstance(output, tuple) else None
            length = self._tuple_length[kind]
            return hidden if length is None else (hidden, *[None] * (length - 1))

        return forward
