"""The bottleneck adapter: a narrow detour after each feed-forward output.

Source: Houlsby et al. 2019 (arXiv 1902.00751), placed once per layer as in Pfeiffer et al. 2021 (arXiv 2005.00247),
which is where FwdLLM (arXiv 2308.13894) puts it. With hidden size ``h`` and width ``b = h // reduction_factor``::

    x  ->  x + up(relu(down(x)))        down: h -> b,  up: b -> h,  up = 0 at the start

so an untrained adapter is the identity, and one layer adds ``2*h*b + b + h`` parameters. The adapter is a child of the
feed-forward output layer and acts through a forward hook: no parameter of the base changes its name or its place. It
computes in float32 whatever the base's dtype.

A probe's noise grows with the number of parameters, so there is a form with few (:class:`SubspaceBottleneck`): with
fixed directions ``B`` of what the adapter reads and ``Q`` of what it writes, only coefficients are trained::

    down = W0 + C B         W0: fixed, as drawn;  B: [in_rank, h];  C: [b, in_rank], 0 at the start
    up   = Q^T D            Q: [out_rank, h], rows of unit length;  D: [out_rank, b], 0 at the start

which with both biases (``up``'s in the rows of ``Q``) are ``b*(in_rank + 1) + out_rank*(b + 1)`` parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model.activations import Moments, Place, Rows
from fs_fwdllm.model.basis_file import basis_rows, check_rank
from fs_fwdllm.model.initialisation import draw_uniform_, private_torch_rng
from fs_fwdllm.model.structure import feed_forward_outputs

__all__ = [
    "BOTTLENECK_CONFIG_FILE",
    "BOTTLENECK_WEIGHTS_FILE",
    "DEFAULT_REDUCTION_FACTOR",
    "Bottleneck",
    "SubspaceBottleneck",
    "attach_bottleneck",
    "bottleneck_places",
    "bottleneck_settings",
    "load_bottleneck",
]

BOTTLENECK_CONFIG_FILE = "bottleneck_config.json"
BOTTLENECK_WEIGHTS_FILE = "bottleneck_model.safetensors"
DEFAULT_REDUCTION_FACTOR = 16
DEFAULT_BASIS_RANK = 32
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


class SubspaceBottleneck(nn.Module):
    """A bottleneck whose matrices move in fixed subspaces only, in float32.

    Attributes:
        start: ``W0``, ``[width, hidden]``, fixed.
        down_basis: ``B``, ``[in_rank, hidden]``, fixed.
        up_basis: ``Q``, ``[out_rank, hidden]``, fixed.
        down: ``C`` as the weight, and a bias ``[width]``.
        up: ``D`` as the weight, and a bias ``[out_rank]``.
    """

    start: torch.Tensor
    down_basis: torch.Tensor
    up_basis: torch.Tensor

    def __init__(self, start: torch.Tensor, down_basis: torch.Tensor, up_basis: torch.Tensor) -> None:
        super().__init__()
        for name, fixed in (("start", start), ("down_basis", down_basis), ("up_basis", up_basis)):
            self.register_buffer(name, fixed)
        self.down = nn.Linear(len(down_basis), len(start), dtype=torch.float32)
        self.up = nn.Linear(len(start), len(up_basis), dtype=torch.float32)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden``: ``[..., hidden_size]``, any floating dtype."""
        wide = hidden.float()
        narrow = F.linear(wide, self.start + self.down.weight @ self.down_basis, self.down.bias)
        moved: torch.Tensor = wide + self.up(torch.relu(narrow)) @ self.up_basis
        return moved.to(hidden.dtype)


