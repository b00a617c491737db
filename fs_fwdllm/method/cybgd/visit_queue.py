"""Which visits are open, which are due, and whom they ask: the server's book of the cycle.

:class:`~fs_fwdllm.method.cybgd.schedule.CycleSchedule` says which block and which clients a visit's number means; the
queue says which numbers have their turn. Visits that failed come first. No block and no client is in a round twice, so
a visit that would collide is passed over and becomes due.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fs_fwdllm.method.cybgd.schedule import CycleSchedule, Visit

__all__ = ["OpenVisit", "VisitQueue"]


@dataclass
class OpenVisit:
    """A visit of the round that is open.

    Attributes:
        sent: per client, the parts it holds in their current version once it has followed its assignment.
    """

    visit: Visit
    block: int
    clients: list[int]
    sent: dict[int, list[int]] = field(default_factory=dict)


class VisitQueue:
    """The visits of a run, in turn.

    Args:
        schedule: what a visit's number means.
        clients: all that hold samples, sorted.
        parallel_blocks: visits in one round.
    """

    def __init__(self, schedule: CycleSchedule, clients: Sequence[int], parallel_blocks: int) -> None:
        self.schedule = schedule
        self.next_visit = 0
        self.due: list[Visit] = []
        self.open: list[OpenVisit] = []
        self._clients = list(clients)
        self._parallel_blocks = parallel_blocks
        self._planned: list[OpenVisit] = []

    def plan(self, available: Sequence[int]) -> list[int]:
        """The clients of the next round's visits, in ascending order; :meth:`begin` expects them."""
        self._planned = self._plan_round(sorted(available))
        return _clients_of(self._planned)

    def begin(self, clients: Sequence[int]) -> list[OpenVisit]:
        """Open a round for ``clients``: the planned visits if they are whom :meth:`plan` named.

        A host that asks others gives them the next blocks in turn, ``clients_per_block`` of them each.
        """
        planned = self._planned or self._plan_round(self._clients)
        self.open = planned if _clients_of(planned) == sorted(clients) else self._fill(sorted(clients))
        self._planned = []
        self._take()
        return self.open

    def failed(self, visit: OpenVisit) -> None:
        """Nobody answered ``visit`` usably: it is due again, with the clients after those that failed."""
        self.due.append(Visit(visit.visit.number, visit.visit.attempt + 1))

    def visit_of(self, client: int) -> OpenVisit:
        """The open visit that asks ``client``. Raises ``StopIteration`` if none does."""
        return next(visit for visit in self.open if client in visit.clients)

    def _plan_round(self, available: Sequence[int]) -> list[OpenVisit]:
        chosen: list[OpenVisit] = []
        for visit in self._candidates():
            block = self._block(visit)
            clients = self.schedule.clients(visit, available)
            taken = {client for other in chosen for client in other.clients}
            if block in {other.block for other in chosen} or taken.intersection(clients):
                continue
            chosen.append(OpenVisit(visit, block, clients))
            if len(chosen) == self._parallel_blocks:
                break
        return chosen

    def _fill(self, clients: Sequence[int]) -> list[OpenVisit]:
        """Visits for clients that the schedule did not ask for."""
        size = self.schedule.clients_per_block
        filled: list[OpenVisit] = []
        candidates = iter(self._candidates())
        for first in range(0, len(clients), size):
            for visit in candidates:
                if self._block(visit) not in {other.block for other in filled}:
                    filled.append(OpenVisit(visit, self._block(visit), list(clients[first : first + size])))
                    break
        return filled

    def _candidates(self) -> Iterable[Visit]:
        yield from self.due
        for number in range(self.next_visit, self.next_visit + self.schedule.blocks * len(self._clients)):
            yield Visit(number)

    def _block(self, visit: Visit) -> int:
        return self.schedule.block(visit.number, len(self._clients))

    def _take(self) -> None:
        """What is open is no longer due; visits that were passed over become due."""
        numbers = {visit.visit.number for visit in self.open}
        last = max(numbers, default=-1)
        passed = [Visit(number) for number in range(self.next_visit, last + 1) if number not in numbers]
        self.due = [visit for visit in self.due if visit.number not in numbers] + passed
        self.next_visit = max(self.next_visit, last + 1)

    def state_numbers(self) -> dict[str, object]:
        """For a checkpoint between two rounds."""
        return {"next_visit": self.next_visit, "due": [[visit.number, visit.attempt] for visit in self.due]}

    def load_state(self, numbers: dict[str, object]) -> None:
        """Inverse of :meth:`state_numbers`."""
        due = numbers["due"]
        assert isinstance(due, list)
        self.next_visit = int(str(numbers["next_visit"]))
        self.due = [Visit(int(number), int(attempt)) for number, attempt in due]


def _clients_of(visits: Iterable[OpenVisit]) -> list[int]:
    return sorted(client for visit in visits for client in visit.clients)
