"""Losses of a language model taken block by block of its vocabulary: no row of logits ever exists whole.

For ``n`` positions and ``V`` tokens the logits are ``n x V`` numbers, the largest tensor of a forward-only step, and
passes that go side by side over a base on the disk would each hold theirs while they wait for its next piece. All that
is wanted of them are ``n`` losses. They follow from what is kept of each slice of the vocabulary
(:mod:`fs_fwdllm.model.log_sum_exp`), to the same bit.

Their derivative by the hidden states ``h`` is to be had from the same piece while it is there::

    dL_n/dh_n = sum_v softmax_v w_v - w_target

summed under a maximum that grows, as the sum of exponentials is. So the matrix is looked at once where values and
derivatives are wanted, and a tangent costs a product of two vectors a position, however many tangents there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fs_fwdllm.model.base.codecs import rows_at_a_time
from fs_fwdllm.model.base.packed import PackedLinear
from fs_fwdllm.model.log_sum_exp import SLICE_COLUMNS, Slice, joined, slice_of

__all__ = ["Beside", "Judge", "Judged", "can_judge", "columns_at_once", "judging", "step_back", "step_in"]


#: What is wanted beside losses: which token is the likeliest, or the losses' derivatives by what goes into the head.
Beside = Literal["nothing", "predictions", "derivatives"]


class Judged(NamedTuple):
    """Per position the loss, float64 ``[positions]``, and where it is wanted the likeliest token, ``[positions]``."""

    losses: torch.Tensor
    predictions: torch.Tensor


def can_judge(head: nn.Module | None) -> bool:
    """Whether losses can be taken in ``head``: a frozen linear layer that nothing has been added to."""
    return (
        type(head) in (nn.Linear, PackedLinear)
        and not head.weight.requires_grad  # type: ignore[union-attr]
        and head.bias is None  # type: ignore[union-attr]
        and not head._forward_hooks  # type: ignore[union-attr]
        and "forward" not in vars(head)
    )


@dataclass
class Judge:
    """What is called in the place of a head, and what it found."""

    head: Any
    targets: torch.Tensor
    beside: Beside
    found: list[Judged] = field(default_factory=list)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """A zero a position, instead of logits."""
        rows = hidden.flatten(0, -2)
        self.found.append(Judged(*_Losses.apply(rows, self.targets, self.head, self.beside)))  # type: ignore
        return torch.zeros_like(hidden[..., :1])


@contextmanager
def judging(head: Any, targets: torch.Tensor, beside: Beside) -> Iterator[list[Judged]]:
    """While this lasts, a pass through ``head`` leaves its losses in the list.

    Args:
        targets: the token that follows each position that goes into the head.
        beside: what else is wanted.
    """
    judge = Judge(head, targets, beside)
    step_in(judge)
    try:
        yield judge.found
    finally:
        step_back(head)


def step_in(judge: Judge) -> None:
    """Let it be called in the place of its head."""
    judge.head.forward = judge


def step_back(head: Any) -> Judge | None:
    """Let a head be itself again; gives what was called in its place, if that was one of these."""
    standing = None if head is None else vars(head).get("forward")
    if not isinstance(standing, Judge):
        return None
    del head.forward
    return standing


def columns_at_once(head: Any) -> int:
    """Of how many tokens there are logits at a time."""
    return min(int(head.out_features), SLICE_COLUMNS + rows_at_a_time(head.in_features, torch.float32))


def _blocks(head: Any, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, int, torch.Tensor]]:
    """``(first, last, rows)`` over the matrix, cut at the same rows wherever it is kept."""
    if isinstance(head, PackedLinear):
        yield from head.blocks(dtype, device)
        return
    step = rows_at_a_time(head.in_features, dtype)
    for first in range(0, head.out_features, step):
        last = min(first + step, head.out_features)
        yield first, last, head.weight[first:last].to(dtype)


class _Losses(torch.autograd.Function):
    """Losses and what is wanted beside them; derivatives, which only this class reads, are by the hidden states."""

    @staticmethod
    def forward(
        hidden: torch.Tensor, targets: torch.Tensor, layer: Any, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sweep = _Sweep(targets.clamp_min(0))
        gradient = _Gradient(torch.zeros_like(hidden, dtype=torch.float32)) if beside == "derivatives" else None
        likeliest = _Likeliest() if beside == "predictions" else None
        for first, last, rows in _blocks(layer, hidden.dtype, hidden.device):
            logits = F.linear(hidden, rows).float()
            chosen = sweep.look(logits, first, last)
            if gradient is not None:
                gradient.add(logits, rows, chosen, sweep.targets[chosen] - first)
            if likeliest is not None:
                likeliest.look(logits, first)
        if gradient is not None:
            return sweep.losses(), gradient.total()
        return sweep.losses(), hidden.new_empty(len(hidden), 0) if likeliest is None else likeliest.tokens

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (upstream[:, None] * slopes).to(ctx.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return (tangent.double() * slopes.double()).sum(dim=-1), None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, hidden: torch.Tensor, targets: torch.Tensor, layer: Any, beside: Beside
    ) -> tuple[tuple[torch.Tensor, ...], int]:
        stacked = hidden.movedim(in_dims[0], 0)
        points = len(stacked)
        found = _Losses.apply(stacked.flatten(0, 1), targets.repeat(points), layer, beside)  # type: ignore
        return tuple(one.unflatten(0, (points, -1)) for one in found), 0


@dataclass
class _Sweep:
    """What is kept of the logits, block by block of the vocabulary.

    Attributes:
        targets: the token that follows each position.
    """

    targets: torch.Tensor
    _slices: list[Slice] = field(default_factory=list)
    _waiting: list[torch.Tensor] = field(default_factory=list)
    _chosen: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._chosen = torch.zeros_like(self.targets, dtype=torch.float32)

    def look(self, logits: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Note the logits of tokens ``first`` to ``last``; gives the positions whose targets are among them."""
        here = torch.nonzero((self.targets >= first) & (self.targets < last)).flatten()
        self._chosen[here] = logits[here, self.targets[here] - first]
        self._waiting.append(logits)
        while sum(some.shape[1] for some in self._waiting) >= SLICE_COLUMNS:
            together = torch.cat(self._waiting, dim=1) if len(self._waiting) > 1 else self._waiting[0]
            self._slices.append(slice_of(together[:, :SLICE_COLUMNS]))
            self._waiting = [together[:, SLICE_COLUMNS:].clone()]
        return here

    def losses(self) -> torch.Tensor:
        """Of all positions, after the last block."""
        rest = torch.cat(self._waiting, dim=1)
        slices = [*self._slices, slice_of(rest)] if rest.shape[1] else self._slices
        return joined(slices, self._chosen)


