"""Replay: adding ``c z(seed)`` to 26 M parameters, against the same with PyTorch's seeded generator.

Two peers: the sweep as the published systems write it (``param.data = param.data + c * z``, with temporaries), which
the target is about, and the best that ``torch.randn`` can do, added in place. Many seeds in one sweep are what a server
and a late joiner do; the parameters are then read and written once for all of them.

    python benchmarks/replay.py [--quick] [--repetitions N]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

import numpy as np
import torch
from common import Timings, arguments, interleave, print_machine, print_table, random_llama, verdict

from fs_fwdllm.core.direction import Gaussian, Rademacher
from fs_fwdllm.core.replay import Contributions, Replayer
from fs_fwdllm.core.trainables import Trainables

_COEFFICIENT = 1e-9


def replay(replayer: Replayer, directions: int) -> Callable[[], None]:
    """One sweep with ``directions`` fresh seeds."""
    sweeps = count()

    def run() -> None:
        first = next(sweeps) * directions
        seeds = range(first, first + directions)
        coefficients = np.full(directions, _COEFFICIENT, dtype=np.float32)
        replayer.apply(Contributions(seeds, coefficients), decay=1.0, momentum=0.0, rate=0.0)

    return run


def randn(trainables: Trainables, *, in_place: bool) -> Callable[[], None]:
    """One seed with ``torch.randn``."""
    seeds = count()

    @torch.no_grad()
    def run() -> None:
        generator = torch.Generator().manual_seed(next(seeds))
        for tensor in trainables.tensors:
            direction = torch.randn(tensor.shape, generator=generator)
            if in_place:
                tensor.add_(direction, alpha=_COEFFICIENT)
            else:
                tensor.data = tensor.data + _COEFFICIENT * direction

    return run


def memory_floor(trainables: Trainables) -> Callable[[], None]:
    """Adding a vector that is already there: what reading and writing memory costs."""
    ready = trainables.copy_values()

    @torch.no_grad()
    def run() -> None:
        for tensor, value in zip(trainables.tensors, ready, strict=True):
            tensor.add_(value, alpha=_COEFFICIENT)

    return run


def main() -> None:
    options = arguments(__doc__, repetitions=10)
    print_machine(options.threads)
    trainables = Trainables.of_model(random_llama(quick=options.quick))
    signs = Replayer(trainables, 1, Rademacher())
    published, in_place = "torch.randn as published", "torch.randn in place"
    peers = {published: randn(trainables, in_place=False), in_place: randn(trainables, in_place=True)}
    single = {
        "adding a ready tensor": memory_floor(trainables),
        "Rademacher, 1 seed": replay(signs, 1),
        "Gaussian, 1 seed": replay(Replayer(trainables, 1, Gaussian()), 1),
    }
    rows: list[tuple[str, ...]] = []

    def add_rows(times: Timings, names: Iterable[str], seeds: int) -> None:
        for name in names:
            ratios = times.ratio(name, published) / seeds, times.ratio(name, in_place) / seeds
            target = verdict(ratios[0], 1 / 8, options.quick) if name.startswith("Rademacher") else ""
            nanoseconds = 1e9 * times.best(name) / seeds / trainables.count
            figures = f"{1e3 * times.best(name):.2f}", f"{nanoseconds:.3f}", f"{ratios[0]:.3f}", f"{ratios[1]:.3f}"
            rows.append((name, *figures, target))

    add_rows(interleave({**peers, **single}, options.repetitions), [*peers, *single], 1)
    # The long sweeps are few, each beside the peers again.
    for seeds, repetitions in ((64, max(1, options.repetitions // 3)), (1024, 1)):
        name = f"Rademacher, {seeds} seeds"
        add_rows(interleave({**peers, name: replay(signs, seeds)}, repetitions), [name], seeds)
    header = ("", "ms", "ns per parameter and seed", "ratio to published", "ratio to in place", "target (published)")
    print_table(f"Replaying seeds over {trainables.count:,} parameters", header, rows)


if __name__ == "__main__":
    main()
