"""The tensors that may change, as one ordered, named, digestible object.

Server, client, checkpoint and wire all speak of "the trainables": float32 tensors in the order in which the model
names them, each with a stable integer id (its position), tied weights once. Everything that must agree between
machines is defined on this order: which part of a direction belongs to which tensor, how a dense update is laid out,
and the :meth:`Trainables.digest` that lets two replicas find out in 16 bytes whether they still hold the same bits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fs_fwdllm.errors import DivergenceError, ModelError

__all__ = ["DIGEST_BYTES", "Trainables", "digest_of", "flatten", "public_name"]

DIGEST_BYTES = 16


_PARAMETRIZED = re.compile(r"\bparametrizations\.([^.]+)\.original\b")


def public_name(name: str) -> str:
    """A parameter's name without a parametrisation's suffix: ``a.parametrizations.bias.original`` is ``a.bias``."""
    return _PARAMETRIZED.sub(r"\1", name)


class Trainables:
    """Ordered float32 tensors with stable integer ids.

    Args:
        named: ``{name: tensor}`` in the order that fixes the ids. The tensors are kept, not copied.
        half: allow half-precision tensors too, for methods that keep float32 masters elsewhere.

    Raises:
        ModelError: there is nothing to train, or a tensor is not contiguous float32.
    """

    def __init__(self, named: Mapping[str, torch.Tensor], *, half: bool = False) -> None:
        if not named:
            raise ModelError("the model has no trainable parameter: llm.adapter selects none")
        for name, tensor in named.items():
            allowed = (torch.float32, torch.bfloat16, torch.float16) if half else (torch.float32,)
            if tensor.dtype not in allowed or not tensor.is_contiguous():
                raise ModelError(f"trainable {name!r} must be contiguous float32, but is {tensor.dtype}")
        self.names: tuple[str, ...] = tuple(named)
        self.tensors: tuple[torch.Tensor, ...] = tuple(named.values())
        self.count = sum(tensor.numel() for tensor in self.tensors)
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @classmethod
    def of_model(cls, model: nn.Module, *, half: bool = False) -> Trainables:
        """The parameters of ``model`` that require a gradient; updates to the trainables move the model."""
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return cls(named, half=half)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def decays(self) -> list[bool]:
        """Per tensor, whether weight decay applies: biases, norms and other vectors are exempt, as is customary."""
        return [tensor.dim() > 1 for tensor in self.tensors]

    def clone(self, *, float32: bool = False) -> Trainables:
        """An independent replica with the same names and bits, or with the same values in float32."""
        values = self.copy_values()
        if float32:
            values = [value.float() for value in values]
        return Trainables(dict(zip(self.names, values, strict=True)), half=not float32)

    def copy_values(self) -> list[torch.Tensor]:
        """Detached copies of the values, in order."""
        return [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def load_values(self, values: Sequence[torch.Tensor]) -> None:
        """Overwrite every tensor in place with ``values`` (same order and shapes)."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def to_flat(self) -> np.ndarray:
        """All values as one little-endian float32 vector of length :attr:`count`."""
        return flatten(self.tensors)

    def load_flat(self, flat: np.ndarray) -> None:
        """Inverse of :meth:`to_flat`. Raises :class:`~fs_fwdllm.errors.DivergenceError` on another length."""
        self.load_values(self.split_flat(flat))

    def split_flat(self, flat: np.ndarray) -> list[torch.Tensor]:
        """A flat float32 vector as tensors in the shapes of the trainables."""
        if flat.size != self.count:
            raise DivergenceError(
                f"a dense vector of {flat.size} values does not fit {self.count} trainable parameters"
            )
        pieces = torch.from_numpy(np.array(flat, dtype=np.float32)).split([tensor.numel() for tensor in self.tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, self.tensors, strict=True)]

    def digest(self) -> bytes:
        """16 bytes that name the current bits: BLAKE2b over names, shapes and little-endian values."""
        return digest_of(zip(self.names, self.tensors, strict=True))

    @contextmanager
    def holding(self, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """Let the tensors *be* ``values`` for a while: storage is exchanged, so leaving restores the exact bits."""
        originals = [tensor.data for tensor in self.tensors]
        try:
            for tensor, value in zip(self.tensors, values, strict=True):
                tensor.data = value
            yield
        finally:
            for tensor, original in zip(self.tensors, originals, strict=True):
                tensor.data = original


def digest_of(named: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """BLAKE2b over names, shapes and little-endian values, in the tensors' own dtypes."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in named:
        state.update(f"{public_name(name)}{tuple(tensor.shape)}".encode())
        state.update(_little_endian(tensor))
    return state.digest()


def flatten(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Concatenate tensors into one float32 vector on the host."""
    return torch.cat([tensor.detach().reshape(-1).to("cpu", torch.float32) for tensor in tensors]).numpy()


def _little_endian(tensor: torch.Tensor) -> memoryview:
    values = tensor.detach().to("cpu").contiguous()
    if values.element_size() == 2:  # NumPy has no bfloat16: its bits are those of an int16
        return values.view(torch.int16).numpy().astype("<i2", copy=False).data
    return values.numpy().astype("<f4", copy=False).data
