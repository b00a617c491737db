"""Which client lives in which process, where a process may hold many: a host with fewer processes than clients asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Placement"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Placement:
    """Clients, numbered from 1, dealt to ``processes`` processes, numbered from 0.

    A client always lives in the same process, which is thus the one that knows what it knows. With as many processes as
    clients, client 1 lives in process 0.
    """

    processes: int

    def process_of(self, client: int) -> int:
        """The process in which a client lives."""
        return (client - 1) % self.processes

    def split(self, values: Mapping[int, Value]) -> dict[int, dict[int, Value]]:
        """``{process: {client: value}}`` from ``{client: value}``; every process is there, some may be empty."""
        found: dict[int, dict[int, Value]] = {process: {} for process in range(self.processes)}
        for client, value in sorted(values.items()):
            found[self.process_of(client)][client] = value
        return found
