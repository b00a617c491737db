"""Printing for people: lines broken between words, tables that fit a terminal of 80 columns, signs of life.

On a terminal a long line is broken at a space, and a word that is longer than the line (a path) is left whole, so that
it can be copied. Elsewhere, in a file or a pipe, a line stays one line, so that it can be searched.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fs_fwdllm.report.units import format_seconds

if TYPE_CHECKING:
    from fs_fwdllm.config import Config

__all__ = ["compact_table", "loading", "print_facts", "say"]

#: A number and the space before its unit, at which no line is broken.
_NUMBER_AND_UNIT = re.compile(r"(\d) (?=(?:s|min|h|B|[KMGT]iB)\b)")


def say(console: Console, text: str, style: str = "") -> None:
    """One remark; continued lines are indented."""
    _print(console, _wrapped(console, text), style)


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """``(name, value)`` pairs, the values below each other; a value may have several lines."""
    indent = max((len(name) for name, _ in facts), default=0) + 2
    for name, value in facts:
        first, *others = value.splitlines() or [""]
        _print(console, _wrapped(console, name.ljust(indent) + first, indent))
        for line in others:
            _print(console, _wrapped(console, " " * indent + line, indent))


def compact_table(*columns: str, title: str = "") -> Table:
    """A table without frames. The first column holds names and may be broken between words, the others numbers."""
    first, *others = (Text(column) for column in columns)
    numbers = (Column(header, justify="right", no_wrap=True) for header in others)
    shown = Text(title) if title else None
    return Table(
        Column(first, style="bold", overflow="fold"), *numbers, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False,
        title=shown, title_justify="left", title_style="italic",
    )  # fmt: skip


@contextmanager
def loading(config: Config, console: Console | None = None) -> Iterator[None]:
    """Say that a configuration's model and data are being loaded, and how long it took."""
    from fs_fwdllm.report.record import short_name  # not before it is needed: the command line prints without numpy

    what = f"{short_name(config.model.type)} and {short_name(config.data.type)}"
    console = console or Console(highlight=False)
    started = time.perf_counter()
    with console.status(Text(f"loading {what}")) if console.is_terminal else _plainly(console, f"loading {what}"):
        yield
    say(console, f"loaded in {format_seconds(time.perf_counter() - started)}")


@contextmanager
def _plainly(console: Console, text: str) -> Iterator[None]:
    say(console, text)
    yield


def _wrapped(console: Console, text: str, indent: int = 2) -> str:
    if not console.is_terminal:
        return text
    together = _NUMBER_AND_UNIT.sub("\\1\u00a0", text)
    lines = (
        textwrap.fill(
            line, console.width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
        for line in together.splitlines() or [""]
    )
    return "\n".join(lines).replace("\u00a0", " ")


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)
