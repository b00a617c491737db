"""A step over a base that is larger than its memory: peak of the whole process, seconds, and bytes from the disk.

Random weights in the shape of a known model are written to the disk (``scripts/make_random_model``). Every row
is one step in a process of its own, imports, tokenizer and loading included; the peak is the kernel's (VmHWM). The
peer is what a user would otherwise pick: accelerate's disk offload of the bfloat16 weights, MeZO's passes one by one.

    python benchmarks/large.py FOLDER [--like llama-7b] [--layers N] [--rows PATTERN] [--threads 1] [--quick]

FOLDER is for the models (3.9 GB for llama-7b in int4, 13.5 GB more for blocks and the peer) and is kept, so that a
second call measures at once. ``--layers 4`` measures as many layers of the same width, for machines without an
afternoon.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import print_machine, print_table

ROOT = Path(__file__).resolve().parents[1]
_LORA = [{"adapter_method": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}]


@dataclass(frozen=True)
class Row:
    """A step: which estimator, over which base, on how many tokens; ``measure`` names what takes it."""

    name: str
    tokens: int
    own: dict[str, Any]
    form: str = "int4"
    base: dict[str, Any] | None = None
    measure: str = "step"


_MEZO = {"estimator": "one_sided", "probes": 8, "probes_per_batch": 8, "attention": "eager"}
#: One after the other they need no kernel that can be batched, and keep no attention weights while they wait.
_ONE_BY_ONE = {**_MEZO, "probes_per_batch": 1, "attention": "auto"}
_DISK = {"stream": True}
ROWS = [
    Row("8 probes, 64 tokens", 64, _MEZO, base=_DISK),
    Row("8 probes, 64 tokens, in memory", 64, _MEZO),
    Row("8 probes one by one, 64 tokens", 64, _ONE_BY_ONE, base=_DISK),
    Row("forward mode, 8 tangents, 64 tokens", 64, {**_MEZO, "estimator": "forward_mode"}, base=_DISK),
    Row("forward mode, 8 tangents, 64 tokens, bfloat16", 64, {**_MEZO, "estimator": "forward_mode"},
        base={**_DISK, "compute_dtype": "bfloat16"}),
    Row("8 probes, 512 tokens", 512, _MEZO, base=_DISK),
    Row("8 probes one by one, 512 tokens", 512, _ONE_BY_ONE, base=_DISK),
    Row("8 probes one by one, 512 tokens, 4 a read", 512, _ONE_BY_ONE,
        base={**_DISK, "passes_per_read": 4}),
    Row("backpropagation, 64 tokens", 64, {"estimator": "projected", "gradient_checkpointing": True}, base=_DISK),
    Row("backpropagation, 512 tokens", 512, {"estimator": "projected", "gradient_checkpointing": True}, base=_DISK),
    Row("a block visit of 4 steps, 64 tokens, bfloat16", 64, {"gradient_checkpointing": True}, form="bfloat16",
        base={**_DISK, "compute_dtype": "bfloat16"}, measure="visit"),
    Row("the same with its server, 2 visits", 64, {"gradient_checkpointing": True}, form="bfloat16",
        base={**_DISK, "compute_dtype": "bfloat16"}, measure="rounds"),
    Row("accelerate disk offload, bfloat16, 8 probes one by one, 64 tokens", 64, {}, form="bfloat16",
        measure="accelerate"),
]  # fmt: skip


def model_of(options: argparse.Namespace, form: str) -> Path:
    """The folder of the random model, made if it is not there."""
    folder: Path = options.folder / f"{options.like}-{form}{f'-{options.layers}' if options.layers else ''}"
    if not (folder / "config.json").is_file():
        command = [sys.executable, str(ROOT / "scripts" / "make_random_model"), str(folder)]
        command += [
            "--like",
            options.like,
            "--form",
            form,
            *(["--layers", str(options.layers)] if options.layers else []),
        ]
        subprocess.run(command, check=True)
    return folder


def step_of_ours(row: Row, folder: Path) -> dict[str, float]:
    """One step as a client takes it."""
    from fs_fwdllm.config import parse_config
    from fs_fwdllm.core.direction import DirectionKey, make_distribution
    from fs_fwdllm.core.trainables import Trainables
    from fs_fwdllm.estimator import make_estimator
    from fs_fwdllm.model import load_model, load_tokenizer
    from fs_fwdllm.model.base.packed import reader_of
    from fs_fwdllm.model.objective import Objective

    config = parse_config(
        {
            "model": {"type": f"{folder}@huggingface_llm"},
            "federate": {"method": "fedmezo"},
            "llm": {"tok_len": row.tokens, "adapter": {"use": True, "args": _LORA}},
            "fwdllm": {**row.own, "base": row.base or {}},
        }
    )
    loaded = load_model(config, load_tokenizer(config))
    trainables, distribution = Trainables.of_model(loaded.model), make_distribution("rademacher")
    estimator = make_estimator(loaded.model, trainables, distribution, config.fwdllm, full=False)
    batch = Objective(loaded.model, trainables, "causal_lm", conduct=loaded.conduct).on(_batch(row.tokens))
    keys = [DirectionKey(1, probe) for probe in range(row.own.get("probes", 8))]
    reader = reader_of(loaded.model)
    read, waited = (reader.bytes_read, reader.waited_s) if reader is not None else (0, 0.0)
    wall, cpu = time.perf_counter(), time.process_time()
    slopes = estimator.slopes(batch, keys)
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": slopes.loss}
    if reader is not None:
        found |= {"read": reader.bytes_read - read, "waited": reader.waited_s - waited}
    return found


def _batch(tokens: int) -> Any:
    from fs_fwdllm.data.types import Batch

    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones_like(ids), ids)


def step_of_accelerate(row: Row, folder: Path) -> dict[str, float]:
    """Nine passes of MeZO over a model whose weights accelerate reads for each of them."""
    import psutil
    from accelerate import disk_offload
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    disk_offload(model, str(folder) + "-offloaded")
    ids = torch.randint(0, 256, (1, row.tokens), generator=torch.Generator().manual_seed(1))
    before, wall, cpu = psutil.Process().io_counters().read_bytes, time.perf_counter(), time.process_time()
    with torch.no_grad():
        for _ in range(9):
            loss = float(model(input_ids=ids, labels=ids).loss)
    read = psutil.Process().io_counters().read_bytes - before
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss, "read": read}


def visit_of_ours(row: Row, folder: Path, rounds: int = 0) -> dict[str, float]:
    """One visit to a block as a client makes it; or so many rounds of block training, client and server."""
    from fs_fwdllm.config import parse_config
    from fs_fwdllm.core.wire import encode
    from fs_fwdllm.data.types import Example
    from fs_fwdllm.method import Parts, assemble_server, assemble_worker
    from fs_fwdllm.model import load_model, load_tokenizer
    from fs_fwdllm.model.base.packed import reader_of

    config = parse_config(
        {
            "model": {"type": f"{folder}@huggingface_llm"},
            "outdir": str(folder.parent),
            "federate": {"method": "fedcybgd", "client_num": 1},
            "llm": {"tok_len": row.tokens, "adapter": {"use": False}},
            "dataloader": {"batch_size": 1},
            "train": {"local_update_steps": 4, "optimizer": {"type": "AdamW", "lr": 1e-5}},
            "fwdllm": {**row.own, "base": row.base or {}, "blocks": {"schedule": "ascending", "upload": "bfloat16"}},
        }
    )
    loaded = load_model(config, load_tokenizer(config))
    parts = Parts.build(config, loaded.model, "causal_lm", 0, full=True, conduct=loaded.conduct)
    worker, server = assemble_worker(parts), assemble_server(parts, {1: 4})
    ids = _batch(row.tokens).input_ids[0].numpy().astype("int32")
    reader = reader_of(loaded.model)
    assert reader is not None
    read, waited = reader.bytes_read, reader.waited_s
    wall, cpu, update = time.perf_counter(), time.process_time(), None
    for number in range(max(1, rounds)):
        assignment = server.assign(number, server.wanted_clients([1]))[1]
        update = worker.work(assignment, [Example(ids, ids)] * 4)
        encode(update)
        if rounds:
            server.absorb([update])
    assert update is not None
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": update.loss}
    return {**found, "read": reader.bytes_read - read, "waited": reader.waited_s - waited}


_MEASURES = {
    "step": step_of_ours, "accelerate": step_of_accelerate, "visit": visit_of_ours,
    "rounds": lambda row, folder: visit_of_ours(row, folder, rounds=2),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", default="llama-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", default="", metavar="PATTERN", help="rows whose name has this regular expression")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny shape")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.like = "llama-tiny"
    if options.step is not None:
        row = ROWS[options.step]
        found = _MEASURES[row.measure](row, model_of(options, row.form))
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
        print(json.dumps({**found, "peak": int(peak) * 1024}))
        return
    print_machine(options.threads)
    chosen = [index for index, row in enumerate(ROWS) if re.search(options.rows, row.name)]
    header = ("a step of", "peak GB", "CPU s", "wall s", "read GB", "waited s", "loss")
    print_table(f"{options.like}{f', {options.layers} layers' if options.layers else ''}", header,
                [_cells(ROWS[index], _measured(index, options)) for index in chosen])  # fmt: skip


def _measured(index: int, options: argparse.Namespace) -> dict[str, float]:
    model_of(options, ROWS[index].form)
    command = [sys.executable, __file__, *sys.argv[1:], "--step", str(index)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{ROWS[index].name}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{ROWS[index].name}: {found}", flush=True)
    return found


def _cells(row: Row, found: dict[str, float]) -> Sequence[str]:
    gigabytes = [f"{found['peak'] / 1e9:.3f}", f"{found['cpu']:.1f}", f"{found['wall']:.1f}"]
    return (
        row.name,
        *gigabytes,
        f"{found.get('read', 0) / 1e9:.2f}",
        f"{found.get('waited', 0):.2f}",
        f"{found['loss']:.4f}",
    )


if __name__ == "__main__":
    main()
