"""Whose directions a client looks along: its own, or those of a set of clients.

Along directions of their own, ``N`` clients with ``P`` probes see ``N P`` directions, and whoever follows the server
needs ``N P`` numbers. Along directions in common the server averages scalars, probe by probe: ``P`` numbers describe
the round's step however many clients took part, and a replica adds ``P`` directions instead of ``N P`` (DeComFL, ICLR
2025)::

    own      sum_c w_c 1/P sum_p g_cp z_cp            E|error|^2 = spread/(N P) mean_c |g_c|^2    (equal weights)
    common   1/P sum_p (sum_c w_c g_cp) z_p           E|error|^2 = spread/P |sum_c w_c g_c|^2

At a point where clients agree, common directions are ``N`` times as noisy; where mini-batch noise is nearly all of a
client's gradient, as soon it is, hardly more. Sets are in between: ``G`` of them see ``G P`` directions. Common
directions are also what a robust statistic over clients, and a sum in secret, need.

Clients that move (local steps) can share directions too: step by step they use the same ones from different points, and
the weighted mean of where they end is still one coefficient a direction.

A client's set is its number modulo ``G``, so that nobody has to be told. Slopes that cost no pass are looked for along
the rows of an orthogonal matrix in turn (:mod:`fs_fwdllm.core.orthogonal`), which all clients have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fs_fwdllm.core.direction import EVERYBODY, direction_seed, set_owner
from fs_fwdllm.core.wire import Participant
from fs_fwdllm.errors import WireError

__all__ = ["OWN", "DirectionSets", "common_seeds", "directions_seeds", "merged"]


@dataclass(frozen=True)
class DirectionSets:
    """How clients share directions.

    Attributes:
        count: sets; 0 gives every client its own directions.
        orthogonal: the one set is of rows of an orthogonal matrix.
    """

    count: int = 0
    orthogonal: bool = False

    def owner(self, client: int) -> int:
        """Whose directions ``client`` looks along, as a :data:`~fs_fwdllm.core.wire.Participant` names it."""
        if not self.count:
            return client
        return EVERYBODY if self.orthogonal else set_owner(client % self.count)


#: A direction's seed is below it.
_SEEDS = 1 << 64

#: Every client looks along directions of its own.
OWN = DirectionSets()


def directions_seeds(round_index: int, owner: int, step: int, probes: Sequence[int]) -> list[int]:
    """The seeds of the directions of a step, part after part."""
    if owner == EVERYBODY:
        return common_seeds(round_index, probes)
    return [direction_seed(round_index, owner, step, probe) for probe in range(sum(probes))]


def common_seeds(round_index: int, probes: Sequence[int]) -> list[int]:
    """The rows of an orthogonal matrix that are a round's: each part counts its own through all rounds.

    Raises:
        WireError: there are not so many seeds in that round.
    """
    if (round_index + 1) * max(probes, default=0) > _SEEDS:
        raise WireError(f"round {round_index} cannot be: its directions would be beyond the last seed")
    return [round_index * count + probe for count in probes for probe in range(count)]


def merged(
    participants: Sequence[Participant], coefficients: Sequence[np.ndarray]
) -> tuple[list[Participant], list[np.ndarray]]:
    """Those who looked along the same directions as one participant, whose coefficients are the sums of theirs.

    Args:
        coefficients: float64 ``[steps, directions]`` of each participant; who takes fewer steps, or has fewer probes of
            a part, has looked along the first ones.

    Returns:
        Participants in the order in which their directions were first looked along, and their coefficients.
    """
    together: dict[tuple[int, int], list[int]] = {}
    for index, (round_index, owner, *_) in enumerate(participants):
        together.setdefault((round_index, owner), []).append(index)
    made: list[Participant] = []
    sums: list[np.ndarray] = []
    for (round_index, owner), members in together.items():
        steps = 1 if owner == EVERYBODY else max(participants[index][2] for index in members)
        probes = [max(counts) for counts in zip(*(participants[index][3:] for index in members), strict=True)]
        total = np.zeros((steps, sum(probes)))
        for index in members:
            own = coefficients[index]
            _add(total, own.sum(axis=0, keepdims=True) if owner == EVERYBODY else own, participants[index][3:], probes)
        made.append((round_index, owner, steps, *probes))
        sums.append(total)
    return made, sums


def _add(total: np.ndarray, own: np.ndarray, own_probes: Sequence[int], probes: Sequence[int]) -> None:
    """Add a participant's coefficients where its directions are among the set's."""
    start = own_start = 0
    for own_count, count in zip(own_probes, probes, strict=True):
        total[: len(own), start : start + own_count] += own[:, own_start : own_start + own_count]
        start, own_start = start + count, own_start + own_count
