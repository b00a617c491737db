"""MeZO's step, and the recipe of methods whose clients step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fs_fwdllm.config.methods import examples_of
from fs_fwdllm.config.schema import Config
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method.client import ClientWorker
from fs_fwdllm.method.first_order.dense import AverageServer
from fs_fwdllm.method.mezo.client import Coefficients, SteppingWorker
from fs_fwdllm.method.mezo.server import SteppingServer
from fs_fwdllm.method.parts import Parts, Recipe, direction_sets
from fs_fwdllm.method.server import RoundServer, ServerSettings

__all__ = ["RECIPE", "Coefficients", "coefficients", "local_step_recipe"]


def coefficients(slopes: np.ndarray, rate: float) -> np.ndarray:
    """``-rate/P g``: a step down the mean of the ``P`` directions' estimates (MeZO, arXiv 2305.17333, algorithm 1)."""
    steps: np.ndarray = -rate / slopes.shape[-1] * slopes
    return steps


def local_step_recipe(coefficients_of: Callable[[Config], Coefficients]) -> Recipe:
    """The recipe of a method whose clients step as ``coefficients_of(configuration)`` says."""

    def make_worker(parts: Parts) -> ClientWorker:
        config = parts.config
        return SteppingWorker(
            parts.objective,
            parts.replica,
            parts.batches,
            parts.measuring(parts.replica.replayer.distribution),
            coefficients_of(config),
            weight_decay=config.train.optimizer.weight_decay,
            dense_upload=config.fwdllm.upload == "dense",
            sets=direction_sets(config),
        )

    def make_server(parts: Parts, settings: ServerSettings) -> RoundServer:
        if parts.config.fwdllm.upload == "dense":
            return AverageServer(parts.server_replayer(), settings)
        return SteppingServer(parts.server_replayer(), settings, coefficients_of(parts.config))

    return Recipe(make_worker, make_server, check=_check)


def _check(config: Config) -> None:
    if config.fwdllm.directions != "own":
        _check_shared(config)
    if config.fwdllm.server_momentum:
        raise ConfigError(
            f"fwdllm.server_momentum {config.fwdllm.server_momentum}: the clients take the steps, so the server has no "
            f"gradient to give momentum to; set it to 0 or use {examples_of(lambda facts: facts.pools_slopes)}"
        )


def _check_shared(config: Config) -> None:
    """A direction that clients share has one coefficient, so what was added along it must have decayed alike."""
    own, train = config.fwdllm, config.train
    if own.upload != "scalars":
        raise ConfigError(
            f"fwdllm.upload {own.upload!r}: sends no slopes, so that nothing is gained by fwdllm.directions "
            f"{own.directions!r}; set it to scalars"
        )
    if not train.optimizer.weight_decay:
        return
    unequal = {
        "train.train_strategy": (train.train_strategy, "frozen"),
        "train.batch_or_epoch": (train.batch_or_epoch, "batch"),
    }
    for key, (value, wanted) in unequal.items():
        if value != wanted:
            raise ConfigError(
                f"{key} {value!r}: with train.optimizer.weight_decay {train.optimizer.weight_decay:g} clients would "
                f"decay differently, and fwdllm.directions {own.directions!r} has one coefficient for all of a set; "
                f"set it to {wanted!r}, the decay to 0, or fwdllm.directions to own"
            )


RECIPE = local_step_recipe(lambda config: coefficients)
