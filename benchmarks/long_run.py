"""A long run: does forward-gradient training collapse as the parameters' norm grows, and does step control prevent it?

Noise is nearly orthogonal to the parameters, so every plain step lengthens them. The model is a small real network, a
LayerNorm-free perceptron on made-up data, whose exact slopes come from one backward pass (the same numbers as forward
mode gives, without its cost), through the real pool, step control and replay. One row a control and learning rate: the
accuracy at its best and at the end, and how far the norm has grown, each for every seed (of data, network and
directions).

    python benchmarks/long_run.py [--updates 3000] [--probes 10] [--seeds 3] [--quick]
"""

from __future__ import annotations

import numpy as np
import torch
from common import arguments, print_machine, print_table
from torch import nn
from torch.nn.functional import cross_entropy

from fs_fwdllm.core.arrays import arrays_of
from fs_fwdllm.core.direction import DirectionKey, Rademacher, direction_seed
from fs_fwdllm.core.learning_rate import Schedule
from fs_fwdllm.core.replay import Replayer
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.method.forward.pacing import Pacing
from fs_fwdllm.method.forward.pool import PoolEntry
from fs_fwdllm.method.forward.pooled_step import PooledStep
from fs_fwdllm.method.forward.server_optimizer import Sgd
from fs_fwdllm.method.forward.step_control import STEP_CONTROLS, norm_of

_FEATURES, _CLASSES, _BATCH = 20, 4, 8
#: Learning rates in the unit of each control, which make first steps of similar length.
_RATES = {"none": 0.003, "normalised": 0.003, "trust_ratio": 0.01}


def _data(generator: torch.Generator, teacher: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points labelled by a noisy linear teacher."""
    x = torch.randn(count, _FEATURES, generator=generator)
    return x, (x @ teacher + torch.randn(count, _CLASSES, generator=generator)).argmax(1)


def _network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(_FEATURES, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, _CLASSES))


def _slopes(model: nn.Module, x: torch.Tensor, y: torch.Tensor, keys: list[DirectionKey]) -> np.ndarray:
    gradient = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    total = np.zeros(len(keys))
    for index, part in enumerate(gradient):
        z = Rademacher().values(keys, index, 0, part.numel(), arrays_of(part)).to(torch.float32)
        total += (z @ part.reshape(-1)).double().numpy()
    return total.astype(np.float32)


def run(control: str, rate: float, updates: int, probes: int, seed: int) -> dict[str, float]:
    """Train and say how it went."""
    generator = torch.Generator().manual_seed(seed + 1)
    teacher = torch.randn(_FEATURES, _CLASSES, generator=generator)
    test = _data(generator, teacher, 1000)
    model = _network(seed)
    trainables = Trainables.of_model(model)
    start = norm_of(trainables.tensors)
    replayer = Replayer(trainables, seed, Rademacher())
    schedule = Schedule(rate, "constant", updates)
    pacing = Pacing(control=STEP_CONTROLS[control])
    step = PooledStep(replayer, schedule, weight_decay=0.0, equal_weights=True, optimizer=Sgd(), pacing=pacing)
    best = accuracy = 0.0
    for index in range(updates):
        keys = [DirectionKey(seed, direction_seed(index, 1, 0, probe)) for probe in range(probes)]
        slopes = _slopes(model, *_data(generator, teacher, _BATCH), keys)
        if not np.isfinite(slopes).all():
            break
        step.pool.add([PoolEntry(index, 1, 1, slopes[None])])
        step.take(index, bytes(16))
        step.pool.clear()
        if index % 100 == 99 or index + 1 == updates:
            with torch.no_grad():
                accuracy = float((model(test[0]).argmax(1) == test[1]).float().mean())
            best = max(best, accuracy)
    growth = norm_of(trainables.tensors) / start
    return {"best": best, "final": accuracy, "growth": growth, "updates": index + 1}


def main() -> None:
    options = arguments(__doc__ or "", 1, updates=3000, probes=10, seeds=3)
    updates, seeds = (20, 1) if options.quick else (options.updates, options.seeds)
    print_machine(options.threads)
    rows = []
    for control, rate in _RATES.items():
        for factor in (1.0, 3.0, 10.0):
            results = [run(control, factor * rate, updates, options.probes, 1 + seed) for seed in range(seeds)]
            best, final = (" ".join(f"{100 * result[key]:.1f}" for result in results) for key in ("best", "final"))
            growth = " ".join(f"{result['growth']:.2f}" for result in results)
            done = " ".join(f"{result['updates']:.0f}" for result in results)
            rows.append((control, f"{factor * rate:.3g}", best, final, growth, done))
    header = ("step control", "lr", "best %", "final %", "|theta|/|theta_0|", "updates")
    print_table(f"{updates} updates of {options.probes} probes, batch {_BATCH}, each seed", header, rows)


if __name__ == "__main__":
    main()
