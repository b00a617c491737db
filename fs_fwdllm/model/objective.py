"""The objective: the loss of a batch as a function of the trainable parameters.

Estimators know nothing of transformers; they ask a :class:`BatchLoss` for the loss *here* (where the model stands),
*at* given values of the trainables, or at a stack of values in one batched pass. Behind it stand four facts that are
the same for every estimator:

* The model is in evaluation mode, so dropout is off and two evaluations at one point agree bit for bit.
* The loss is computed from float32 logits whatever the base's dtype, and summed in float64: a difference of two
  half-precision losses would be mostly rounding.
* What the labels of a batch are and where a model is read is the task's :mod:`~fs_fwdllm.model.readout`; all tasks end
  in rows of logits with one target each.
* For language models the vocabulary projection runs only at positions that have a label. A forward-only step holds no
  activations, so the ``[tokens, vocabulary]`` logits would be its largest tensor. Where nothing but the
  loss follows the projection, losses are taken slice by slice of the vocabulary, and there are no logits at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.data.types import Batch, Task
from fs_fwdllm.errors import DataError, EstimatorError, ModelError
from fs_fwdllm.model.base.packed import meeting_of
from fs_fwdllm.model.base.vocabulary import Beside, Judged, can_judge, judging, step_back, step_in
from fs_fwdllm.model.inputs import Group, batch_on, groups_of
from fs_fwdllm.model.prefix_cache import Prefix, PrefixCache
from fs_fwdllm.model.readout import Readout, make_readout
from fs_fwdllm.model.trial import PADDED_RIGHT, Conduct, foreign_code, output_layer_of

__all__ = ["BatchLoss", "Objective"]

T = TypeVar("T")


class Objective:
    """Loss and logits of a model on batches.

    Args:
        model: in evaluation mode.
        trainables: the model's own trainable tensors.
        task: what the labels mean.
        prefix_cache_bytes: budget of the prefix cache; zero switches it off.
        label_tokens: for ``label_words`` the token that stands for each class.
        conduct: how the model takes padding, and whether anything follows its output layer.

    Attributes:
        head: a language model's output layer; ``None`` of other models, and where it says of none.
    """

    def __init__(
        self,
        model: nn.Module,
        trainables: Trainables,
        task: Task,
        prefix_cache_bytes: int = 0,
        label_tokens: Sequence[int] = (),
        conduct: Conduct = PADDED_RIGHT,
    ) -> None:
        self.model = model
        self.trainables = trainables
        self.task = task
        self.conduct = conduct
        self._places = _places_of(model, trainables)
        self.readout = make_readout(task, label_tokens)
        self.cache = PrefixCache(model, prefix_cache_bytes)
        self._positions: torch.Tensor | None = None
        self._selected = False
        self._standing: Sequence[torch.Tensor] | None = None
        self.meeting = meeting_of(model)
        self.meeting.share(self)
        self.head: Any = output_layer_of(model) if self.readout.reads_tokens else None
        if self.head is not None:
            # first, so that an adapter of the projection sees labelled positions only, too
            self.head.register_forward_pre_hook(self._select_positions, prepend=True)

    def on(self, batch: Batch) -> BatchLoss:
        """The loss of ``batch``. Raises :class:`~fs_fwdllm.errors.DataError` if no position has a label."""
        return BatchLoss(self, batch)

    @contextmanager
    def standing_at(self, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """Let the model's modules hold ``values`` in place of the trainables, in every place that shares one.

        Unlike a parameter's storage, what stands there may be a batched or a dual tensor of ``torch.func``. PyTorch's
        own ``functional_call`` leaves such a tensor behind where two modules share a container of parameters.
        """
        try:
            self._stand_at(values)
            yield
        finally:
            self._stand_at(None)

    def _stand_at(self, values: Sequence[torch.Tensor] | None) -> None:
        self._standing = values
        standing = self.trainables.tensors if values is None else values
        for owner, key, index in self._places:
            owner[key] = standing[index]

    def take(self) -> Any:
        """What a pass that stops has changed (:class:`~fs_fwdllm.model.base.meeting.Shared`)."""
        state = self._positions, self._selected, self._standing, step_back(self.head)
        self._positions, self._selected = None, False
        if self._standing is not None:
            self._stand_at(None)
        return state

    def give(self, state: Any) -> None:
        """It goes on."""
        self._positions, self._selected, standing, judge = state
        if judge is not None:
            step_in(judge)
        if standing is not None:
            self._stand_at(standing)

    @property
    def judges_in_head(self) -> bool:
        """Whether the losses are to be had slice by slice of the vocabulary, without logits."""
        if self.task != "causal_lm" or not self.conduct.ends_in_head or not can_judge(self.head):
            return False
        return all(owner is not self.head._parameters for owner, _, _ in self._places)  # nothing in it is trained

    def judging(self, targets: torch.Tensor, beside: Beside) -> AbstractContextManager[list[Judged]]:
        """While this lasts a pass puts the losses of ``targets`` into the list, and what is wanted beside them."""
        return judging(self.head, targets, beside)

    def places_of(self, tensor: torch.Tensor) -> int:
        """In how many places of the model a trainable stands: more than one where modules share it."""
        return sum(self.trainables.tensors[index] is tensor for _, _, index in self._places)

    def _select_positions(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._positions is None:
            return None
        self._selected = True
        hidden = arguments[0]
        return (hidden.flatten(0, -2).index_select(0, self._positions), *arguments[1:])

    @contextmanager
    def selecting(self, positions: torch.Tensor | None) -> Iterator[None]:
        """Compute vocabulary logits only at flat ``positions`` while the context is open."""
        self._positions, self._selected = positions, False
        try:
            yield
        finally:
            self._positions = None


class BatchLoss:
    """The loss of one batch, ready to be evaluated many times. All losses are means over labels, in float64."""

    #: The clean loss where it is known, while the parameters are known not to move; ``None`` at any other time.
    _remembered: list[torch.Tensor] | None = None

    def __init__(self, objective: Objective, batch: Batch) -> None:
        self._objective = objective
        self._batch = on_device = batch_on(objective.trainables.device, batch)
        self._groups = groups_of(on_device, objective.conduct, segments=_knows_segments(objective.model))
        self.positions, self.targets = objective.readout.labelled(on_device)
        if not len(self.targets):
            raise DataError("a batch has no label: every answer was cut off; raise llm.tok_len")
        self.size = len(batch)
        self._prefix: Prefix | None = objective.cache.prefix(batch.key, self._probing_loss)

    @property
    def trainables(self) -> Trainables:
        return self._objective.trainables

    @property
    def objective(self) -> Objective:
        return self._objective

    @property
    def model(self) -> nn.Module:
        return self._objective.model

    @property
    def readout(self) -> Readout:
        return self._objective.readout

    def here(self) -> torch.Tensor:
        """The loss at the model's current parameters; differentiable if gradients are enabled."""
        with self._replayed():
            return self._mean_loss(differentiable=torch.is_grad_enabled())

    def together(self, passes: Sequence[Callable[[], T]]) -> list[T]:
        """What passes over this batch return, side by side where they share what is read from the disk."""
        return self._objective.meeting.together(passes)

    @contextmanager
    def at_one_point(self) -> Iterator[None]:
        """While this lasts the parameters do not move, so that estimators of several parts share the clean pass."""
        self._remembered = []
        try:
            yield
        finally:
            self._remembered = None

    @torch.no_grad()
    def clean(self) -> torch.Tensor:
        """As :meth:`here`, without a graph."""
        if self._remembered:
            return self._remembered[0]
        loss = self.here()
        self.note_clean(loss)
        return loss

    def note_clean(self, loss: torch.Tensor) -> None:
        """Somebody has run the model where it stands, and this came out."""
        if self._remembered is not None:
            self._remembered = [loss.detach()]

    def at(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss with the trainables standing at ``values`` (same order and shapes)."""
        with self.trainables.holding(values):
            return self.here()

    def at_stack(self, stacks: Sequence[torch.Tensor]) -> torch.Tensor:
        """The losses ``[points]`` at several points in one batched pass; each stack is ``[points, *shape]``.

        Raises:
            EstimatorError: an operation of the model cannot be batched.
        """
        try:
            with self._replayed(), foreign_code("in one pass over several points"):
                return vmap(self.function(differentiable=False))(tuple(stacks))
        except ModelError as error:
            raise EstimatorError(f"fwdllm.probes_per_batch: set it to 1, since {error}") from error

    def function(self, differentiable: bool = True) -> Callable[[tuple[torch.Tensor, ...]], torch.Tensor]:
        """The loss as a pure function of the trainables' values, for ``torch.func`` transformations."""

        def loss(values: tuple[torch.Tensor, ...]) -> torch.Tensor:
            with self._objective.standing_at(values):
                return self._mean_loss(differentiable)

        return loss

    def replayed(self) -> Any:
        """Context in which :meth:`function` may be called; it plays the cached prefix back."""
        return self._replayed()

    def resumed(self) -> AbstractContextManager[None]:
        """Context for running a part of the model again later: playback goes on from where it stands now."""
        return self._prefix.resumed() if self._prefix is not None else nullcontext()

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """``[targets, classes]`` float32 logits, one row per label, matching :attr:`targets`."""
        with self._replayed():
            return self._logits()

    def _replayed(self) -> Any:
        return self._prefix.replayed() if self._prefix is not None else nullcontext()

    @torch.no_grad()
    def judged(self) -> Judged:
        """Loss and prediction of every row, matching :attr:`targets`; of a row that does not count, anything."""
        objective = self._objective
        with self._replayed():
            if objective.judges_in_head:
                return self._judged_in_head("predictions")
            logits = self._logits()
        return Judged(objective.readout.losses(logits, self.targets), objective.readout.predictions(logits))

    def _judged_in_head(self, beside: Beside) -> Judged:
        with self._objective.judging(self.targets, beside) as found, self._running():
            self.model(**self._groups[0].inputs)
        return found[0]

    def _losses(self, differentiable: bool) -> torch.Tensor:
        if self._objective.judges_in_head:
            return self._judged_in_head("derivatives" if differentiable else "nothing").losses
        return self.readout.losses(self._logits(), self.targets)

    def _mean_loss(self, differentiable: bool) -> torch.Tensor:
        return self.readout.reduced(self._losses(differentiable), self.targets)

    def _probing_loss(self) -> torch.Tensor:
        """A loss in which every row counts, so that it is finite also where windows without an answer make a batch."""
        return self.readout.reduced(self._losses(torch.is_grad_enabled()), self.targets.clamp_min(0))

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Context of a pass over the batch."""
        objective, shape = self._objective, tuple(self._batch.input_ids.shape)
        what = f"{type(objective.model).__name__}: a forward pass of {shape[0]} samples of {shape[1]} tokens failed"
        with objective.selecting(self.positions), foreign_code(what):
            yield

    def _logits(self) -> torch.Tensor:
        objective = self._objective
        with self._running():
            if self.positions is None:
                return objective.readout.logits(self._output(), self._batch).float()
            tokens = objective.model(**self._groups[0].inputs).logits
            if not objective._selected:
                tokens = tokens.flatten(0, -2).index_select(0, self.positions)
            return objective.readout.of_tokens(tokens).float()

    def _output(self) -> Any:
        """What the model says of each row, whatever passes that takes."""
        if len(self._groups) == 1 and self._groups[0].rows is None:
            return self.model(**self._groups[0].inputs)
        outputs = [self.model(**group.inputs) for group in self._groups]
        names = ("logits",) if getattr(outputs[0], "logits", None) is not None else ("start_logits", "end_logits")
        width = self._batch.input_ids.shape[1]
        return SimpleNamespace(**{name: _joined(self._groups, outputs, name, width) for name in names})


def _joined(groups: Sequence[Group], outputs: Sequence[Any], name: str, width: int) -> torch.Tensor:
    """Rows of several passes in the batch's order; results for every token get zeros where padding was."""
    parts = [getattr(output, name) for output in outputs]
    if name != "logits":
        parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
    rows = torch.cat([group.rows for group in groups if group.rows is not None])
    return torch.cat(parts).index_select(0, rows.argsort())


def _places_of(model: nn.Module, trainables: Trainables) -> list[tuple[dict[str, Any], str, int]]:
    """Where the trainables are held: ``(a module's own parameters, name, index)``, each alias once."""
    index = {id(tensor): number for number, tensor in trainables.in_memory.items()}
    return [
        (module._parameters, name, index[id(parameter)])
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in index
    ]


def _knows_segments(model: Any) -> bool:
    """Whether the model tells two texts apart by segment embeddings (BERT and ALBERT do, RoBERTa does not)."""
    return getattr(getattr(model, "config", None), "type_vocab_size", 0) > 1
