"""Which client processes get work: every one says as it joins which base it has, and is compared with the server's.

A frozen base is never sent, so that nothing else would tell that a process has another one, or a damaged copy. FedML's
server waits for every process in every round, and under MPI one that leaves ends them all; so a process that is refused
stays in FedML's rounds, without work, and the run goes on with the clients of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fs_fwdllm.errors import HostError
from fs_fwdllm.host.fedml.guard import name_of
from fs_fwdllm.host.placement import Placement
from fs_fwdllm.model.base.identity import UNTOLD_BASE, refusal_of_base
from fs_fwdllm.running.session import Session

__all__ = ["Admission"]


@dataclass
class Admission:
    """Who has joined, and who of them takes part.

    Attributes:
        session: the server's; :meth:`close` leaves the clients of refused silos out of its ``client_samples``.
        placement: which client lives in which silo.
        refusals: why a silo gets no work, by silo; known once admission is closed.
    """

    session: Session
    placement: Placement
    refusals: dict[int, str] = field(default_factory=dict)
    _bases: dict[int, bytes] = field(default_factory=dict)

    def note_base(self, silo: int, base: object) -> None:
        """A silo has joined with a base of this digest; anything but bytes counts as not having said it."""
        self._bases[silo] = base if isinstance(base, bytes) else b""

    @property
    def has_others(self) -> bool:
        """Whether there are other processes than the server's."""
        return bool(self._bases)

    def close(self) -> None:
        """Decide, when all have joined.

        Raises:
            HostError: too few clients are left (``fwdllm.min_answers``).
        """
        own = self.session.base_digest if self._bases else b""
        self.refusals = {silo: why for silo, base in sorted(self._bases.items()) if (why := refusal_of_base(own, base))}
        everybody = self.session.client_samples
        left = {
            client: samples
            for client, samples in everybody.items()
            if self.placement.process_of(client) not in self.refusals
        }
        self.session.client_samples, needed = left, self.session.config.fwdllm.min_answers
        if len(left) < needed:
            raise HostError(
                f"{len(left)} of {len(everybody)} clients are left, but {needed} are needed (fwdllm.min_answers)"
            )

    def remarks(self) -> list[str]:
        """What a user should know of who has joined."""
        untold = [silo for silo, base in sorted(self._bases.items()) if not base and self.session.base_digest]
        refused = [f"refused {name_of(silo + 1)}: {why}" for silo, why in self.refusals.items()]
        return [*refused, *(f"warning: {name_of(silo + 1)} {UNTOLD_BASE}" for silo in untold)]
