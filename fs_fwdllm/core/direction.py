"""Directions: reproducible random vectors that are named by a seed and never stored or sent.

A *direction* ``z`` is as long as all trainable parameters together. Everything in this package that needs ``z`` asks
this module for a slice of it, ``(run seed, direction seed, tensor id, first element, count)``, and gets the same values
on every machine, in any order and in slices of any size. That is possible because the generator is *counter based*:
Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), exactly the algorithm of
:class:`numpy.random.Philox`. The key is ``(run seed, direction seed)``; the counter is the position:

    ``counter = (block + 1, 0, tensor id, 0)``, one block being four 64-bit words, that is 256 elements of one bit.

(The ``+ 1`` is numpy's habit of incrementing before it generates.) There is no hidden state, so there is nothing to get
out of step.

Two distributions:

* :class:`Rademacher` (default): element ``e`` of a tensor is ``2 * bit - 1``, where ``bit`` is bit ``e % 64`` of word
  ``e // 64``. Integers only, hence the same bits on every CPU and GPU; ``E[z z^T] = I``; the fourth moment is the
  smallest possible, so a slope estimate has less variance than with a Gaussian.
* :class:`Gaussian`: word ``e // 2`` gives a Box-Muller pair. Here for parity with the papers. Logarithm and cosine
  differ in the last place between libraries, so it is **not** bit-portable, and :attr:`Gaussian.portable` says so.

Device-side ``torch.randn`` with a shared seed, the field's habit, gives different numbers on different GPU models and
on a CPU. A mixed fleet that replays it diverges silently.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from fs_fwdllm.core.arrays import NUMPY, Array, Arrays, arrays_of
from fs_fwdllm.core.registry import Registry

__all__ = [
    "DIRECTIONS",
    "EVERYBODY",
    "REFERENCE_SEED",
    "AimedDirections",
    "ConfinedDirections",
    "DirectionKey",
    "Distribution",
    "Gaussian",
    "Rademacher",
    "candidate_seed",
    "direction_seed",
    "make_distribution",
    "raw_words",
    "set_owner",
]

_WORDS_PER_BLOCK = 4
_BITS_PER_WORD = 64
#: Up to this many words per direction, many directions are generated in one vectorised sweep; above it numpy's own
#: compiled generator, one object per direction, is faster.
_VECTORISED_WORDS = 256
#: Packed bits of the direction in use that are kept at most (64 MiB of bits are 512 M parameters).
_RECENT_LIMIT_BYTES = 64 << 20
#: Owner of the candidates of a round, where a client stands in a direction's name.
_CANDIDATES = -1
#: Stands for all clients where a direction's client is named: rows of an orthogonal matrix that they have in common.
EVERYBODY = (1 << 62) - 1
#: Names the reference where a direction's seed is expected; outside the range of seeds.
REFERENCE_SEED = -1


class DirectionKey(NamedTuple):
    """What names a direction: two unsigned 64-bit integers, the Philox key."""

    run_seed: int
    seed: int


def direction_seed(round_index: int, client: int, step: int, probe: int) -> int:
    """The 64-bit seed of one probe: a hash of who looks, and when.

    Server and clients compute it instead of sending it. Two of ``n`` directions share a seed with probability below
    ``n^2 / 2^65`` (``3e-8`` for a million).
    """
    packed = struct.pack("<4q", round_index, client, step, probe)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8, person=b"fwdllm-direction").digest(), "little")


def set_owner(index: int) -> int:
    """Stands for the clients of a set where a direction's client is named."""
    return EVERYBODY - 1 - index


def candidate_seed(round_index: int, index: int) -> int:
    """The seed of a candidate that nobody owns, ``index`` counting through all candidates of a round."""
    return direction_seed(round_index, _CANDIDATES, 0, index)


def raw_words(keys: Sequence[DirectionKey], tensor_id: int, first_word: int, count: int) -> np.ndarray:
    """Philox words ``first_word .. first_word + count`` of one tensor for several directions.

    Returns:
        uint64 array of shape ``[len(keys), count]``.
    """
    first_block, skip = divmod(first_word, _WORDS_PER_BLOCK)
    blocks = -(-(skip + count) // _WORDS_PER_BLOCK)
    if len(keys) > 1 and blocks * _WORDS_PER_BLOCK <= _VECTORISED_WORDS:
        words = _vectorised_philox(keys, tensor_id, first_block, blocks)
    else:
        rows = [_numpy_philox(key, tensor_id, first_block, blocks) for key in keys]
        words = rows[0][None] if len(rows) == 1 else np.stack(rows)
    return words[:, skip : skip + count]


def _numpy_philox(key: DirectionKey, tensor_id: int, first_block: int, blocks: int) -> np.ndarray:
    counter = np.array([first_block, 0, tensor_id, 0], dtype=np.uint64)
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter)
    return generator.random_raw(blocks * _WORDS_PER_BLOCK)