@dataclass
class _Likeliest:
    """The token of the largest logit so far."""

    tokens: torch.Tensor = field(init=False)
    _largest: torch.Tensor | None = None

    def look(self, logits: torch.Tensor, first: int) -> None:
        """Compare the logits of one block of the vocabulary; of equal ones the first counts."""
        largest, token = logits.max(dim=1)
        if self._largest is None:
            self._largest, self.tokens = largest, token
            return
        larger = largest > self._largest
        self.tokens = torch.where(larger, token + first, self.tokens)
        self._largest = torch.where(larger, largest, self._largest)


@dataclass
class _Gradient:
    """The sum of rows of the matrix weighted by exponentials, relative to the largest logit so far."""

    _weighted: torch.Tensor
    _largest: torch.Tensor | None = None
    _total: torch.Tensor | None = None
    _targets: torch.Tensor = field(init=False)

    def add(self, logits: torch.Tensor, rows: torch.Tensor, chosen: torch.Tensor, columns: torch.Tensor) -> None:
        """One block of the vocabulary; the targets of positions ``chosen`` are its ``columns``."""
        largest = logits.amax(dim=1)
        if self._largest is None or self._total is None:
            self._targets = torch.zeros_like(self._weighted)
            self._total = torch.zeros_like(largest)
        else:
            largest = torch.maximum(largest, self._largest)
            shrunk = (self._largest - largest).exp()
            self._weighted *= shrunk[:, None]
            self._total *= shrunk
        self._largest = largest
        weights = (logits - largest[:, None]).exp()
        self._weighted.addmm_(weights, rows.float())
        self._total += weights.sum(dim=1)
        self._targets[chosen] = rows[columns].float()

    def total(self) -> torch.Tensor:
        """The derivatives, after the last block."""
        assert self._total is not None
        return self._weighted.div_(self._total[:, None]).sub_(self._targets)
