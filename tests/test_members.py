"""A member that nobody here has heard of works wherever members do: what is asked of it, its class answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from fs_fwdllm import run
from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.core.arrays import NUMPY, Array, Arrays
from fs_fwdllm.core.direction import DIRECTIONS, DirectionKey, Distribution, make_distribution, raw_words
from fs_fwdllm.estimator import CentralDifference, Slopes
from fs_fwdllm.forecast.plan import make_plan
from fs_fwdllm.model.objective import BatchLoss
from tests.host.fixtures import models, world
from tests.host.small import METHODS, SCALAR_METHODS, World, read_jsonl

__all__ = ["models", "world"]

pytestmark = pytest.mark.slow


class Repeated(CentralDifference):
    """Central differences, each measured three times."""

    @classmethod
    def passes(cls, probes: int, probes_per_batch: int) -> int:
        return 3 * super().passes(probes, probes_per_batch)

    def slopes(self, batch_loss: BatchLoss, keys: Sequence[DirectionKey]) -> Slopes:
        measured = [super(Repeated, self).slopes(batch_loss, keys) for _ in range(3)]
        return Slopes(np.mean([one.values for one in measured], axis=0), measured[0].loss, self.passes(len(keys), 1))


class Halves(Distribution):
    """Ones and minus ones, and zeros for half of the elements; scaled so that ``E[z z^T] = I``."""

    name = "halves"
    portable = False

    def spread(self, dimensions: int) -> float:
        return dimensions  # E|z|^4 / d - 1, with E z^4 = 2

    def values(
        self, keys: Sequence[DirectionKey], tensor_id: int, start: int, count: int, arrays: Arrays = NUMPY
    ) -> Array:
        words = raw_words(keys, tensor_id, start, count)
        signs = np.where(words & np.uint64(2), 1.0, -1.0) * (words & np.uint64(1)).astype(np.float64)
        return arrays.place((signs * math.sqrt(2.0)).astype(np.float32))


@pytest.fixture(autouse=True)
def members() -> Iterator[None]:
    ESTIMATORS.register("repeated", Repeated)
    DIRECTIONS.register("halves", Halves)
    yield
    ESTIMATORS.unregister("repeated")
    DIRECTIONS.unregister("halves")


@pytest.mark.parametrize("method", SCALAR_METHODS)
def test_an_estimator_and_a_distribution_of_another_package_train_and_plan(method: str, world: World) -> None:
    settings = {**METHODS[method], "fwdllm.estimator": "repeated", "fwdllm.direction": "halves"}
    config = world.config(settings)
    plan = make_plan(config)
    lines = read_jsonl(run(config).files.metrics_path)
    assert len({line["digest"] for line in lines}) == 1 + config.federate.total_round_num
    assert plan.run.forward_passes == lines[-1]["forward_passes"] == 3 * _passes_of_central(method, world)
    assert plan.run.upload_bytes == lines[-1]["upload_bytes"]
    assert plan.run.download_bytes == lines[-1]["download_bytes"]


def _passes_of_central(method: str, world: World) -> int:
    return make_plan(world.config(METHODS[method])).run.forward_passes


def test_the_gate_asks_a_distribution_how_far_its_probes_spread(world: World) -> None:
    """``E|g z - grad|^2 = spread |grad|^2``; measured on a gradient that is known."""
    gradient = np.random.default_rng(1).normal(size=40)
    keys = [DirectionKey(3, seed) for seed in range(20_000)]
    for name in DIRECTIONS:
        directions = np.asarray(make_distribution(name).values(keys, 0, 0, 40), dtype=np.float64)
        slopes = directions @ gradient
        errors = np.square(slopes[:, None] * directions - gradient).sum(axis=1) / np.square(gradient).sum()
        standard_error = errors.std() / math.sqrt(len(errors))
        assert abs(errors.mean() - make_distribution(name).spread(40)) < 4 * standard_error, name


def test_a_gated_run_takes_any_distribution(world: World) -> None:
    settings = {
        **METHODS["forward_gradient"], "federate.method": "fwdllm", "fwdllm.direction": "halves",
        "fwdllm.gate.kind": "relative",
    }  # fmt: skip
    lines = read_jsonl(run(world.config(settings)).files.metrics_path)
    assert any(line.get("gate") in ("accepted", "limit", "end") for line in lines)
