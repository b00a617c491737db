"""The server's step: what becomes of the sum ``u`` of a round's contributions.

    * plain      ``p <- p + u``                        (``u`` holds the whole step, learning rate and sign included)
    * momentum   ``m <- m * beta``, ``m <- m + u``;    ``p <- p - (m * rate)``                      (``u``: a gradient)
    * Adam       ``m <- m * beta_1``, ``m <- m + (u * (1 - beta_1))``
                 ``v <- v * beta_2``, ``v <- v + ((u * u) * (1 - beta_2))``
                 ``p <- p - (((m * c_1) / (sqrt(v * c_2) + epsilon)) * rate)``                      (``u``: a gradient)

with ``c_i = 1 / (1 - beta_i^t)`` in the ``t``-th step (Kingma and Ba, "Adam", arXiv 1412.6980, algorithm 1).

Every pair of brackets is one IEEE-754 operation per element, issued on its own
(:mod:`~fs_fwdllm.core.arrays`), so each step is exact on every machine and in any chunking. A fused optimiser, or an
operation such as ``addcmul`` that may or may not round between its product and its sum, is not. All scalars come as
numbers with the step (``c_1`` and ``c_2``, too), so that a replica needs no count of steps.

The buffers ``m`` and ``v`` are part of what replicas must agree on: they are in the digest, travel to a late joiner and
are kept in checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fs_fwdllm.core.arrays import Array, Arrays
from fs_fwdllm.core.trainables import Trainables

__all__ = ["MOMENTS", "AdamStep", "Addition", "Moments", "MomentumStep", "PlainStep", "ServerStep", "server_step"]

#: The buffers a step may keep, in the order of digests, frames and checkpoints.
MOMENTS = ("momentum", "second_moment")

#: ``{name: buffer per tensor}``; a buffer that no step has asked for yet is not there.
Moments = dict[str, list[Array]]

#: Adds the sum of a round's contributions, in place, to buffers in the shapes of the trainables.
Addition = Callable[[Sequence[Array]], None]


class ServerStep(ABC):
    """One way to step, with all its numbers.

    Attributes:
        keeps: names of the buffers that outlive the step.
    """

    keeps: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def take(self, trainables: Trainables, moments: Moments, add: Addition, chunk: int) -> None:
        """Move ``trainables`` (weight decay has been applied) and ``moments``, in place.

        Args:
            moments: the buffers so far; those of :attr:`keeps` that are missing start from zero.
            add: called once.
            chunk: elements that are walked together where intermediate results need memory; the bits do not depend on
                it.
        """

    def _buffers(self, trainables: Trainables, moments: Moments) -> list[list[Array]]:
        for name in self.keeps:
            if name not in moments:
                moments[name] = trainables.zeros_like()
        return [moments[name] for name in self.keeps]


@dataclass(frozen=True)
class PlainStep(ServerStep):
    """The contributions are the step."""

    def take(self, trainables: Trainables, moments: Moments, add: Addition, chunk: int) -> None:
        add(trainables.tensors)


@dataclass(frozen=True)
class MomentumStep(ServerStep):
    """Heavy-ball momentum on gradient estimates.

    Attributes:
        momentum: ``beta``.
        rate: learning rate.
    """

    keeps = ("momentum",)
    momentum: float
    rate: float

    def take(self, trainables: Trainables, moments: Moments, add: Addition, chunk: int) -> None:
        arrays = trainables.arrays
        (buffers,) = self._buffers(trainables, moments)
        for buffer in buffers:
            arrays.scale(buffer, self.momentum)
        add(buffers)
        for parameter, buffer in zip(trainables.tensors, buffers, strict=True):
            arrays.subtract(parameter, arrays.scaled(buffer, self.rate))


@dataclass(frozen=True)
class AdamStep(ServerStep):
    """Adam on gradient estimates.

    Attributes:
        first_beta, second_beta: decay rates of the running means of the gradient and of its square.
        epsilon: added to the root of the second moment.
        first_correction, second_correction: ``c_1``, ``c_2``: what makes up for the zeros the means started from.
        rate: learning rate.
    """

    keeps = MOMENTS
    first_beta: float
    second_beta: float
    epsilon: float
    first_correction: float
    second_correction: float
    rate: float

    def take(self, trainables: Trainables, moments: Moments, add: Addition, chunk: int) -> None:
        arrays = trainables.arrays
        gradients = trainables.zeros_like()
        add(gradients)
        buffers = self._buffers(trainables, moments)
        for tensors in zip(trainables.tensors, gradients, *buffers, strict=True):
            flat = list(map(arrays.flat, tensors))
            for start in range(0, len(flat[0]), chunk):
                self._move(arrays, *(part[start : start + chunk] for part in flat))

    def _move(self, arrays: Arrays, parameter: Array, gradient: Array, momentum: Array, second_moment: Array) -> None:
        """The step on a slice; what was the gradient is not, afterwards."""
        arrays.scale(momentum, self.first_beta)
        arrays.add(momentum, arrays.scaled(gradient, 1.0 - self.first_beta))
        arrays.multiply(gradient, gradient)
        arrays.scale(gradient, 1.0 - self.second_beta)
        arrays.scale(second_moment, self.second_beta)
        arrays.add(second_moment, gradient)
        root = arrays.scaled(second_moment, self.second_correction)
        arrays.take_root(root)
        arrays.increase(root, self.epsilon)
        change = arrays.scaled(momentum, self.first_correction)
        arrays.divide(change, root)
        arrays.scale(change, self.rate)
        arrays.subtract(parameter, change)


def server_step(momentum: float, rate: float, adam: Sequence[float] = ()) -> ServerStep:
    """The step that a record's numbers describe (:class:`~fs_fwdllm.core.wire.RoundUpdate`)."""
    if adam:
        second_beta, epsilon, first_correction, second_correction = adam
        return AdamStep(momentum, second_beta, epsilon, first_correction, second_correction, rate)
    return MomentumStep(momentum, rate) if momentum else PlainStep()
