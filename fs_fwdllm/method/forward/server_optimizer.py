"""What a server steps with on the pooled estimate: SGD (with momentum, if wanted) or Adam.

The optimiser gives every step its numbers, in float64 and once, on the server. They travel in the step's record, and
server and replicas take the step by them (:mod:`fs_fwdllm.core.server_step`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fs_fwdllm.config.own_sections import FwdllmConfig
from fs_fwdllm.errors import ConfigError

__all__ = ["Adam", "ServerOptimizer", "Sgd", "StepNumbers", "check_server_optimizer", "make_server_optimizer"]


class StepNumbers(NamedTuple):
    """Fields of a :class:`~fs_fwdllm.core.wire.RoundUpdate`."""

    momentum: float
    adam: tuple[float, ...] = ()


class ServerOptimizer(ABC):
    """Gives the numbers of each step."""

    @property
    @abstractmethod
    def takes_gradient(self) -> bool:
        """Whether the contributions of a step sum to the estimate itself, rather than to ``-rate`` times it."""

    @abstractmethod
    def numbers(self, step: int) -> StepNumbers:
        """The numbers of a step, counted from 1."""


@dataclass(frozen=True)
class Sgd(ServerOptimizer):
    """Stochastic gradient descent with heavy-ball momentum, or without (0)."""

    momentum: float = 0.0

    @property
    def takes_gradient(self) -> bool:
        return bool(self.momentum)

    def numbers(self, step: int) -> StepNumbers:
        return StepNumbers(self.momentum)


@dataclass(frozen=True)
class Adam(ServerOptimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980); weight decay is decoupled, as everywhere here."""

    betas: tuple[float, float]
    epsilon: float

    @property
    def takes_gradient(self) -> bool:
        return True

    def numbers(self, step: int) -> StepNumbers:
        first, second = self.betas
        return StepNumbers(first, (second, self.epsilon, _correction(first, step), _correction(second, step)))


def _correction(beta: float, step: int) -> float:
    """``1 / (1 - beta^step)``; the power is a repeated product, since ``pow`` rounds differently from library to
    library."""
    return float(1.0 / (1.0 - np.multiply.accumulate(np.full(step, beta))[-1]))


def make_server_optimizer(own: FwdllmConfig) -> ServerOptimizer:
    """The optimiser a configuration asks for."""
    if own.server_optimizer == "sgd":
        return Sgd(own.server_momentum)
    first, second = own.server_betas
    return Adam((first, second), own.server_epsilon)


def check_server_optimizer(own: FwdllmConfig) -> None:
    """Refuse what the chosen optimiser would not look at.

    Raises:
        ConfigError: names the key and the way out.
    """
    if own.server_optimizer == "sgd":
        for name in ("server_betas", "server_epsilon"):
            value, default = getattr(own, name), FwdllmConfig.model_fields[name].default
            if value != default:
                raise ConfigError(
                    f"fwdllm.{name} {value}: fwdllm.server_optimizer 'sgd' has none; leave it at {default}, or set "
                    "fwdllm.server_optimizer: adam"
                )
        return
    if own.server_momentum:
        raise ConfigError(
            f"fwdllm.server_momentum {own.server_momentum}: is that of fwdllm.server_optimizer 'sgd'; Adam's is the "
            f"first of fwdllm.server_betas {own.server_betas}; set fwdllm.server_momentum to 0"
        )
    if own.step.control != "none":
        raise ConfigError(
            f"fwdllm.step.control {own.step.control!r}: scales an estimate, and fwdllm.server_optimizer 'adam' divides "
            "an estimate's scale out again; set it to none, or fwdllm.server_optimizer to sgd"
        )
