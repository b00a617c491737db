"""The client's half of every method: follow the server, work on local data, answer.

:class:`ClientWorker` has one verb, :meth:`ClientWorker.work`. One worker serves any number of simulated clients in
turn, because nothing of a client outlives its work: parameters end bitwise where they started, batches are a pure
function of ``(seed, client, round)``, optimiser state is local to a visit. (Where a configuration of block training
keeps something on the client, it is kept by client, and :meth:`ClientWorker.state_tensors` has it.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fs_fwdllm.core.trainables import Trainables, flatten
from fs_fwdllm.core.wire import Assignment, ClientUpdate
from fs_fwdllm.data import client_batches
from fs_fwdllm.data.types import Batch, Example
from fs_fwdllm.errors import DataError, WireError
from fs_fwdllm.model.objective import Objective

__all__ = ["BatchSettings", "ClientWorker", "Follower"]


@dataclass(frozen=True)
class BatchSettings:
    """How a client's examples become batches.

    Attributes:
        most_steps: from how many samples a client holds to how many batches it works on in a round at most; any number
            unless told.
    """

    batch_size: int
    seed: int
    pad_token_id: int
    shuffle: bool = True
    most_steps: Callable[[int], int] | None = None

    def cut(self, examples: Sequence[Example], *, client: int, batch_index: int, steps: int) -> list[Batch]:
        """The mini-batches of ``client`` in round ``batch_index``.

        Raises:
            WireError: it is asked for more steps than its configuration says.
        """
        most = steps if self.most_steps is None else self.most_steps(len(examples))
        if steps > most:
            raise WireError(
                f"client {client} is asked for {steps} steps, but its configuration says {most}; server and clients "
                "must agree on train.local_update_steps, train.batch_or_epoch and dataloader.batch_size"
            )
        return client_batches(
            examples,
            client=client,
            round_index=batch_index,
            steps=steps,
            batch_size=self.batch_size,
            seed=self.seed,
            pad_token_id=self.pad_token_id,
            shuffle=self.shuffle,
        )


class Follower(Protocol):
    """A model that follows the server by what assignments carry.

    Attributes:
        digest: of what it holds.
    """

    digest: bytes

    @property
    def trainables(self) -> Trainables: ...

    def follow(self, frames: Sequence[bytes], target: bytes) -> None:
        """Apply the frames that lead from here to ``target``. Raises ``WireError`` or ``DivergenceError`` if not."""


class ClientWorker(ABC):
    """Does the work of clients on one model.

    Args:
        objective: the loss on the model that is trained.
        replica: the model, following the server.
        batches: how to cut batches.
    """

    def __init__(self, objective: Objective, replica: Follower, batches: BatchSettings) -> None:
        self.objective = objective
        self.replica: Follower = replica
        self._batches = batches

    @property
    def trainables(self) -> Trainables:
        return self.replica.trainables

    def work(self, assignment: Assignment, examples: Sequence[Example]) -> ClientUpdate:
        """Follow the server to the assignment's starting point, then do the round's work on ``examples``.

        Raises:
            DataError: the client has no examples.
            WireError: the server asks for what the client's configuration does not say.
            DivergenceError: the client cannot reach the parameters the assignment starts from.
        """
        if not examples:
            raise DataError(f"client {assignment.client} was given work but holds no training sample")
        self.replica.follow(assignment.catch_up, assignment.digest)
        batches = self._batches.cut(
            examples, client=assignment.client, batch_index=assignment.batch_index, steps=assignment.steps
        )
        return self.train(assignment, batches)

    @abstractmethod
    def train(self, assignment: Assignment, batches: Sequence[Batch]) -> ClientUpdate:
        """The method's own work, from the parameters of ``assignment`` on. Leaves the trainables bitwise as found."""

    def side_by_side(self, clients: Sequence[int]) -> int:
        """How many of ``clients`` may be at work at a time: more than one where all stand at one point, and share what
        is read of a base on the disk."""
        return 1

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What simulated clients keep between rounds, for a checkpoint; most methods' clients keep nothing."""
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:  # noqa: B027 - nothing is kept, nothing is loaded
        """Inverse of :meth:`state_tensors`."""

    @contextmanager
    def _excursion(self) -> Iterator[list[torch.Tensor]]:
        """Let the trainables move and bring them back to the exact bits. Yields copies of where they started."""
        start = self.trainables.copy_values()
        try:
            yield start
        finally:
            self.trainables.load_values(start)

    def _change_since(self, start: Sequence[torch.Tensor]) -> np.ndarray:
        """How far the trainables have moved, as one float32 vector."""
        return flatten([here.detach() - there for here, there in zip(self.trainables.tensors, start, strict=True)])
