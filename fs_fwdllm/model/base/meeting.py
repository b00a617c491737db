"""Ordinary passes side by side over one base on the disk: they meet at every layer, so that it is read once for all.

Each pass is a function that runs the model as it always does, in a thread of its own. Exactly one of them runs at a
time. Where it needs a layer other than the one in memory it stops, and the next pass runs up to the same place; when
all have stopped there, the layer is read and all of them use it in turn::

    pass 1   layer 1 |          layer 2 |          layer 3 |
    pass 2           | layer 1          | layer 2          | layer 3     ...

So every pass computes exactly what it would compute alone, bit for bit, whatever the architecture; no operation need
know of it, unlike :func:`torch.vmap`. What it costs is memory: each pass that waits holds its activations. A pass may
itself start passes; those join the meeting, and it goes on when they have ended.

A pass changes the model while it runs: perturbed parameters stand in it, positions are selected, outputs are played
back. Whoever does so is :class:`Shared` and takes it out again while another pass has its turn.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["Meeting", "Shared"]

T = TypeVar("T")
_LISTEN_S = 0.5


class Shared(Protocol):
    """Something that a running pass changes in the model, or next to it."""

    def take(self) -> Any:
        """Take out what the running pass has put there, and return it."""

    def give(self, state: Any) -> None:
        """Put back what was taken."""


class _Abandoned(BaseException):
    """Ends a pass that nobody waits for any more; never leaves this module."""


@dataclass(eq=False)
class _Pass:
    """A pass that has its turn, or waits for it.

    Attributes:
        wish: the layer it stopped at; ``None`` where it needs none to go on.
        waits_for: passes of its own that have not ended.
        fails: one of the passes it has started failed, so that the others are to be abandoned.
        state: what was taken out of the model when it stopped.
    """

    starter: _Pass | None = None
    turn: threading.Event = field(default_factory=threading.Event)
    wish: int | None = None
    waits_for: int = 0
    fails: bool = False
    state: list[tuple[Shared, Any]] = field(default_factory=list)
    result: Any = None
    error: BaseException | None = None

    @property
    def is_abandoned(self) -> bool:
        starter = self.starter
        return starter is not None and (starter.fails or starter.is_abandoned)


class Meeting:
    """Lets passes over the layers of one reader take turns.

    Args:
        largest: passes of one call of :meth:`together` that go side by side.
    """

    def __init__(self, largest: int = 8) -> None:
        self.largest = largest
        self._shared: weakref.WeakSet[Any] = weakref.WeakSet()
        self._passes: list[_Pass] = []
        self._mine = threading.local()
        self._place = threading.Lock()
        self._held = -1
        self._alone = 0

    def share(self, shared: Shared) -> None:
        """From now on a pass that stops takes out what it has put there. It is not kept alive by this."""
        self._shared.add(shared)

    def together(self, passes: Sequence[Callable[[], T]]) -> list[T]:
        """What each of ``passes`` returns, :attr:`largest` side by side.

        Raises:
            BaseException: whatever the first of them that fails raises; the others are ended at their next layer.
        """
        found: list[T] = []
        for first in range(0, len(passes), self.largest):
            found += self._side_by_side(passes[first : first + self.largest])
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else has a turn while this lasts."""
        self._alone += 1
        try:
            yield
        finally:
            self._alone -= 1

    def arrive(self, layer: int) -> None:
        """Called where a layer is about to be used: the others' turn, unless it is the one in memory."""
        own: _Pass | None = getattr(self._mine, "own", None)
        if own is None or self._alone or layer == self._held:
            return
        own.wish = layer
        self._give_way(own)
        own.wish = None

    def _side_by_side(self, passes: Sequence[Callable[[], T]]) -> list[T]:
        mine: _Pass | None = getattr(self._mine, "own", None)
        if len(passes) == 1 or self._alone:
            return [one() for one in passes]
        if mine is not None:
            return self._under(mine, passes)
        with self._place:  # a stranger's thread waits until this meeting is over
            starter = _Pass()
            self._passes, self._held = [starter], -1
            return self._under(starter, passes)

    def _under(self, starter: _Pass, passes: Sequence[Callable[[], T]]) -> list[T]:
        started = [_Pass(starter) for _ in passes]
        starter.waits_for = len(started)
        place = self._passes.index(starter)
        self._passes[place:place] = started
        for one, run in zip(started, passes, strict=True):
            try:
                self._start(one, run)
            except RuntimeError as error:  # the system has no thread left
                self._end(one, error)
        try:
            self._give_way(starter)
        finally:
            starter.fails = False
        failed = [one.error for one in started if one.error is not None and not isinstance(one.error, _Abandoned)]
        if failed:
            raise failed[0]
        return [one.result for one in started]

    def _start(self, own: _Pass, run: Callable[[], Any]) -> None:
        gradients, context = torch.is_grad_enabled(), contextvars.copy_context()

        def work() -> None:
            self._mine.own = own
            own.turn.wait()
            try:
                if not own.is_abandoned:
                    with torch.set_grad_enabled(gradients):
                        own.result = context.run(run)
            except BaseException as error:
                self._end(own, error)
            else:
                self._end(own)
            self._next().turn.set()

        threading.Thread(target=work, name="fs-fwdllm pass", daemon=True).start()

    def _end(self, own: _Pass, error: BaseException | None = None) -> None:
        assert own.starter is not None
        own.error = error
        own.starter.fails |= error is not None
        own.starter.waits_for -= 1
        self._passes.remove(own)

    def _give_way(self, own: _Pass) -> None:
        """Let others have their turn, until it is this pass's again."""
        following = self._next()
        if following is own and not own.is_abandoned:
            return
        own.state = [(shared, shared.take()) for shared in list(self._shared)]
        own.turn.clear()
        following.turn.set()
        interrupted = _wait(own)
        for shared, state in own.state:
            shared.give(state)
        own.state = []
        if interrupted is not None:
            raise interrupted
        if own.is_abandoned:
            raise _Abandoned

    def _next(self) -> _Pass:
        """Whose turn it is: who needs no layer, then who needs the one in memory, then whoever comes first."""
        ready = [one for one in self._passes if not one.waits_for]
        for one in ready:
            if one.wish is None or one.is_abandoned:
                return one
        wanted = next((one for one in ready if one.wish == self._held), ready[0])
        assert wanted.wish is not None
        self._held = wanted.wish
        return wanted


def _wait(own: _Pass) -> BaseException | None:
    """Wait for the turn. An interrupt from the keyboard ends the passes that were started, and is returned then."""
    interrupted: BaseException | None = None
    while True:
        try:
            while not own.turn.wait(_LISTEN_S):  # a wait without end hears of no interrupt on some systems
                pass
            return interrupted
        except KeyboardInterrupt as error:
            interrupted, own.fails = error, True
