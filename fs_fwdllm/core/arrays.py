"""Arrays: the few elementwise operations that replay is made of, on numpy arrays or on PyTorch tensors.

The algorithms (which direction is added when, in which chunks, what decays) exist once, in
:mod:`~fs_fwdllm.core.replay` and its neighbours; they ask the :class:`Arrays` of what they were given for single
operations. :data:`NUMPY` is the default and needs nothing else; tensors bring
:class:`~fs_fwdllm.core.torch_arrays.TorchArrays`, which is imported when the first tensor is seen.

**The law of this module**: an operation on float32 is exactly one IEEE-754 rounding per element (two where its name
says two things, :meth:`Arrays.add_scaled` with values other than signs excepted), so both libraries, and every device,
give the same bits. Scalars are rounded to float32 first; nothing is promoted to float64 in between, nothing is fused,
and subnormal numbers are kept.
"""

from __future__ import annotations

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

__all__ = [
    "LONG_ROW",
    "NUMPY",
    "Array",
    "Arrays",
    "NumpyArrays",
    "arrays_of",
    "count_of",
    "flatten",
    "squared_norm",
    "sum_in_order",
]

#: A numpy array or a PyTorch tensor.
Array = Any


class Arrays(ABC):
    """Operations on the arrays of one library, on one device. Tensors are never part of an autograd graph here.

    Attributes:
        device: where the arrays are, in the library's own terms (``"cpu"`` for numpy).
    """

    device: Any

    @abstractmethod
    def place(self, values: np.ndarray) -> Array:
        """``values`` (writable, never written to here) as an array on the device; may share their memory."""

    @abstractmethod
    def signs(self, octets: np.ndarray, skip: int, count: int) -> Array:
        """Signs from packed bits: int8 ``[rows, count]`` on the device, ``2 bit - 1``.

        Args:
            octets: uint8 ``[rows, octets]``, first element in the lowest bit.
            skip: elements left out at the start of every row.
        """

    @abstractmethod
    def stack(self, rows: Sequence[Array]) -> Array:
        """Rows of equal length as one float32 array ``[rows, elements]``."""

    @abstractmethod
    def flat(self, array: Array) -> Array:
        """The elements as a one-dimensional view: writing to it writes to ``array``, which must be contiguous."""

    @abstractmethod
    def is_contiguous(self, array: Array) -> bool:
        """Whether the elements lie in memory in their order, without gaps."""

    @abstractmethod
    def copy(self, array: Array) -> Array:
        """Another array with the same bits."""

    @abstractmethod
    def zeros_like(self, array: Array) -> Array:
        """Zeros of the same shape and type."""

    @abstractmethod
    def as_float32(self, array: Array) -> Array:
        """The same values in float32; ``array`` itself where it is."""

    @abstractmethod
    def assign(self, target: Array, values: Array) -> None:
        """Overwrite ``target`` with ``values`` of the same shape; those may also be a numpy array, even a read-only."""

    @abstractmethod
    def exchange_storage(self, target: Array, values: Array) -> Array:
        """Let ``target`` be ``values`` from now on, and return what it was; for parameters that a model holds."""

    @abstractmethod
    def to_numpy(self, array: Array) -> np.ndarray:
        """The values as a float32 numpy array; may share their memory."""

    @abstractmethod
    def octets(self, array: Array) -> memoryview:
        """The values as little-endian bytes in the array's own type, for a digest."""

    @abstractmethod
    def add(self, target: Array, other: Array) -> None:
        """``target <- target + other``."""

    @abstractmethod
    def subtract(self, target: Array, other: Array) -> None:
        """``target <- target - other``."""

    @abstractmethod
    def multiply(self, target: Array, other: Array) -> None:
        """``target <- target * other``, which may be ``target``."""

    @abstractmethod
    def divide(self, target: Array, other: Array) -> None:
        """``target <- target / other``."""

    @abstractmethod
    def take_root(self, target: Array) -> None:
        """``target <- sqrt(target)``."""

    @abstractmethod
    def increase(self, target: Array, number: float) -> None:
        """``target <- target + number``."""

    @abstractmethod
    def scale(self, target: Array, factor: float) -> None:
        """``target <- target * factor``."""

    @abstractmethod
    def scaled(self, array: Array, factor: float) -> Array:
        """``array * factor`` as an array of its own."""

    @abstractmethod
    def add_scaled(self, source: Array, row: Array, factor: float, target: Array) -> None:
        """``target <- source + factor * row``, ``row`` being int8 signs or float32; ``target`` may be ``source``.

        The product with a sign is exact, so that the sum is rounded once; with other values a library may round once
        or twice, which is why a direction made of them is not portable.
        """

    def add_rows(self, target: Array, rows: Array, factors: Sequence[float]) -> None:
        """``target <- target + factor * row`` for one row after the other, each sum rounded before the next.

        Args:
            rows: ``[rows, elements]`` as :meth:`add_scaled` takes them; a library may add them in fewer calls, in no
                other order.
        """
        for row, factor in zip(rows, factors, strict=True):
            self.add_scaled(target, row, factor, target)

    @abstractmethod
    def is_finite(self, array: Array) -> bool:
        """Whether no element is NaN or infinite."""

    @abstractmethod
    def sum_of_squares(self, array: Array) -> float:
        """In float64. The order of the sum is the library's: not for anything that replicas must agree on."""

    @abstractmethod
    def products(self, rows: Array, vector: Array) -> tuple[np.ndarray, np.ndarray]:
        """``rows @ vector`` and the rows' squared lengths, float64 ``[rows]``; sums in the library's order."""


