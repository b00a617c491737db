"""Replay: turning ``(seed, scalar)`` pairs back into the update they stand for, with the same bits everywhere.

A direction evaluated with slope ``g`` contributes ``c * z(seed)`` to the parameters, where the coefficient ``c`` holds
learning rate, client weight and sign. Several contributions are added in a fixed order with fixed arithmetic:

    1. ``u = 0``; for each contribution in order ``u <- u + c * z``   (one rounding each; ``c * (+-1)`` is exact)
       where a reference ``r`` (an earlier ``u``) takes part: ``u <- u + (r * a)``
    2. ``p <- p * decay``, for the tensors that decay
    3. the server's step with ``u``: ``p <- p + u``, or with momentum or as Adam has it
       (:mod:`~fs_fwdllm.core.server_step`)

Every line is a single IEEE-754 operation per element, issued as a call of its own to the library that holds the arrays
(:mod:`~fs_fwdllm.core.arrays`: numpy or PyTorch), so that no compiler can fuse two roundings into one. With Rademacher
directions the result is therefore the same in either library, on any device and in any chunking, and summing the
contributions before touching ``p`` keeps small coefficients from drowning in large parameters. The same argument covers
dense momentum and Adam's moments, so that these buffers are exact on every machine too.

Chunks are walked on the outside and contributions on the inside, so that a chunk stays in the cache while all its
directions are added: memory is read and written once however many contributions there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fs_fwdllm.core.arrays import Array, arrays_of, count_of
from fs_fwdllm.core.direction import DirectionKey, Distribution
from fs_fwdllm.core.division import Division
from fs_fwdllm.core.server_step import MOMENTS, Moments, server_step
from fs_fwdllm.core.trainables import DIGEST_BYTES, Trainables

__all__ = [
    "BUFFERS",
    "DEFAULT_CHUNK",
    "Contributions",
    "Replayer",
    "add_contribution_slice",
    "add_contributions",
    "perturb",
]

#: Elements per chunk: one float32 chunk and its signs fit a core's second-level cache.
DEFAULT_CHUNK = 1 << 19
#: Contributions whose signs are generated together, bounding the sign block to this many elements.
_SIGN_BLOCK = 1 << 18


@dataclass(frozen=True)
class Contributions:
    """Directions and what each is multiplied with, in the order in which they are added.

    Attributes:
        seeds: direction seeds.
        coefficients: float32 array of the same length.
        decayed: the coefficients for tensors that weight decay applies to, where they differ: what was added early in
            a round has decayed since.
        reference: coefficient of the reference.
        directions: what the seeds mean, where it is not the replayer's own distribution.
        parts: per direction, the part of the trainables that it covers; ``None`` where there is one part only.
    """

    seeds: Sequence[int]
    coefficients: np.ndarray
    decayed: np.ndarray | None = None
    reference: float = 0.0
    directions: Distribution | None = None
    parts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.coefficients):
            raise ValueError(f"{len(self.seeds)} seeds but {len(self.coefficients)} coefficients")

    def of_part(self, part: int) -> Contributions:
        """Those whose directions cover ``part``, in the same order."""
        if self.parts is None:
            return self
        chosen = np.flatnonzero(self.parts == part)
        return replace(
            self,
            seeds=[self.seeds[int(index)] for index in chosen],
            coefficients=np.asarray(self.coefficients)[chosen],
            decayed=None if self.decayed is None else np.asarray(self.decayed)[chosen],
            parts=None,
        )

    def coefficients_for(self, decays: bool) -> list[float]:
        """The coefficients of a tensor that decays or does not, as float32 numbers."""
        values = self.coefficients if self.decayed is None or not decays else self.decayed
        return [float(value) for value in np.asarray(values, dtype=np.float32)]


def add_contributions(
    buffers: Sequence[Array | None],
    contributions: Contributions,
    run_seed: int,
    distribution: Distribution,
    chunk: int = DEFAULT_CHUNK,
    decays: Sequence[bool] | None = None,
    division: Division | None = None,
) -> None:
    """Add ``sum_i c_i z_i`` to ``buffers`` in place; ``buffers[k]`` has id ``k``, ``None`` leaves it out.

    A tensor that no direction covers is not touched.

    Args:
        decays: per tensor, whether the decayed coefficients apply; needed only where there are such.
        division: which part each tensor belongs to; all to one unless told.
    """
    division = division or Division.whole(len(buffers))
    by_part = [_Prepared.of(contributions.of_part(part), run_seed) for part in range(division.parts)]
    for tensor_id, buffer in enumerate(buffers):
        keys, plain, decayed = by_part[division.owners[tensor_id]]
        if buffer is None or not keys:
            continue
        coefficients = decayed if decays is not None and decays[tensor_id] else plain
        flat = arrays_of(buffer).flat(buffer)
        for start in range(0, len(flat), chunk):
            part = flat[start : start + chunk]
            add_contribution_slice(part, keys, coefficients, tensor_id, start, distribution)


class _Prepared(NamedTuple):
    """A part's directions, and their coefficients as float32 numbers for tensors that do not decay or do."""

    keys: list[DirectionKey]
    plain: list[float]
    decayed: list[float]

    @classmethod
    def of(cls, contributions: Contributions, run_seed: int) -> _Prepared:
        keys = [DirectionKey(run_seed, seed) for seed in contributions.seeds]
        return cls(keys, contributions.coefficients_for(False), contributions.coefficients_for(True))


