"""Closed form: the exact gradient of all that lies at the output, from one ordinary forward pass.

A linear head needs no probes. What goes into it and how far what comes out is from the targets (:mod:`fs_fwdllm.model.
output_layer`) give ``dL/dW = sum_n e_n f_n^T``, and with that any number of slopes, for one pass a step, without a
graph and with nothing held but one buffer as large as what is trained. This *is* the gradient that backpropagation
finds for the last layer, so what it reaches is what FedSGD on the head reaches; it buys slopes at no cost, not a better
gradient.

It covers the weight and the bias of the layer whose output the logits are (a classifier's last layer, the span head,
the output head of a language model, also where classes are words), and the adapter at that layer's door, ``f -> f + U V
f`` with a bias on the logits: ``dL/dU = sum_n (W^T e_n) (V f_n)^T``.
"""

from __future__ import annotations

import torch
from torch import nn

from fs_fwdllm.config.own_sections import FwdllmConfig
from fs_fwdllm.core.direction import Distribution
from fs_fwdllm.core.trainables import Trainables, public_name
from fs_fwdllm.errors import EstimatorError
from fs_fwdllm.estimator.base import Estimator, Passes
from fs_fwdllm.estimator.exact import ExactSlopes, Gradient
from fs_fwdllm.model.objective import BatchLoss
from fs_fwdllm.model.output_layer import OutputLayer, OutputPass

__all__ = ["ClosedForm"]

#: Outputs of the layer whose errors are held at once, in numbers (16 MiB).
ERROR_ELEMENTS = 1 << 22


class ClosedForm(ExactSlopes):
    """Slopes of the output layer without a further pass and without backpropagation.

    Raises:
        EstimatorError: a trainable does not lie behind the boundary, or the logits are no linear layer's output.
    """

    runs_here = True

    def __init__(self, distribution: Distribution) -> None:
        super().__init__(distribution)
        self._layer: OutputLayer | None = None

    @classmethod
    def of(
        cls, model: nn.Module, trainables: Trainables, distribution: Distribution, config: FwdllmConfig, *, full: bool
    ) -> Estimator:
        return cls(distribution)

    @torch.no_grad()
    def gradient(self, batch_loss: BatchLoss) -> Gradient:
        if self._layer is None:
            self._layer = OutputLayer(batch_loss.objective)
        seen = self._layer.run(batch_loss)
        roles = self._roles(batch_loss.trainables, self._layer)
        found = _gradients(self._layer, seen, set(roles.values()))
        return Gradient(float(seen.loss), {index: found[role] for index, role in roles.items()}, Passes(1))

    def _roles(self, trainables: Trainables, layer: OutputLayer) -> dict[int, str]:
        """What each covered tensor is to the output layer, by tensor id."""
        roles = {
            index: layer.role_of(tensor)
            for index, tensor in enumerate(trainables.tensors)
            if self.distribution.covers(index)
        }
        strangers = [public_name(trainables.names[index]) for index, role in roles.items() if not role]
        if strangers:
            raise EstimatorError(
                f"closed_form: {strangers[0]!r} ({len(strangers)} in all) does not lie behind the last linear layer, "
                "so its slopes do not follow from one pass; give it another source in fwdllm.parts (probes, projected, "
                "frozen), or train the head alone (llm.adapter.args: adapter_method head, or output_residual)"
            )
        return roles


def _gradients(layer: OutputLayer, seen: OutputPass, wanted: set[str]) -> dict[str, torch.Tensor]:
    """The gradients by role, outputs a slice at a time."""
    features, found = seen.features, dict[str, torch.Tensor]()
    if "weight" in wanted:
        found["weight"] = features.new_empty(seen.width, features.shape[1])
    bias = features.new_empty(seen.width)
    hidden = torch.zeros_like(features) if "up" in wanted else None
    step = max(1, ERROR_ELEMENTS // max(1, len(features)))
    for start in range(0, seen.width, step):
        stop = min(seen.width, start + step)
        errors = seen.error(start, stop)
        bias[start:stop] = errors.sum(dim=0)
        if "weight" in wanted:
            torch.mm(errors.T, features, out=found["weight"][start:stop])
        if hidden is not None:
            hidden.addmm_(errors, layer.weight[start:stop].float())
    if hidden is not None:
        assert seen.below is not None
        found["up"] = hidden.T @ (seen.below @ layer.adapter.down.T)
    if "weight" in wanted and layer.is_transposed:
        found["weight"] = found["weight"].T.contiguous()
    return found | {"bias": bias, "logit_bias": bias}
