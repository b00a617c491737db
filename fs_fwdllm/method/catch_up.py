"""Who knows what: the cheapest way to bring a client to the server's current parameters.

A client that was in round ``k`` needs the records of the rounds from ``k`` on; a client that is new, or has been away
so long that those records outweigh the parameters, gets the parameters. Records that nobody will ever be sent are
dropped, so the log never grows beyond the size of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fs_fwdllm.core.wire import RoundUpdate, decode

__all__ = ["CatchUpLog"]


class CatchUpLog:
    """Encoded round records, oldest first, and the round each client last started from.

    Args:
        limit_bytes: drop the oldest records beyond this total; the size of the dense parameters.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._frames: dict[int, bytes] = {}
        self._complete_from = 0
        self._known_round: dict[int, int] = {}

    def frames_for(self, client: int, dense_frame: Callable[[], bytes]) -> tuple[bytes, ...]:
        """What to send to ``client``: missed records, or the dense frame where those are unknown or larger."""
        known = self._known_round.get(client)
        missed = None if known is None else self.frames_since(known)
        if missed is not None and sum(map(len, missed)) <= self._limit_bytes:
            return missed
        return (dense_frame(),)

    def note_started(self, clients: Iterable[int], round_index: int) -> None:
        """``clients`` hold the parameters that ``round_index`` starts from."""
        self._known_round.update(dict.fromkeys(clients, round_index))

    def note_holds(self, client: int, digest: bytes, current: bytes, next_round: int) -> None:
        """``client`` holds the parameters of ``digest``: the ``current`` ones, or those a kept record starts from."""
        if digest == current:
            self._known_round[client] = next_round
            return
        starts = {_start_of(frame): round_index for round_index, frame in self._frames.items()}
        if digest in starts:
            self._known_round[client] = starts[digest]
        else:
            self._known_round.pop(client, None)

    def append(self, round_index: int, frame: bytes) -> None:
        """Remember a round's record, forgetting the oldest ones beyond the limit."""
        self._frames[round_index] = frame
        while sum(map(len, self._frames.values())) > self._limit_bytes:
            oldest = min(self._frames)
            del self._frames[oldest]
            self._complete_from = oldest + 1

    def forget_until(self, round_index: int) -> None:
        """The step of ``round_index`` has no record: whoever missed it needs the parameters."""
        self._frames.clear()
        self._complete_from = round_index + 1

    def frames_since(self, round_index: int) -> tuple[bytes, ...] | None:
        """The records of ``round_index`` and later; ``None`` where one of them is not known."""
        if round_index < self._complete_from:
            return None
        return tuple(frame for index, frame in self._frames.items() if index >= round_index)

    def state_arrays(self) -> dict[str, np.ndarray]:
        """The records as uint8 arrays, by names that :meth:`load_state` understands."""
        return {
            f"catch_up.{round_index}": np.frombuffer(frame, dtype=np.uint8)
            for round_index, frame in self._frames.items()
        }

    def state_numbers(self) -> dict[str, object]:
        return {
            "complete_from": self._complete_from,
            "known_round": [[client, known] for client, known in self._known_round.items()],
        }

    def load_state(self, arrays: Mapping[str, Any], numbers: dict[str, object]) -> None:
        """Inverse of :meth:`state_arrays` and :meth:`state_numbers`; ``arrays`` are numpy's, or tensors on the CPU."""
        rounds = sorted(int(name.removeprefix("catch_up.")) for name in arrays if name.startswith("catch_up."))
        self._frames = {index: np.asarray(arrays[f"catch_up.{index}"]).tobytes() for index in rounds}
        self._complete_from = int(str(numbers["complete_from"]))
        known = numbers["known_round"]
        assert isinstance(known, list)
        self._known_round = {int(client): int(round_index) for client, round_index in known}


def _start_of(frame: bytes) -> bytes:
    return decode(frame, RoundUpdate).digest_before
