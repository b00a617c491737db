"""Passes side by side compute what each computes alone, share every layer, and end in any way without a trace."""

from __future__ import annotations

import contextvars
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fs_fwdllm.model.base.meeting import Meeting


class Disk:
    """Counts how often a layer has to be read anew."""

    def __init__(self, largest: int = 8) -> None:
        self.meeting = Meeting(largest)
        self.held = -1
        self.reads: list[int] = []

    def use(self, layer: int) -> None:
        self.meeting.arrive(layer)
        if layer != self.held:
            self.reads.append(layer)
            self.held = layer


class Standing:
    """What the running pass has put into a model."""

    def __init__(self) -> None:
        self.value: Any = None

    def take(self) -> Any:
        state, self.value = self.value, None
        return state

    def give(self, state: Any) -> None:
        self.value = state


def walk(disk: Disk, layers: Sequence[int], result: Any, said: list[Any] | None = None) -> Callable[[], Any]:
    def run() -> Any:
        for layer in layers:
            disk.use(layer)
            if said is not None:
                said.append((result, layer))
        return result

    return run


@pytest.mark.parametrize("passes", [1, 2, 3, 8])
def test_a_layer_is_read_once_for_all_and_results_keep_their_order(passes: int) -> None:
    disk = Disk()
    for _ in range(3):
        disk.reads, disk.held = [], -1
        assert disk.meeting.together([walk(disk, range(6), one) for one in range(passes)]) == list(range(passes))
        assert disk.reads == list(range(6))


def test_more_passes_than_go_side_by_side_come_in_groups() -> None:
    disk = Disk(largest=3)
    assert disk.meeting.together([walk(disk, range(5), one) for one in range(8)]) == list(range(8))
    assert disk.reads == list(range(5)) * 3


def test_all_use_a_layer_before_anybody_uses_the_next() -> None:
    disk, said = Disk(), []  # type: ignore[var-annotated]
    disk.meeting.together([walk(disk, range(4), one, said) for one in range(3)])
    assert [layer for _, layer in said] == sorted(layer for _, layer in said)


def test_a_layer_that_comes_again_and_passes_of_different_shapes() -> None:
    disk = Disk()
    shared = [0, 1, 0, 1, 0, 1]
    assert disk.meeting.together([walk(disk, shared, "a"), walk(disk, shared, "b")]) == ["a", "b"]
    assert disk.reads == shared
    odd = [walk(disk, [], 0), walk(disk, [2, 0], 1), walk(disk, [0, 1, 2], 2), walk(disk, [5], 3)]
    assert disk.meeting.together(odd) == [0, 1, 2, 3]


def test_passes_that_start_passes_share_with_everybody() -> None:
    disk = Disk()

    def outer(name: str) -> Callable[[], list[str]]:
        return lambda: disk.meeting.together([walk(disk, range(4), f"{name}{one}") for one in range(3)])

    assert disk.meeting.together([outer("a"), outer("b"), lambda: [walk(disk, range(4), "c")()]]) == [
        ["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c"],
    ]  # fmt: skip
    assert disk.reads == [0, 1, 2, 3]


def test_exactly_one_runs_and_sees_what_it_left() -> None:
    disk, standing = Disk(), Standing()
    disk.meeting.share(standing)
    running = itertools.count()
    inside: list[int] = []

    def run(own: int) -> Callable[[], int]:
        def work() -> int:
            assert standing.value is None  # the others have taken theirs out
            standing.value = own
            for layer in range(5):
                inside.append(own)
                assert len(inside) == 1, "two passes run at a time"
                next(running)
                inside.pop()
                disk.use(layer)
                assert standing.value == own
            standing.value = None
            return own

        return work

    assert disk.meeting.together([run(one) for one in range(6)]) == list(range(6))
    assert standing.value is None and next(running) == 30


