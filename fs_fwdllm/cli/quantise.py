"""The command ``fs-fwdllm quantise``: a model's folder with its linear layers packed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.report.terminal import print_facts, say
from fs_fwdllm.report.units import format_bytes

__all__ = ["quantise"]


def quantise(
    model: Annotated[Path, typer.Argument(help="Folder of a float model.", metavar="MODEL")],
    output: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT")],
    int4: Annotated[bool, typer.Option("--int4", help="Whole numbers of 4 bits (the default).")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Whole numbers of 8 bits.")] = False,
    nf4: Annotated[bool, typer.Option("--nf4", help="Sixteen quantiles of a normal distribution (QLoRA).")] = False,
    group: Annotated[int, typer.Option(min=8, metavar="N", help="Weights that share a scale.")] = 64,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero of its own for every group.")] = False,
) -> None:
    """Write a model's folder with the linear layers of its blocks packed into 8 or 4 bits.

    Example: fs-fwdllm quantise llama-7b llama-7b-int4 --int4 --group 64

    Tensors are read and written one by one, so that memory holds half a gigabyte of them at most, whatever the model's
    size. What was interrupted goes on when the same command is given again. The folder is loaded by model.type as any
    other, and by transformers with compressed-tensors (int4, int8) or bitsandbytes (nf4).
    """
    names = [name for name, chosen in (("int4", int4), ("int8", int8), ("nf4", nf4)) if chosen] or ["int4"]
    if len(names) > 1:
        raise ConfigError(f"--{' and --'.join(names)}: choose one")
    if asymmetric and nf4:
        raise ConfigError("--asymmetric: nf4 has no zeros; it is for --int4 and --int8")
    form = importlib.import_module("fs_fwdllm.model.base.packing").Form(names[0], group, not asymmetric)
    quantise_folder = importlib.import_module("fs_fwdllm.model.base.quantising").quantise_folder
    progress = importlib.import_module("rich.progress").Progress  # not for every other command's help
    with progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tensors")
        made = quantise_folder(model, output, form, lambda done, all_: bar.update(task, completed=done, total=all_))
    console = Console(highlight=False)
    size = f"{format_bytes(made.bytes_before)} before, {format_bytes(made.bytes_after)} now"
    print_facts(console, [("layers packed", f"{made.layers:,}"), ("weights", size)])
    if made.left:
        print_facts(console, [("left as they are", f"{', '.join(made.left[:3])} ({len(made.left)} in all)")])
    say(console, f"wrote {made.folder}; use it with model.type {made.folder}@huggingface_llm (or @transformers)")
