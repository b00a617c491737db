"""The command ``fs-fwdllm basis``: fixed directions for an adapter, from public text."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fs_fwdllm.cli.words import ConfigFile, FileAndOverrides, file_and_words
from fs_fwdllm.report.terminal import print_facts, say

__all__ = ["basis"]


def basis(
    words: FileAndOverrides = None,
    cfg: ConfigFile = None,
    text: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Public text: .txt by paragraphs, or a table whose field fwdllm.data.text names."
        ),
    ] = Path("public.txt"),
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write; it must not exist.")
    ] = Path("basis.safetensors"),
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Look at about so many tokens.")] = 100_000,
) -> None:
    """Write the fixed directions that the configured adapter reads activations through (llm.adapter.args basis).

    Example: fs-fwdllm basis my.yaml --text public.txt --output basis.safetensors

    Example: fs-fwdllm basis my.yaml --text public.jsonl fwdllm.data.text instruction+response

    The base runs over the text, forward only. Take text that nobody has to protect and that is like the clients'. The
    file's bytes are part of what a run computes: give every machine the same file, and never make it anew there.
    """
    from fs_fwdllm.config import load_config

    config = load_config(*file_and_words(words, cfg, "basis"))
    device = importlib.import_module("fs_fwdllm.method.parts").select_device(config)
    made = importlib.import_module("fs_fwdllm.model.basis").make_basis(config, text, output, device, tokens)
    console = Console(highlight=False)
    print_facts(console, [("tokens", f"{made.tokens:,}"), ("forward passes", f"{made.passes:,}")])
    print_facts(
        console,
        [(name, f"{rows} rows of {width}, {share:.0%} of the variance") for name, rows, width, share in made.places],
    )
    say(console, f"wrote {made.path}; use it with llm.adapter.args basis: {made.path}, basis_digest: {made.digest}")
