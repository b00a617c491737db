"""Which client lives where: FedML thinks in silos, one process each; a silo may hold many clients.

Client ``c`` always lives in silo ``(c - 1) % silos``, so that its process is the one that knows what it knows. With as
many silos as clients this is FedML's own numbering, client 1 in silo 0. FedML's sampling is not used: all silos take
part in every round, and one whose clients were not drawn has nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fs_fwdllm.data.types import Example
from fs_fwdllm.errors import DataError
from fs_fwdllm.run.session import Session

__all__ = ["Placement", "SiloData", "make_dataset"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Placement:
    """Clients, numbered from 1, dealt to ``silos`` silos, numbered from 0."""

    silos: int

    def silo_of(self, client: int) -> int:
        return (client - 1) % self.silos

    def split(self, values: Mapping[int, Value]) -> dict[int, dict[int, Value]]:
        """``{silo: {client: value}}`` from ``{client: value}``; every silo is there, some may be empty."""
        found: dict[int, dict[int, Value]] = {silo: {} for silo in range(self.silos)}
        for client, value in sorted(values.items()):
            found[self.silo_of(client)][client] = value
        return found


@dataclass(frozen=True)
class SiloData:
    """The samples of a silo's clients. ``len`` counts samples, not batches."""

    clients: Mapping[int, Sequence[Example]]

    def __len__(self) -> int:
        return sum(map(len, self.clients.values()))

    def of(self, client: int) -> Sequence[Example]:
        """A client's samples. Raises :class:`~fs_fwdllm.errors.DataError` for a client of another silo."""
        if client not in self.clients:
            raise DataError(f"client {client} does not live in this silo, which holds {sorted(self.clients)}")
        return self.clients[client]


def make_dataset(session: Session, placement: Placement) -> list[Any]:
    """FedML's eight-element dataset around the data of a session.

    Returns:
        ``[train samples, test samples, None, evaluation batches, {silo: train samples}, {silo: SiloData},
        {silo: SiloData}, classes]``, silos counted from 0. The counts are samples.
    """
    clients = session.data.clients
    train = placement.split({client: held.train for client, held in clients.items()})
    test = placement.split({client: held.test or held.val for client, held in clients.items()})
    train_data = {silo: SiloData(held) for silo, held in train.items()}
    test_data = {silo: SiloData(held) for silo, held in test.items()}
    return [
        sum(map(len, train_data.values())),
        sum(len(batch) for batch in session.evaluation_batches),
        None,
        session.evaluation_batches,
        {silo: len(held) for silo, held in train_data.items()},
        train_data,
        test_data,
        len(session.data.label_names),
    ]
