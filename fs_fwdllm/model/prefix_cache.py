"""The prefix cache: run what lies below the lowest trainable layer once per batch, not once per probe.

Frozen layers below the first trainable one give the same output for every probe, both signs, every local step on the
same batch and every later round. This module records that output and plays it back, for *any* architecture, without
knowing its layers: it watches module calls. A *site* is a largest module that holds no trainable parameter; the
*boundary* is the first call of a module that owns one (or of an adapter layer). Sites called before the boundary are
recorded; when the batch is seen again each of them returns what it returned before and all glue code around them runs
as usual. Nothing is recomputed in another order or shape, so the loss is bit for bit the one without the cache. Glue
code may write into what it is given, so it is given copies; where glue code itself reads a trainable parameter, the
first site whose input depends on one is the boundary.

Most recorded outputs are never looked at: layer 3's output only fed layer 4, which is played back as well. So, once per
model, each recorded tensor in turn is replaced by a stand-in of the right shape that occupies four bytes and contains
NaN. If the loss stays finite, nobody reads that tensor, and the stand-in is all that is kept of it from then on; a
wrong guess could not stay unnoticed. A head-only run thus keeps one pooled vector per sample. No backward pass is
involved: a device that cannot run one can use the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.base.packed import meeting_of, packed_layers

__all__ = ["Prefix", "PrefixCache"]

#: Below this share of the model's matrix parameters the prefix saves less than it costs to keep.
_WORTHWHILE_SHARE = 0.05
#: Above the largest size that the C library serves from its heap, so that a block is a mapping of its own.
_BLOCK_BYTES = 64 << 20
_ALIGNMENT_BYTES = 64
#: Layers whose ``forward`` is one product with their own weight and never calls a child.
_MATRIX_LAYERS = (nn.Linear, Conv1D)


class _BoundaryReached(Exception):
    """Ends a recording run; never leaves this module."""


@dataclass
class _Call:
    site: nn.Module
    leaves: list[Any]
    structure: Any

    def output(self) -> Any:
        return pytree.tree_unflatten([_copy(leaf) for leaf in self.leaves], self.structure)

    def nbytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves if _occupies_memory(leaf))


class _Stage:
    """Where recorded calls are played back: the prefix whose turn it is, and how far it has come.

    Sites are replaced once however many passes play there, so that passes may end in any order.
    """

    def __init__(self) -> None:
        self._playing: tuple[Prefix | None, int] = (None, 0)
        self._players: dict[int, tuple[nn.Module, Any, int]] = {}

    @property
    def position(self) -> int:
        """Of the call that is played next."""
        return self._playing[1]

    @contextmanager
    def playing(self, prefix: Prefix, start: int) -> Iterator[None]:
        """Let the sites of ``prefix`` return what they returned, from call ``start`` on."""
        before, sites = self._playing, list({id(call.site): call.site for call in prefix.calls}.values())
        self._playing = (prefix, start)
        try:
            for site in sites:
                self._replace(site)
            yield
        finally:
            self._playing = before
            for site in sites:
                self._restore(site)

    def take(self) -> Any:
        """The playback of a pass that stops (:class:`~fs_fwdllm.model.base.meeting.Shared`)."""
        state, self._playing = self._playing, (None, 0)
        return state

    def give(self, state: Any) -> None:
        """It goes on."""
        self._playing = state

    def _replace(self, site: nn.Module) -> None:
        _, previous, players = self._players.get(id(site), (site, site.__dict__.get("forward"), 0))
        self._players[id(site)] = (site, previous, players + 1)
        if not players:
            site.forward = self._player(site, site.forward)

    def _restore(self, site: nn.Module) -> None:
        _, previous, players = self._players.pop(id(site))
        if players > 1:
            self._players[id(site)] = (site, previous, players - 1)
        else:
            _put_back(site, previous)

    def _player(self, site: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            prefix, position = self._playing
            if prefix is not None and position < len(prefix.calls) and prefix.calls[position].site is site:
                self._playing = (prefix, position + 1)
                return prefix.calls[position].output()
            return original(*args, **kwargs)

        return forward


class Prefix:
    """The recorded calls of one batch. Inside :meth:`replayed` the model starts where the recording ended."""

    def __init__(self, calls: list[_Call], stage: _Stage) -> None:
        self.calls = calls
        self.bytes = sum(call.nbytes() for call in calls)
        self._stage = stage

    def replayed(self, start: int = 0) -> AbstractContextManager[None]:
        """Play the outputs from number ``start`` on back to the model for the duration of one forward pass."""
        return self._stage.playing(self, start)

    def resumed(self) -> AbstractContextManager[None]:
        """Playback from where it stands now, for a part of the model that will be run again later."""
        return self.replayed(self._stage.position)


class _Shelf:
    """Kept tensors side by side in large blocks.

    Thousands of separate allocations among short-lived ones would fragment the heap and occupy far more memory.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, leaf: Any) -> Any:
        """A copy of a tensor on the shelf; anything that occupies no memory as it is."""
        if not _occupies_memory(leaf):
            return leaf
        count = leaf.numel() * leaf.element_size()
        if self._used + count > len(self._block) or self._block.device != leaf.device:
            self._block = torch.empty(max(_BLOCK_BYTES, count), dtype=torch.uint8, device=leaf.device)
            self._used = 0
        place = self._block[self._used : self._used + count].view(leaf.dtype).view(leaf.shape)
        self._used += -(-count // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return place.copy_(leaf)


class PrefixCache:
    """Records prefixes and keeps them, per batch key, within a byte budget.

    Once the budget is used no further batch is admitted and none is dropped: clients revisit their batches in turn, and
    for such a scan keeping a fixed part beats evicting the least recently used.

    Args:
        model: in evaluation mode, with ``requires_grad`` set on what is trained.
        budget_bytes: memory for recorded outputs; zero switches the cache off.
    """

    def __init__(self, model: nn.Module, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.hits = 0
        self.misses = 0
        self._model = model
        self._sites, self._boundaries = _partition(model)
        self._kept: dict[Hashable, Prefix] = {}
        self._stage = _Stage()
        self._shelf = _Shelf()
        self._read: list[list[bool]] | None = None
        self._enabled = budget_bytes > 0 and bool(self._sites)
        self._meeting = meeting_of(model)
        self._meeting.share(self._stage)

    def prefix(self, key: Hashable | None, run: Callable[[], torch.Tensor]) -> Prefix | None:
        """The prefix of a batch, recorded now if it is not kept.

        Args:
            key: names the batch exactly; ``None`` for one that will not come back.
            run: runs the model on the batch and returns a scalar loss.

        Returns:
            ``None`` where the cache is off or nothing worthwhile lies below the boundary.
        """
        if not self._enabled:
            return None
        if key is not None and key in self._kept:
            self.hits += 1
            return self._kept[key]
        self.misses += 1
        with self._meeting.alone():
            prefix = self._record(run)
        if prefix is not None and key is not None and self.used_bytes + prefix.bytes <= self.budget_bytes:
            for call in prefix.calls:
                call.leaves = [self._shelf.keep(leaf) for leaf in call.leaves]
            self._kept[key] = prefix
            self.used_bytes += prefix.bytes
        return prefix

    def _record(self, run: Callable[[], torch.Tensor]) -> Prefix | None:
        calls: list[_Call] = []

        def note(site: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = original(*args, **kwargs)
                leaves, structure = pytree.tree_flatten(output)
                if _depends_on_trainables((args, kwargs, leaves)):
                    raise _BoundaryReached
                kept = [_copy(leaf) for leaf in self._prune(len(calls), leaves)]
                calls.append(_Call(site, kept, structure))
                return output

            return forward

        def stop(site: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                raise _BoundaryReached

            return forward

        recording, stopping = _patched(self._sites, note), _patched(self._boundaries, stop)
        # With gradients enabled a tensor tells whether a trainable parameter had a part in it; none is computed.
        with torch.enable_grad(), recording, stopping, suppress(_BoundaryReached):
            run()
        if not calls or self._share(calls) < _WORTHWHILE_SHARE:
            self._enabled = False
            return None
        if self._read is None:
            self._read = _leaves_that_are_read(calls, run, self._stage)
            for index, call in enumerate(calls):
                call.leaves = self._prune(index, call.leaves)
        return Prefix(calls, self._stage)

    def _prune(self, index: int, leaves: list[Any]) -> list[Any]:
        if self._read is None:
            return leaves
        return [leaf if read else _stand_in(leaf) for leaf, read in zip(leaves, self._read[index], strict=True)]

    def _share(self, calls: list[_Call]) -> float:
        def matrices(module: nn.Module) -> int:
            embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
            held = sum(p.numel() for p in module.parameters() if p.dim() > 1 and id(p) not in embeddings)
            return held + sum(layer.out_features * layer.in_features for _, layer in packed_layers(module))

        sites = {id(call.site): call.site for call in calls}
        return sum(matrices(site) for site in sites.values()) / max(1, matrices(self._model))


def _partition(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Largest modules without a trainable parameter, and the modules whose call ends the prefix."""
    sites: list[nn.Module] = []
    boundaries: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        called = type(module).forward is not nn.Module.forward  # a list of layers is not
        if called and not any(parameter.requires_grad for parameter in module.parameters()):
            if next(module.parameters(), None) is not None or packed_layers(module):
                sites.append(module)
            return
        if _owns_trainable(module):
            boundaries.append(module)
            return
        if isinstance(module, _MATRIX_LAYERS):
            # A frozen matrix with an adapter hung on it by a hook: ``forward`` is the frozen part alone.
            sites.append(module)
        for child in module.children():
            visit(child)

    visit(model)
    unique = {id(site): site for site in sites}
    return list(unique.values()), boundaries


def _owns_trainable(module: nn.Module) -> bool:
    """Whether a call of ``module`` itself reads trainable parameters: its own, a container's, or an adapter's."""
    containers = (nn.ParameterDict, nn.ParameterList)
    own = list(module.parameters(recurse=False))
    for child in module.children():
        if isinstance(child, containers) or type(child).__module__.startswith("torch.nn.utils.parametrize"):
            own += list(child.parameters())
    if any(parameter.requires_grad for parameter in own):
        return True
    return hasattr(module, "adapter_layer_names") or hasattr(module, "parametrizations")


@torch.no_grad()
def _leaves_that_are_read(calls: list[_Call], run: Callable[[], torch.Tensor], stage: _Stage) -> list[list[bool]]:
    """Which recorded tensors the rest of the model reads: those whose replacement by NaN reaches the loss.

    A tensor that cannot be replaced (glue code writes into it, the loss is not finite to begin with) counts as read.
    """
    prefix = Prefix(calls, stage)

    def loss_is_finite() -> bool:
        with prefix.replayed():
            return bool(torch.isfinite(run()))

    if not loss_is_finite():
        return [[True for _ in call.leaves] for call in calls]
    read: list[list[bool]] = []
    for call in calls:
        read.append([])
        for index, leaf in enumerate(call.leaves):
            if not _is_float(leaf):
                read[-1].append(True)
                continue
            call.leaves[index] = _stand_in(leaf)
            try:
                read[-1].append(not loss_is_finite())
            except (RuntimeError, ModelError):
                read[-1].append(True)
            finally:
                call.leaves[index] = leaf
    return read


def _depends_on_trainables(values: Any) -> bool:
    leaves = pytree.tree_leaves(values)
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)


def _copy(leaf: Any) -> Any:
    """A copy that may be written to; a stand-in is left as it is."""
    return leaf.clone() if _occupies_memory(leaf) else leaf


def _occupies_memory(leaf: Any) -> bool:
    """Whether this is a tensor, and not a stand-in."""
    return isinstance(leaf, torch.Tensor) and not (leaf.dim() and not any(leaf.stride()))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _stand_in(leaf: torch.Tensor) -> torch.Tensor:
    return torch.full((), float("nan"), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)


@contextmanager
def _patched(modules: Any, wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace ``forward`` on module *instances* for a while."""
    patched: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            patched.append((module, module.__dict__.get("forward")))
            module.forward = wrap(module, module.forward)
        yield
    finally:
        for module, previous in patched:
            _put_back(module, previous)


def _put_back(module: nn.Module, previous: Any) -> None:
    """The ``forward`` that an instance had, or its class's."""
    if previous is None:
        del module.forward
    else:
        module.forward = previous
