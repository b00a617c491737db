"""Which slope estimator finds the better direction at equal cost? Central, one-sided and forward mode on AG News.

Cost is forward passes: of 65 passes a batch, a central difference makes 32 probes, a one-sided one 64 (the clean pass
is shared) and forward mode 64. What counts is the direction that all slopes together give, so for every estimator and
radius:

* ``slope error``: root mean square of ``g - z . grad``, relative to that of ``z . grad``;
* ``cosine`` of the pooled estimate to the gradient by backpropagation;
* ``loss decrease``: of the same batches, after a step against the estimate that is ``step`` times the parameters' norm
  long.

Measured where training starts and after some steps of backpropagation. All use the same directions and batches.

    python benchmarks/estimators.py DATA_ROOT [--batches 8] [--passes 65] [--warm-up 60] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import print_machine, print_table

from fs_fwdllm.config import load_config
from fs_fwdllm.core.direction import DirectionKey, Rademacher, direction_seed
from fs_fwdllm.core.replay import Contributions, add_contributions
from fs_fwdllm.estimator import Backprop, CentralDifference, Estimator, ForwardMode, OneSidedDifference, Radius
from fs_fwdllm.estimator.base import stack_directions
from fs_fwdllm.method.forward.cosine import cosine_between
from fs_fwdllm.method.forward.step_control import norm_of
from fs_fwdllm.model.objective import BatchLoss
from fs_fwdllm.model.perturbation import ResidentPerturbation
from fs_fwdllm.running.session import Session

_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "fwd_agnews.yaml"
_RADII = [
    *(Radius(value) for value in (1e-4, 1e-3, 1e-2, 1e-1)),
    *(Radius(value, relative=True) for value in (1e-3, 1e-2, 1e-1)),
]
_WARM_UP_RATE = 0.5


def candidates(losses: ResidentPerturbation, passes: int) -> Iterator[tuple[str, Estimator, int]]:
    """``(name, estimator, probes)`` of equal cost."""
    for radius in _RADII:
        name = f"{radius.value:g}{' relative' if radius.relative else ''}"
        yield f"central, h = {name}", CentralDifference(losses, radius), (passes - 1) // 2
        yield f"one-sided, h = {name}", OneSidedDifference(losses, radius), passes - 1
    yield "forward mode", ForwardMode(losses.distribution, passes - 1), passes - 1


def gradients(session: Session, batches: list[BatchLoss]) -> list[list[torch.Tensor]]:
    """By backpropagation, per batch."""
    found = []
    for batch in batches:
        Backprop(session.loaded.model).gradient(batch)
        tensors = session.parts.trainables.tensors
        found.append([torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors])
        for tensor in tensors:
            tensor.grad = None
    return found


def mean_loss(batches: list[BatchLoss]) -> float:
    with torch.no_grad():
        return float(np.mean([float(batch.here()) for batch in batches]))


def measure(
    session: Session, batches: list[BatchLoss], exact: list[list[torch.Tensor]], it: Estimator, probes: int, step: float
) -> tuple[float, float, float]:
    """``(slope error, cosine, loss decrease)``."""
    trainables, distribution = session.parts.trainables, Rademacher()
    estimate = [torch.zeros_like(tensor.detach()) for tensor in trainables.tensors]
    errors, sizes = [], []
    for index, (batch, gradient) in enumerate(zip(batches, exact, strict=True)):
        seeds = [direction_seed(0, index, 0, probe) for probe in range(probes)]
        keys = [DirectionKey(1, seed) for seed in seeds]
        slopes = it.slopes(batch, keys).values.astype(np.float64)
        stacks = list(stack_directions(batch, keys, distribution))
        truth = sum((z * g).flatten(1).double().sum(1) for z, g in zip(stacks, gradient, strict=True)).numpy()  # type: ignore
        errors.append(np.mean((slopes - truth) ** 2))
        sizes.append(np.mean(truth**2))
        add_contributions(estimate, Contributions(seeds, slopes / probes / len(batches)), 1, distribution)
    mean = [torch.stack(parts).mean(0) for parts in zip(*exact, strict=True)]
    scale = step * norm_of(trainables.tensors) / (norm_of(estimate) or 1.0)
    moved = [here.detach() - scale * part for here, part in zip(trainables.tensors, estimate, strict=True)]
    before = mean_loss(batches)
    with trainables.holding(moved):
        after = mean_loss(batches)
    return float(np.sqrt(np.mean(errors) / np.mean(sizes))), cosine_between(estimate, mean), before - after


def warm_up(session: Session, batches: list[BatchLoss], steps: int) -> None:
    for index in range(steps):
        (gradient,) = gradients(session, [batches[index % len(batches)]])
        with torch.no_grad():
            for tensor, part in zip(session.parts.trainables.tensors, gradient, strict=True):
                tensor.sub_(_WARM_UP_RATE * part)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data_root", type=Path, help="folder with train_10k.jsonl")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--passes", type=int, default=65, help="forward passes per batch")
    parser.add_argument("--warm-up", type=int, default=60, help="steps of backpropagation before the second table")
    parser.add_argument("--step", type=float, default=0.05, help="length of the step over the parameters' norm")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.batches, options.passes, options.warm_up = 1, 5, 1
    torch.set_num_threads(1)
    print_machine(1)
    overrides = ["data.root", str(options.data_root), "fwdllm.data.test_file", "", "data.splits", "[0.9,0.1,0.0]"]
    session = Session.open(load_config(_CONFIG, [*overrides, "fwdllm.attention", "eager", "data.subsample", "0.2"]))
    clients = sorted(session.client_samples)[: options.batches]
    cut = session.parts.batches.cut
    batches = [
        session.parts.objective.on(cut(session.data.clients[client].train, client=client, batch_index=0, steps=1)[0])
        for client in clients
    ]
    losses = ResidentPerturbation(session.parts.trainables, Rademacher())
    for moment, steps in (("where training starts", 0), (f"after {options.warm_up} steps", options.warm_up)):
        warm_up(session, batches, steps)
        exact = gradients(session, batches)
        rows = []
        for name, it, probes in candidates(losses, options.passes):
            error, cosine, decrease = measure(session, batches, exact, it, probes, options.step)
            rows.append((name, probes, f"{error:.4f}", f"{cosine:.3f}", f"{1000 * decrease:.2f}"))
        count = session.parts.trainables.count
        title = f"{len(batches)} batches of {options.passes} passes, {count:,} parameters, {moment}"
        print_table(title, ("", "probes", "slope error", "cosine", "loss decrease / 1000"), rows)


if __name__ == "__main__":
    main()
