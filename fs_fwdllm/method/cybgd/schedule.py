"""The cycle: which block is visited next, and by whom.

Visits are numbered ``0, 1, 2, ...`` in the order in which they are due; one round holds ``parallel_blocks`` of them.
With ``D`` blocks and clients ``0 .. N-1`` (those that hold data, in order), visit ``t`` goes to

* ascending ``t mod D``, descending ``D - 1 - t mod D``, random: place ``t mod D`` of a permutation keyed by
  (seed, cycle ``t // D``). Every block once per cycle, whatever ``D`` and ``N`` are;
* rotating: with client ``i = t mod N`` in pass ``e = t // N`` over the clients, block ``(i + e) mod D``. In ``D``
  passes every client visits every block exactly once, so that no data is bound to a block;
* fixed: always the same block (never switch); full: the only block there is, the whole model;
* aggregate: ascending, and block ``b`` belongs to the clients ``b, b + D, b + 2 D, ...`` for ever (as published).

All but aggregate take the clients in turn, ``clients_per_block`` of them to a visit. A visit that nobody answered is
due again, with the clients that follow those that failed.

The published program draws blocks with replacement for ``random`` and binds client and block for ever in ascending and
descending order when ``N`` is a multiple of ``D``; ascending order still does, which is what rotating is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fs_fwdllm.core.seeding import seeded_permutation
from fs_fwdllm.errors import ConfigError

__all__ = ["CycleSchedule", "Order", "Visit"]

Order = Literal["ascending", "descending", "random", "rotating", "fixed", "full", "aggregate"]


@dataclass(frozen=True)
class Visit:
    """One due visit: number in the sequence, and how often it has failed."""

    number: int
    attempt: int = 0


@dataclass(frozen=True)
class CycleSchedule:
    """Order of blocks and clients; a pure function of its fields.

    Attributes:
        order: see the module.
        blocks: ``D``.
        seed: of the run.
        first_block: the block of order ``fixed``.
        clients_per_block: clients per visit.
    """

    order: Order
    blocks: int
    seed: int
    first_block: int = 0
    clients_per_block: int = 1

    def cycle(self, number: int) -> int:
        """Number of the cycle over the blocks that visit ``number`` belongs to."""
        return number // self.blocks

    def block(self, number: int, clients: int) -> int:
        """The block of visit ``number`` among ``clients`` clients."""
        place = number % self.blocks
        if self.order == "descending":
            return self.blocks - 1 - place
        if self.order == "random":
            return int(seeded_permutation(self.blocks, "block order", self.seed, self.cycle(number))[place])
        if self.order == "rotating":
            turn = number * self.clients_per_block
            return (turn % clients + turn // clients) % self.blocks
        return self.first_block if self.order == "fixed" else place

    def clients(self, visit: Visit, available: Sequence[int]) -> list[int]:
        """Whom visit ``visit`` asks, out of ``available`` (sorted).

        Raises:
            ConfigError: there are not as many clients.
        """
        total, wanted = len(available), self.clients_per_block
        if wanted > total:
            raise ConfigError(f"fwdllm.blocks.clients_per_block {wanted}: only {total} clients hold training samples")
        if self.order == "aggregate":
            block = visit.number % self.blocks
            if wanted * self.blocks > total:
                raise ConfigError(
                    f"fwdllm.blocks.schedule 'aggregate': {self.blocks} blocks with clients_per_block {wanted} need "
                    f"{self.blocks * wanted} clients that hold samples, but there are {total}; use another schedule"
                )
            return [available[block + self.blocks * place] for place in range(wanted)]
        first = (visit.number + visit.attempt) * wanted
        return sorted(available[(first + place) % total] for place in range(wanted))
