"""Block training (fedcybgd): memory of a visit, bytes of a visit, and what a bfloat16 model keeps of small steps.

The model is a random Llama of 97 M parameters (12 layers, hidden 768, tied embeddings); its layers are the blocks.

* *memory*: every kind in a process of its own that has imported everything and run the same code on a tiny model. What
  is shown is the high-water mark less the resident memory before the model was made, against ``2 P + 16 P_b`` (bfloat16
  weights; float32 master, gradient and AdamW's moments of one block) plus activations: what a forward and backward pass
  with that block's gradients needs beside the model and those gradients.
* *bytes*: frames of the real server after every block has changed, for a client it has not seen, and frames of deltas.
* *moved*: 150 AdamW steps at learning rate 1e-6 on one block of a smaller model: the share of weights that moved, with
  our float32 master, with a full float32 copy of the model, and with an optimiser on the bfloat16 weights themselves.

    python benchmarks/blocks.py [--quick] [--only memory|bytes|moved] [--rows 2] [--tokens 64]
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import arguments, make_batch, make_parts, mib, print_machine, print_table
from memory import reset_high_water_mark, status_bytes
from step import backprop_step
from torch import nn

from fs_fwdllm.config import parse_config
from fs_fwdllm.core.wire import frame_bytes
from fs_fwdllm.estimator import Backprop
from fs_fwdllm.method import Parts, assemble_server, assemble_worker
from fs_fwdllm.method.cybgd.client import delta_encoding
from fs_fwdllm.method.cybgd.codec import encode_tensors
from fs_fwdllm.method.cybgd.forecast import BlockAnswers, active_parameters
from fs_fwdllm.method.cybgd.optimiser import BlockOptimizer, OptimizerSettings
from fs_fwdllm.method.cybgd.records import BlockAssignment
from fs_fwdllm.method.cybgd.server import BlockServer

_LLAMA = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
_MIDDLE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}

#: name: (dtype, method or none for a forward pass, trained, gradient checkpointing)
KINDS: dict[str, tuple[str, str, str, bool]] = {
    "gradient of a block, bfloat16": ("bfloat16", "", "", False),
    "gradient of a block, bfloat16, checkpointing": ("bfloat16", "", "", True),
    "block visit, bfloat16": ("bfloat16", "fedcybgd", "full", False),
    "block visit, bfloat16, checkpointing": ("bfloat16", "fedcybgd", "full", True),
    "block visit, float32": ("float32", "fedcybgd", "full", False),
    "all parameters, AdamW, float32": ("float32", "fedavg", "full", False),
    "LoRA r=8, AdamW, bfloat16 base": ("bfloat16", "fedavg", "lora", False),
    "LoRA r=8, AdamW, float32 base": ("float32", "fedavg", "lora", False),
}

#: name: settings below fwdllm.blocks.download
DOWNLOADS: dict[str, dict[str, Any]] = {
    "everything, exact": {"select": "all"},
    "changed blocks, exact": {},
    "changed, inactive int8": {"inactive": "int8"},
    "changed, inactive int4": {"inactive": "int4"},
    "changed, pruned to 50 %": {"keep_ratio": 0.5},
    "changed, half of the layers dropped": {"drop_ratio": 0.5},
    "changed, int4, 50 % pruned, half dropped": {"inactive": "int4", "keep_ratio": 0.5, "drop_ratio": 0.5},
}


def random_model(shape: dict[str, int], dtype: str, vocabulary: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        settings = transformers.LlamaConfig(**shape, vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False)
        return transformers.LlamaForCausalLM(settings).to(getattr(torch, dtype)).eval()


def block_parts(model: nn.Module, *, checkpointing: bool = False, **blocks: Any) -> Parts:
    tree = {
        "federate": {"method": "fedcybgd", "total_round_num": 1000, "client_num": 64},
        "train": {"optimizer": {"type": "AdamW", "lr": 1e-6}},
        "fwdllm": {"gradient_checkpointing": checkpointing, "blocks": blocks},
    }
    return Parts.build(parse_config(tree), model, "causal_lm", 0, full=True)


def prepare(kind: str, *, small: bool, rows: int, tokens: int) -> Callable[[], object]:
    """The work of this kind: a visit of two steps, or two of the peer's."""
    dtype, method, trained, checkpointing = KINDS[kind]
    vocabulary = 128 if small else 16000
    model = random_model(_SMALL if small else _LLAMA, dtype, vocabulary)
    batch = make_batch(rows, tokens, vocabulary)
    if not method:
        return block_gradient(model, batch, checkpointing)
    if method == "fedcybgd":
        worker = assemble_worker(block_parts(model, checkpointing=checkpointing))
        digest = worker.replica.digest
        assignment = BlockAssignment(
            0,
            1,
            digest,
            1e-6,
            2,
            (),
            batch_index=0,
            block=0,
            versions=(0,),
            cycle=0,
            held=(1,) * len(worker.replica.store.plan.parts),
            dropped=(),
            digest_base=digest,
        )
        worker.replica.follow((), digest)
        return lambda: worker.train(assignment, [batch, batch])
    parts = make_parts(model, method, trained)
    parts.config.train.optimizer.type = "AdamW"
    return backprop_step(parts, batch)


