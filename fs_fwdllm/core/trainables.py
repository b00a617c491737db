"""The tensors that may change, as one ordered, named, digestible object.

Server, client, checkpoint and wire all speak of "the trainables": float32 tensors (of PyTorch, where a model holds
them, or numpy arrays, where none does) in the order in which the model names them, each with a stable integer id (its
position), tied weights once. Everything that must agree between machines is defined on this order: which part of a
direction belongs to which tensor, how a dense update is laid out, and the :meth:`Trainables.digest` that lets two
replicas find out in 16 bytes whether they still hold the same bits.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fs_fwdllm.core.arrays import Array, Arrays, arrays_of, count_of, flatten
from fs_fwdllm.errors import DivergenceError, ModelError

__all__ = ["CHANGED_FILES", "DIGEST_BYTES", "Trainables", "digest_of", "flatten", "public_name"]

DIGEST_BYTES = 16
#: Under which name whatever is kept says where the files of changed parameters are.
CHANGED_FILES = "changed_files"
_SINGLE = ("float32", "torch.float32")
_HALF = ("torch.bfloat16", "torch.float16")
#: Tensors from this size on are hashed beside one another: a thread of its own pays for itself.
_LARGE_BYTES = 1 << 20
_MOST_THREADS = 8

_PARAMETRIZED = re.compile(r"\bparametrizations\.([^.]+)\.original\b")


def public_name(name: str) -> str:
    """A parameter's name without a parametrisation's suffix: ``a.parametrizations.bias.original`` is ``a.bias``."""
    return _PARAMETRIZED.sub(r"\1", name)


class Trainables:
    """Ordered float32 tensors with stable integer ids.

    Args:
        named: ``{name: tensor}`` in the order that fixes the ids: numpy arrays, or PyTorch tensors on one device. They
            are kept, not copied.
        half: allow half-precision tensors of PyTorch too, for methods that keep float32 masters elsewhere.

    Raises:
        ModelError: there is nothing to train, or a tensor is not contiguous float32.
    """

    def __init__(self, named: Mapping[str, Array], *, half: bool = False) -> None:
        if not named:
            raise ModelError("the model has no trainable parameter: llm.adapter selects none")
        allowed = (*_SINGLE, *_HALF) if half else _SINGLE
        for name, tensor in named.items():
            if str(tensor.dtype) not in allowed or not arrays_of(tensor).is_contiguous(tensor):
                raise ModelError(f"trainable {name!r} must be contiguous float32, but is {tensor.dtype}")
        self.names: tuple[str, ...] = tuple(named)
        self.tensors: tuple[Array, ...] = tuple(named.values())
        self.count = sum(count_of(tensor) for tensor in self.tensors)
        self.bytes = sum(int(tensor.nbytes) for tensor in self.tensors)

    @classmethod
    def of_model(cls, model: Any, *, half: bool = False) -> Trainables:
        """The parameters of a PyTorch ``model`` that require a gradient; updates to the trainables move the model."""
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return cls(named, half=half)

    @property
    def arrays(self) -> Arrays:
        """The operations for these tensors, where they are now."""
        return arrays_of(self.tensors[0])

    @property
    def device(self) -> Any:
        """Where the tensors are: PyTorch's device, or ``"cpu"``."""
        return self.arrays.device

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the tensors, in order."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """Of the tensors, in order, in the terms of their library."""
        return tuple(tensor.dtype for tensor in self.tensors)

    @property
    def in_memory(self) -> dict[int, Array]:
        """The tensors that a model's modules hold, by id: all, unless some stay on the disk."""
        return dict(enumerate(self.tensors))

    def parameter(self, index: int) -> Array:
        """The tensor as the model computes with it."""
        return self.tensors[index]

    @contextmanager
    def resident(self, indices: Sequence[int]) -> Iterator[None]:
        """Have the tensors with these ids in memory for a while, so that they can be trained. Here all always are."""
        yield

    def assign(self, indices: Sequence[int], values: Sequence[Array]) -> None:
        """Overwrite the tensors with these ids in place."""
        for index, value in zip(indices, values, strict=True):
            self.arrays.assign(self.tensors[index], value)

    def named(self) -> Mapping[str, Array]:
        """The tensors by name; those that are not in memory are read when they are looked at."""
        return dict(zip(self.names, self.tensors, strict=True))

    def kept_by_value(self) -> Mapping[str, Array]:
        """By name, what whoever keeps these values has to write: all, unless some are kept in files of their own."""
        return self.named()

    def kept_in_files(self) -> dict[str, list[object]]:
        """By name, what was changed and is in a file of its own, as JSON; here nothing is."""
        return {}

    def restored(self, values: Mapping[str, Array], files: Mapping[str, Sequence[object]]) -> Trainables:
        """Trainables of these names that stand where others were kept, by value and in files."""
        return Trainables({name: values[name] for name in self.names})

    def take_files(self, files: Mapping[str, Sequence[object]]) -> None:
        """Stand where :meth:`kept_in_files` says. Here nothing ever does."""
        if files:
            raise ModelError(f"{len(files)} parameters were kept in files of their own, but this model is in memory")

    def keep_only(self, names: set[str]) -> None:
        """Remove files of changed parameters that are neither among ``names`` nor read here."""

    def decays(self) -> list[bool]:
        """Per tensor, whether weight decay applies: biases, norms and other vectors are exempt, as is customary."""
        return [tensor.ndim > 1 for tensor in self.tensors]

    def clone(self, *, float32: bool = False, folder: Path | None = None) -> Trainables:
        """An independent replica with the same names and bits, or with the same values in float32.

        Args:
            folder: where a replica that does not fit in memory keeps what changes.
        """
        values = self.copy_values()
        if float32:
            values = list(map(self.arrays.as_float32, values))
        return Trainables(dict(zip(self.names, values, strict=True)), half=not float32)

    def copy_values(self) -> list[Array]:
        """Detached copies of the values, in order."""
        return list(map(self.arrays.copy, self.tensors))

    def zeros_like(self) -> list[Array]:
        """Zeros in the shapes of the trainables: a buffer beside them."""
        return list(map(self.arrays.zeros_like, self.tensors))

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(map(self.arrays.is_finite, self.tensors))

    def load_values(self, values: Sequence[Array]) -> None:
        """Overwrite every tensor in place with ``values``: same order and shapes, numpy arrays or their own kind."""
        self.assign(range(len(self.names)), values)

    def to_flat(self) -> np.ndarray:
        """All values as one little-endian float32 vector of length :attr:`count`."""
        return flatten(self.tensors)

    def load_flat(self, flat: np.ndarray) -> None:
        """Inverse of :meth:`to_flat`. Raises :class:`~fs_fwdllm.errors.DivergenceError` on another length."""
        self.load_values(self._pieces(flat))

    def split_flat(self, flat: np.ndarray) -> list[Array]:
        """A flat float32 vector as new tensors beside the trainables, in their shapes.

        Raises:
            DivergenceError: it has another length.
        """
        arrays = self.arrays
        return [arrays.place(np.array(piece, dtype=np.float32)) for piece in self._pieces(flat)]

    def _pieces(self, flat: np.ndarray) -> list[np.ndarray]:
        """Views of a flat vector in the shapes of the trainables."""
        if flat.size != self.count:
            raise DivergenceError(
                f"a dense vector of {flat.size} values does not fit {self.count} trainable parameters"
            )
        pieces = np.split(flat, np.cumsum([count_of(tensor) for tensor in self.tensors])[:-1])
        return [piece.reshape(tuple(tensor.shape)) for piece, tensor in zip(pieces, self.tensors, strict=True)]

    def digest(self) -> bytes:
        """16 bytes that name the current bits, with names and shapes (see :func:`digest_of`)."""
        return digest_of(zip(self.names, self.tensors, strict=True))

    @contextmanager
    def holding(self, values: Sequence[Array]) -> Iterator[None]:
        """Let a model's parameters *be* ``values`` for a while; storage is exchanged: leaving restores the exact bits.

        Raises:
            TypeError: the trainables are numpy arrays, which cannot.
        """
        arrays = self.arrays
        originals: list[Array] = []
        try:
            for tensor, value in zip(self.tensors, values, strict=True):
                originals.append(arrays.exchange_storage(tensor, value))
            yield
        finally:
            for tensor, original in zip(self.tensors, originals, strict=False):
                arrays.exchange_storage(tensor, original)


