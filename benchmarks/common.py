"""What the benchmarks share: the model they measure on, the machine's facts, fair timing, and tables.

Fair timing on a noisy machine means three things. CPU time rather than wall-clock time (with one thread). Both sides of
a comparison in one process, *interleaved* (A B A B ...), so that whatever slows one slows the other. And the minimum
over the repetitions, because noise only ever adds; the median of the ratios within each repetition stands beside it and
tells how noisy the machine was.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from fs_fwdllm.config import parse_config
from fs_fwdllm.data.types import Batch
from fs_fwdllm.method import Parts
from fs_fwdllm.model.trainable_parts import Request, attach

__all__ = [
    "Timings",
    "arguments",
    "interleave",
    "make_batch",
    "make_parts",
    "mib",
    "print_machine",
    "print_table",
    "random_llama",
    "verdict",
]

#: The model of the issue's targets: 26 M parameters. And one for smoke tests.
_LLAMA = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 2048,
}
_SMALL_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 128,
}
LORA_TARGETS = ["q_proj", "v_proj"]


def arguments(description: str, repetitions: int, **more: Any) -> argparse.Namespace:
    """Parse the command line; ``more`` are further options, ``name=default`` or ``name=(default, help)``."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repetition, to see that it works")
    parser.add_argument("--threads", type=int, default=1, help="threads; with more than one, wall-clock time is taken")
    parser.add_argument("--repetitions", type=int, default=repetitions)
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.repetitions = 1
    torch.set_num_threads(parsed.threads)
    return parsed


def print_machine(threads: int) -> None:
    """One line with what the figures depend on."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}, {threads} thread(s)"
        f"{load}; Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, numpy {np.__version__}"
    )


def random_llama(*, quick: bool, attention: str = "sdpa") -> nn.Module:
    """A seeded random Llama in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        settings = transformers.LlamaConfig(**(_SMALL_LLAMA if quick else _LLAMA), attn_implementation=attention)
        return transformers.LlamaForCausalLM(settings).eval()


def make_batch(rows: int, tokens: int, vocabulary: int) -> Batch:
    """Random tokens, every one of them a label."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator).numpy()
    return Batch(input_ids, np.ones_like(input_ids), input_ids.copy(), key=("benchmark", rows, tokens))


def make_parts(model: nn.Module, method: str, trained: str = "lora", **fwdllm: Any) -> Parts:
    """Our parts around ``model``: LoRA of rank 8 on the query and value projections, or every parameter."""
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": LORA_TARGETS} if trained == "lora" else {}
    tree = {"federate": {"method": method}, "llm": {"adapter": {"use": trained != "full"}}, "fwdllm": fwdllm}
    model.config.use_cache = False  # as load_model has it: nothing is generated
    wrapped = attach(trained, Request(model, "causal_lm", (), 1, adapter))
    return Parts.build(parse_config(tree), wrapped.eval(), "causal_lm", 0, full=trained == "full")


@dataclass
class Timings:
    """Seconds of every repetition, per action."""

    seconds: dict[str, list[float]]

    def best(self, name: str) -> float:
        """The least of the repetitions, in seconds."""
        return min(self.seconds[name])

    def ratio(self, name: str, peer: str) -> float:
        """Minimum over minimum."""
        return self.best(name) / self.best(peer)

    def median_ratio(self, name: str, peer: str) -> float:
        """Median over the repetitions of the ratio within a repetition."""
        pairs = zip(self.seconds[name], self.seconds[peer], strict=True)
        return statistics.median(mine / other for mine, other in pairs)


def interleave(actions: dict[str, Callable[[], object]], repetitions: int) -> Timings:
    """Run the actions in turn, ``repetitions`` times after one warm-up each."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repetitions):
        for name, action in actions.items():
            started = clock()
            action()
            seconds[name].append(clock() - started)
    return Timings(seconds)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """An aligned table; the first column to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for row in [cells[0], ["-" * width for width in widths], *cells[1:]]:
        first, *others = (cell.ljust(width) if not index else cell.rjust(width)
                          for index, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        print("  ".join([first, *others]).rstrip())


def verdict(value: float, target: float, quick: bool = False) -> str:
    """``<= 1.1 met`` or ``<= 1.1 MISSED``; a quick run judges nothing."""
    if quick:
        return f"<= {target:.4g}"
    return f"<= {target:.4g} {'met' if value <= target else 'MISSED'}"


def mib(count_bytes: float) -> str:
    """Bytes as MiB."""
    return f"{count_bytes / 2**20:.1f}"
