"""Everybody has a share of what may wait, and a log is not filled by who fills it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fs_fwdllm.host.chunks import PIECE_BYTES, WHOLE_BYTES
from fs_fwdllm.host.federatedscope.intake import Intake, Repeats, claimed_by, limit_intake


@dataclass(eq=False)
class Single:
    int_value: int = 0
    kind: str = "int_value"

    def WhichOneof(self, name: str) -> str:
        return self.kind


@dataclass(eq=False)
class Request:
    """As gRPC hands a message of the host's over."""

    sender: int | None
    size: int = 100
    msg: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        single = Single(kind="str_value") if self.sender is None else Single(self.sender)
        self.msg = {"sender": SimpleNamespace(single_msg=single)}

    def ByteSize(self) -> int:
        return self.size


def test_strangers_fill_their_own_share_alone() -> None:
    intake = Intake([1, 2])
    for number in range(10_000):
        intake.append(Request(99 + number))
        intake.append(Request(None))
    assert len(intake) == 512
    mine = [Request(1) for _ in range(50)]
    for request in mine:
        intake.append(request)
    taken = [intake.popleft() for _ in range(len(intake))]
    assert taken[512:] == mine
    intake.append(Request(7))  # room again
    assert len(intake) == 1


def test_a_participant_has_a_share_too_and_may_send_what_is_long() -> None:
    intake = Intake([1, 2])
    for _ in range(2000):
        intake.append(Request(1, size=300 << 20))
    intake.append(Request(2))
    assert len(intake) == 1025 and claimed_by(intake[-1]) == 2
    assert 1024 * PIECE_BYTES > WHOLE_BYTES, "no text that may come is cut off"


def test_long_messages_of_strangers_do_not_wait() -> None:
    intake = Intake([1])
    intake.append(Request(9, size=1 << 20))
    assert not intake


def test_what_waited_already_waits_on() -> None:
    manager = SimpleNamespace(server_funcs=SimpleNamespace(msg_queue=[Request(1), Request(2)]))
    limit_intake(manager, [1, 2])
    assert [claimed_by(request) for request in manager.server_funcs.msg_queue] == [1, 2]


def test_shares_are_counted_right_by_many_threads() -> None:
    intake, taken = Intake([1, 2, 3]), []
    senders = [threading.Thread(target=lambda n=n: [intake.append(Request(n)) for _ in range(2000)]) for n in (1, 2, 3)]
    for sender in senders:
        sender.start()
    while any(sender.is_alive() for sender in senders) or intake:
        if intake:
            taken.append(intake.popleft())
    for _ in range(1024):
        intake.append(Request(1))
    assert len(intake) == 1024 and len(taken) > 0


def test_a_remark_is_made_a_few_times_and_then_at_powers_of_ten() -> None:
    said: list[str] = []
    repeats = Repeats(said.append, first=2)
    for _ in range(1000):
        repeats.say("again")
    assert said == ["again", "again", *(f"again ({count} such by now)" for count in ("10", "100", "1,000"))]


def test_remarks_without_an_end_are_counted_as_one() -> None:
    said: list[str] = []
    repeats = Repeats(said.append)
    for number in range(100_000):
        repeats.say(f"remark {number}")
    assert len(said) < 400