def digest_of(named: Iterable[tuple[str, Array]]) -> bytes:
    """16 bytes that name tensors with their names: BLAKE2b over the leaves of all, in order.

    A leaf is BLAKE2b over a tensor's name, shape and little-endian values in its own dtype. It depends on no other
    tensor, so that large tensors are hashed by as many threads as there are processors; as many are read ahead, where
    they are on a disk.
    """
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    ahead: deque[Future[bytes] | bytes] = deque()
    with ThreadPoolExecutor(threads) as pool:  # which has no thread before it is given something to do
        for name, tensor in named:
            is_large = threads > 1 and int(tensor.nbytes) >= _LARGE_BYTES
            ahead.append(pool.submit(_leaf, name, tensor) if is_large else _leaf(name, tensor))
            if len(ahead) > threads:
                whole.update(_made(ahead.popleft()))
        for leaf in ahead:
            whole.update(_made(leaf))
    return whole.digest()


def _leaf(name: str, tensor: Array) -> bytes:
    state = hashlib.blake2b(f"{public_name(name)}{tuple(tensor.shape)}".encode(), digest_size=DIGEST_BYTES)
    state.update(arrays_of(tensor).octets(tensor))
    return state.digest()


def _made(leaf: Future[bytes] | bytes) -> bytes:
    return leaf.result() if isinstance(leaf, Future) else leaf
