"""How losses began, and whether they have exploded since."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Literal

__all__ = ["Losses"]

#: A loss of more than this times the first one (or one, if that is larger) is a ruin, not a bad round.
_EXPLODED = 10.0


class Losses:
    """Remembers the first loss of either kind: ``eval`` on the reported split, ``train`` as the
    clients' median has it.

    Args:
        lines: of ``metrics.jsonl``, where a run goes on.

    Attributes:
        told: whether the user has been told of an explosion.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.told = False
        self._first: dict[str, float] = {}
        for line in lines:
            measured = [loss for loss in (line.get("loss") or {}).values() if loss is not None]
            typical = statistics.median_low(measured) if measured else None
            for kind, loss in (("eval", (line.get("eval") or {}).get("loss")), ("train", typical)):
                if loss is not None:
                    self._first.setdefault(kind, loss)

    def note_start(self, evaluation: Mapping[str, Any] | None) -> None:
        """Learn how the model was before training."""
        self.has_exploded("eval", None if evaluation is None else evaluation.get("loss"))

    @property
    def start(self) -> float | None:
        """The first evaluation loss."""
        return self._first.get("eval")

    def has_exploded(self, kind: Literal["eval", "train"], loss: float | None) -> bool:
        """Whether ``loss`` is not finite, or far beyond the first one; ``None`` says nothing."""
        if loss is None:
            return False
        if not math.isfinite(loss):
            return True
        return loss > _EXPLODED * max(1.0, self._first.setdefault(kind, loss))
