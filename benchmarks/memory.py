"""Peak memory of a training step: forward-only against inference and against backpropagation.

Each kind runs in a process of its own on the 26 M parameter Llama with a batch of 4 x 256 tokens. All import everything
and run the same code once on a tiny model, so that libraries and lazily loaded code are counted for none of them. Then:

* *before*: resident memory with the model and the data in place, before the first step;
* *peak*: the high-water mark over the steps, counted anew after one warm-up step where the kernel allows it;
* *needs*: peak - before. That is what the step needs on top of the model.

The target is peak(MeZO) <= peak(inference) + 3 x trainable bytes + 20 MB, on *needs*, where inference is one that keeps
no key-value cache (which a loss does not need, but the unmodified model keeps; its row is there too).

The C library's allocator keeps freed blocks of up to 32 MB by default, which adds tens of MiB, by chance, to every
kind. So that tensors in use are compared and not chance, every process returns blocks of 128 KiB and more to the system
at once (``MALLOC_MMAP_THRESHOLD_``; glibc only). ``--allocator default`` shows what is seen without.

    python benchmarks/memory.py [--quick] [--rows 4] [--tokens 256] [--allocator default]
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from common import arguments, make_batch, make_parts, mib, print_machine, print_table, random_llama
from step import backprop_step, plain_forward, worker_step

#: name: (method or none for inference, trained, settings)
KINDS: dict[str, tuple[str, str, dict[str, object]]] = {
    "inference": ("", "", {"use_cache": False}),
    "inference with key-value cache": ("", "", {"use_cache": True}),
    "MeZO, LoRA": ("fedmezo", "lora", {}),
    "backprop, LoRA": ("fedavg", "lora", {}),
    "backprop + checkpointing, LoRA": ("fedavg", "lora", {"gradient_checkpointing": True}),
    "MeZO, all parameters": ("fedmezo", "full", {}),
    "backprop, all parameters": ("fedavg", "full", {}),
    "backprop + checkpointing, all": ("fedavg", "full", {"gradient_checkpointing": True}),
}


def prepare(kind: str, *, small: bool, rows: int, tokens: int) -> tuple[Callable[[], object], int]:
    """One step of this kind, and the bytes it trains."""
    method, trained, settings = KINDS[kind]
    model = random_llama(quick=small)
    batch = make_batch(rows, tokens, 128 if small else 2048)
    if not method:
        return plain_forward(model, batch, **settings), 0
    parts = make_parts(model, method, trained, **settings)
    step = worker_step(parts, batch) if method == "fedmezo" else backprop_step(parts, batch)
    return step, parts.trainables.bytes


def status_bytes(field: str) -> int | None:
    """A field of ``/proc/self/status``; ``None`` where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def reset_high_water_mark() -> bool:
    """Start counting the peak anew; false where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def measure(kind: str, *, quick: bool, rows: int, tokens: int) -> dict[str, object]:
    """Runs in a process of its own."""
    warm_up, _ = prepare(kind, small=True, rows=2, tokens=8)
    warm_up()
    step, trainable_bytes = prepare(kind, small=quick, rows=rows, tokens=tokens)
    anew = reset_high_water_mark()
    before = status_bytes("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step()
    anew = reset_high_water_mark() and anew
    for _ in range(3):
        step()
    peak = status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before, "peak": peak, "trainable": trainable_bytes, "anew": anew}


def measure_elsewhere(kind: str, flags: list[str], environment: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, __file__, *flags, "--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = arguments(__doc__, repetitions=1, rows=4, tokens=256, kind="", allocator="returning")
    if options.kind:
        print(json.dumps(measure(options.kind, quick=options.quick, rows=options.rows, tokens=options.tokens)))
        return
    print_machine(options.threads)
    flags = ["--rows", str(options.rows), "--tokens", str(options.tokens), *(["--quick"] if options.quick else [])]
    kinds = [kind for kind in KINDS if not options.quick or "all" not in kind]
    environment = {} if options.allocator == "default" else {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    measured = {kind: measure_elsewhere(kind, flags, environment) for kind in kinds}
    needs = {kind: figures["peak"] - figures["before"] for kind, figures in measured.items()}
    if not all(figures["anew"] for figures in measured.values()):
        print("the high-water mark cannot be reset here: loading counts towards the peak")
    inference = needs["inference"]
    rows = []
    for kind, figures in measured.items():
        allowed = inference + 3 * figures["trainable"] + 20_000_000
        target = ""
        if KINDS[kind][0] == "fedmezo":
            met = "" if options.quick else " met" if needs[kind] <= allowed else " MISSED"
            target = f"<= {mib(allowed)}{met}"
        sizes = figures["trainable"], figures["before"], figures["peak"], needs[kind], needs[kind] - inference
        rows.append((kind, *map(mib, sizes), f"{needs[kind] / max(inference, 1):.2f}", target))
    header = ("MiB", "trainable", "before", "peak", "needs", "over inference", "ratio to inference", "target on needs")
    print_table(f"Peak resident memory, batch {options.rows} x {options.tokens} tokens", header, rows)


if __name__ == "__main__":
    main()
