"""The output residual: a low-rank step on what a language model's vocabulary projection reads.

With ``h`` the hidden state after the final norm, ``V`` fixed and ``U``, ``b`` trained::

    h  ->  h + U (V h)          V: [rank, hidden],  U: [hidden, rank],  U = 0 at the start
    logits = E h + b            b: [vocabulary],    b = 0 at the start

Nothing but a linear map lies between what is trained and the logits, so the loss' derivative follows from one forward
pass, without a graph: ``dL/dU = sum_i E^T (p_i - e_i) (V h_i)^T`` and ``dL/db = sum_i (p_i - e_i)``, over the labelled
positions ``i`` with the softmax' probabilities ``p`` and the target's indicator ``e``. That is what the adapter is for.
``V`` is not trained, because its derivative would need ``U`` and because the pair would then start from a saddle; its
bytes are part of what is saved, and a client never computes them. It comes from a file (``basis``, which
``fs-fwdllm basis`` writes from public text) or from the run's seed.

``b`` is the bias of the output layer, added to what that layer gives; where an architecture scales or caps its logits
(Cohere, Granite, Gemma 2), it does so afterwards, to the sum. The adapter is a child of the output layer and acts
through hooks, so no parameter of the base changes its name or its place, and it computes in float32 whatever the base's
dtype. ``E (I + U V)`` is a matrix like ``E``: :func:`merge_output_residual` writes it into the output layer, untied
from the input embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model.activations import Moments, Place, Rows
from fs_fwdllm.model.basis_file import RANDOM, basis_rows, check_rank
from fs_fwdllm.model.structure import output_layer

__all__ = [
    "DEFAULT_RANK",
    "OutputResidual",
    "attach_output_residual",
    "merge_output_residual",
    "output_residual_places",
    "output_residual_settings",
]

DEFAULT_RANK = 32
_CHILD = "output_residual"


class OutputResidual(nn.Module):
    """``h + up (down h)`` in float32, returned in the dtype of ``h``; and the bias of the logits.

    Attributes:
        down: ``[rank, hidden]`` buffer, float32, never trained.
        up: ``[hidden, rank]`` parameter, float32, zero at the start.
        bias: ``[vocabulary]`` parameter, float32, zero at the start; ``None`` without one.

    Args:
        down: as above; it is kept, not copied.
        vocabulary: number of logits, or zero for no bias.
    """

    down: torch.Tensor

    def __init__(self, down: torch.Tensor, vocabulary: int = 0) -> None:
        super().__init__()
        self.register_buffer("down", down)
        self.up = nn.Parameter(torch.zeros(down.shape[1], down.shape[0], device=down.device))
        self.bias = nn.Parameter(torch.zeros(vocabulary, device=down.device)) if vocabulary else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden``: ``[..., hidden]``, any floating dtype."""
        wide = hidden.float()
        moved = wide + F.linear(F.linear(wide, self.down), self.up)
        return moved.to(hidden.dtype)


def attach_output_residual(
    model: nn.Module, rank: int = DEFAULT_RANK, bias: bool = True, basis: str = "", seed: int = 0
) -> str:
    """Add the adapter to the output layer of a language model, trainable, and return the adapter's name.

    Args:
        model: a causal language model in the Hugging Face sense.
        rank: directions of the hidden state that are looked at.
        bias: whether the logits get a bias as well.
        basis: a file with ``down``, whose first ``rank`` rows are taken, or empty (or ``random``) to draw them. Drawn
            rows have features of about unit variance where the final norm gives elements of that.
        seed: key of what is drawn.

    Raises:
        ConfigError: ``rank`` or ``bias`` is of another kind or out of range, or ``basis`` cannot be used.
        ModelError: the model has no linear output layer, or has such an adapter already.
    """
    name, head = output_layer(model)
    if hasattr(head, _CHILD):
        raise ModelError(f"{name}: has an output residual already")
    vocabulary, hidden_size = head.weight.shape
    check_rank("rank", rank, hidden_size)
    if not isinstance(bias, bool):
        raise ConfigError(f"llm.adapter.args bias: must be true or false, but the value is {bias!r}")
    down = basis_rows(basis or RANDOM, f"{_CHILD}.down", rank, hidden_size, seed)
    head.add_module(_CHILD, OutputResidual(down.to(head.weight.device), vocabulary if bias else 0))
    head.register_forward_pre_hook(_move_hidden)
    head.register_forward_hook(_add_bias)
    return f"{name}.{_CHILD}"


def output_residual_places(model: nn.Module, arguments: Mapping[str, Any]) -> list[Place]:
    """Where the adapter of ``model`` reads: the hidden states after the final norm."""
    _, head = output_layer(model)
    rank, hidden_size = arguments.get("rank", DEFAULT_RANK), head.weight.shape[1]
    return [Place(getattr(head, _CHILD), Moments(hidden_size), (Rows(f"{_CHILD}.down", rank),))]


def output_residual_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that decide which tensors there are, as they came to be."""
    return {"rank": arguments.get("rank", DEFAULT_RANK), "bias": arguments.get("bias", True)}


@torch.no_grad()
def merge_output_residual(model: Any) -> None:
    """Multiply the adapter of ``model`` into its output layer, in place, and remove it.

    The output layer's weight becomes its own, ``E + (E U) V`` computed in float64, no longer tied to the input
    embeddings.

    Raises:
        ConfigError: there is a bias, and the architecture's output layer has no place for one.
    """
    name, head = output_layer(model)
    adapter: OutputResidual = getattr(head, _CHILD)
    if adapter.bias is not None and head.bias is None:
        raise ConfigError(
            f"{type(model).__name__}: its output layer {name} has no bias, so the one trained beside it has no place "
            "in a merged model; use it as it is, by fs_fwdllm.load, or train with llm.adapter.args bias: false"
        )
    weight = head.weight.double()
    weight = weight + weight @ adapter.up.double() @ adapter.down.double()
    head.weight = nn.Parameter(weight.to(head.weight.dtype), requires_grad=head.weight.requires_grad)
    if adapter.bias is not None:
        summed = head.bias.double() + adapter.bias.double()
        head.bias = nn.Parameter(summed.to(head.bias.dtype), requires_grad=head.bias.requires_grad)
    _remove(head)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False


def _remove(head: Any) -> None:
    delattr(head, _CHILD)
    for hooks, ours in ((head._forward_pre_hooks, _move_hidden), (head._forward_hooks, _add_bias)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]


def _move_hidden(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(head, _CHILD)(arguments[0]), *arguments[1:])


def _add_bias(head: nn.Module, arguments: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
    bias = getattr(head, _CHILD).bias
    return logits if bias is None else logits.float() + bias
