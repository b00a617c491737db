"""What waits to be handled, where anybody may send anything as fast as he likes.

The host puts every message that reaches its port into a queue without an end. A stranger who sends faster than messages
are handled fills the memory with them, and the participants' own wait behind. Here every participant has a share of the
queue, all strangers together have one, and what does not fit a share is dropped as it comes. Dropping is told, but not
every time: a log is not to be filled, either.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

__all__ = ["DROPPED", "Intake", "Repeats", "claimed_by", "limit_intake"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

#: Messages of a participant that may wait: the pieces of the longest text there is, 24 GiB, are fewer.
_SHARE = 1024
#: Messages of all strangers together that may wait.
_STRANGERS_SHARE = 512
#: Longest message of a stranger that is kept: what a client that joins says of itself takes a tenth of it.
_STRANGERS_BYTES = 32 << 10
_STRANGER = -2
#: Different remarks that are counted apart.
_REMARKS = 256


class Repeats:
    """Logs a remark the first few times, and then at every power of ten.

    Args:
        log: what says it.
        first: how many times it is said without counting.
    """

    def __init__(self, log: Callable[[str], None], first: int = 5) -> None:
        self._log = log
        self._first = first
        self._counts: Counter[str] = Counter()

    def say(self, remark: str) -> None:
        """Say ``remark``, if it is its turn."""
        key = remark if remark in self._counts or len(self._counts) < _REMARKS else ""
        self._counts[key] += 1
        count = self._counts[key]
        if count <= self._first:
            self._log(remark)
        elif set(str(count)[1:]) <= {"0"} and str(count)[0] == "1":
            self._log(f"{remark} ({count:,} such by now)")


#: What is said of messages that are dropped.
DROPPED = Repeats(logger.warning)


class Intake(deque[Any]):
    """The host's queue of messages, with shares.

    Args:
        members: numbers by which participants' messages come.
        waiting: messages that are there already.
    """

    def __init__(self, members: Iterable[int], waiting: Iterable[Any] = ()) -> None:
        super().__init__()
        self._members = frozenset(members)
        self._held: Counter[int] = Counter()
        self._lock = Lock()
        for request in waiting:
            self.append(request)

    def append(self, request: Any) -> None:
        """Let a message wait, if it fits its sender's share. Called by the threads that receive."""
        owner = self._owner(request)
        if owner == _STRANGER and request.ByteSize() > _STRANGERS_BYTES:
            DROPPED.say("dropped long messages of strangers")
            return
        share, name = (_STRANGERS_SHARE, "strangers") if owner == _STRANGER else (_SHARE, f"participant {owner}")
        with self._lock:
            if self._held[owner] >= share:
                DROPPED.say(f"dropped messages of {name}: {share} are waiting already")
                return
            self._held[owner] += 1
            super().append(request)

    def popleft(self) -> Any:
        with self._lock:
            request = super().popleft()
            self._held[self._owner(request)] -= 1
            return request

    def _owner(self, request: Any) -> int:
        claimed = claimed_by(request)
        return claimed if claimed in self._members else _STRANGER


def claimed_by(request: Any) -> int | None:
    """Whom a message of the host's, as gRPC hands it over, says it is of; ``None`` if that is no number."""
    sender = request.msg["sender"].single_msg if "sender" in request.msg else None
    return sender.int_value if sender is not None and sender.WhichOneof("type") == "int_value" else None


def limit_intake(manager: Any, members: Iterable[int]) -> None:
    """Give a gRPC communication manager a queue with shares in place of its own."""
    functions = manager.server_funcs
    functions.msg_queue = Intake(members, functions.msg_queue)
