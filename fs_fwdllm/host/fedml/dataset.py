"""FedML's dataset around ours. FedML thinks in silos, one process each; a silo may hold many clients.

Clients are dealt to silos by :class:`~fs_fwdllm.host.placement.Placement`, whose processes they are. FedML's sampling
is not used: all silos take part in every round, and one whose clients were not drawn has nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fs_fwdllm.data.types import Example
from fs_fwdllm.errors import DataError
from fs_fwdllm.host.placement import Placement
from fs_fwdllm.running.session import Session

__all__ = ["SiloData", "make_dataset"]


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
