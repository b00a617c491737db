"""Which pieces of texts a participant lets in: those it waits for, of those it waits for them from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fs_fwdllm.core.wire import to_text
from fs_fwdllm.errors import WireError
from fs_fwdllm.host.chunks import Joiner, split
from fs_fwdllm.host.federatedscope.transport import frame_in, next_message

TEXT = to_text(bytes(range(256)) * 4)
PIECES = split(TEXT, 300)


def a_message(content: Any, sender: int = 1, kind: str = "update", state: int = 0) -> SimpleNamespace:
    return SimpleNamespace(content=content, sender=sender, msg_type=kind, state=state)


class Manager:
    """Stands where the host's gRPC manager is."""

    def __init__(self, messages: list[SimpleNamespace]) -> None:
        self.server_funcs = SimpleNamespace(msg_queue=messages)

    def receive(self) -> SimpleNamespace:
        return self.server_funcs.msg_queue.pop(0)


def expected(message: Any) -> int:
    return len(TEXT) if message.sender in (1, 2) and message.msg_type == "update" and not message.state else 0


def received(messages: list[SimpleNamespace], joiner: Joiner) -> list[SimpleNamespace]:
    manager = Manager(messages)
    return [message for _ in range(len(messages)) if (message := next_message(manager, 0.0, joiner, expected))]


def test_strangers_hold_nothing_and_cost_nobody_anything() -> None:
    joiner = Joiner()
    forged = [
        *(a_message(piece, sender) for sender in range(3, 5000) for piece in PIECES[:1]),
        *(a_message(piece, 1, "metrics") for piece in PIECES[:1]),
        a_message(PIECES[0], state=7),
        a_message("late", state=7),
        a_message("short", 1, "metrics"),
        a_message("short", 77),
    ]
    honest = [a_message(piece) for piece in PIECES]
    whole = received([*honest[:2], *forged, *honest[2:]], joiner)
    assert [message.content for message in whole] == ["late", "short", "short", TEXT]
    assert joiner.held_bytes == 0


def test_what_is_held_is_bounded_by_who_is_waited_for() -> None:
    joiner = Joiner()
    received([a_message(piece, sender) for sender in range(100) for piece in PIECES[:-1]], joiner)
    assert 0 < joiner.held_bytes <= 2 * (len(TEXT) + len(TEXT) // 16 + (8 << 10))
    joiner.forget()
    assert received([a_message(split(TEXT + TEXT, 300)[0])], joiner) == []
    assert joiner.held_bytes == 0, "longer than anything that is waited for"


def test_a_text_that_no_frame_has_is_not_decoded() -> None:
    assert frame_in(a_message(TEXT), 1024) == bytes(range(256)) * 4
    with pytest.raises(WireError, match="a text of 1368 characters, more than a frame of 1000 bytes"):
        frame_in(a_message(TEXT), 1000)
    with pytest.raises(WireError, match="more than a frame of 0 bytes"):
        frame_in(a_message(TEXT), 0)
