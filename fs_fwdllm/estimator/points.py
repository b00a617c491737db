"""The losses at several perturbed points in one batched pass; the frozen weights are read once for all of them.

Two ways with the same bits, as for a single point (:mod:`fs_fwdllm.model.perturbation`):

* :class:`ResidentPoints` makes every perturbed tensor beforehand: ``points`` copies of the trainables.
* :class:`LayerPoints` makes a module's around its own forward pass. Right where the base stays on the disk: there the
  copies of an adapter would be most of what is in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import vmap

from fs_fwdllm.core.arrays import arrays_of
from fs_fwdllm.core.direction import DirectionKey, Distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import EstimatorError, ModelError
from fs_fwdllm.estimator.base import stack_directions
from fs_fwdllm.model.base.packed import meeting_of
from fs_fwdllm.model.objective import BatchLoss
from fs_fwdllm.model.trial import foreign_code

__all__ = ["LayerPoints", "Points", "ResidentPoints", "make_points"]


class Points(ABC):
    """Evaluates the loss at ``theta + offset * z(key)`` for all offsets and keys in one pass."""

    def __init__(self, trainables: Trainables, distribution: Distribution) -> None:
        self.trainables = trainables
        self.distribution = distribution

    @abstractmethod
    def losses(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey], offsets: Sequence[float]) -> torch.Tensor:
        """``[len(offsets) * len(keys)]`` on the device, the keys of one offset after the other.

        Raises:
            EstimatorError: an operation of the model cannot be batched.
        """


class ResidentPoints(Points):
    """All points of all trainables at once."""

    def losses(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey], offsets: Sequence[float]) -> torch.Tensor:
        directions = stack_directions(batch_loss, keys, self.distribution)
        pairs = zip(batch_loss.trainables.tensors, directions, strict=True)
        return batch_loss.at_stack([_moved(tensor, direction, offsets) for tensor, direction in pairs])


class _Pass(NamedTuple):
    """A pass over several points; ``held`` are the trainables that stand moved for all of it."""

    keys: Sequence[DirectionKey]
    offsets: Sequence[float]
    point: torch.Tensor
    held: frozenset[int]


class LayerPoints(Points):
    """One module's points at a time, around its forward pass.

    PyTorch's own layers read their parameters in their forward pass and nowhere else. Trainables of other modules,
    which may do it in a hook, stand perturbed for the whole pass; so do those of layers that are never called, which
    the first pass finds, and is then run again.
    """

    def __init__(self, model: nn.Module, trainables: Trainables, distribution: Distribution) -> None:
        super().__init__(trainables, distribution)
        self._ids = {id(tensor): tensor_id for tensor_id, tensor in enumerate(trainables.tensors)}
        self._owners: dict[int, list[tuple[dict[str, Any], str, int]]] = {}
        self._active: _Pass | None = None
        self._reached: set[int] = set()
        self._held: frozenset[int] = frozenset()
        for module in model.modules():
            own = [
                (module._parameters, name, self._ids[id(parameter)])
                for name, parameter in module._parameters.items()
                if id(parameter) in self._ids
            ]
            if not own:
                continue
            self._owners[id(module)] = own
            if not type(module).__module__.startswith("torch.nn.modules"):
                self._held |= {tensor_id for _, _, tensor_id in own}
            else:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, always_call=True)
        meeting_of(model).share(self)

    def losses(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey], offsets: Sequence[float]) -> torch.Tensor:
        places = torch.arange(len(offsets) * len(keys), device=self.trainables.device)
        try:
            with foreign_code("in one pass over several points"):
                while True:
                    held = self._held

                    def at(point: torch.Tensor, held: frozenset[int] = held) -> torch.Tensor:
                        with self._standing(_Pass(keys, offsets, point, held)):
                            return batch_loss.here()

                    losses: torch.Tensor = vmap(at)(places)
                    missed = frozenset(self._ids.values()) - self._reached - held
                    if not missed:
                        return losses
                    self._held = held | missed
        except ModelError as error:
            raise EstimatorError(f"fwdllm.probes_per_batch: set it to 1, since {error}") from error

    @contextmanager
    def _standing(self, active: _Pass) -> Iterator[None]:
        self._active = active
        try:
            for own in self._owners.values():
                self._move([place for place in own if place[2] in active.held])
            yield
        finally:
            self._active = None
            for own in self._owners.values():
                self._put_back(own)

    def take(self) -> Any:
        """What stands moved in a pass that stops (:class:`~fs_fwdllm.model.base.meeting.Shared`)."""
        tensors = self.trainables.tensors
        places = [place for own in self._owners.values() for place in own]
        moved = [(owner, name, owner[name]) for owner, name, index in places if owner[name] is not tensors[index]]
        state, self._active = (self._active, moved), None
        for own in self._owners.values():
            self._put_back(own)
        return state

    def give(self, state: Any) -> None:
        """It goes on."""
        self._active, moved = state
        for owner, name, standing in moved:
            owner[name] = standing

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        if (active := self._active) is not None:
            own = self._owners[id(module)]
            self._reached.update(tensor_id for _, _, tensor_id in own)
            self._move([place for place in own if place[2] not in active.held])

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if (active := self._active) is not None:
            self._put_back([place for place in self._owners[id(module)] if place[2] not in active.held])

    def _move(self, places: Sequence[tuple[dict[str, Any], str, int]]) -> None:
        assert self._active is not None
        keys, offsets, point, _ = self._active
        for owner, name, tensor_id in places:
            if not self.distribution.covers(tensor_id):
                continue
            tensor = self.trainables.tensors[tensor_id]
            signs = self.distribution.values(keys, tensor_id, 0, tensor.numel(), arrays_of(tensor))
            stack = _moved(tensor, signs.to(torch.float32).view(len(keys), *tensor.shape), offsets)
            owner[name] = stack.index_select(0, point.reshape(1)).squeeze(0)

    def _put_back(self, places: Sequence[tuple[dict[str, Any], str, int]]) -> None:
        for owner, name, tensor_id in places:
            owner[name] = self.trainables.tensors[tensor_id]


def make_points(model: nn.Module, trainables: Trainables, distribution: Distribution, *, streamed: bool) -> Points:
    """The way that fits: a layer at a time where the base is read so, too."""
    return LayerPoints(model, trainables, distribution) if streamed else ResidentPoints(trainables, distribution)


def _moved(tensor: torch.Tensor, directions: torch.Tensor, offsets: Sequence[float]) -> torch.Tensor:
    """``tensor + offset * direction``, ``[len(offsets) * len(directions), *shape]``."""
    moved = [torch.add(tensor.detach(), directions, alpha=offset) for offset in offsets]
    return torch.cat(moved) if len(moved) > 1 else moved[0]
