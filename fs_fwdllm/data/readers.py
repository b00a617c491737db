"""From ``data.type`` to rows with the fields a task needs.

``NAME@llm`` and ``FILE@llm`` are instructions or conversations: whatever a file calls its fields, the rows that leave
here hold a conversation (:mod:`fs_fwdllm.data.conversations`) beside their own fields. The names and the file each
stands for are FederatedScope's; a file named directly is recognised by the fields of its first row. ``FILE@text`` is
text classification, with the text and label fields named by ``fwdllm.data.text`` and ``fwdllm.data.label``;
``installed_docstrings@text`` needs no file at all (:mod:`fs_fwdllm.data.docstrings`). ``FILE@qa`` is questions about
contexts (:mod:`fs_fwdllm.data.squad`); the same file as ``FILE@llm`` has the context for input, the answer for output.
``presplit@llm`` and ``presplit@text`` read one file a client.

Nothing is downloaded: the message for an absent file says where it is expected.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fs_fwdllm.config.schema import Config
from fs_fwdllm.data.conversations import ALPACA, DOLLY, GSM8K, ROSETTA, Layout, as_conversations
from fs_fwdllm.data.docstrings import installed_docstrings
from fs_fwdllm.data.files import FILE_ENDINGS, how_to_convert, read_table
from fs_fwdllm.data.table import Table
from fs_fwdllm.data.types import Task
from fs_fwdllm.errors import ConfigError, DataError, nearest

__all__ = [
    "CLIENT_FIELD", "PRESPLIT", "data_task", "is_h5", "parse_data_type", "read_test_table",
    "read_train_table",
]  # fmt: skip

logger = logging.getLogger("fs_fwdllm.data")

#: Name of the data set read from the installed packages, and the only one that needs no file.
DOCSTRINGS = "installed_docstrings"

#: Name of data that comes divided already: one file a client.
PRESPLIT = "presplit"
#: The field that says, in pre-split data, which client's file a row is from.
CLIENT_FIELD = "fs_fwdllm client"

#: A category the host leaves out of the code data when it gives each client one language.
_LEFT_OUT_BY_META = "X86-64 Assembly"


_NAMED: dict[str, tuple[str, Layout]] = {
    "alpaca": ("alpaca_data.json", ALPACA),
    "alpaca_cleaned": ("alpaca_data_cleaned.json", ALPACA),
    "code_alpaca": ("rosetta_alpaca.json", ROSETTA),
    "dolly-15k": ("databricks-dolly-15k.jsonl", DOLLY),
    "gsm8k": ("gsm8k_train.jsonl", GSM8K),
    "rosetta_alpaca": ("rosetta_alpaca.json", ROSETTA),
}

_TASKS: dict[str, Task] = {"llm": "causal_lm", "text": "classification", "qa": "question_answering"}

_H5_ENDING = ".h5"
_ENDINGS = (*FILE_ENDINGS, _H5_ENDING)

_KNOWN_TYPES = [f"{name}@llm" for name in sorted(_NAMED)] + [f"{DOCSTRINGS}@text"]


def parse_data_type(data_type: str) -> tuple[str, Task]:
    """Split ``NAME@KIND`` into the name and the task.

    Raises:
        ConfigError: there is no ``@KIND``, the kind is unknown, or the name is neither known nor a file's.
    """
    name, _, kind = data_type.rpartition("@")
    task = _TASKS.get(kind.lower())
    path = Path(name)
    is_file = path.suffix.lower() in _ENDINGS and bool(path.stem)
    known = {"causal_lm": name.lower() in _NAMED, "classification": name.lower() == DOCSTRINGS}.get(task or "", False)
    known = known or (name.lower() == PRESPLIT and task != "question_answering")
    if task is not None and not (is_file or known) and how_to_convert(name):
        raise ConfigError(f"data.type: {data_type!r}: {how_to_convert(name)}")
    if task is None or not (is_file or known):
        raise ConfigError(
            f"data.type: {data_type!r} is not known; allowed are {', '.join(_KNOWN_TYPES)}, FILE@llm, FILE@text "
            f"and FILE@qa (FILE ending in {', '.join(_ENDINGS)}){nearest(data_type.lower(), _KNOWN_TYPES)}"
        )
    return name, task


def data_task(config: Config) -> Task:
    """What the data is for.

    It is as ``data.type`` says, but texts with labels are ``label_words`` for a language model, and ``regression``
    where ``fwdllm.data.regression`` or ``model.num_labels: 1`` says so.
    """
    task = parse_data_type(config.data.type)[1]
    if task != "classification":
        return task
    if config.model.type.endswith("@huggingface_llm"):
        return "label_words"
    return "regression" if config.fwdllm.data.regression or config.model.num_labels == 1 else task


def is_h5(config: Config) -> bool:
    """Whether ``data.type`` names one of FedNLP's h5 files."""
    return Path(parse_data_type(config.data.type)[0]).suffix.lower() == _H5_ENDING