_ROUND_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_KEY_INCREMENTS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_LOW_HALF, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _multiply_high_low(factor: np.uint64, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of the 128-bit products, by schoolbook multiplication of 32-bit halves."""
    factor_low, factor_high = factor & _LOW_HALF, factor >> _HALF
    values_low, values_high = values & _LOW_HALF, values >> _HALF
    low_low = factor_low * values_low
    middle = factor_high * values_low + (low_low >> _HALF)
    carry = factor_low * values_high + (middle & _LOW_HALF)
    return factor_high * values_high + (middle >> _HALF) + (carry >> _HALF), factor * values


def _vectorised_philox(keys: Sequence[DirectionKey], tensor_id: int, first_block: int, blocks: int) -> np.ndarray:
    """Philox4x64-10 over a whole ``[directions, blocks]`` grid at once (Salmon et al. 2011, section 4)."""
    # One column at a time: numpy reads a sequence of named tuples five times as slowly.
    key_0, key_1 = (np.fromiter(column, np.uint64, len(keys))[:, None] for column in zip(*keys, strict=True))
    positions = np.arange(first_block + 1, first_block + 1 + blocks, dtype=np.uint64)
    c0 = np.broadcast_to(positions, (len(keys), blocks))
    c1 = np.zeros_like(c0)
    c2 = np.full_like(c0, tensor_id)
    c3 = np.zeros_like(c0)
    for _ in range(10):
        high_0, low_0 = _multiply_high_low(_ROUND_MULTIPLIERS[0], c0)
        high_1, low_1 = _multiply_high_low(_ROUND_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0, key_1 = key_0 + _KEY_INCREMENTS[0], key_1 + _KEY_INCREMENTS[1]
    return np.stack([c0, c1, c2, c3], axis=-1).reshape(len(keys), blocks * _WORDS_PER_BLOCK)


class Distribution(ABC):
    """What turns raw words into the elements of a direction.

    A distribution says its values in numpy's terms and leaves it to the :class:`~fs_fwdllm.core.arrays.Arrays` it is
    given to place them. What others must know of it stands in it; adding one takes a class and a row in
    :data:`DIRECTIONS` (or an entry point).

    Attributes:
        name: the word a configuration uses.
        portable: whether the values are the same, bit for bit, on every machine.
    """

    name: ClassVar[str]
    portable: ClassVar[bool]

    @abstractmethod
    def values(
        self, keys: Sequence[DirectionKey], tensor_id: int, start: int, count: int, arrays: Arrays = NUMPY
    ) -> Array:
        """Elements ``start .. start + count`` of a tensor's part of several directions.

        Returns:
            int8 (signs) or float32 ``[len(keys), count]``, of ``arrays``' library and on its device. Multiply it only
            by :meth:`~fs_fwdllm.core.arrays.Arrays.add_scaled`: the product with a sign is exact, so that the sum is
            rounded once.
        """

    def covers(self, tensor_id: int) -> bool:
        """Whether directions are anything but zero in a tensor."""
        return True

    @abstractmethod
    def spread(self, dimensions: int) -> float:
        """``E|g z - grad|^2 / |grad|^2`` of one probe with exact slope ``g = z . grad`` in ``dimensions`` dimensions.

        That is ``E|z|^2 (z . e)^2 - 1`` for any unit vector ``e``, since ``E[z z^T] = I``.
        """

    def relative_variance(self, dimensions: int, count: int) -> float:
        """The same for the mean of ``count`` probes; they are independent unless a distribution says otherwise."""
        return self.spread(dimensions) / count


class Rademacher(Distribution):
    """Independent fair signs, one raw bit each."""

    name = "rademacher"
    portable = True

    def __init__(self) -> None:
        # A step walks one direction three times (plus, minus, update); its packed bits, a thirty-second of the
        # parameters' size, are kept for the second and third walk.
        self._recent_key: DirectionKey | None = None
        self._recent: dict[tuple[int, int, int], np.ndarray] = {}

    def _octets(self, keys: Sequence[DirectionKey], tensor_id: int, first_word: int, count: int) -> np.ndarray:
        """Packed bits, uint8 ``[len(keys), 8 * count]``, first element in the lowest bit."""
        if len(keys) > 1:
            return _as_octets(raw_words(keys, tensor_id, first_word, count))
        if keys[0] != self._recent_key:
            self._recent_key, self._recent = keys[0], {}
        place = (tensor_id, first_word, count)
        if place not in self._recent:
            words = _as_octets(raw_words(keys, tensor_id, first_word, count))
            if len(self._recent) * words.nbytes >= _RECENT_LIMIT_BYTES:
                return words
            self._recent[place] = words
        return self._recent[place]

    def values(
        self, keys: Sequence[DirectionKey], tensor_id: int, start: int, count: int, arrays: Arrays = NUMPY
    ) -> Array:
        first_word, skip = divmod(start, _BITS_PER_WORD)
        word_count = -(-(skip + count) // _BITS_PER_WORD)
        return arrays.signs(self._octets(keys, tensor_id, first_word, word_count), skip, count)

    def spread(self, dimensions: int) -> float:
        return dimensions - 1.0


def _as_octets(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words.astype("<u8", copy=False)).view(np.uint8)


class Gaussian(Distribution):
    """Independent standard normals by Box and Muller, one pair a word; for parity with the papers, not portable."""

    name = "gaussian"
    portable = False

    def values(
        self, keys: Sequence[DirectionKey], tensor_id: int, start: int, count: int, arrays: Arrays = NUMPY
    ) -> Array:
        first_word, skip = divmod(start, 2)
        words = raw_words(keys, tensor_id, first_word, -(-(skip + count) // 2))
        # (0, 1] for the logarithm, [0, 1) for the angle; float64 throughout, rounded to float32 once at the end.
        radius = np.sqrt(-2.0 * np.log(((words >> _HALF).astype(np.float64) + 1.0) * 2.0**-32))
        angle = (words & _LOW_HALF).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(len(keys), -1)
        return arrays.place(pairs[:, skip : skip + count].astype(np.float32))

    def spread(self, dimensions: int) -> float:
        return dimensions + 1.0


class AimedDirections(Distribution):
    """Directions of which some were chosen from candidates, or are the reference itself.

    What they are chosen for, and how, is the method's: :mod:`fs_fwdllm.method.forward.directed_sampling`.

    Attributes:
        chosen: ``{seed: seed of the chosen candidate, per tensor}``; other seeds mean what they always do.
    """

    name = "aimed"
    portable = False

    def __init__(self, drawn: Distribution, chosen: Mapping[int, Sequence[int]] | None = None) -> None:
        self.drawn = drawn
        self.chosen: Mapping[int, Sequence[int]] = chosen or {}
        self._reference: Sequence[Array] = ()
        self._scale = 0.0

    def look_along(self, reference: Sequence[Array], scale: float) -> None:
        """From now on :data:`REFERENCE_SEED` is ``scale * reference``."""
        self._reference, self._scale = reference, scale

    def values(
        self, keys: Sequence[DirectionKey], tensor_id: int, start: int, count: int, arrays: Arrays = NUMPY
    ) -> Array:
        if not any(key.seed == REFERENCE_SEED for key in keys):
            return self.drawn.values([self._candidate(key, tensor_id) for key in keys], tensor_id, start, count, arrays)
        return arrays.stack([self._row(key, tensor_id, start, count, arrays) for key in keys])

    def spread(self, dimensions: int) -> float:
        """That of the directions as they are drawn."""
        return self.drawn.spread(dimensions)

    def _row(self, key: DirectionKey, tensor_id: int, start: int, count: int, arrays: Arrays) -> Array:
        if key.seed != REFERENCE_SEED:
            return self.drawn.values([self._candidate(key, tensor_id)], tensor_id, start, count, arrays)[0]
        reference = self._reference[tensor_id]
        return arrays.scaled(arrays_of(reference).flat(reference)[start : start + count], self._scale)

    def _candidate(self, key: DirectionKey, tensor_id: int) -> DirectionKey:
        seeds = self.chosen.get(key.seed)
        return key if seeds is None else DirectionKey(key.run_seed, seeds[tensor_id])


class ConfinedDirections(Distribution):
    """Directions that are zero outside some tensors: those of one part of the trainables.

    Only whoever measures needs the zeros. A replay adds a part's directions to the part's tensors and to no other.
    """

    name = "confined"

    def __init__(self, drawn: Distribution, tensor_ids: Collection[int]) -> None:
        self.drawn = drawn
        self.tensor_ids = frozenset(tensor_ids)

    @property
    def portable(self) -> bool:  # type: ignore[override]
        return self.drawn.portable

    def covers(self, tensor_id: int) -> bool:
        return tensor_id in self.tensor_ids

    def values(
        self, keys: Sequence[DirectionKey], tensor_id: int, start: int, count: int, arrays: Arrays = NUMPY
    ) -> Array:
        if self.covers(tensor_id):
            return self.drawn.values(keys, tensor_id, start, count, arrays)
        return arrays.place(np.zeros((len(keys), count), dtype=np.float32))

    def spread(self, dimensions: int) -> float:
        return self.drawn.spread(dimensions)


#: The distributions by the words of ``fwdllm.direction``.
DIRECTIONS: Registry[type[Distribution]] = Registry(
    "fwdllm.direction",
    "fs_fwdllm.distributions",
    {member.name: member for member in (Rademacher, Gaussian)},
    kind=Distribution,
)


def make_distribution(name: str) -> Distribution:
    """The distribution a configuration names. Raises :class:`~fs_fwdllm.errors.ConfigError` for an unknown word."""
    return DIRECTIONS[name]()
