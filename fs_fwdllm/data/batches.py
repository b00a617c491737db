"""Batches as a pure function of (examples, client, round): nothing to carry over, nothing to checkpoint.

Two questions are kept apart. *Which* examples form a batch is settled once per client: a permutation keyed by
(seed, client), cut in pieces. So a client has a fixed set of batches, each with a name, ``(client, batch index)``, and
what the frozen layers make of a batch can be kept and used again whenever the batch returns. In *which order* a round
visits them is keyed by (seed, client, round): without replacement, and again from a fresh permutation if the round has
more steps than the client has batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from fs_fwdllm.core.seeding import seeded_permutation
from fs_fwdllm.data.types import IGNORED_LABEL, Batch, Example
from fs_fwdllm.errors import DataError

__all__ = ["client_batches", "collate", "evaluation_batches", "steps_per_epoch", "visited_samples"]


def collate(examples: Sequence[Example], pad_token_id: int, key: Hashable | None = None) -> Batch:
    """Pad examples on the right to the longest of them.

    Returns:
        A :class:`Batch`; labels are padded with ``-100`` for a language model.

    Raises:
        DataError: there is no example.
    """
    if not examples:
        raise DataError("a batch needs at least one example")
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = example.input_ids
        attention_mask[row, : len(example.input_ids)] = 1
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=_padded_labels(examples, shape),
        key=key,
        token_type_ids=_padded_segments(examples, shape),
        references=tuple(example.reference for example in examples if example.reference is not None),
    )


def client_batches(
    examples: Sequence[Example],
    *,
    client: int,
    round_index: int,
    steps: int,
    batch_size: int,
    seed: int,
    pad_token_id: int,
    shuffle: bool = True,
) -> list[Batch]:
    """The batches of one client's round, one per step; equal arguments give equal batches.

    Args:
        shuffle: ``False`` keeps the examples in their order and visits the batches in turn, a round going on where the
            one before stopped (with the same number of steps).

    Returns:
        ``steps`` batches with key ``(client, batch index)``. A client with fewer examples than ``batch_size`` has one
        batch of all of them; the last of several batches may be smaller than the others.

    Raises:
        DataError: the client has no example.
    """
    visits = _visits(len(examples), batch_size, steps, seed, client, round_index, shuffle)
    members = seeded_permutation(len(examples), "batch members", seed, client) if shuffle else np.arange(len(examples))
    padded: dict[int, Batch] = {}
    for index in visits:
        if index not in padded:
            chosen = members[index * batch_size : (index + 1) * batch_size]
            padded[index] = collate([examples[row] for row in chosen], pad_token_id, key=(client, index))
    return [padded[index] for index in visits]


def visited_samples(
    count_of_examples: int, *, client: int, round_index: int, steps: int, batch_size: int, seed: int, shuffle: bool
) -> int:
    """Samples in the batches of one client's round, each as often as it is visited; without padding anything.

    It is ``sum(map(len, client_batches(...)))`` for a client that holds ``count_of_examples``.

    Raises:
        DataError: the client has no example.
    """
    visits = _visits(count_of_examples, batch_size, steps, seed, client, round_index, shuffle)
    return sum(min(batch_size, count_of_examples - index * batch_size) for index in visits)


def evaluation_batches(
    examples: Sequence[Example], batch_size: int, pad_token_id: int, name: str = "eval"
) -> list[Batch]:
    """Every example once, those of similar length together so that little is padded.

    Args:
        name: first part of the keys ``(name, batch index)``; give each evaluated split its own.

    Returns:
        The batches, shortest examples first; none if there is no example.
    """
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids))
    return [
        collate([examples[row] for row in order[first : first + batch_size]], pad_token_id, key=(name, index))
        for index, first in enumerate(range(0, len(order), batch_size))
    ]


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Batches it takes to see ``examples`` samples once."""
    return -(-examples // batch_size)


def _visits(
    examples: int, batch_size: int, steps: int, seed: int, client: int, round_index: int, shuffle: bool
) -> list[int]:
    """Indices of the batches that a round visits, one per step."""
    if not examples:
        raise DataError(f"client {client} has no training example")
    count = steps_per_epoch(examples, batch_size)
    if not shuffle:
        return [(round_index * steps + step) % count for step in range(steps)]
    order: list[int] = []
    for lap in range(steps_per_epoch(steps, count)):
        order += seeded_permutation(count, "batch order", seed, client, round_index, lap).tolist()
    return order[:steps]


def _padded_labels(examples: Sequence[Example], shape: tuple[int, int]) -> np.ndarray:
    if examples[0].labels.ndim == 0:
        kind = np.float32 if examples[0].labels.dtype.kind == "f" else np.int64
        return np.array([example.labels for example in examples], dtype=kind)
    if examples[0].labels.ndim == 2:
        return np.concatenate([example.labels for example in examples]).astype(np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    for row, example in enumerate(examples):
        labels[row, : len(example.labels)] = example.labels
    return labels


def _padded_segments(examples: Sequence[Example], shape: tuple[int, int]) -> np.ndarray | None:
    if examples[0].segments is None:
        return None
    segments = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        if example.segments is not None:
            segments[row, : len(example.input_ids)] = example.segments
    return segments