def attach_bottleneck(
    model: nn.Module,
    reduction_factor: int = DEFAULT_REDUCTION_FACTOR,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    basis: str = "",
    in_rank: int | None = None,
    out_rank: int | None = None,
) -> list[str]:
    """Add a trainable adapter to ``model`` after each feed-forward output; return the adapters' names.

    Args:
        model: a transformer in the Hugging Face sense. ALBERT's shared block gets one adapter, shared likewise.
        reduction_factor: hidden size over adapter width.
        layers: indices of the blocks that get one; ``None`` is all.
        seed: key of the initial values.
        basis: a file of fixed directions, or ``random``, for the form with few parameters; empty for the plain one.
        in_rank: directions that the adapter reads, with a basis; 32 unless told.
        out_rank: directions that it writes, with a basis; 32 unless told.

    Raises:
        ConfigError: an argument is out of range, or a rank is given without a basis.
        ModelError: a feed-forward output cannot be found, or there is an adapter already.
    """
    if not basis and (in_rank, out_rank) != (None, None):
        raise ConfigError(
            "llm.adapter.args in_rank, out_rank: are the numbers of fixed directions, so they need basis: a file "
            "that fs-fwdllm basis wrote, or random"
        )
    outputs = feed_forward_outputs(model)
    names = []
    for index in _chosen_layers(layers, len(outputs)):
        name, linear = outputs[index]
        if hasattr(linear, _CHILD):
            raise ModelError(f"{name}: has a bottleneck adapter already")
        hidden_size = linear.out_features if isinstance(linear, nn.Linear) else int(linear.nf)  # type: ignore[arg-type]
        plain = _new_adapter(hidden_size, reduction_factor, seed, f"{name}.{_CHILD}")
        adapter = _in_subspaces(plain, basis, (in_rank, out_rank), seed, f"{name}.{_CHILD}") if basis else plain
        linear.add_module(_CHILD, adapter.to(next(linear.parameters(), torch.empty(0)).device))
        linear.register_forward_hook(_apply)
        names.append(f"{name}.{_CHILD}")
    return names


def bottleneck_places(model: nn.Module, arguments: Mapping[str, Any]) -> list[Place]:
    """Where the adapters of ``model`` read and write: the feed-forward outputs."""
    in_rank, out_rank = (arguments.get(name, DEFAULT_BASIS_RANK) for name in ("in_rank", "out_rank"))
    return [
        Place(
            adapter,
            Moments(adapter.down.in_features),
            (Rows(f"{name}.down_basis", in_rank), Rows(f"{name}.up_basis", out_rank, scaled=False)),
        )
        for name, adapter in model.named_modules()
        if isinstance(adapter, Bottleneck)
    ]


def bottleneck_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that decide which tensors there are, as they came to be."""
    plain = {
        "reduction_factor": arguments.get("reduction_factor", DEFAULT_REDUCTION_FACTOR),
        "layers": arguments.get("layers"),
    }
    if not arguments.get("basis"):
        return plain
    return plain | {name: arguments.get(name, DEFAULT_BASIS_RANK) for name in ("in_rank", "out_rank")}


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
    ranks = {name: settings[name] for name in ("in_rank", "out_rank") if name in settings}
    basis = str(place / BOTTLENECK_WEIGHTS_FILE) if ranks else ""
    attach_bottleneck(model, settings["reduction_factor"], settings["layers"], basis=basis, **ranks)
    fixed = {name: buffer for name, buffer in model.named_buffers() if f".{_CHILD}." in name}
    parameters: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **fixed}
    adapters = {name for name in parameters if f".{_CHILD}." in name}
    misfits = {name for name in tensors if name not in parameters or parameters[name].shape != tensors[name].shape}
    if wrong := sorted(misfits | (adapters - set(tensors))):
        raise ModelError(f"{place}: does not fit this model: {', '.join(wrong[:3])} is missing or has another shape")
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)
    return model.eval()


def _in_subspaces(
    plain: Bottleneck, basis: str, ranks: tuple[int | None, int | None], seed: int, name: str
) -> SubspaceBottleneck:
    hidden_size, rows = plain.down.in_features, []
    for argument, side, given in zip(("in_rank", "out_rank"), ("down", "up"), ranks, strict=True):
        rank = DEFAULT_BASIS_RANK if given is None else given
        check_rank(argument, rank, hidden_size)
        rows.append(basis_rows(basis, f"{name}.{side}_basis", rank, hidden_size, seed))
    with private_torch_rng(0):
        return SubspaceBottleneck(plain.down.weight.detach(), *rows)


def _new_adapter(hidden_size: int, reduction_factor: int, seed: int, name: str) -> Bottleneck:
    valid = isinstance(reduction_factor, int) and not isinstance(reduction_factor, bool)
    if not valid or not 1 <= reduction_factor <= hidden_size:
        raise ConfigError(
            f"llm.adapter.args reduction_factor: must be a whole number from 1 to the hidden size {hidden_size}, "
            f"but the value is {reduction_factor!r}"
        )
    with private_torch_rng(0):
        adapter = Bottleneck(hidden_size, hidden_size // reduction_factor)
    adapter.initialise(seed, name)
    return adapter


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