def block_gradient(model: nn.Module, batch: Any, checkpointing: bool) -> Callable[[], object]:
    """The gradient of the first layer (the one that needs most activations), in the model's dtype."""
    parts = block_parts(model)
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    backprop = Backprop(model, gradient_checkpointing=checkpointing)
    return lambda: backprop.gradient(parts.objective.on(batch))


def measure(kind: str, *, quick: bool, rows: int, tokens: int) -> dict[str, int]:
    """Runs in a process of its own."""
    prepare(kind, small=True, rows=2, tokens=8)()
    gc.collect()
    before = status_bytes("VmRSS") or 0
    work = prepare(kind, small=quick, rows=rows, tokens=tokens)
    gc.collect()
    loaded = status_bytes("VmRSS") or 0
    anew = reset_high_water_mark()
    work()
    peak = status_bytes("VmHWM") or 0
    return {"model": loaded - before, "peak": peak - before, "anew": int(anew)}


def print_memory(options: Any) -> None:
    flags = ["--rows", str(options.rows), "--tokens", str(options.tokens), *(["--quick"] if options.quick else [])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    figures = {}
    for kind in list(KINDS)[: 4 if options.quick else None]:
        command = [sys.executable, __file__, *flags, "--kind", kind]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{kind}: {done.stderr}")
        figures[kind] = json.loads(done.stdout.splitlines()[-1])
    if not all(figure["anew"] for figure in figures.values()):
        print("the high-water mark cannot be reset here: loading counts towards the peak")
    model = random_model(_SMALL if options.quick else _LLAMA, "bfloat16", 128 if options.quick else 16000)
    count, block = sum(p.numel() for p in model.parameters()), active_parameters(block_parts(model))
    print(f"\nP = {count:,}, P_b = {block:,}")
    rows = []
    for kind, figure in figures.items():
        gradient = figures.get(kind.replace("block visit", "gradient of a block"))
        formula = 0
        if kind.startswith("block visit, bfloat16") and gradient:
            activations = gradient["peak"] - gradient["model"] - 2 * block
            formula = 2 * count + 16 * block + activations
        ratio = f"{figure['peak'] / formula:.2f}" if formula else ""
        rows.append((kind, mib(figure["model"]), mib(figure["peak"]), mib(formula) if formula else "", ratio))
    header = ("MiB over an empty process", "with the model", "peak", "2 P + 16 P_b + activations", "peak / formula")
    print_table(f"Peak resident memory, batch {options.rows} x {options.tokens} tokens", header, rows)


def last_download(parts: Parts) -> int:
    """Bytes for a client the server has not seen, after two cycles in which every block has changed (by zeros)."""
    samples = dict.fromkeys(range(1, 65), 16)
    server = assemble_server(parts, samples)
    assert isinstance(server, BlockServer)
    visits = BlockAnswers(server, parts.config)
    for round_index in range(visits.rounds):
        assigned = server.assign(round_index, server.wanted_clients(sorted(samples)))
        server.absorb([visits.answer(given) for given in assigned.values()])
    return frame_bytes(next(iter(assigned.values())))


def print_bytes(options: Any) -> None:
    shape, vocabulary = (_SMALL, 128) if options.quick else (_LLAMA, 16000)
    model = random_model(shape, "bfloat16", vocabulary)
    count = sum(parameter.numel() for parameter in model.parameters())
    layers = len(model.model.layers)
    rows = []
    for name, download in DOWNLOADS.items():
        parts = block_parts(model, schedule="ascending", download=download)
        down = last_download(parts)
        rows.append((f"down: {name}", f"{down:,}", f"{down / count:.3f}", f"{down / (4 * count):.4f}"))
    block = [parameter.detach() for parameter in model.model.layers[0].parameters()]
    generator = torch.Generator().manual_seed(1)
    deltas = [1e-6 * torch.randn(value.shape, generator=generator) for value in block]
    for form in ("float32", "bfloat16", "int8"):
        for compress in (False, True):
            up = len(encode_tensors(deltas, delta_encoding(form), compress=compress)[0])
            name = f"up: one of {layers} blocks, {form}{', zstandard' if compress else ''}"
            rows.append((name, f"{up:,}", f"{up / count:.3f}", f"{up / (4 * count):.4f}"))
    lora = make_parts(model, "fedavg").trainables.count
    rows.append(("down and up: FedAvg, all parameters", f"{4 * count:,}", "4.000", "1.0000"))
    rows.append(
        ("down and up: FedAvg, LoRA r=8 (q, v)", f"{4 * lora:,}", f"{4 * lora / count:.3f}", f"{lora / count:.4f}")
    )
    header = (f"bytes of a visit, P = {count:,}", "bytes", "bytes / P", "of FedAvg, all")
    print_table("Bytes", header, rows)


def print_moved(options: Any) -> None:
    steps = 5 if options.quick else 150
    shape, vocabulary = (_SMALL, 128) if options.quick else (_MIDDLE, 4096)
    batches = [make_batch(2, 32, vocabulary)] * steps
    settings = OptimizerSettings(kind="AdamW")

    def visit(dtype: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        model = random_model(shape, "bfloat16", vocabulary).to(getattr(torch, dtype))
        parts = block_parts(model, schedule="fixed")
        assemble_worker(parts)
        block = list(model.model.layers[1].parameters())
        start = [value.detach().float().clone() for value in block]
        optimizer = BlockOptimizer(block, start, settings)
        optimizer.train(parts.objective, Backprop(model), batches, 1e-6)
        return start, [m.detach() for m in optimizer.masters], [p.detach().bfloat16() for p in block]

    start, master, shown = visit("bfloat16")
    _, copy, copy_shown = visit("float32")
    plain = plain_bfloat16(shape, vocabulary, batches)
    flat = lambda tensors: torch.cat([tensor.flatten().float() for tensor in tensors])  # noqa: E731
    origin, wanted = flat(start), flat(copy) - flat(start)
    rows = []
    for name, exact, seen in (
        ("our visit: float32 master of the block", flat(master), flat(shown)),
        ("a full float32 copy of the model", flat(copy), flat(copy_shown)),
        ("AdamW on bfloat16 weights", flat(plain), flat(plain)),
    ):
        change = exact - origin
        cosine = float(torch.cosine_similarity(change, wanted, dim=0)) if change.any() else 0.0
        length = float(change.norm() / wanted.norm())
        moved, deployed = float((change != 0).float().mean()), float((seen != origin).float().mean())
        rows.append((name, f"{moved:.2%}", f"{deployed:.2%}", f"{length:.3f}", f"{cosine:.3f}"))
    header = (f"{steps} steps at 1e-6", "weights moved", "as bfloat16", "length of the change", "cosine to the copy's")
    print_table("What a bfloat16 model keeps of small steps", header, rows)


def plain_bfloat16(shape: dict[str, int], vocabulary: int, batches: list[Any]) -> list[torch.Tensor]:
    """The block after AdamW on the bfloat16 weights themselves."""
    model = random_model(shape, "bfloat16", vocabulary)
    parts = block_parts(model, schedule="fixed")
    assemble_worker(parts)
    block = list(model.model.layers[1].requires_grad_(True).parameters())
    optimizer, backprop = torch.optim.AdamW(block, lr=1e-6, weight_decay=0.0), Backprop(model)
    for batch in batches:
        backprop.gradient(parts.objective.on(batch))
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in block]


def main() -> None:
    options = arguments(__doc__, repetitions=1, rows=2, tokens=64, kind="", only="")
    if options.kind:
        print(json.dumps(measure(options.kind, quick=options.quick, rows=options.rows, tokens=options.tokens)))
        return
    print_machine(options.threads)
    for name, show in {"memory": print_memory, "bytes": print_bytes, "moved": print_moved}.items():
        if options.only in ("", name):
            show(options)


if __name__ == "__main__":
    main()
