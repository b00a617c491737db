"""A replica: trainables that follow the server by replaying what it broadcasts.

Clients, late joiners and resumed processes all are replicas. They are told the digest they should end at; records chain
from digest to digest, so a replica applies exactly those that start from what it holds, and knows at the end whether it
arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fs_fwdllm.core.direction import AimedDirections, candidate_seed
from fs_fwdllm.core.replay import BUFFERS, Contributions, Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.core.wire import DenseState, Participant, RoundUpdate, decode
from fs_fwdllm.errors import DivergenceError, WireError
from fs_fwdllm.method.direction_sets import directions_seeds

__all__ = [
    "Replica",
    "apply_round_update",
    "chosen_seeds",
    "contributions_of",
    "directions_of",
    "later_decay",
    "parts_of",
    "probe_spreads",
    "seeds_of",
]


def seeds_of(participants: Sequence[Participant]) -> list[int]:
    """Direction seeds in replay order: participant, then step, then probe."""
    return [
        seed
        for round_index, owner, steps, *probes in _who_looked(participants)
        for step in range(steps)
        for seed in directions_seeds(round_index, owner, step, probes)
    ]


def _who_looked(participants: Sequence[Participant]) -> Iterator[Participant]:
    """Participants with directions. What others say of their steps or probes counts for nothing and may be any number:
    of those that are left, all numbers together are no larger than the record that names them."""
    return (participant for participant in participants if directions_of([participant]))


def directions_of(participants: Sequence[Participant]) -> int:
    """How many directions participants looked along."""
    return sum(steps * sum(probes) for _, _, steps, *probes in participants)


def parts_of(participants: Sequence[Participant]) -> np.ndarray:
    """The part that each direction covers, in replay order."""
    numbers = [np.zeros(0, dtype=np.int64)]
    for _, _, steps, *probes in _who_looked(participants):
        numbers.append(np.tile(np.repeat(np.arange(len(probes)), probes), steps))
    return np.concatenate(numbers)


def apply_round_update(replayer: Replayer, record: RoundUpdate) -> None:
    """Take the step a record describes. Raises :class:`~fs_fwdllm.errors.WireError` if its length is inconsistent."""
    expected = directions_of(record.participants)
    if expected != len(record.values):
        raise WireError(f"a round update names {expected} probes but carries {len(record.values)} coefficients")
    if record.step_decay and len(record.step_decay) != len(record.participants):
        raise WireError(
            f"a round update names {len(record.participants)} participants but {len(record.step_decay)} decay factors"
        )
    coefficients = np.asarray(record.values)
    contributions = contributions_of(replayer, record.participants, coefficients, record.choices, record.reference)
    decayed = coefficients * _later_decay(record) if record.step_decay else None
    replayer.apply(
        replace(contributions, decayed=decayed),
        decay=record.decay,
        momentum=record.momentum,
        rate=record.rate,
        adam=record.adam,
        keep_reference=record.keeps_reference,
    )


def contributions_of(
    replayer: Replayer,
    participants: Sequence[Participant],
    coefficients: np.ndarray,
    choices: bytes = b"",
    reference: float = 0.0,
) -> Contributions:
    """The directions that participants evaluated, times ``coefficients``.

    Raises:
        WireError: ``choices`` does not name one candidate per probe and tensor, or a participant has another number of
            parts than the trainables.
    """
    parts = replayer.division.parts
    if wrong := [part for part in participants if len(part) != 3 + parts]:
        raise WireError(f"a participant names {len(wrong[0]) - 3} parts, but the trainables are divided into {parts}")
    directions = None
    if choices:
        tensors = len(replayer.trainables.tensors)
        directions = AimedDirections(replayer.distribution, chosen_seeds(participants, choices, tensors))
    seeds = seeds_of(participants)
    covered = None if parts == 1 else parts_of(participants)
    return Contributions(seeds, coefficients, reference=reference, directions=directions, parts=covered)


def probe_spreads(replayer: Replayer) -> tuple[float, ...]:
    """``E|g z - grad|^2 / |grad|^2`` of one probe of each part, which the distribution knows."""
    dimensions = replayer.division.dimensions(replayer.trainables.tensors)
    return tuple(replayer.distribution.spread(count) for count in dimensions)


def chosen_seeds(participants: Sequence[Participant], choices: bytes, tensors: int) -> dict[int, tuple[int, ...]]:
    """``{direction seed: seeds of its chosen candidates, per tensor}``.

    Raises:
        WireError: ``choices`` has another length than the participants' probes ask for.
    """
    probes = directions_of(participants)
    if len(choices) != 4 * probes * tensors:
        raise WireError(f"{len(choices)} bytes of choices do not fit {probes} probes of {tensors} tensors")
    rows = np.frombuffer(choices, dtype="<u4").reshape(probes, tensors)
    rounds = [
        round_index for round_index, *looks in participants for _ in range(directions_of([(round_index, *looks)]))
    ]
    return {
        seed: tuple(candidate_seed(round_index, int(index)) for index in row)
        for seed, round_index, row in zip(seeds_of(participants), rounds, rows, strict=True)
    }


def _later_decay(record: RoundUpdate) -> np.ndarray:
    """:func:`later_decay` of every participant, one after the other."""
    factors = [
        later_decay(steps, sum(probes), factor)
        for (_, _, steps, *probes), factor in zip(record.participants, record.step_decay, strict=True)
        if steps * sum(probes)
    ]
    return np.concatenate(factors) if factors else np.ones(0)


def later_decay(steps: int, probes: int, factor: float) -> np.ndarray:
    """Per coefficient of a participant (step after step, probe after probe), what is left of its contribution at the
    end of the round: one ``factor`` per later local step.

    Powers are repeated products, since ``pow`` rounds differently from library to library.
    """
    left = np.ones(steps, dtype=np.float64)
    for step in range(steps - 2, -1, -1):
        left[step] = left[step + 1] * factor
    return np.repeat(left, probes)


class Replica:
    """Trainables (and moments and reference) that track the server's."""

    def __init__(self, replayer: Replayer) -> None:
        self.replayer = replayer
        self.digest = replayer.digest()

    @property
    def trainables(self) -> Trainables:
        return self.replayer.trainables

    def follow(self, frames: Sequence[bytes], target: bytes) -> None:
        """Apply the frames that lead from here to ``target``.

        Raises:
            WireError: a frame is not a record of the server's.
            DivergenceError: the frames do not lead to ``target``, so server and replica hold different bits.
        """
        for frame in frames:
            if self.digest == target:
                break
            self._apply(decode(frame))
        if self.digest != target:
            raise DivergenceError(
                f"replica is at {self.digest.hex()} but the server is at {target.hex()}: the parameters differ. "
                "Check that both run the same package versions and the same configuration"
            )

    def _apply(self, record: object) -> None:
        if isinstance(record, DenseState):
            self._load(record)
        elif isinstance(record, RoundUpdate):
            if record.digest_before != self.digest:
                return
            apply_round_update(self.replayer, record)
        else:
            raise WireError(f"a {type(record).__name__} cannot bring a replica up to date")
        self.digest = self.replayer.digest()

    def _load(self, state: DenseState) -> None:
        has = {name: getattr(state, f"has_{name}") for name in BUFFERS}
        vectors = 1 + sum(has.values())
        if len(state.values) != vectors * self.trainables.count:
            raise WireError(
                f"a state of {len(state.values)} values is not {vectors} times the {self.trainables.count} trainable "
                "parameters"
            )
        values, *buffers = np.split(np.asarray(state.values), vectors)
        held = [name for name in BUFFERS if has[name]]
        self.replayer.hold(dict(zip(held, map(self.trainables.split_flat, buffers), strict=True)))
        self.trainables.load_flat(values)
