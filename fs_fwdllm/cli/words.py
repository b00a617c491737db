"""The free words of a command: a file, unless an option names it, and ``key value key value``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fs_fwdllm.errors import ConfigError, nearest

__all__ = ["ConfigFile", "FileAndOverrides", "file_and_words", "refuse_stray_options"]

#: What every command that reads a configuration takes.
FileAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILE] KEY VALUE ...", help="The file, unless --cfg names it; then values to replace."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--cfg",
        metavar="FILE",
        help="Configuration, YAML: a file, or the name of a packaged one (demo, fwdllm/agnews_fwd).",
    ),
]

_OPTIONS = ("--cfg", "--cf", "--host")


def file_and_words(words: Sequence[str] | None, named: Path | None, command: str) -> tuple[Path, list[str]]:
    """The file a command is to read: the one an option has named, or else the first word; and the other words.

    Raises:
        ConfigError: there is neither, or a word is an option that no command has.
    """
    given = list(words or [])
    file = named
    if file is None:
        refuse_stray_options(given[:1])
        if not given:
            raise ConfigError(f"FILE: name a configuration, as in fs-fwdllm {command} demo")
        file = Path(given.pop(0))
    refuse_stray_options(given[::2])
    return file, given


def refuse_stray_options(words: Sequence[str]) -> None:
    """Raises :class:`~fs_fwdllm.errors.ConfigError` for a word in a key's place that looks like an option."""
    stray = next((word for word in words if word.startswith("--")), None)
    if stray is not None:
        raise ConfigError(f"{stray}: is not an option of this command{nearest(stray, _OPTIONS)}")
