"""The command ``fs-fwdllm data show`` for files of rows: what they hold, and who would train on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table as Printed
from rich.text import Text

from fs_fwdllm.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from fs_fwdllm.config import Config
    from fs_fwdllm.data import FederatedData
    from fs_fwdllm.data.inspection import FileFacts

__all__ = ["print_table", "say", "show_rows"]

#: Rows of a table, and row numbers and groups in a line, that are listed.
_LISTED_CLASSES, _LISTED_CLIENTS, _LISTED = 40, 20, 5


def show_rows(file: Path | None, cfg: Path | None, text: str, label: str, tokenizer: str, tok_len: int) -> None:
    """Print what a file of rows holds; with a configuration also what its clients would.

    Args:
        file: the file; ``None`` takes the configuration's.
        cfg: a configuration: its fields, its tokenizer, its clients.
        text, label, tokenizer, tok_len: replace what the configuration says; empty and 0 leave it.

    Raises:
        ConfigError, DataError, ModelError: see their messages.
    """
    from fs_fwdllm.config import parse_config
    from fs_fwdllm.config.load import tree_of
    from fs_fwdllm.data.files import read_table
    from fs_fwdllm.data.inspection import inspect_table
    from fs_fwdllm.data.sources import read_source
    from fs_fwdllm.model import load_tokenizer

    given = {"fwdllm.data.text": text, "fwdllm.data.label": label, "llm.tok_len": tok_len}
    given |= {"model.type": f"{tokenizer}@huggingface_llm" if tokenizer else ""}
    overrides = {key: value for key, value in given.items() if value}
    if cfg is None:
        if file is None:
            raise ConfigError("data show: name a file, or a configuration with --cfg FILE")
        config, kind = parse_config(tree_of(overrides)), ""
        table = read_table(file)
    else:
        config = _configuration(file, cfg, overrides)
        kind = config.data.type.rpartition("@")[2]
        table = read_source(config).train
    loaded = load_tokenizer(config) if config.model.type else None
    _show_facts(table.source, inspect_table(table, config.fwdllm.data, kind, loaded), config.llm.tok_len)
    if cfg is not None and loaded is not None:
        from fs_fwdllm.data import load_federated_data

        _show_clients(load_federated_data(config, loaded))


def _configuration(file: Path | None, cfg: Path, overrides: dict[str, Any]) -> Config:
    """A configuration, about ``file`` where there is one."""
    from fs_fwdllm.config import load_config

    config = load_config(cfg, [str(part) for pair in overrides.items() for part in pair])
    if file is not None:
        kind = config.data.type.rpartition("@")[2] or "text"
        config.data.root, config.data.type = str(file.parent), f"{file.name}@{kind}"
    return config


def _show_facts(source: str, facts: FileFacts, tok_len: int) -> None:
    say(f"{source}: {facts.rows:,} rows, {facts.format}; read as data.type FILE@{facts.kind}")
    say(f"fields: {', '.join(facts.fields)}")
    if facts.numbers.size:
        print_table([_quantiles("label", facts.numbers, "{:,.4g}")], "numbers", "least", "median", "95 %", "most")
    elif facts.classes:
        ordered = facts.classes.most_common()
        rows = [[name, f"{count:,}", f"{count / facts.rows:.1%}"] for name, count in ordered[:_LISTED_CLASSES]]
        print_table(rows, f"{len(ordered)} classes", "rows", "share")
        if len(ordered) > _LISTED_CLASSES:
            say(f"... and {len(ordered) - _LISTED_CLASSES} more, the smallest {ordered[-1][0]} ({ordered[-1][1]})")
    for group in facts.similar[:_LISTED]:
        spelt = " and ".join(f"{name!r} ({facts.classes[name]})" for name in group)
        say(f"warning: {spelt} differ only by case or white space; fwdllm.data.merge_labels: true makes them one")
    _say_rows("have an empty label; fwdllm.data.drop_empty_labels: true leaves them out", facts.empty_labels)
    _say_rows("have an empty answer" if facts.kind == "llm" else "have an empty text", facts.empty_texts)
    more = sum(len(group) - 1 for group in facts.repeated)
    _say_groups(f"{more:,} rows repeat another but for case, punctuation and white space", facts.repeated)
    _say_groups(f"warning: {len(facts.contradicting):,} texts have several labels", facts.contradicting)
    _show_lengths(facts, tok_len)


def _say_rows(what: str, numbers: Sequence[int]) -> None:
    if numbers:
        listed = ", ".join(map(str, numbers[:_LISTED])) + (", ..." if len(numbers) > _LISTED else "")
        say(f"{len(numbers):,} rows {what}: {listed}")


def _say_groups(what: str, groups: Sequence[Sequence[int]]) -> None:
    if groups:
        listed = "; ".join(" = ".join(map(str, group[:_LISTED])) for group in groups[:_LISTED])
        say(f"{what}: rows {listed}{'; ...' if len(groups) > _LISTED else ''}")


def _show_lengths(facts: FileFacts, tok_len: int) -> None:
    rows = [_quantiles("characters", facts.characters)]
    if facts.turns.size:
        rows.append(_quantiles("answers", facts.turns))
    if facts.tokens.size:
        rows.append(_quantiles("tokens", facts.tokens))
    if facts.prompt_tokens.size:
        rows.append(_quantiles("before the answer", facts.prompt_tokens))
    print_table(rows, "of a row", "least", "median", "95 %", "most")
    if facts.tokens.size:
        cut = int((facts.tokens > tok_len).sum())
        way = "are read in several windows" if facts.kind == "qa" else "are cut"
        say(f"llm.tok_len {tok_len}: {cut:,} of {facts.rows:,} rows are longer and {way}")
    if facts.prompt_tokens.size and (lost := int((facts.prompt_tokens >= tok_len).sum())):
        say(f"warning: {lost:,} of them lose their whole answer, and are left out")


def _quantiles(name: str, values: np.ndarray, form: str = "{:,.0f}") -> list[str]:
    import numpy

    return [name, *(form.format(value) for value in numpy.quantile(values, [0, 0.5, 0.95, 1]))]


def _show_clients(data: FederatedData) -> None:
    from fs_fwdllm.data.summary import data_remarks

    splits = [(str(number), held.train, held.val, held.test) for number, held in data.clients.items()]
    rows = [[name, *(f"{len(split):,}" for split in held)] for name, *held in splits[:_LISTED_CLIENTS]]
    if len(splits) > _LISTED_CLIENTS:
        rows.append([f"... {len(splits) - _LISTED_CLIENTS} more", "", "", ""])
    together = [sum(len(held[index]) for _, *held in splits) for index in range(3)]
    rows.append(["all", *(f"{count:,}" for count in together)])
    rows.append(["server", "", f"{len(data.val):,}", f"{len(data.test):,}"])
    print_table(rows, "client", "training", "validation", "test")
    for remark in data_remarks(data):
        say(remark)


def say(text: str) -> None:
    """Lines that wrap between words on a terminal, and are whole elsewhere."""
    console = Console(highlight=False)
    console.print(Text(text), soft_wrap=not console.is_terminal)


def print_table(rows: Sequence[Sequence[str]], *names: str) -> None:
    """A table as wide as it has to be, and never wider than the terminal; numbers stand on the right."""
    console = Console(highlight=False)
    table = Printed(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(names):
        table.add_column(name, justify="right" if column else "left", overflow="fold", no_wrap=bool(column))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
