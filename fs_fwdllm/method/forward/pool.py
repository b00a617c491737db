"""The pool: what the probes of one server step have measured so far, as scalars.

A server step may take several rounds on the same mini-batches. What it keeps between them are seeds and slopes, never a
gradient: 4 bytes a probe, whatever the number of parameters or clients. The estimate they stand for is ::

    G = sum_c w_c 1/n_c sum_k g_ck z_ck

where client ``c`` has weight ``w_c`` (its share of the samples) and ``n_c`` probes over all rounds of the pool. A
client that missed a repeat has fewer probes but the same weight, so ``G`` estimates the same gradient.

Where the trainables are divided into parts, all of this holds part by part: ``n_c`` counts the slopes of the part, the
weights are the part's own (:mod:`fs_fwdllm.method.weights`), and the part's rate multiplies its coefficients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fs_fwdllm.core.replay import Contributions, Replayer
from fs_fwdllm.core.wire import Participant
from fs_fwdllm.method.direction_sets import OWN, DirectionSets, merged
from fs_fwdllm.method.replica import contributions_of
from fs_fwdllm.method.weights import part_shares

__all__ = ["Pool", "PoolEntry"]


@dataclass(frozen=True)
class PoolEntry:
    """One client's answer in one round.

    Attributes:
        slopes: float32 ``[steps, directions]`` along random directions (what a reference leaves of them, if there is
            one), part after part.
        along_reference: float32 ``[steps]``, slopes along the reference times ``scale``; empty without one.
        choices: which candidates were chosen, as the assignment had them.
        probes: how many directions of a step each part has; all are the one part's if nothing is said.
    """

    round_index: int
    client: int
    samples: int
    slopes: np.ndarray
    along_reference: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    scale: float = 0.0
    choices: bytes = b""
    probes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", self.probes or (self.slopes.shape[1],))

    def columns(self, part: int) -> slice:
        """Where in a step's slopes those of ``part`` are."""
        start = sum(self.probes[:part])
        return slice(start, start + self.probes[part])

    def slopes_of(self, part: int) -> np.ndarray:
        """Float32 ``[steps, probes of the part]``."""
        return self.slopes[:, self.columns(part)]