class NumpyArrays(Arrays):
    """numpy: what every machine has. Type promotion differs between numpy 1 and 2, so types are always named."""

    device = "cpu"

    def place(self, values: np.ndarray) -> np.ndarray:
        return values

    def signs(self, octets: np.ndarray, skip: int, count: int) -> np.ndarray:
        # 2 b - 1 = 1 - 2 (1 - b), and inverting packed bits is almost free.
        signs = np.unpackbits(~octets, axis=-1, bitorder="little").view(np.int8)
        np.add(signs, signs, out=signs)
        np.subtract(np.int8(1), signs, out=signs)
        return signs[:, skip : skip + count]

    def stack(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([self.as_float32(row) for row in rows])

    def flat(self, array: np.ndarray) -> np.ndarray:
        if not array.flags.c_contiguous:
            raise ValueError("only a contiguous array has a flat view")
        return array.reshape(-1)

    def is_contiguous(self, array: np.ndarray) -> bool:
        return bool(array.flags.c_contiguous)

    def copy(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def zeros_like(self, array: np.ndarray) -> np.ndarray:
        return np.zeros_like(array)

    def as_float32(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32, copy=False)

    def assign(self, target: np.ndarray, values: np.ndarray) -> None:
        target[...] = values

    def exchange_storage(self, target: np.ndarray, values: np.ndarray) -> np.ndarray:
        raise TypeError("a numpy array cannot exchange its storage; only the parameters of a PyTorch model can")

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return self.as_float32(array)

    def octets(self, array: np.ndarray) -> memoryview:
        return np.ascontiguousarray(array, dtype="<f4").data

    def add(self, target: np.ndarray, other: np.ndarray) -> None:
        np.add(target, other, out=target)

    def subtract(self, target: np.ndarray, other: np.ndarray) -> None:
        np.subtract(target, other, out=target)

    def multiply(self, target: np.ndarray, other: np.ndarray) -> None:
        np.multiply(target, other, out=target)

    def divide(self, target: np.ndarray, other: np.ndarray) -> None:
        np.divide(target, other, out=target)

    def take_root(self, target: np.ndarray) -> None:
        np.sqrt(target, out=target)

    def increase(self, target: np.ndarray, number: float) -> None:
        np.add(target, np.float32(number), out=target, dtype=np.float32)

    def scale(self, target: np.ndarray, factor: float) -> None:
        np.multiply(target, np.float32(factor), out=target, dtype=np.float32)

    def scaled(self, array: np.ndarray, factor: float) -> np.ndarray:
        product: np.ndarray = np.multiply(array, np.float32(factor), out=np.empty_like(array), dtype=np.float32)
        return product

    def add_scaled(self, source: np.ndarray, row: np.ndarray, factor: float, target: np.ndarray) -> None:
        np.add(source, np.multiply(row, np.float32(factor), dtype=np.float32), out=target)

    def add_rows(self, target: np.ndarray, rows: np.ndarray, factors: Sequence[float]) -> None:
        if rows.shape[1] > LONG_ROW or len(rows) < 2:
            super().add_rows(target, rows, factors)
            return
        products = np.multiply(rows, np.array(factors, dtype=np.float32)[:, None], dtype=np.float32)
        np.add(products[0], target, out=products[0])
        target[...] = sum_in_order(products)

    def is_finite(self, array: np.ndarray) -> bool:
        return bool(np.isfinite(array).all())

    def sum_of_squares(self, array: np.ndarray) -> float:
        return float(np.square(array, dtype=np.float64).sum())

    def products(self, rows: np.ndarray, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = self.as_float32(rows)
        return (values @ vector).astype(np.float64), np.square(values).sum(axis=1).astype(np.float64)


#: The default.
NUMPY = NumpyArrays()

#: Rows of more elements are added one call each: the call costs nothing beside them, and their products would leave the
#: cache.
LONG_ROW = 1 << 14
#: Rows of fewer elements are added by ``accumulate``, which is as fast for them.
_SHORT_ROW = 16


def sum_in_order(rows: np.ndarray) -> np.ndarray:
    """``((row 0 + row 1) + row 2) + ...`` of float32 ``[rows, elements]`` in C order, each sum rounded to float32.

    ``numpy.add.reduce`` over the first axis does that forty times as fast as ``accumulate``, whose order is defined.
    Its own order is not promised, so it is used only where a trial, once per process, shows it to be that one.
    """
    in_order = rows.shape[1] >= _SHORT_ROW and _reduces_in_order()
    total: np.ndarray = np.add.reduce(rows, axis=0) if in_order else np.add.accumulate(rows, axis=0)[-1]
    return total


@cache
def _reduces_in_order() -> bool:
    """Whether this numpy adds the rows of arrays of many shapes one after the other."""
    generator = np.random.Generator(np.random.Philox(7))
    for count, length in ((2, 16), (3, 17), (9, 65), (127, 16), (129, 20), (1000, 31), (17, 4099), (4, LONG_ROW)):
        rows = generator.standard_normal((count, length), dtype=np.float32)
        if not np.array_equal(np.add.reduce(rows, axis=0), np.add.accumulate(rows, axis=0)[-1]):
            return False
    return True


def arrays_of(array: Array) -> Arrays:
    """The operations for what ``array`` is, on the device where it is. PyTorch is not imported for a numpy array.

    Raises:
        TypeError: it is neither a numpy array nor a PyTorch tensor.
    """
    if isinstance(array, np.ndarray):
        return NUMPY
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    if torch is not None and isinstance(array, torch.Tensor):
        return _tensors_on(array.device)
    raise TypeError(f"expected a numpy array or a PyTorch tensor, not a {type(array).__name__}")


#: Where the operations on PyTorch's tensors are; named, as members of a registry are, and imported when asked for.
_TENSORS = "fs_fwdllm.core.torch_arrays"


@cache
def _tensors_on(device: Any) -> Arrays:
    arrays: Arrays = importlib.import_module(_TENSORS).TorchArrays(device)
    return arrays


def count_of(array: Array) -> int:
    """Number of elements."""
    return math.prod(array.shape)


def flatten(arrays: Sequence[Array]) -> np.ndarray:
    """All elements, one array after the other, as one float32 vector on the host."""
    return np.concatenate([arrays_of(array).to_numpy(array).reshape(-1) for array in arrays])


def squared_norm(arrays: Iterable[Array]) -> float:
    """``|v|^2`` of a vector in pieces, in float64."""
    return math.fsum(arrays_of(array).sum_of_squares(array) for array in arrays)
