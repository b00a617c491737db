"""Slope estimators: central and one-sided differences, exact forward mode; and backpropagation for the baselines."""

from __future__ import annotations

from torch import nn

from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.config.schema import FwdllmConfig
from fs_fwdllm.core.direction import Distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.estimator.backprop import Backprop
from fs_fwdllm.estimator.base import Estimator, Footprint, Slopes
from fs_fwdllm.estimator.differences import CentralDifference, OneSidedDifference, Radius
from fs_fwdllm.estimator.forward_mode import ForwardMode

__all__ = [
    "Backprop",
    "CentralDifference",
    "Estimator",
    "Footprint",
    "ForwardMode",
    "OneSidedDifference",
    "Radius",
    "Slopes",
    "make_estimator",
]


def make_estimator(
    model: nn.Module, trainables: Trainables, distribution: Distribution, config: FwdllmConfig, *, full: bool
) -> Estimator:
    """The estimator a configuration asks for.

    Args:
        distribution: the one the updates are replayed with, so that a direction's bits are generated once per step.
        full: whether the model's own weights are trained.
    """
    made: Estimator = ESTIMATORS[config.estimator].of(model, trainables, distribution, config, full=full)
    return made
