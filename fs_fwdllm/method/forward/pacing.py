"""How a server takes a pooled step: when (gate), along what (sampling), how far (step control), and what it reports.

FwdLLM is the forward-gradient method with these three parts in place; without them it is the plain method. One exchange
of assignments and answers is a round, whatever the gate says: a host counts rounds and never has to repeat one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fs_fwdllm.config.own_sections import FwdllmConfig, GateConfig
from fs_fwdllm.core.arrays import Array
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.core.wire import Assignment
from fs_fwdllm.method.forward.directed_sampling import choose_candidates, deal, reference_scale
from fs_fwdllm.method.forward.gate import (
    Decision,
    GateStatistic,
    PublishedStatistic,
    RelativeVariance,
    VarianceGate,
    tensor_ids,
)
from fs_fwdllm.method.forward.pool import Pool
from fs_fwdllm.method.forward.step_control import STEP_CONTROLS, StepControl, plain

__all__ = ["DirectedSampling", "Pacing", "make_gate"]


@dataclass(frozen=True)
class DirectedSampling:
    """Which directions clients look along; see :mod:`fs_fwdllm.method.forward.directed_sampling`.

    Attributes:
        candidates: drawn per probe (``published``).
        every: sample directions only in every N-th server step.
    """

    kind: Literal["none", "published", "corrected"] = "none"
    candidates: int = 10
    every: int = 1

    @property
    def keeps_reference(self) -> bool:
        return self.kind != "none"

    def equip(
        self, assigned: Mapping[int, Assignment], replayer: Replayer, *, server_step: int, sign: float
    ) -> dict[int, Assignment]:
        """Assignments that say where to look, once there is a reference that is not zero.

        Args:
            server_step: steps taken so far.
            sign: of the reference, as a multiple of a gradient estimate.
        """
        reference = replayer.reference
        if reference is None or (server_step + 1) % self.every or not self.keeps_reference:
            return dict(assigned)
        scale = reference_scale(reference)
        if not scale:
            return dict(assigned)
        if self.kind == "corrected":
            return {client: replace(work, reference_scale=scale) for client, work in assigned.items()}
        shares = {client: work.steps * sum(work.probes) for client, work in assigned.items()}
        round_index = next(iter(assigned.values())).round_index
        wanted = [part * sign for part in reference]
        choices = self.choose(round_index, sum(shares.values()), wanted, replayer)
        dealt = deal(choices, shares, replayer.run_seed, round_index)
        return {client: replace(work, choices=dealt[client]) for client, work in assigned.items()}

    def choose(self, round_index: int, count: int, wanted: Sequence[Array], replayer: Replayer) -> np.ndarray:
        """The candidates that look most along ``wanted``, uint32 ``[count, tensors]``."""
        return choose_candidates(round_index, count, self.candidates, wanted, replayer.run_seed, replayer.distribution)


@dataclass(frozen=True)
class Pacing:
    """The parts of a pooled step; as built without arguments, the plain forward-gradient step."""

    gate: VarianceGate | None = None
    sampling: DirectedSampling = DirectedSampling()
    control: StepControl = plain
    report_norms: bool = False
    report_cosine: bool = False

    @classmethod
    def of(cls, config: FwdllmConfig, trainables: Trainables) -> Pacing:
        """The parts a configuration asks for. Raises :class:`~fs_fwdllm.errors.ConfigError` for an unknown tensor."""
        return cls(
            gate=make_gate(config.gate, trainables),
            sampling=DirectedSampling(config.sampling.kind, config.sampling.candidates, config.sampling.every),
            control=STEP_CONTROLS[config.step.control],
            report_norms=config.step.report_norms,
            report_cosine=config.step.report_cosine,
        )

    @property
    def reports(self) -> bool:
        """Whether there is anything to say beyond the plain method's report."""
        return self != Pacing()

    def decide(self, pool: Pool, replayer: Replayer, *, last: bool) -> Decision:
        """Whether to step on a pool that is not empty."""
        if self.gate is None:
            return Decision("accepted", math.nan, math.nan)
        return self.gate.decide(pool, replayer, last=last)


def make_gate(config: GateConfig, trainables: Trainables) -> VarianceGate | None:
    """The gate a configuration asks for. Raises :class:`~fs_fwdllm.errors.ConfigError` for an unknown tensor."""
    if config.kind == "none":
        return None
    statistic: GateStatistic = RelativeVariance()
    if config.kind == "published":
        statistic = PublishedStatistic(tensor_ids(trainables, config.tensor))
    threshold = config.threshold or statistic.default_threshold(trainables.count)
    return VarianceGate(statistic, threshold, config.max_repeats)
