"""Every client has one process, in which it stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fs_fwdllm.host.placement import Placement


@given(st.integers(1, 7), st.sets(st.integers(1, 30)))
def test_every_client_lives_in_one_process_that_never_changes(processes: int, clients: set[int]) -> None:
    placement = Placement(processes)
    split = placement.split({client: -client for client in clients})
    assert list(split) == list(range(processes))
    assert {client: value for held in split.values() for client, value in held.items()} == {c: -c for c in clients}
    assert all(placement.process_of(client) == process for process, held in split.items() for client in held)


def test_as_many_processes_as_clients_is_fedmls_numbering() -> None:
    assert Placement(3).split({1: "a", 2: "b", 3: "c"}) == {0: {1: "a"}, 1: {2: "b"}, 2: {3: "c"}}
