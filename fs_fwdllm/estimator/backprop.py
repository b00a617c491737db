"""Backpropagation, for the baselines: the exact gradient for about one forward and one backward pass.

With *gradient checkpointing* the activations inside a transformer layer are dropped after the forward pass and
recomputed during the backward pass: memory falls to one layer's activations plus one hidden state per layer, for one
more forward pass. It is the honest competitor of forward-only methods ("The cost of avoiding backpropagation",
arXiv 2506.21833), so it is available wherever backpropagation is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.objective import BatchLoss
from fs_fwdllm.model.trial import foreign_code

__all__ = ["Backprop"]


class Backprop:
    """Exact gradients of the trainables.

    Args:
        model: the model whose layers are checkpointed.
        gradient_checkpointing: recompute activations layer by layer.

    Raises:
        ModelError: checkpointing was asked for, but the model has no stack of layers.
    """

    def __init__(self, model: nn.Module, *, gradient_checkpointing: bool = False) -> None:
        self._layers = transformer_layers(model) if gradient_checkpointing else []
        if gradient_checkpointing and not self._layers:
            raise ModelError("fwdllm.gradient_checkpointing: this model has no stack of layers to checkpoint")
        self.forward_passes = self.passes(gradient_checkpointing=gradient_checkpointing)

    @staticmethod
    def passes(*, gradient_checkpointing: bool) -> int:
        """Forward passes per gradient: checkpointing runs every layer twice."""
        return 2 if gradient_checkpointing else 1

    def gradient(self, batch_loss: BatchLoss, scale: float = 1.0) -> float:
        """Accumulate the gradient of ``batch_loss``, times ``scale``, in ``grad`` fields; returns the (unscaled) loss.

        Autograd stops where the lowest parameter that requires a gradient is: layers below it build no graph.
        """
        with foreign_code("backpropagation failed"), torch.enable_grad(), self._checkpointed(batch_loss):
            loss = batch_loss.here()
            (loss if scale == 1.0 else loss * scale).backward()
        return float(loss.detach())

    @contextmanager
    def _checkpointed(self, batch_loss: BatchLoss) -> Iterator[None]:
        originals = [layer.forward for layer in self._layers]
        try:
            for layer, original in zip(self._layers, originals, strict=True):
                layer.forward = _recomputed(original, batch_loss)
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)


def _recomputed(forward: Any, batch_loss: BatchLoss) -> Any:
    def contexts() -> tuple[Any, Any]:
        # The second run of a layer must see the same cached prefix as the first.
        return nullcontext(), batch_loss.resumed()

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The model's stack of layers: the module list that holds most of the parameters."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    sizes = [sum(parameter.numel() for parameter in stack.parameters()) for stack in stacks]
    return list(stacks[sizes.index(max(sizes))]) if stacks else []
