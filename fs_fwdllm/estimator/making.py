"""From a configuration to the estimator it asks for."""

from __future__ import annotations

from torch import nn

from fs_fwdllm.config.schema import FwdllmConfig
from fs_fwdllm.core.direction import Distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.estimator.base import Estimator
from fs_fwdllm.estimator.differences import CentralDifference, OneSidedDifference, Radius
from fs_fwdllm.estimator.forward_mode import ForwardMode
from fs_fwdllm.model.perturbation import make_perturbation

__all__ = ["make_estimator"]


def make_estimator(
    model: nn.Module, trainables: Trainables, distribution: Distribution, config: FwdllmConfig, *, full: bool
) -> Estimator:
    """The estimator a configuration asks for.

    Args:
        distribution: the one the updates are replayed with, so that a direction's bits are generated once per step.
        full: whether the model's own weights are trained.
    """
    if config.estimator == "forward_mode":
        return ForwardMode(distribution, config.probes_per_batch)
    perturbation = make_perturbation(model, trainables, distribution, streamed=full)
    difference = CentralDifference if config.estimator == "central" else OneSidedDifference
    radius = Radius(config.radius, relative=config.radius_scale == "relative")
    return difference(perturbation, radius, config.probes_per_batch)
