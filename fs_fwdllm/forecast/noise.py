"""How noisy a round's estimate will be, part by part, from counts alone.

``C`` clients (or sets of clients that share directions) that send ``n`` slopes each, along independent directions,
estimate a gradient ``g`` of ``d`` parameters that they agree on with relative error ``E|G - g|^2 / |g|^2 =
(d - 1)/(C n)``. Where clients disagree it is larger by
``mean |g_c|^2 / |g|^2``, which nobody knows beforehand and which grows as training goes on, so what stands here is a
lower bound. It counts *scalars per parameter*: with fewer than one a round, the error is longer than the gradient, a
safe step shrinks as ``1 / (1 + error)``, and a part beside another that is far better known mostly adds noise to it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fs_fwdllm.config.own_sections import FROZEN
from fs_fwdllm.config.sources import describe_sources, sources_of
from fs_fwdllm.core.trainables import public_name
from fs_fwdllm.errors import EstimatorError
from fs_fwdllm.method import Parts
from fs_fwdllm.method.parts import direction_sets
from fs_fwdllm.method.server import WorkPlan
from fs_fwdllm.model.output_layer import OutputLayer
from fs_fwdllm.running.session import Session

__all__ = ["PartForecast", "forecast_parts", "noise_remarks"]

#: Parts are trained at one rate as if they were equally well known; beyond this ratio of errors they are not.
_FAR_NOISIER = 10.0


@dataclass(frozen=True)
class PartForecast:
    """What a round will know of one part.

    Attributes:
        name: what the part matches; ``all`` where the trainables are one part.
        source: of clients in no group of a fleet, in words.
        parameters: of the part.
        scalars: slopes of a round, of all its clients and steps.
        relative_error: ``E|G - g|^2 / |g|^2`` of the round's estimate if clients agree; infinite without slopes.
        rate: what the part's learning rate is multiplied with.
    """

    name: str
    source: str
    parameters: int
    scalars: float
    relative_error: float
    rate: float

    @property
    def trained(self) -> bool:
        return self.source != FROZEN

    def in_words(self) -> str:
        """For a table: parameters, slopes and what they come to."""
        if not self.trained:
            return f"{self.parameters:,} parameters, {FROZEN}"
        per_parameter = self.scalars / self.parameters
        return (
            f"{self.parameters:,} parameters, {self.source}: {per_parameter:.2g} scalars per parameter a round, "
            f"relative error at least {self.relative_error:.2g}"
        )


def forecast_parts(session: Session, plans: Mapping[int, WorkPlan], clients_per_round: int) -> list[PartForecast]:
    """The forecast of each part; empty for methods that send no slopes.

    Args:
        plans: the work of a round, by client.
    """
    config, replayer = session.config, session.parts.replica.replayer
    if not config.method.measures_slopes:
        return []
    own, dimensions = config.fwdllm, replayer.division.dimensions(replayer.trainables.tensors)
    asked = min(clients_per_round, direction_sets(config).count or clients_per_round)
    found = []
    for part, count in enumerate(dimensions):
        scalars = asked * statistics.fmean(plan.steps * plan.probes[part] for plan in plans.values())
        error = replayer.distribution.relative_variance(count, max(1, round(scalars))) if scalars else math.inf
        name = own.parts[part].match if own.parts else "all"
        source = describe_sources([sources_of(config)[part]])
        found.append(PartForecast(name, source, count, scalars, error, replayer.division.rates[part]))
    return found


def noise_remarks(parts: Parts, forecasts: Sequence[PartForecast]) -> list[str]:
    """What is wrong with how scalars are spread, and how to spread them."""
    if not forecasts:
        return []
    trained = [part for part in forecasts if part.trained]
    if len(forecasts) == 1:
        return _one_part(parts, forecasts[0])
    remarks = []
    best = min(trained, key=lambda part: part.relative_error)
    for part in trained:
        ratio = (1 + part.relative_error) * part.rate / ((1 + best.relative_error) * best.rate)
        if part is not best and ratio > _FAR_NOISIER:
            remarks.append(
                f"warning: part {part.name!r} is {ratio:.0f} times as noisy as {best.name!r} at its rate, and mostly "
                f"adds noise: lower its rate to {part.rate / ratio:.1g}, freeze it, or raise its slopes {ratio:.0f} "
                "times"
            )
    return remarks


def _one_part(parts: Parts, whole: PartForecast) -> list[str]:
    """Trainables below the output layer share their directions with it, whose slopes could be had for nothing."""
    below = [] if whole.relative_error <= 1 else _below_the_output(parts)
    if not below or len(below) == len(parts.trainables.tensors):
        return []
    tensors, names = parts.trainables.tensors, parts.trainables.names
    count = sum(tensors[index].numel() for index in below)
    head = next(public_name(names[index]) for index in range(len(names)) if index not in below).split(".")
    word = head[-2] if len(head) > 1 else head[0]
    return [
        f"warning: a round's estimate is off by {whole.relative_error:.2g} times the squared gradient or more: "
        f"{count:,} of the {whole.parameters:,} parameters lie below the output layer and mostly add noise to it; give "
        f"the layer a source of its own, as in fwdllm.parts: [{{match: {word}, slopes: closed_form, scalars: 100}}, "
        "{match: '*', rate: 0.1}]"
    ]


def _below_the_output(parts: Parts) -> list[int]:
    """Ids of the trainables that are no part of the output layer; none where there is no such layer."""
    if parts.trial is None:
        return []
    layer = OutputLayer(parts.objective)
    try:
        layer.run(parts.objective.on(parts.trial))
    except EstimatorError:
        return []
    return [index for index, tensor in enumerate(parts.trainables.tensors) if not layer.role_of(tensor)]