def test_a_pass_has_its_callers_settings() -> None:
    disk, variable = Disk(), contextvars.ContextVar("variable", default="nothing")
    variable.set("something")
    with torch.no_grad():
        found = disk.meeting.together([lambda: (torch.is_grad_enabled(), variable.get())] * 2)
    assert found == [(False, "something")] * 2
    assert disk.meeting.together([torch.is_grad_enabled] * 2) == [True, True]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_is_the_callers_and_ends_the_others(place: int) -> None:
    disk, standing, ended = Disk(), Standing(), []  # type: ignore[var-annotated]
    disk.meeting.share(standing)

    def run(own: int) -> Callable[[], None]:
        def work() -> None:
            try:
                for layer in range(9):
                    standing.value = own
                    disk.use(layer)
                    assert standing.value == own
                    if own == place and layer == 4:
                        raise ValueError(f"pass {own}")
            finally:
                assert standing.value == own
                standing.value = None
                ended.append(own)

        return work

    with pytest.raises(ValueError, match=f"pass {place}"):
        disk.meeting.together([run(one) for one in range(3)])
    assert sorted(ended) == [0, 1, 2] and standing.value is None
    assert max(disk.reads) <= 5  # nobody went on to the end
    disk.reads = []
    assert disk.meeting.together([walk(disk, range(3), one) for one in range(2)]) == [0, 1]


def test_who_started_a_pass_that_failed_may_go_on() -> None:
    disk = Disk()

    def fails() -> None:
        disk.use(1)
        raise ValueError

    def forgiving() -> str:
        disk.use(0)
        try:
            disk.meeting.together([fails, walk(disk, range(3), 0)])
        except ValueError:
            disk.use(2)
            return "went on"
        return "not told"

    assert disk.meeting.together([forgiving, walk(disk, range(4), "other")]) == ["went on", "other"]


def test_an_interrupt_from_the_keyboard_ends_all_passes() -> None:
    disk, ended = Disk(), []  # type: ignore[var-annotated]

    def run(own: int) -> Callable[[], None]:
        def work() -> None:
            try:
                for layer in range(1000):
                    disk.use(layer)
                    if own == 1 and layer == 3:
                        os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.01)  # for the interrupt to arrive
            finally:
                ended.append(own)

        return work

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of a test run may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            disk.meeting.together([run(one) for one in range(3)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(ended) == [0, 1, 2] and max(disk.reads) < 999
    assert not [one for one in threading.enumerate() if one.name == "fs-fwdllm pass"]
    assert disk.meeting.together([walk(disk, range(3), one) for one in range(2)]) == [0, 1]


def test_nobody_else_has_a_turn_while_one_is_alone() -> None:
    disk, said = Disk(), []  # type: ignore[var-annotated]

    def first() -> None:
        with disk.meeting.alone():
            walk(disk, range(3), "first", said)()
            assert disk.meeting.together([walk(disk, [7], one) for one in range(2)]) == [0, 1]

    disk.meeting.together([first, walk(disk, range(3), "second", said)])
    assert [name for name, _ in said] == ["first"] * 3 + ["second"] * 3


def test_meetings_of_two_threads_do_not_mix() -> None:
    disk, found = Disk(), {}  # type: ignore[var-annotated]

    def meet(name: str) -> None:
        for turn in range(20):
            passes = [walk(disk, range(5), f"{name}{turn}-{one}") for one in range(3)]
            found[name, turn] = disk.meeting.together(passes)

    threads = [threading.Thread(target=meet, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {(name, turn): [f"{name}{turn}-{one}" for one in range(3)] for name in "abc" for turn in range(20)}


def test_a_system_without_threads_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, start, started = Disk(), threading.Thread.start, []  # type: ignore[var-annotated]

    def runs_out(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", runs_out)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            disk.meeting.together([walk(disk, range(5), one) for one in range(4)])
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
    assert disk.meeting.together([walk(disk, range(5), one) for one in range(4)]) == [0, 1, 2, 3]
