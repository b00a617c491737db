"""Random starting values and round records that use everything a record can say; numpy alone, so that a process without
PyTorch can draw the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.wire import Participant, RoundUpdate
from fs_fwdllm.method.replica import apply_round_update

__all__ = ["RUN_SEED", "SMALLEST", "random_records", "random_start", "replayed"]

RUN_SEED = 77
#: The smallest positive float32.
SMALLEST = 2.0**-149

_SHAPES = [(7, 11), (5,), (), (1, 1), (3, 2, 5), (0, 4), (129,), (64, 33), (1, 700), (63,), (4097,), (2, 3, 1, 7)]


def random_start(seed: int) -> dict[str, np.ndarray]:
    """One to five tensors by name: ordinary, subnormal and large values, and zeros of both signs."""
    rng = np.random.default_rng([1, seed])
    shapes = [_SHAPES[int(index)] for index in rng.choice(len(_SHAPES), size=rng.integers(1, 6), replace=False)]
    return {f"layer.{number}": _values(rng, shape) for number, shape in enumerate(shapes)}


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(rng.normal(size=shape))
    scale = rng.choice([1.0, 1e-3, 1e30, 40 * SMALLEST, 0.0, -0.0], size=shape, p=[0.6, 0.15, 0.05, 0.1, 0.05, 0.05])
    return np.asarray(values * scale, dtype=np.float32)


def random_records(seed: int, count: int, tensors: int) -> list[RoundUpdate]:
    """``count`` records in a row, each with every feature on or off by lot; digests are not filled in."""
    rng = np.random.default_rng([2, seed])
    return [_record(rng, round_index, tensors) for round_index in range(count)]


def _record(rng: np.random.Generator, round_index: int, tensors: int) -> RoundUpdate:
    def by_lot(value: float, otherwise: float, probability: float = 0.5) -> float:
        return float(value) if rng.random() < probability else otherwise

    participants = tuple(_participants(rng, round_index))
    probes = sum(steps * count for *_, steps, count in participants)
    scale = rng.choice([1e-3, 1.0, 30 * SMALLEST, 2.0**-127])
    chosen = rng.integers(0, 1000, size=(probes, tensors)).astype("<u4") if rng.random() < 0.4 else np.zeros(0)
    return RoundUpdate(
        round_index,
        bytes(16),
        bytes(16),
        decay=by_lot(1.0 - rng.random() / 10, 1.0),
        step_decay=tuple(1.0 - rng.random(len(participants)) / 10) if rng.random() < 0.4 else (),
        momentum=by_lot(rng.random(), 0.0),
        rate=by_lot(rng.random(), 100 * SMALLEST, 0.8),
        participants=participants,
        keeps_reference=bool(rng.random() < 0.4),
        reference=by_lot(rng.normal(), 0.0),
        choices=chosen.tobytes(),
        adam=_numbers_of_adam(rng) if rng.random() < 0.3 else (),
        values=(scale * rng.normal(size=probes)).astype(np.float32),
    )


def _numbers_of_adam(rng: np.random.Generator) -> tuple[float, ...]:
    return rng.random(), float(rng.choice([1e-16, 1e-8, 0.1])), 1.0 + rng.exponential(), 1.0 + rng.exponential(100)


def _participants(rng: np.random.Generator, round_index: int) -> Iterator[Participant]:
    for client in range(rng.integers(0, 4)):
        yield round_index, client, int(rng.integers(1, 4)), int(rng.integers(1, 4))


def replayed(replayer: Replayer, records: list[RoundUpdate]) -> Iterator[str]:
    """The digest after each record, in hexadecimal."""
    for record in records:
        apply_round_update(replayer, record)
        yield replayer.digest().hex()
