"""How long the rest of a run will take, from how long its rounds took so far.

Whole rounds are measured by the seconds in their own lines, so that a plain log says the same wherever it is written.
Inside the first round nothing is known but how many of its clients have answered, so that is what counts until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Pace"]


class Pace:
    """Args: the number of the last round, and a clock in seconds for what happens between two rounds."""

    def __init__(self, total_rounds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_rounds = total_rounds
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._done = 0
        self._seconds_a_round: float | None = None
        self._share_answered = 0.0
        self._round_began = self._evaluation_began = clock()

    @property
    def open_round(self) -> int:
        """Number of the round that is being worked on."""
        return self._done + 1

    def note(self, round_number: int, seconds: float | None) -> None:
        """Round ``round_number`` ended ``seconds`` after the run's start."""
        self._done, self._share_answered = round_number, 0.0
        self._round_began = self._clock()
        if seconds is None:
            return
        if self._first is None:  # a resumed run begins with the average of all its rounds
            self._first = (0, seconds if round_number == 0 else 0.0)
        rounds = round_number - self._first[0]
        if rounds > 0:
            self._seconds_a_round = (seconds - self._first[1]) / rounds

    def answered(self, done: int, asked: int) -> None:
        """``done`` of the ``asked`` clients of the open round have answered."""
        if done == 0:
            self._round_began = self._clock()
        self._share_answered = done / asked if asked else 0.0

    def evaluated(self, done: int, total: int) -> float | None:
        """Seconds that an evaluation will still take, ``done`` of whose ``total`` batches are over."""
        if done == 0:
            self._evaluation_began = self._clock()
            return None
        return (self._clock() - self._evaluation_began) / done * (total - done)

    def left_s(self) -> float | None:
        """Seconds until the last round ends; ``None`` as long as nothing is known."""
        seconds_a_round = self._seconds_a_round
        if seconds_a_round is None and self._share_answered:
            seconds_a_round = (self._clock() - self._round_began) / self._share_answered
        if seconds_a_round is None:
            return None
        return max(0.0, seconds_a_round * (self._total_rounds - self._done - self._share_answered))
