"""The command ``fs-fwdllm data``: show data files of any kind, build and partition FedNLP's h5 files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from fs_fwdllm.cli.show_data import print_table, say, show_rows
from fs_fwdllm.errors import ConfigError, nearest

__all__ = ["data_app"]

data_app = typer.Typer(
    name="data", help="Show data files; build and partition those of FedNLP and FwdLLM.", no_args_is_help=True
)

DataFile = Annotated[Path, typer.Argument(metavar="DATA.h5", help="A data file.")]


@data_app.command()
def build(
    dataset: Annotated[str, typer.Argument(help="agnews, yahoo, yelp, squad, 20news, sst2, or table for any other.")],
    output: DataFile,
    train: Annotated[Path, typer.Option(help="The original file: .csv, .tsv, .json or .jsonl.")],
    test: Annotated[Path | None, typer.Option(help="The original file of the test split.")] = None,
    test_share: Annotated[float, typer.Option(help="Share drawn for the test split where there is no --test.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of that draw.")] = 0,
    text: Annotated[str, typer.Option(help="Field of the text; several are joined by +.")] = "",
    label: Annotated[str, typer.Option(help="Field of the label.")] = "",
    natural: Annotated[str, typer.Option(help="Field that names a row's natural owner.")] = "",
    columns: Annotated[str, typer.Option(help="Columns of a file without a header line, with commas.")] = "",
    labels: Annotated[str, typer.Option(help="Classes in index order, with commas; else the sorted labels.")] = "",
) -> None:
    """Write the h5 file of a data set from its original files.

    Example: fs-fwdllm data build agnews agnews_data.h5 --train train.csv --test test.csv
    """
    from fs_fwdllm.data.h5 import builders

    if dataset not in builders.RECIPES:
        known = sorted(builders.RECIPES)
        raise ConfigError(f"{dataset}: is no known data set; known are {', '.join(known)}{nearest(dataset, known)}")
    given: dict[str, Any] = {
        "text": text,
        "label": label,
        "natural": natural,
        "columns": _listed(columns),
        "labels": _listed(labels),
    }
    recipe = replace(builders.RECIPES[dataset], **{name: value for name, value in given.items() if value})
    data = builders.build(recipe, output, train, test, test_share, seed)
    say(f"{output}: {len(data.train):,} training and {len(data.test):,} test rows, {_classes(data)}")


@data_app.command()
def partition(
    data_file: DataFile,
    partition_file: Annotated[Path, typer.Argument(metavar="PARTITION.h5", help="Is made, or added to.")],
    method: Annotated[str, typer.Option(help="uniform, niid_label, niid_quantity or natural.")] = "uniform",
    clients: Annotated[int, typer.Option(help="Number of clients; natural has its own.")] = 100,
    alpha: Annotated[float, typer.Option(help="Concentration of niid_label.")] = 1.0,
    beta: Annotated[float, typer.Option(help="Concentration of niid_quantity.")] = 5.0,
    field: Annotated[str, typer.Option(help="Field of the owner, for natural.")] = "",
    name: Annotated[str, typer.Option(help="Name of the partition; else the published one.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Deal the rows of a data file to clients.

    Example: fs-fwdllm data partition agnews_data.h5 agnews_partition.h5 --method niid_label
    """
    from fs_fwdllm.data.h5.builders import make_partition
    from fs_fwdllm.data.h5.files import read_h5_data
    from fs_fwdllm.data.h5.partition_files import write_partition
    from fs_fwdllm.data.h5.partitioning import METHODS

    if method not in METHODS:
        raise ConfigError(f"--method {method}: must be one of {', '.join(METHODS)}{nearest(method, METHODS)}")
    data = read_h5_data(data_file)
    made = make_partition(data, method, clients, alpha if method == "niid_label" else beta, seed, name, field)
    write_partition(partition_file, made)
    say(f"{partition_file}: {made.method}, {len(made)} clients")


@data_app.command()
def show(
    data_file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A data file; else --cfg's.")] = None,
    partition_file: Annotated[
        Path | None, typer.Argument(metavar="[PARTITION.h5]", help="Partitions of an h5.")
    ] = None,
    cfg: Annotated[
        Path | None, typer.Option("--cfg", metavar="CFG", help="A configuration: also shows who would hold which rows.")
    ] = None,
    text: Annotated[str, typer.Option(help="Field of the text; several are joined by +.")] = "",
    label: Annotated[str, typer.Option(help="Field of the label.")] = "",
    tokenizer: Annotated[str, typer.Option(metavar="FOLDER", help="A model's folder: counts tokens.")] = "",
    tok_len: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = 0,
    method: Annotated[str, typer.Option(help="Show this partition of an h5 file only.")] = "",
) -> None:
    """Say what a file holds: rows, format, classes, gaps, repetitions, lengths, and what clients would hold.

    Example: fs-fwdllm data show tickets.csv
    """
    if data_file is None or data_file.suffix.lower() != ".h5":
        if partition_file is not None:
            raise ConfigError(f"{partition_file}: partitions are shown for .h5 files; {data_file} is none")
        show_rows(data_file, cfg, text, label, tokenizer, tok_len)
        return
    _show_h5(data_file, partition_file, method)


def _show_h5(data_file: Path, partition_file: Path | None, method: str) -> None:
    from fs_fwdllm.data.h5.files import read_h5_data
    from fs_fwdllm.data.h5.partition_files import partition_methods, read_partition

    data = read_h5_data(data_file)
    say(f"{data_file}: {data.task_type}, {len(data.train):,} training and {len(data.test):,} test rows")
    if data.labels:
        print_table(_class_rows(data), "class", "training", "test")
    if partition_file is None:
        return
    rows = []
    for name in [method] if method else partition_methods(partition_file):
        made = read_partition(partition_file, name, list(data.train_rows), list(data.test_rows), allow_overlap=True)
        rows.append([name, str(len(made)), *(_spread(part) for part in (made.train, made.test)), _skew(data, made)])
    say("rows of a client and share of its largest class: least / median / most")
    print_table(rows, "partition", "clients", "training", "test", "largest class")


def _class_rows(data: Any) -> list[list[str]]:
    counts = [[str(record["label"]) for record in table.records] for table in (data.train, data.test)]
    return [[label, *(f"{part.count(label):,}" for part in counts)] for label in data.labels]


def _spread(parts: list[Any]) -> str:
    """Fewest, median and most rows of a client."""
    sizes = [len(part) for part in parts]
    return f"{min(sizes)} / {median(sizes):g} / {max(sizes)}" if sizes else "none"


def _skew(data: Any, made: Any) -> str:
    """Smallest, median and largest share of a client's most frequent class; 1 is a client with one class."""
    if not data.labels:
        return "no classes"
    label_of = {index: str(data.train.records[row]["label"]) for index, row in data.train_rows.items()}
    shares = []
    for part in made.train:
        held = [label_of[index] for index in part.tolist() if index in label_of]
        if held:
            shares.append(max(held.count(label) for label in set(held)) / len(held))
    return f"{min(shares):.2f} / {median(shares):.2f} / {max(shares):.2f}" if shares else "none"


def _classes(data: Any) -> str:
    return f"{len(data.labels)} classes: {', '.join(data.labels[:20])}" if data.labels else "no classes"


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
