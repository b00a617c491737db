"""Which client processes get work: every one says as it joins which base it has and how it is configured.

A frozen base is never sent, so that nothing else would tell that a process has another one, or a damaged copy; nor
would anything tell of another radius or seed (:mod:`fs_fwdllm.running.agreement`). FedML's server waits for every
process in every round, and under MPI one that leaves ends them all; so a process that is refused stays in FedML's
rounds, without work, and the run goes on with the clients of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fs_fwdllm.errors import HostError
from fs_fwdllm.host.fedml.guard import name_of
from fs_fwdllm.host.placement import Placement
from fs_fwdllm.model.base.identity import UNTOLD_BASE
from fs_fwdllm.running.agreement import refusal_of
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
    _said: dict[int, tuple[bytes, str]] = field(default_factory=dict)

    def note(self, silo: int, base: object, settings: object) -> None:
        """A silo has joined with a base of this digest, and these settings' hashes; anything but bytes and text counts
        as not having said it."""
        self._said[silo] = (base if isinstance(base, bytes) else b"", settings if isinstance(settings, str) else "")

    @property
    def has_others(self) -> bool:
        """Whether there are other processes than the server's."""
        return bool(self._said)

    def close(self) -> None:
        """Decide, when all have joined.

        Raises:
            HostError: too few clients are left (``fwdllm.min_answers``).
        """
        answers = {silo: refusal_of(self.session, base, settings) for silo, (base, settings) in self._said.items()}
        self.refusals = {silo: why for silo, why in sorted(answers.items()) if why}
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
        untold = [silo for silo, (base, _) in sorted(self._said.items()) if not base and self.session.base_digest]
        refused = [f"refused {name_of(silo + 1)}: {why}" for silo, why in self.refusals.items()]
        return [*refused, *(f"warning: {name_of(silo + 1)} {UNTOLD_BASE}" for silo in untold)]
