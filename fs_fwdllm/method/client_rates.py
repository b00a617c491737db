"""Per-client learning rates: who is behind the others takes larger steps.

The strategies of FedMeZO (Ling et al., KDD 2024, arXiv 2402.05926) move each client's rate away from the schedule's
by at most ``span``, in proportion to how far a *statistic* of the client is from the mean over clients:

    ``rate_k = max(0, base + span * d_k / max_j |d_j|)``,   ``d_k = statistic_k - mean_j statistic_j``

| strategy | statistic of a client | statistics count from |
|---|---|---|
| ``frozen`` | none: every client has the schedule's rate | |
| ``random`` | none: ``base + span * u``, ``u`` uniform in [-1, 1), keyed by (seed, round, client), from round 0 on | |
| ``round-wise`` | its latest loss | the second round |
| ``five-round`` | mean of its latest five losses | five completed rounds |
| ``model-diff`` | distance of its latest change from the mean change (:mod:`.update_norms`) | the second round |

With every client in every round these are the published formulas. They are defined for any federation:

* A *report* is what an accepted answer says. Rejected answers and numbers that are not finite say nothing. A round is
  complete when at least one answer was accepted; a round that failed counts for nothing.
* A client that missed rounds is judged by its own latest reports, however old they are (for ``five-round`` by the
  latest five, or as many as there are). A client without a report has the base rate. Mean and maximum are over all
  clients with a report, in this round or not: a client's rate does not depend on whom else the round's draw has chosen.
* Equal statistics, one client, no reports: the base rate. A round with a single answer has no ``model-diff`` report,
  since a single change is the mean change; two changes are equally far from theirs. Sums are exact (rational numbers):
  equal losses are equal, and no finite loss is too large.
* A rate that would be negative is zero: the client works and reports, and does not move.

The published span is 5e-6 whatever the rate, half of the 1e-5 it was published with. At the hundred times larger rates
that smaller models need, so little moves nothing; a span of -1 therefore means half of the schedule's rate, which is
the published number at the published rate, to the bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

from fs_fwdllm.core.seeding import seeded_generator

__all__ = ["ClientRates", "StrategyName", "StrategySettings", "random_rate", "spread_rates"]

StrategyName = Literal["frozen", "random", "round-wise", "five-round", "model-diff"]

#: Strategies that look back, and the reports (and completed rounds) they look back on.
_WINDOWS: dict[str, int] = {"round-wise": 1, "five-round": 5, "model-diff": 1}


#: Part of the schedule's rate that a rate may move by, where no span is given.
_SHARE_OF_THE_RATE = 0.5


@dataclass(frozen=True)
class StrategySettings:
    """Which strategy, how far a rate may move from the schedule's (-1 is half of it), and the run's seed."""

    name: StrategyName = "frozen"
    span: float = -1.0
    seed: int = 0

    def span_at(self, base: float) -> float:
        """The largest distance from a schedule's rate of ``base``."""
        return self.span if self.span >= 0 else _SHARE_OF_THE_RATE * base


def random_rate(base: float, span: float, seed: int, round_index: int, client: int) -> float:
    """A rate uniform in ``[base - span, base + span)``, zero where that is negative; a pure function of its arguments.

    It is taken from one raw word of the generator, the part of it that never changes with the version of NumPy.
    """
    word = int(seeded_generator("learning rate", seed, round_index, client).bit_generator.random_raw())
    return _moved(base, span, (word >> 11) * 2.0**-52 - 1.0)


def spread_rates(base: float, span: float, statistics: Mapping[int, Fraction]) -> dict[int, float]:
    """The module's formula for every client that has a statistic.

    Args:
        base: the schedule's rate, not negative.
        span: the largest distance from it.
        statistics: ``{client: statistic}``.
    """
    total = sum(statistics.values(), Fraction(0))
    deviations = {client: len(statistics) * value - total for client, value in statistics.items()}
    largest = max(map(abs, deviations.values()), default=Fraction(0))
    if not largest:
        return dict.fromkeys(statistics, base)
    return {client: _moved(base, span, float(deviation / largest)) for client, deviation in deviations.items()}


def _moved(base: float, span: float, share: float) -> float:
    return max(0.0, base + span * share)


class ClientRates:
    """Gives every client its rate, and remembers the reports that the strategy looks back on."""

    def __init__(self, settings: StrategySettings) -> None:
        self._settings = settings
        self._window = _WINDOWS.get(settings.name, 0)
        self._completed_rounds = 0
        self._reports: dict[int, deque[float]] = {}

    @property
    def needs_distances(self) -> bool:
        """Whether a report is the distance of a client's change from the mean change, instead of its loss."""
        return self._settings.name == "model-diff"

    def rates(self, base: float, round_index: int, clients: Iterable[int]) -> dict[int, float]:
        """The rate of each of ``clients`` in a round whose schedule says ``base``."""
        name, span, seed = self._settings.name, self._settings.span_at(base), self._settings.seed
        if name == "random":
            return {client: random_rate(base, span, seed, round_index, client) for client in clients}
        known: dict[int, float] = {}
        if self._window and self._completed_rounds >= self._window:
            known = spread_rates(base, span, {client: _exact_mean(held) for client, held in self._reports.items()})
        return {client: known.get(client, base) for client in clients}

    def complete_round(self, reports: Mapping[int, float]) -> None:
        """Remember what the accepted answers of a round reported; what is not finite is ignored."""
        self._completed_rounds += 1
        if self._window:
            for client, value in reports.items():
                if math.isfinite(value):
                    self._reports.setdefault(client, deque(maxlen=self._window)).append(float(value))

    def state_numbers(self) -> dict[str, object]:
        """What a resumed run needs, as JSON values."""
        reports = [[client, list(held)] for client, held in sorted(self._reports.items())]
        return {"completed_rounds": self._completed_rounds, "rate_reports": reports}

    def load_state(self, numbers: Mapping[str, object]) -> None:
        """Inverse of :meth:`state_numbers`."""
        self._completed_rounds = int(str(numbers["completed_rounds"]))
        reports = cast("list[tuple[int, list[float]]]", numbers["rate_reports"])
        self._reports = {int(client): deque(held, maxlen=self._window) for client, held in reports}


def _exact_mean(values: deque[float]) -> Fraction:
    return sum(map(Fraction, values), Fraction(0)) / len(values)
