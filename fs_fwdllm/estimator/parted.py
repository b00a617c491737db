"""A step's slopes where the trainables are divided: each part from its own source.

Parts share what they can. Sources that follow from one gradient take it once for all their parts, and a pass at the
point where the model stands, which the closed form runs and a one-sided difference needs, is run once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from fs_fwdllm.config.own_sections import FwdllmConfig
from fs_fwdllm.config.sources import Source
from fs_fwdllm.core.direction import ConfinedDirections, DirectionKey, Distribution
from fs_fwdllm.core.division import Division
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.estimator.base import Estimator, Passes, Slopes
from fs_fwdllm.estimator.exact import ExactSlopes, Gradient, project
from fs_fwdllm.model.objective import BatchLoss

__all__ = ["PartedEstimator", "make_parted_estimator", "passes_of_step", "reads_of_step"]


@dataclass(frozen=True)
class _Part:
    """A part's source, and the directions that cover it. Parts whose slopes follow from one gradient share a source."""

    estimator: Estimator
    distribution: Distribution


class PartedEstimator:
    """Measures the slopes of all parts at one point; leaves the parameters bitwise as they were.

    Args:
        parts: per part its source, ``None`` for one that is frozen.
        probes: per part, how many directions a step has.
        side_by_side: runs of the model that may go side by side with other clients'; 0 where none may.
    """

    def __init__(self, parts: Sequence[_Part | None], probes: tuple[int, ...], side_by_side: int = 0) -> None:
        self._parts = parts
        self.probes = probes
        self.side_by_side = side_by_side
        known = {id(part.estimator): part.estimator for part in parts if part is not None}
        # Whoever runs the model where it stands goes first, so that others need not.
        self._first = [index for index, part in enumerate(parts) if part is not None and part.estimator.exact]
        self._then = [index for index, part in enumerate(parts) if part is not None and not part.estimator.exact]
        self._shared = max(0, sum(estimator.runs_here for estimator in known.values()) - 1)

    def slopes(self, batch_loss: BatchLoss, keys: Sequence[Sequence[DirectionKey]]) -> Slopes:
        """The slopes along each part's directions, part after part, as one step's.

        Args:
            keys: per part the directions, none for one that is frozen.
        """
        gradients: dict[int, Gradient] = {}
        measured: dict[int, Slopes] = {}
        with batch_loss.at_one_point():
            for index in (*self._first, *self._then):
                part = self._parts[index]
                assert part is not None
                if isinstance(part.estimator, ExactSlopes):
                    measured[index] = _along(part, batch_loss, keys[index], gradients)
                else:
                    measured[index] = part.estimator.slopes(batch_loss, keys[index])
        return self._together(measured)

    def _together(self, measured: dict[int, Slopes]) -> Slopes:
        return Slopes(
            values=np.concatenate([measured[index].values for index in sorted(measured)]),
            loss=next(iter(measured.values())).loss,
            forward_passes=sum(slopes.forward_passes for slopes in measured.values()) - self._shared,
            backward_passes=sum(slopes.backward_passes for slopes in measured.values()),
        )


def make_parted_estimator(
    model: nn.Module,
    trainables: Trainables,
    distribution: Distribution,
    config: FwdllmConfig,
    division: Division,
    sources: Sequence[Source],
    *,
    full: bool,
) -> PartedEstimator:
    """The estimators of ``sources``, each on its part of the trainables.

    Args:
        distribution: what the directions are drawn from.
        full: whether the model's own weights are trained.
    """
    covered: list[Distribution] = [distribution]
    if division.parts > 1:
        covered = [ConfinedDirections(distribution, division.tensor_ids(part)) for part in range(division.parts)]
    exact: dict[str, Estimator] = {}
    parts: list[_Part | None] = []
    for source, own in zip(sources, covered, strict=True):
        if source.estimator is None:
            parts.append(None)
        elif not source.estimator.exact:
            parts.append(_Part(source.estimator.of(model, trainables, own, config, full=full), own))
        else:
            if source.slopes not in exact:
                ids = [index for index, owner in enumerate(division.owners) if sources[owner].slopes == source.slopes]
                union = ConfinedDirections(distribution, ids)
                exact[source.slopes] = source.estimator.of(model, trainables, union, config, full=full)
            parts.append(_Part(exact[source.slopes], own))
    runs = [
        source.estimator.side_by_side(source.probes, config.probes_per_batch)
        for source in sources
        if source.estimator is not None
    ]
    return PartedEstimator(parts, tuple(source.probes for source in sources), max(runs) if all(runs) else 0)


def _along(part: _Part, batch_loss: BatchLoss, keys: Sequence[DirectionKey], gradients: dict[int, Gradient]) -> Slopes:
    """Slopes of a gradient, which is taken for the first part that needs it."""
    assert isinstance(part.estimator, ExactSlopes)
    known = gradients.get(id(part.estimator))
    gradient = gradients[id(part.estimator)] = known or part.estimator.gradient(batch_loss)
    values = project(gradient.tensors, keys, part.distribution).astype(np.float32)
    return Slopes(values, gradient.loss, *(gradient.passes if known is None else Passes(0)))


def passes_of_step(sources: Sequence[Source], config: FwdllmConfig) -> Passes:
    """Passes of a step over all parts, as :class:`PartedEstimator` shares them."""
    taken = _taken(sources)
    passes = [source.estimator.passes_as(config, source.probes) for source in taken]
    shared = max(0, sum(source.estimator.runs_here for source in taken) - 1)
    return Passes(sum(one.forward for one in passes) - shared, sum(one.backward for one in passes))


def reads_of_step(sources: Sequence[Source], config: FwdllmConfig) -> int:
    """How often a step over all parts reads a base that stays on the disk."""
    return sum(source.estimator.reads(config, source.probes) for source in _taken(sources))


def _taken(sources: Sequence[Source]) -> list[Source]:
    """The sources that run the model: one for all parts whose slopes follow from one gradient, and the others."""
    exact = {source.slopes: source for source in sources if source.estimator is not None and source.estimator.exact}
    return [
        *exact.values(),
        *(source for source in sources if source.estimator is not None and not source.estimator.exact),
    ]
