"""The command ``fs-fwdllm config``: which keys there are, and what a configuration comes to."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from fs_fwdllm.cli.words import ConfigFile, FileAndOverrides, file_and_words
from fs_fwdllm.errors import ConfigError, nearest

__all__ = ["config_app"]

config_app = typer.Typer(name="config", help="List the keys of a configuration, or show one.", no_args_is_help=True)


@config_app.command()
def keys(
    pattern: Annotated[
        str, typer.Argument(metavar="[PATTERN]", help="Part of a name (lr), a pattern ('fwdllm.gate.*'), or a word.")
    ] = "",
) -> None:
    """List every key: its default, what it takes, what it means, and which host gives it a meaning.

    Example: fs-fwdllm config keys train.optimizer
    """
    from fs_fwdllm.config.keys import matching_keys, schema_keys
    from fs_fwdllm.config.yaml_text import dump_yaml

    found = matching_keys(pattern)
    if not found:
        known = [key.name for key in schema_keys()]
        raise ConfigError(f"{pattern}: is in no key's name or description{nearest(pattern, known)}")
    console = Console(highlight=False)
    for key in found:
        default = dump_yaml([key.default])[2:].strip().removesuffix("\n...")
        facts = f"{default}  ({key.form})" if key.description else default
        console.print(Text.assemble((key.name, "bold"), ": ", facts))
        meaning = key.description or "accepted, so that one file serves every host"
        hosts = "" if key.description else f"{key.hosts}: "
        indented = textwrap.wrap(hosts + meaning, console.width, initial_indent="    ", subsequent_indent="    ")
        console.print(Text("\n".join(indented)))


@config_app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
def show(
    words: FileAndOverrides = None,
    cfg: ConfigFile = None,
) -> None:
    """Print the resolved configuration as YAML: every key with its value, as a run would write it to config.yaml.

    Example: fs-fwdllm config show demo fwdllm.probes 100
    """
    from fs_fwdllm.config import dump_config, load_config

    typer.echo(dump_config(load_config(*file_and_words(words, cfg, "config show"))), nl=False)
