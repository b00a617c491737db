"""A client's batches: fixed in composition, a pure function of their arguments, every example visited."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.data import client_batches, collate, evaluation_batches, steps_per_epoch
from fs_fwdllm.data.batches import visited_samples
from fs_fwdllm.data.types import Batch, Example
from fs_fwdllm.errors import DataError

PAD = 9


def lm_example(number: int, length: int) -> Example:
    """``length`` tokens that all say ``100 + number``; the first half is prompt."""
    tokens = np.full(length, 100 + number, dtype=np.int32)
    labels = np.where(np.arange(length) < length // 2, -100, tokens).astype(np.int32)
    return Example(tokens, labels)


def examples_of(count: int) -> list[Example]:
    return [lm_example(number, 2 + number % 5) for number in range(count)]


def numbers_in(batch: Batch) -> list[int]:
    return (batch.input_ids[:, 0] - 100).tolist()


def draw(count: int = 23, **changes) -> list[Batch]:
    arguments = dict(client=4, round_index=2, steps=6, batch_size=4, seed=1, pad_token_id=PAD)
    return client_batches(examples_of(count), **{**arguments, **changes})


def same(first: Batch, second: Batch) -> bool:
    names = ("input_ids", "attention_mask", "labels")
    return first.key == second.key and all(np.array_equal(getattr(first, n), getattr(second, n)) for n in names)


def test_collate_pads_on_the_right() -> None:
    batch = collate([lm_example(0, 2), lm_example(1, 4)], PAD, key="k")
    assert batch.input_ids.tolist() == [[100, 100, PAD, PAD], [101, 101, 101, 101]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 100, -100, -100], [-100, -100, 101, 101]]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {np.dtype(np.int64)}
    assert batch.key == "k" and len(batch) == 2


def test_collate_of_classes() -> None:
    examples = [Example(np.array([5, 6], dtype=np.int32), np.array(label, dtype=np.int32)) for label in (2, 0)]
    batch = collate(examples, PAD)
    assert batch.labels.tolist() == [2, 0] and batch.labels.dtype == np.int64 and batch.key is None


def test_collate_of_nothing_is_refused() -> None:
    with pytest.raises(DataError):
        collate([], PAD)


@given(
    count=st.integers(1, 40), steps=st.integers(0, 30), batch_size=st.integers(1, 12), round_index=st.integers(0, 5),
    client=st.integers(1, 5), shuffle=st.booleans(),
)  # fmt: skip
def test_laws_of_a_round(count, steps, batch_size, round_index, client, shuffle) -> None:
    arguments = dict(steps=steps, batch_size=batch_size, round_index=round_index, client=client, shuffle=shuffle)
    batches = draw(count, **arguments)
    per_lap = steps_per_epoch(count, batch_size)
    assert len(batches) == steps
    for first in range(0, steps, per_lap):
        lap = batches[first : first + per_lap]
        assert len({batch.key for batch in lap}) == len(lap), "a batch returned before the others had been seen"
        if len(lap) == per_lap:
            assert sorted(number for batch in lap for number in numbers_in(batch)) == list(range(count))
    for batch in batches:
        assert batch.key[0] == client and 0 <= batch.key[1] < per_lap
        assert len(batch) == (batch_size if batch.key[1] < per_lap - 1 else count - batch_size * (per_lap - 1))
    assert all(map(same, batches, draw(count, **arguments)))
    assert visited_samples(count, seed=1, **arguments) == sum(map(len, batches))


def test_equal_keys_mean_equal_tensors_over_rounds() -> None:
    seen: dict[object, Batch] = {}
    for round_index in range(10):
        for batch in draw(round_index=round_index):
            assert same(batch, seen.setdefault(batch.key, batch))
    assert len(seen) == steps_per_epoch(23, 4)


def test_the_order_differs_by_round_and_lap_and_the_composition_by_client_and_seed() -> None:
    orders = {tuple(batch.key[1] for batch in draw(round_index=round_index)) for round_index in range(8)}
    assert len(orders) > 1
    two_laps = [batch.key[1] for batch in draw(steps=12)]
    assert two_laps[:6] != two_laps[6:]

    def composition(**changes) -> set[tuple[int, ...]]:
        return {tuple(numbers_in(batch)) for batch in draw(**changes)}

    assert composition() == composition(round_index=7)
    assert composition() != composition(client=5)
    assert composition() != composition(seed=2)


def test_no_global_generator_is_read_or_moved() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    first = draw()
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert all(map(same, first, draw()))


def test_without_shuffling_rounds_go_on_where_the_last_one_stopped() -> None:
    visits = [batch.key[1] for r in range(4) for batch in draw(count=20, steps=2, round_index=r, shuffle=False)]
    assert visits == [0, 1, 2, 3, 4, 0, 1, 2]
    assert numbers_in(draw(count=20, steps=1, round_index=0, shuffle=False)[0]) == [0, 1, 2, 3]


def test_fewer_examples_than_a_batch_is_one_batch_of_all() -> None:
    batches = draw(count=3, steps=2, batch_size=8)
    assert [sorted(numbers_in(batch)) for batch in batches] == [[0, 1, 2]] * 2


def test_an_empty_client_is_refused_by_its_number() -> None:
    with pytest.raises(DataError, match="client 4"):
        draw(count=0)
    with pytest.raises(DataError, match="client 4"):
        visited_samples(0, client=4, round_index=0, steps=1, batch_size=2, seed=1, shuffle=True)


def test_evaluation_sees_everything_once_with_little_padding() -> None:
    examples = examples_of(23)
    batches = evaluation_batches(examples, 4, PAD, name="test")
    assert sorted(number for batch in batches for number in numbers_in(batch)) == list(range(23))
    assert [batch.key for batch in batches] == [("test", index) for index in range(6)]
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths)
    in_order = [collate(examples[first : first + 4], PAD) for first in range(0, 23, 4)]
    assert sum(b.input_ids.size for b in batches) < sum(b.input_ids.size for b in in_order)
    assert evaluation_batches([], 4, PAD) == []


def test_steps_per_epoch_rounds_up() -> None:
    assert [steps_per_epoch(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
