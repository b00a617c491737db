"""The streams are pinned: these words are part of what makes two machines agree."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fs_fwdllm.core.seeding import seeded_generator, seeded_permutation


def test_golden_words() -> None:
    words = seeded_generator("golden", 0, -1, 2**70).bit_generator.random_raw(3).tolist()
    assert words == [8115279170372585181, 16083053583558304148, 14020311183434612343]
    assert seeded_permutation(10, "golden", 7).tolist() == [9, 6, 8, 7, 1, 3, 5, 0, 2, 4]


def test_the_key_is_the_hash_of_the_name() -> None:
    digest = hashlib.blake2b(b'["a purpose", 5, 6]', digest_size=16).digest()
    key = int.from_bytes(digest, "little")
    expected = np.random.Philox(key=key).random_raw(5)
    assert seeded_generator("a purpose", 5, np.int64(6)).bit_generator.random_raw(5).tolist() == expected.tolist()


def test_names_do_not_run_together() -> None:
    names = [("a", 1, 2), ("a", 12), ("a1", 2), ("a", 1), ("a", 2, 1), ("a",)]
    assert len({int(seeded_generator(*name).bit_generator.random_raw()) for name in names}) == len(names)


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_a_permutation_permutes(size: int) -> None:
    assert sorted(seeded_permutation(size, "p", 1).tolist()) == list(range(size))


def test_permutations_are_uniform() -> None:
    counts = np.zeros((4, 4))
    for seed in range(4000):
        counts[np.arange(4), seeded_permutation(4, "p", seed)] += 1
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_a_number_that_is_no_integer_is_refused() -> None:
    with pytest.raises(TypeError):
        seeded_generator("p", 1.5)  # type: ignore[arg-type]
