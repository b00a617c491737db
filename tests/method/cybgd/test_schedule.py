"""Laws of the cycle: every block its turn, whatever the numbers of blocks and clients are."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.cybgd.schedule import CycleSchedule, Visit

SIZES = st.integers(1, 30)


@given(
    order=st.sampled_from(["ascending", "descending", "random"]), blocks=SIZES, clients=SIZES, cycle=st.integers(0, 9)
)
def test_every_block_once_in_a_cycle(order: str, blocks: int, clients: int, cycle: int) -> None:
    schedule = CycleSchedule(order, blocks, seed=3)
    numbers = range(cycle * blocks, (cycle + 1) * blocks)
    assert sorted(schedule.block(number, clients) for number in numbers) == list(range(blocks))
    assert {schedule.cycle(number) for number in numbers} == {cycle}


def test_orders_are_what_they_are_called() -> None:
    def of(order: str) -> list[int]:
        return [CycleSchedule(order, 5, seed=1).block(number, 3) for number in range(5)]

    assert of("ascending") == [0, 1, 2, 3, 4] and of("descending") == [4, 3, 2, 1, 0]
    assert [CycleSchedule("fixed", 5, 1, first_block=3).block(number, 3) for number in range(9)] == [3] * 9


def test_random_cycles_differ_and_depend_on_the_seed() -> None:
    def cycle(seed: int, index: int) -> tuple[int, ...]:
        return tuple(CycleSchedule("random", 8, seed).block(8 * index + place, 4) for place in range(8))

    assert len({cycle(1, index) for index in range(9)}) == 9
    assert cycle(2, 0) != cycle(1, 0) == cycle(1, 0)


@given(blocks=SIZES, clients=SIZES)
def test_rotating_lets_every_client_visit_every_block_once(blocks: int, clients: int) -> None:
    schedule = CycleSchedule("rotating", blocks, seed=0)
    pairs = Counter(
        (schedule.clients(Visit(number), range(clients))[0], schedule.block(number, clients))
        for number in range(blocks * clients)
    )
    assert len(pairs) == blocks * clients and set(pairs.values()) == {1}


@given(blocks=SIZES, clients=SIZES, share=st.integers(1, 30), visits=st.integers(0, 200))
def test_clients_take_turns(blocks: int, clients: int, share: int, visits: int) -> None:
    schedule = CycleSchedule("ascending", blocks, seed=0, clients_per_block=min(share, clients))
    asked = [schedule.clients(Visit(number), range(clients)) for number in range(visits)]
    assert all(len(set(group)) == len(group) == min(share, clients) for group in asked)
    counts = Counter(client for group in asked for client in group)
    assert not visits or max(counts.values()) - min(counts.get(client, 0) for client in range(clients)) <= 1


@given(blocks=st.integers(2, 30), share=st.integers(2, 4), number=st.integers(0, 99))
def test_aggregate_binds_clients_to_blocks_as_published(blocks: int, share: int, number: int) -> None:
    schedule = CycleSchedule("aggregate", blocks, seed=0, clients_per_block=share)
    clients = schedule.clients(Visit(number), range(blocks * share))
    assert [client % blocks for client in clients] == [schedule.block(number, blocks * share)] * share
    with pytest.raises(ConfigError, match="aggregate"):
        schedule.clients(Visit(number), range(blocks * share - 1))


@given(clients=st.integers(2, 20), number=st.integers(0, 99))
def test_a_failed_visit_goes_to_another_client(clients: int, number: int) -> None:
    schedule = CycleSchedule("random", 6, seed=0)
    first, second = (schedule.clients(Visit(number, attempt), range(clients)) for attempt in (0, 1))
    assert first != second