def read_train_table(config: Config) -> Table:
    """The rows of ``data.type`` under ``data.root``.

    Raises:
        ConfigError: ``data.type`` is not known.
        DataError: the file is missing or malformed, or a row lacks a field it needs.
    """
    name, task = parse_data_type(config.data.type)
    if name.lower() == PRESPLIT:
        return _read_presplit(config, task)
    if name.lower() == DOCSTRINGS:
        return installed_docstrings()
    if task != "causal_lm":
        return _read(Path(config.data.root) / name, config)
    if name.lower() not in _NAMED:
        return _read_instructions(Path(config.data.root) / name, config)
    file, layout = _NAMED[name.lower()]
    table = _read_instructions(Path(config.data.root) / file, config, layout)
    if layout is ROSETTA and config.data.splitter.lower() == "meta":
        return _without_left_out_category(table)
    return table


def read_test_table(config: Config) -> Table:
    """The rows of ``fwdllm.data.test_file`` under ``data.root``; its fields as the training file's. Raises as above."""
    path = Path(config.data.root) / config.fwdllm.data.test_file
    task = parse_data_type(config.data.type)[1]
    return _read_instructions(path, config) if task == "causal_lm" else _read(path, config)


def _read_presplit(config: Config, task: Task) -> Table:
    """The rows of ``client_1.jsonl``, ``client_2.jsonl``, ... under ``data.root`` (or another known ending), each
    marked with its client."""
    folder = Path(config.data.root)
    found = [path for path in folder.glob("client_*") if path.suffix.lower() in FILE_ENDINGS]
    numbered = {int(digits): path for path in found if (digits := path.stem.removeprefix("client_")).isdecimal()}
    if len(numbered) < len(found) or sorted(numbered) != list(range(1, len(found) + 1)) or not found:
        names = ", ".join(sorted(path.name for path in found)) or "none"
        raise DataError(
            f"{folder}: data.type {config.data.type!r} needs one file a client, client_1.jsonl to client_N.jsonl (or "
            f"{', '.join(FILE_ENDINGS)}), each number once; there are {names}"
        )
    records, numbers = [], []
    for client, path in sorted(numbered.items()):
        part = _read_instructions(path, config) if task == "causal_lm" else _read(path, config)
        records += [{**record, CLIENT_FIELD: f"{client:09d}"} for record in part.records]
        numbers += list(part.numbers)
    return Table(str(folder), records, numbers)


def _read(path: Path, config: Config) -> Table:
    return read_table(path, config.fwdllm.data.columns, config.fwdllm.data.encoding)


def _read_instructions(path: Path, config: Config, layout: Layout | None = None) -> Table:
    return as_conversations(_read(path, config), layout)


def _without_left_out_category(table: Table) -> Table:
    kept = [row for row, record in enumerate(table.records) if record["category"] != _LEFT_OUT_BY_META]
    if len(kept) < len(table):
        logger.info(
            "%s: %d rows of category %r are left out, as FederatedScope does for data.splitter meta",
            table.source,
            len(table) - len(kept),
            _LEFT_OUT_BY_META,
        )
    return table.take(kept)