def add_contribution_slice(
    part: Array,
    keys: Sequence[DirectionKey],
    coefficients: Sequence[float],
    tensor_id: int,
    start: int,
    distribution: Distribution,
) -> None:
    """Add ``sum_i c_i z_i`` in place to ``part``, the elements from ``start`` on of tensor ``tensor_id``."""
    arrays, count = arrays_of(part), count_of(part)
    # A single contribution needs no running sum: 0 + c z is c z exactly.
    total = part if len(keys) == 1 else arrays.zeros_like(part)
    group = max(1, _SIGN_BLOCK // count)
    for first in range(0, len(keys), group):
        block = distribution.values(keys[first : first + group], tensor_id, start, count, arrays)
        arrays.add_rows(total, block, coefficients[first : first + group])
    if total is not part:
        arrays.add(part, total)


def perturb(
    source: Array,
    target: Array,
    coefficient: float,
    key: DirectionKey,
    tensor_id: int,
    distribution: Distribution,
    chunk: int = DEFAULT_CHUNK,
) -> None:
    """Write ``source + coefficient * z`` for one tensor into ``target`` (same size, another storage)."""
    arrays = arrays_of(source)
    flat_source, flat_target = arrays.flat(source), arrays.flat(target)
    for start in range(0, len(flat_source), chunk):
        part = flat_source[start : start + chunk]
        row = distribution.values([key], tensor_id, start, len(part), arrays)[0]
        arrays.add_scaled(part, row, coefficient, flat_target[start : start + chunk])


#: The buffers beside the trainables, in the order of digests, frames and checkpoints, and what tells them apart in a
#: digest.
BUFFERS = {"momentum": b"", "second_moment": b"second moment", "reference": b"reference"}


class Replayer:
    """Applies round updates to trainables and keeps the moments of the server's steps and the reference, if any.

    Two replayers that start from equal trainables and see the same updates in the same order hold the same bits.

    Attributes:
        moments: what the steps so far keep (:mod:`~fs_fwdllm.core.server_step`).
        reference: the sum that an earlier update has kept.
    """

    def __init__(
        self,
        trainables: Trainables,
        run_seed: int,
        distribution: Distribution,
        chunk: int = DEFAULT_CHUNK,
        division: Division | None = None,
    ) -> None:
        self.trainables = trainables
        self.run_seed = run_seed
        self.distribution = distribution
        self.chunk = chunk
        self.division = division or Division.whole(len(trainables.tensors))
        self.moments: Moments = {}
        self.reference: list[Array] | None = None

    def buffers(self) -> dict[str, list[Array]]:
        """Everything beside the trainables, by the names and in the order of :data:`BUFFERS`."""
        held = self.moments if self.reference is None else self.moments | {"reference": self.reference}
        return {name: held[name] for name in BUFFERS if name in held}

    def hold(self, buffers: Mapping[str, list[Array]]) -> None:
        """Inverse of :meth:`buffers`; they are kept, not copied."""
        self.moments = {name: buffers[name] for name in MOMENTS if name in buffers}
        self.reference = buffers.get("reference")

    def digest(self) -> bytes:
        """16 bytes that name the whole state: the trainables' digest, extended by every buffer there is."""
        digest = self.trainables.digest()
        for name, buffers in self.buffers().items():
            state = Trainables(dict(zip(self.trainables.names, buffers, strict=True)))
            chained = hashlib.blake2b(digest + state.digest(), digest_size=DIGEST_BYTES, person=BUFFERS[name])
            digest = chained.digest()
        return digest

    def apply(
        self,
        contributions: Contributions,
        *,
        decay: float,
        momentum: float,
        rate: float,
        adam: Sequence[float] = (),
        keep_reference: bool = False,
    ) -> None:
        """One server step.

        Args:
            contributions: without ``momentum`` and ``adam`` they hold the whole step, learning rate and sign included;
                otherwise they sum to the gradient estimate.
            decay: factor of the parameters that decay (float32), one for none.
            momentum, rate, adam: the step's numbers, as :class:`~fs_fwdllm.core.wire.RoundUpdate` has them.
            keep_reference: the sum of the contributions becomes the reference.
        """
        if decay != 1.0:
            for parameter, decays in zip(self.trainables.tensors, self.trainables.decays(), strict=True):
                if decays:
                    self.trainables.arrays.scale(parameter, decay)

        def add(buffers: Sequence[Array]) -> None:
            self._add(buffers, contributions, keep_reference)

        server_step(momentum, rate, adam).take(self.trainables, self.moments, add, self.chunk)

    def move(self, action: Callable[[], None]) -> None:
        """Let ``action`` change the trainables otherwise than by a replay (a dense step). A forecast leaves it out."""
        action()

    def total(self, contributions: Contributions, tensor_ids: Collection[int] | None = None) -> list[Array]:
        """The sum of the contributions as tensors, zero outside ``tensor_ids`` if those are given."""
        chosen = range(len(self.trainables.tensors)) if tensor_ids is None else tensor_ids
        total = self.trainables.zeros_like()
        self._add_directions([buffer if index in chosen else None for index, buffer in enumerate(total)], contributions)
        if contributions.reference and self.reference is not None:
            arrays = self.trainables.arrays
            for index in chosen:
                arrays.add(total[index], arrays.scaled(self.reference[index], contributions.reference))
        return total

    def _add(self, buffers: Sequence[Array], contributions: Contributions, keep_reference: bool) -> None:
        if not keep_reference and not contributions.reference:
            self._add_directions(buffers, contributions)
            return
        total = self.total(contributions)
        for buffer, part in zip(buffers, total, strict=True):
            self.trainables.arrays.add(buffer, part)
        if keep_reference:
            self.reference = total

    def _add_directions(self, buffers: Sequence[Array | None], contributions: Contributions) -> None:
        if len(contributions.seeds):
            distribution = contributions.directions or self.distribution
            decays = self.trainables.decays()
            add_contributions(buffers, contributions, self.run_seed, distribution, self.chunk, decays, self.division)
