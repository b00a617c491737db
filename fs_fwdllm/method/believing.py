"""How far the updates of a round are believed: a chain, from the samples that a client reports to what a set votes for.

Every link takes the round's accepted updates and gives them back changed; what it found goes into the report. The
links themselves are arithmetic (:mod:`fs_fwdllm.guard`); here they meet updates, and the server that knows what an
update of its method consists of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from fs_fwdllm.core.wire import ClientUpdate, ScalarUpdate
from fs_fwdllm.guard import LengthGuard, Statistic, believed_samples, vote
from fs_fwdllm.method.direction_sets import OWN, DirectionSets

__all__ = ["Belief", "Believed", "Measured", "RobustSettings"]


@dataclass(frozen=True)
class RobustSettings:
    """How far a single client is believed.

    Attributes:
        clip: how many times the median length an update may be long; ``None`` for any length.
        samples_times_median: how many times the median of the round's clients a client's samples count at most;
            ``None`` for any number that its steps can hold.
        statistic: what a set of clients with the same directions says.
        liars: share of a set's clients that are expected to lie.
    """

    clip: float | None = None
    samples_times_median: float | None = None
    statistic: Statistic = "mean"
    liars: float = 0.2


class Measured(Protocol):
    """A server, as far as its updates can be measured."""

    def lengths_of(self, update: ClientUpdate) -> tuple[float, ...]: ...

    def shortened(self, update: ClientUpdate, factors: Sequence[float]) -> ClientUpdate: ...

    def longest(self) -> tuple[float, ...]: ...


@dataclass
class Believed:
    """Updates as they count.

    Attributes:
        clipped: ``{client: factor}`` of those that were longer than is usual.
        capped: ``{client: samples}`` as they were reported, where fewer are believed.
        outvoted: clients whose numbers a set's vote left out as a whole.
    """

    updates: list[ClientUpdate]
    clipped: dict[int, float] = field(default_factory=dict)
    capped: dict[int, int] = field(default_factory=dict)
    outvoted: list[int] = field(default_factory=list)


class Belief:
    """The chain of a run.

    Args:
        settings: see :class:`RobustSettings`.
        sets: whose directions clients look along.

    Attributes:
        lengths: what is known of usual lengths.
    """

    def __init__(self, settings: RobustSettings, sets: DirectionSets = OWN) -> None:
        self.lengths = LengthGuard(settings.clip)
        self._settings = settings
        self._sets = sets

    def of(self, accepted: Sequence[ClientUpdate], most: Mapping[int, int], server: Measured) -> Believed:
        """The accepted updates as they count.

        Args:
            most: how many samples each client's steps can hold.
        """
        found = Believed(list(accepted))
        self._cap(found, most)
        self._shorten(found, server)
        self._vote(found)
        return found

    def _cap(self, found: Believed, most: Mapping[int, int]) -> None:
        reported = {update.client: update.samples for update in found.updates}
        believed = believed_samples(reported, most, self._settings.samples_times_median)
        found.capped = {client: samples for client, samples in reported.items() if believed[client] < samples}
        found.updates = [
            replace(update, samples=believed[update.client]) if update.client in found.capped else update
            for update in found.updates
        ]

    def _shorten(self, found: Believed, server: Measured) -> None:
        if not self.lengths.is_on:
            return
        lengths = {update.client: server.lengths_of(update) for update in found.updates}
        factors = self.lengths.factors(lengths, server.longest())
        found.clipped = {client: min(parts) for client, parts in factors.items() if min(parts, default=1.0) < 1.0}
        found.updates = [
            server.shortened(update, factors[update.client]) if update.client in found.clipped else update
            for update in found.updates
        ]

    def _vote(self, found: Believed) -> None:
        """Let every client of a set say what the set says, so that its weighted mean is that, too."""
        if self._settings.statistic == "mean":
            return
        members: dict[int, list[int]] = {}
        for place, update in enumerate(found.updates):
            assert isinstance(update, ScalarUpdate)
            members.setdefault(self._sets.owner(update.client), []).append(place)
        for places in members.values():
            values = np.stack([found.updates[place].values for place in places])
            said, left_out = vote(self._settings.statistic, values, self._settings.liars)
            found.outvoted += [found.updates[places[row]].client for row in left_out]
            for place in places:
                found.updates[place] = replace(found.updates[place], values=said)
        found.outvoted.sort()
