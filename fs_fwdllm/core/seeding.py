"""Random numbers that depend on what they are for, and on nothing else.

Every draw of the data part names its *purpose* and the integers it belongs to, for example
``seeded_generator("round order", seed, client, round_index)``. The name is hashed to the key of a counter-based
generator (Philox4x64-10), so a draw needs no state carried from an earlier one: a resumed run, another process and
another host find the same numbers, and adding a draw somewhere never shifts the draws elsewhere.

A permutation is taken from the generator's raw 64-bit words, whose stream NumPy guarantees for all versions (NEP 19);
the methods of ``Generator`` carry no such promise.
"""

from __future__ import annotations

import hashlib
import json
import operator

import numpy as np

__all__ = ["seeded_generator", "seeded_permutation"]


def seeded_generator(purpose: str, *numbers: int) -> np.random.Generator:
    """The generator of ``(purpose, *numbers)``: equal arguments give equal streams, on every machine.

    Args:
        purpose: what the numbers are for, in words.
        numbers: integers of any size and sign that tell this draw from others (seed, client, round).

    Raises:
        TypeError: a number is not an integer.
    """
    name = json.dumps([purpose, *(int(operator.index(number)) for number in numbers)])
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def seeded_permutation(size: int, purpose: str, *numbers: int) -> np.ndarray:
    """A permutation of ``range(size)`` as int64 ``[size]``; the same for every version of NumPy."""
    bits = seeded_generator(purpose, *numbers).bit_generator
    words = np.asarray(bits.random_raw(size), dtype=np.uint64)
    return np.argsort(words, kind="stable").astype(np.int64)
