"""Which version of each block every client holds, as far as the server can know.

A client that answered has followed its assignment; one that evaluated has followed what it was sent for that. Whatever
else was sent may never have arrived, and counts as not sent. A client that comes back says a digest: the base model's
(it was started anew), the one it was last known by (it only was away), or another one: then nothing is known of it, and
it is sent every block once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["UNKNOWN", "Holdings"]

#: The version of a block that a client may hold in any state; no block has it.
UNKNOWN = -1


@dataclass
class _Known:
    digest: bytes
    versions: list[int]


class Holdings:
    """Versions by client.

    Args:
        parts: number of blocks, with the part that is always active.
        base_digest: of the model before the first round, whose blocks all have version 0.
    """

    def __init__(self, parts: int, base_digest: bytes) -> None:
        self._parts = parts
        self._base = base_digest
        self._known: dict[int, _Known] = {}
        self._told: dict[int, _Known] = {}

    def of(self, client: int) -> list[int]:
        """The version of each part that ``client`` holds; 0 of all for one that was never heard."""
        return list(self._of(client).versions)

    def _of(self, client: int) -> _Known:
        return self._known.get(client) or _Known(self._base, [0] * self._parts)

    def note_answered(self, client: int, digest: bytes, parts: Iterable[int], versions: Sequence[int]) -> None:
        """``client`` followed an assignment of ``digest``, which brought ``parts`` to ``versions``."""
        held = self.of(client)
        for part in parts:
            held[part] = versions[part]
        self._known[client] = _Known(digest, held)

    def note_told(self, client: int, digest: bytes, versions: Sequence[int]) -> None:
        """``client`` was sent all it lacks of ``versions``; :meth:`note_holds` confirms that it arrived."""
        self._told[client] = _Known(digest, list(versions))

    def note_holds(self, client: int, digest: bytes) -> None:
        """``client`` says that it is at ``digest``."""
        told = self._told.pop(client, None)
        if told is not None and told.digest == digest:
            self._known[client] = told
        elif digest == self._base:
            self._known.pop(client, None)
        elif digest != self._of(client).digest:
            self._known[client] = _Known(digest, [UNKNOWN] * self._parts)

    def state_numbers(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"known": [[client, own.digest.hex(), own.versions] for client, own in sorted(self._known.items())]}

    def load_state(self, numbers: dict[str, object]) -> None:
        """Inverse of :meth:`state_numbers`."""
        known = numbers["known"]
        assert isinstance(known, list)
        self._known = {int(client): _Known(bytes.fromhex(digest), list(held)) for client, digest, held in known}
        self._told.clear()
