"""A deadline for every wait: FedML's own loops wait for ever.

While a process waits for others, its watchdog is armed; when the deadline passes it calls back, from a thread of its
own, since the process's own thread is inside FedML's loop and cannot be reached. The default is to say why and to end
the process at once; nothing is lost by that, because what a run keeps is written after every round.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

__all__ = ["Watchdog"]


class Watchdog:
    """Calls ``on_expiry(explanation)`` when an armed deadline passes. Arming again replaces the deadline.

    Attributes:
        ending_s: how long FedML may take to close its transport after the last payload; no limit unless set.
    """

    def __init__(self, on_expiry: Callable[[str], None]) -> None:
        self.ending_s = math.inf
        self._on_expiry = on_expiry
        self._changed = threading.Condition()
        self._deadline_s: float | None = None
        self._explain: Callable[[], str] = str
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float, explain: Callable[[], str]) -> None:
        """Give what follows ``seconds``; ``explain`` says, when they have passed, what did not come.

        An infinite number of seconds is no deadline: in a single process nobody waits for another.
        """
        if math.isinf(seconds):
            return
        with self._changed:
            self._deadline_s, self._explain = time.monotonic() + seconds, explain
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="fs_fwdllm watchdog", daemon=True)
                self._thread.start()
            self._changed.notify()

    def disarm(self) -> None:
        """What was waited for has come."""
        with self._changed:
            self._deadline_s = None
            self._changed.notify()

    def wind_down(self) -> None:
        """The last payload has been delivered; what is left is FedML's ending."""
        self.disarm()
        self.arm(self.ending_s, lambda: f"FedML did not close its transport within {self.ending_s:g} s")

    def _watch(self) -> None:
        with self._changed:
            while True:
                left_s = None if self._deadline_s is None else self._deadline_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    break
                self._changed.wait(left_s)
            explanation = self._explain()
        self._on_expiry(explanation)