@dataclass
class Pool:
    """Entries in the order of rounds, and of clients within a round.

    Args:
        equal_weights: clients count equally instead of by samples.
        rates: per part, what its part of the estimate is multiplied with.
        spreads: per part, variance of a single slope's estimate over ``|grad|^2``; without, clients that send different
            numbers of slopes weigh by their samples alone.
        sets: whose directions clients look along.

    Attributes:
        first_round: the round whose clients and mini-batches the pool is about; ``None`` while it is empty.
        exchanges: rounds that have added to it.
    """

    equal_weights: bool
    rates: tuple[float, ...] = (1.0,)
    spreads: tuple[float, ...] | None = None
    sets: DirectionSets = OWN
    entries: list[PoolEntry] = field(default_factory=list)
    exchanges: int = 0

    @property
    def parts(self) -> range:
        return range(len(self.rates))

    @property
    def first_round(self) -> int | None:
        return self.entries[0].round_index if self.entries else None

    @property
    def directions(self) -> int:
        """Random directions evaluated so far."""
        return sum(entry.slopes.size for entry in self.entries)

    @property
    def participants(self) -> tuple[Participant, ...]:
        """Every entry's directions, by whom they belong to."""
        return tuple(
            (entry.round_index, self.sets.owner(entry.client), len(entry.slopes), *entry.probes)
            for entry in self.entries
        )

    @property
    def choices(self) -> bytes:
        return b"".join(entry.choices for entry in self.entries)

    def add(self, entries: Sequence[PoolEntry]) -> None:
        """Take in a round's entries."""
        self.entries.extend(entries)
        self.exchanges += bool(entries)

    def clear(self) -> None:
        self.entries, self.exchanges = [], 0

    def slopes(self) -> np.ndarray:
        """All slopes along random directions, float64, in order."""
        return np.concatenate([entry.slopes.astype(np.float64).ravel() for entry in self.entries])

    def client_weights(self, part: int = 0) -> dict[int, float]:
        """Every client's weight in the estimate of a part; they sum to one."""
        samples = {entry.client: entry.samples for entry in self.entries}
        spread = None if self.spreads is None else self.spreads[part]
        return part_shares(samples, self.client_probes(part), spread, equal=self.equal_weights)

    def client_probes(self, part: int = 0) -> dict[int, int]:
        """How many slopes of a part each client has sent."""
        counts: dict[int, int] = {}
        for entry in self.entries:
            counts[entry.client] = counts.get(entry.client, 0) + len(entry.slopes) * entry.probes[part]
        return counts

    def coefficients(self, sign: float = 1.0) -> np.ndarray:
        """What every entry's slopes make of its directions in ``sign * G``, float64, one entry after the other."""
        return np.concatenate([block.ravel() for block in self._blocks(sign)])

    def merged(self, sign: float = 1.0) -> tuple[list[Participant], list[np.ndarray]]:
        """Who looked, and what every direction is multiplied with in ``sign * G``: each direction once."""
        return merged(self.participants, self._blocks(sign))

    def _blocks(self, sign: float) -> list[np.ndarray]:
        """Every entry's coefficients in ``sign * G``, float64 ``[steps, directions]``."""
        made = [np.empty(entry.slopes.shape) for entry in self.entries]
        for part, weighed in self._weighed():
            rate = self.rates[part]
            scale = sign if rate == 1.0 else sign * rate
            for entry, coefficients, weight, count in zip(self.entries, made, *weighed, strict=True):
                if count:
                    own = scale * weight / count * entry.slopes_of(part).astype(np.float64)
                    coefficients[:, entry.columns(part)] = own
        return made

    def _weighed(self) -> Iterator[tuple[int, tuple[list[float], list[int]]]]:
        """Per part, every entry's weight and its client's number of slopes."""
        for part in self.parts:
            weights, counts = self.client_weights(part), self.client_probes(part)
            clients = [entry.client for entry in self.entries]
            yield part, ([weights[client] for client in clients], [counts[client] for client in clients])

    def reference_coefficient(self, dimensions: int, sign: float = 1.0) -> float:
        """What the reference is multiplied with in ``sign * G``: ``sum_c w_c mean(g_r) scale / d``."""
        weights = self.client_weights()
        steps: dict[int, int] = {}
        for entry in self.entries:
            steps[entry.client] = steps.get(entry.client, 0) + len(entry.along_reference)
        total = 0.0
        for entry in self.entries:
            if len(entry.along_reference):
                mean = float(entry.along_reference.sum(dtype=np.float64)) / steps[entry.client]
                total += sign * weights[entry.client] * mean * entry.scale / dimensions
        return total

    def contributions(self, replayer: Replayer, coefficients: np.ndarray, reference: float = 0.0) -> Contributions:
        """The pool's directions with other coefficients."""
        return contributions_of(replayer, self.participants, coefficients, self.choices, reference)

    def estimate(self, replayer: Replayer) -> list[torch.Tensor]:
        """``G`` as tensors: one replay."""
        reference = self.reference_coefficient(replayer.trainables.count)
        return replayer.total(self.contributions(replayer, self.coefficients(), reference))

    def noise(self, spreads: Sequence[float]) -> float:
        """Estimate of ``E|G - E G|^2`` from the scalars alone: ``spread * sum_k a_k^2``, ``a_k`` being what direction
        ``k`` is multiplied with in ``G``.

        ``spread`` is ``E|g z - grad|^2 / |grad|^2`` of one probe: ``d - 1`` for signs, part by part; the parts' errors
        add up, each times its squared rate. Directions that nobody shares give ``sum_c w_c^2 / n_c * spread * mean_k
        g_ck^2``; along shared ones only what the clients' mean has counts.
        """
        total = 0.0
        for (_, _, _, *probes), block in zip(*self.merged(), strict=True):
            start = 0
            for count, spread in zip(probes, spreads, strict=True):
                total += spread * float(np.square(block[:, start : start + count]).sum())
                start += count
        return total

    def mean_squared_slope(self, dimensions: int) -> float:
        """Estimate of the clients' mean ``|grad_c|^2``: ``E g^2``, and what the reference explains (``g_r^2 / d``)."""
        total = 0.0
        for part, weighed in self._weighed():
            for entry, weight, count in zip(self.entries, *weighed, strict=True):
                squares = float(np.square(entry.slopes_of(part), dtype=np.float64).sum())
                explained = float(np.square(entry.along_reference, dtype=np.float64).sum()) / dimensions
                explained *= entry.probes[part]
                total += weight / count * (squares + explained) if count else 0.0
        return total

    def state_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for index, entry in enumerate(self.entries):
            tensors[f"pool.slopes.{index}"] = torch.from_numpy(entry.slopes.copy())
            if entry.along_reference.size:
                tensors[f"pool.along_reference.{index}"] = torch.from_numpy(entry.along_reference.copy())
            if entry.choices:
                tensors[f"pool.choices.{index}"] = torch.frombuffer(bytearray(entry.choices), dtype=torch.uint8)
        return tensors

    def state_numbers(self) -> dict[str, object]:
        rows = [
            [entry.round_index, entry.client, entry.samples, entry.scale, list(entry.probes)] for entry in self.entries
        ]
        return {"pool": rows, "exchanges": self.exchanges}

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, object]) -> None:
        """Inverse of :meth:`state_tensors` and :meth:`state_numbers`."""
        rows = numbers["pool"]
        assert isinstance(rows, list)
        none = torch.zeros(0)
        self.entries = [
            PoolEntry(
                round_index,
                client,
                samples,
                slopes=tensors[f"pool.slopes.{index}"].numpy().copy(),
                along_reference=tensors.get(f"pool.along_reference.{index}", none).numpy().copy(),
                scale=scale,
                choices=tensors.get(f"pool.choices.{index}", none).numpy().tobytes(),
                probes=tuple(probes),
            )
            for index, (round_index, client, samples, scale, probes) in enumerate(rows)
        ]
        self.exchanges = int(str(numbers["exchanges"]))
