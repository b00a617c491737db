"""Evaluating the loss at ``theta + c z`` without ever changing ``theta``.

Two ways with the same bits:

* :class:`ResidentPerturbation` writes all perturbed tensors beside the originals and lets the model hold them for one
  forward pass. Right for adapters, which are small.
* :class:`StreamedPerturbation` perturbs *one module at a time*, around that module's own forward pass, into a scratch
  buffer that all modules share. Right for full-parameter tuning: the extra memory is one layer, the parameters are
  never written, so nothing has to be undone and nothing can drift. (The published systems add ``+h z``, ``-2h z``,
  ``+h z`` to the parameters themselves, which does not restore them in floating point.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from fs_fwdllm.core.direction import DirectionKey, Distribution
from fs_fwdllm.core.replay import perturb
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.model.base.packed import meeting_of, reader_of
from fs_fwdllm.model.objective import BatchLoss

__all__ = ["Perturbation", "ResidentPerturbation", "StreamedPerturbation", "make_perturbation"]


class Perturbation(ABC):
    """Evaluates the loss at perturbed parameters."""

    def __init__(self, trainables: Trainables, distribution: Distribution) -> None:
        self.trainables = trainables
        self.distribution = distribution

    @abstractmethod
    def loss(self, batch_loss: BatchLoss, key: DirectionKey, coefficient: float) -> torch.Tensor:
        """The loss at ``theta + coefficient * z(key)``, a float64 scalar on the device."""


class ResidentPerturbation(Perturbation):
    """All perturbed tensors at once, in buffers that are reused from probe to probe."""

    def __init__(self, trainables: Trainables, distribution: Distribution) -> None:
        super().__init__(trainables, distribution)
        self._buffers: list[torch.Tensor] | None = None

    @torch.no_grad()
    def loss(self, batch_loss: BatchLoss, key: DirectionKey, coefficient: float) -> torch.Tensor:
        if self._buffers is None:
            self._buffers = [torch.empty_like(tensor.detach()) for tensor in self.trainables.tensors]
        for tensor_id, (tensor, buffer) in enumerate(zip(self.trainables.tensors, self._buffers, strict=True)):
            if not self.distribution.covers(tensor_id):
                buffer.copy_(tensor.detach())
                continue
            perturb(tensor.detach(), buffer, coefficient, key, tensor_id, self.distribution)
        return batch_loss.at(self._buffers)


class _Moved(NamedTuple):
    """Parameters that stand perturbed, with what they held; ``module`` is whose forward pass that lasts for."""

    module: nn.Module | None
    originals: list[tuple[torch.Tensor, torch.Tensor]]


class StreamedPerturbation(Perturbation):
    """One module's tensors at a time, around its forward pass.

    Tensors that no module's own forward pass reads (their owner is only a container) are found in the first pass, which
    is then run again, and stand perturbed for the whole pass from there on. Leaving a pass puts every tensor back
    however the pass ended, by an interrupt from the keyboard too.

    Attributes:
        scratch: where perturbed tensors stand, one flat buffer for each depth of modules that call one another.
    """

    def __init__(self, model: nn.Module, trainables: Trainables, distribution: Distribution) -> None:
        super().__init__(trainables, distribution)
        self._ids = {id(tensor): tensor_id for tensor_id, tensor in enumerate(trainables.tensors)}
        self._active: tuple[DirectionKey, float] | None = None
        self._reached: set[int] = set()
        self._held: frozenset[int] = frozenset()
        self.scratch: list[torch.Tensor] = []
        self._open: list[_Moved] = []
        for module in model.modules():
            if any(id(parameter) in self._ids for parameter in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, always_call=True)
        meeting_of(model).share(self)

    @torch.no_grad()
    def loss(self, batch_loss: BatchLoss, key: DirectionKey, coefficient: float) -> torch.Tensor:
        while True:
            held = self._held
            with self._streaming(key, coefficient, [self.trainables.tensors[index] for index in sorted(held)]):
                loss = batch_loss.here()
            missed = {index for index in self._ids.values() if self.distribution.covers(index)} - self._reached - held
            if not missed:
                return loss
            self._held = held | missed

    def take(self) -> Any:
        """What stands perturbed in a pass that stops (:class:`~fs_fwdllm.model.base.meeting.Shared`)."""
        standing = [pair for level in self._open for pair in level.originals]
        moved = [(parameter, parameter.data) for parameter, _ in standing]
        state = self._active, self._open, self.scratch[: len(self._open)], moved
        for parameter, original in reversed(standing):
            parameter.data = original
        nothing = torch.empty(0, device=self.trainables.device)
        self.scratch[: len(self._open)] = [nothing] * len(self._open)
        self._active, self._open = None, []
        return state

    def give(self, state: Any) -> None:
        """It goes on."""
        self._active, self._open, scratch, moved = state
        self.scratch[: len(scratch)] = scratch
        for parameter, standing in moved:
            parameter.data = standing

    @contextmanager
    def _streaming(self, key: DirectionKey, coefficient: float, held: Sequence[torch.Tensor]) -> Iterator[None]:
        self._active = (key, coefficient)
        try:
            self._move(None, held)
            yield
        finally:
            self._active = None
            while self._open:
                self._put_back()

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        if self._active is not None:
            self._move(module, [p for p in module.parameters(recurse=False) if id(p) in self._ids])

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._active is not None and self._open and self._open[-1].module is module:
            self._put_back()

    def _move(self, module: nn.Module | None, parameters: Sequence[torch.Tensor]) -> None:
        assert self._active is not None
        key, coefficient = self._active
        # A tensor held for the whole pass, or shared with a caller that is still running, has been moved already.
        standing = {id(parameter) for moved in self._open for parameter, _ in moved.originals}
        due = [
            parameter
            for parameter in parameters
            if id(parameter) not in standing and self.distribution.covers(self._ids[id(parameter)])
        ]
        scratch = self._scratch_for(len(self._open), sum(parameter.numel() for parameter in due))
        originals: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._open.append(_Moved(module, originals))
        for parameter, target in zip(due, scratch.split([p.numel() for p in due]), strict=True):
            tensor_id = self._ids[id(parameter)]
            if module is not None:
                self._reached.add(tensor_id)
            perturb(parameter.data, target, coefficient, key, tensor_id, self.distribution)
            originals.append((parameter, parameter.data))
            parameter.data = target.view(parameter.shape)

    def _put_back(self) -> None:
        for parameter, original in self._open[-1].originals:
            parameter.data = original
        self._open.pop()

    def _scratch_for(self, depth: int, count: int) -> torch.Tensor:
        """A buffer per nesting depth, because a module may call another one while its own parameters are in use."""
        while len(self.scratch) <= depth:
            self.scratch.append(torch.empty(0, device=self.trainables.device))
        if self.scratch[depth].numel() < count:
            self.scratch[depth] = torch.empty(count, device=self.trainables.device)
        return self.scratch[depth][:count]


def make_perturbation(
    model: nn.Module, trainables: Trainables, distribution: Distribution, *, streamed: bool
) -> Perturbation:
    """The way that fits: streamed for full-parameter tuning and over a base on the disk, resident for adapters."""
    if streamed or reader_of(model) is not None:
        return StreamedPerturbation(model, trainables, distribution)
    return ResidentPerturbation(trainables, distribution)
