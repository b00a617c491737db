"""A text classification data set every installation already has: whose documentation is this?

The rows are the summaries (first paragraphs) of the docstrings of functions, classes and methods in Python's standard
library and in the libraries a language-model user has installed; the label is the library, ``module`` its part the row
comes from (``torch.nn``), a natural owner for a federated split. Files are parsed, never imported, so nothing runs and
nothing is redistributed.

The task is meant to be about style and content. Names that would give the answer away are replaced by a neutral word,
with the whole word they stand in (``torch.nn.Linear`` becomes ``library.nn.Linear``), and summaries that two libraries
share are dropped. The draw of files and rows has a fixed seed: the rows depend on the installed versions and on nothing
else.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from fs_fwdllm.core.seeding import seeded_permutation
from fs_fwdllm.data.table import Table
from fs_fwdllm.errors import DataError

__all__ = ["GIVE_AWAYS", "LIBRARIES", "NEUTRAL_WORD", "installed_docstrings", "mask_give_aways"]

logger = logging.getLogger("fs_fwdllm.data")

#: The classes: ``{label: name of the package to look for}``; the standard library has no package of its own.
LIBRARIES = {
    "numpy": "numpy",
    "python": "",
    "scikit-learn": "sklearn",
    "torch": "torch",
    "transformers": "transformers",
}

#: Substrings (lower case) that no text contains.
GIVE_AWAYS = ("torch", "numpy", "sklearn", "scikit", "hugging", "transformers", "python")

NEUTRAL_WORD = "library"

_GIVE_AWAY = re.compile(rf"\w*(?:{'|'.join(GIVE_AWAYS)})\w*(?:[-\s]+(?:learn|face)\b)?|\bnp\b", re.IGNORECASE)
_LEFT_OUT_FOLDERS = {
    *("__pycache__", "_vendor", "dist-packages", "distutils", "ensurepip", "externals", "idlelib", "lib2to3"),
    *("pydoc_data", "site-packages", "test", "testing", "tests", "turtledemo", "vendored"),
}
#: Where prose ends although no blank line says so: a section's title, a field list, an example session.
_END_OF_SUMMARY = re.compile(
    r"(?:args|arguments|attributes|examples?|inputs?|notes?|outputs?|parameters|params|raises|returns?|shape|usage|yields?)"
    r"\s*:?$|[-=~]{3,}$|:\w+[^:]*:(?:\s|$)|>>>|```|\.\. ",
    re.IGNORECASE,
)
#: A call's signature or a list of fields where the prose should start.
_NOT_PROSE = re.compile(r"\w[\w.]*(?:\(|\s\(`)")
_CHARACTERS = range(20, 501)
_MINIMUM_WORDS = 4
_ROWS_PER_FILE = 20
#: Larger files are tables or generated code, and slow to parse.
_LARGEST_FILE_BYTES = 100_000
#: Rows collected for each one kept, so that dropping what libraries share leaves enough.
_SPARE = 1.15


def installed_docstrings(rows_per_library: int = 600) -> Table:
    """Collect up to ``rows_per_library`` rows ``{"text", "label", "module"}`` from each library found.

    Raises:
        DataError: fewer than two libraries have source files on this machine.
    """
    found: dict[str, dict[str, str]] = {}
    for label in sorted(LIBRARIES):
        root = _source_folder(LIBRARIES[label])
        texts = _library_texts(root, label, int(rows_per_library * _SPARE)) if root else {}
        if texts:
            found[label] = texts
    if len(found) < 2:
        raise DataError(
            f"installed_docstrings@text: needs the source files of at least two of {', '.join(sorted(LIBRARIES))}, "
            f"but found {', '.join(found) or 'none'}"
        )
    records: list[dict[str, str]] = []
    for label, texts in found.items():
        others = {text.casefold() for other, theirs in found.items() if other != label for text in theirs}
        own = [text for text in texts if text.casefold() not in others][:rows_per_library]
        records += [{"text": text, "label": label, "module": texts[text]} for text in own]
        logger.info("installed_docstrings: %d summaries of %s", len(own), label)
    return Table("installed_docstrings", list(records), list(range(1, len(records) + 1)))


def mask_give_aways(text: str) -> str:
    """Replace every word that names a library by :data:`NEUTRAL_WORD`."""
    return _GIVE_AWAY.sub(NEUTRAL_WORD, text)


def _source_folder(package: str) -> Path | None:
    """The folder of a package's source, found without importing it; the standard library's for an empty name."""
    if not package:
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _library_texts(root: Path, label: str, limit: int) -> dict[str, str]:
    """Up to ``limit`` distinct summaries and their modules, file by file in a drawn order."""
    files = _source_files(root)
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for number in seeded_permutation(len(files), "docstring files", 0).tolist():
        module = _module_of(files[number], LIBRARIES[label])
        summaries = list(_summaries(root / files[number]))
        drawn = seeded_permutation(len(summaries), "docstrings of a file", number)[:_ROWS_PER_FILE]
        for summary in (summaries[row] for row in drawn.tolist()):
            if summary.casefold() not in seen:
                seen.add(summary.casefold())
                texts[summary] = module
        if len(texts) >= limit:
            break
    return dict(list(texts.items())[:limit])


def _source_files(root: Path) -> list[str]:
    """Paths under ``root`` with ``/``, by code point: the same order on every file system."""
    found: list[str] = []
    folders = [root]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.suffix == ".py":
                found.append(entry.relative_to(root).as_posix())
            elif entry.name not in _LEFT_OUT_FOLDERS and entry.is_dir() and not entry.is_symlink():
                folders.append(entry)
    return sorted(found)


def _module_of(file: str, package: str) -> str:
    top = file.removesuffix(".py").split("/")[0]
    if not package:
        return top
    return package if top == "__init__" else f"{package}.{top}"


def _summaries(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the source are not ours to report
            tree = ast.parse(file.read_bytes() if file.stat().st_size <= _LARGEST_FILE_BYTES else b"")
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in _definitions(tree):
        summary = mask_give_aways(_first_paragraph(ast.get_docstring(node) or ""))
        if len(summary) in _CHARACTERS and not _NOT_PROSE.match(summary) and len(summary.split()) >= _MINIMUM_WORDS:
            yield summary


def _first_paragraph(docstring: str) -> str:
    """The summary of a docstring on one line; empty where it starts with something else."""
    words: list[str] = []
    for line in docstring.strip().splitlines():
        if not line.strip() or _END_OF_SUMMARY.match(line.strip()):
            break
        words += line.split()
    return " ".join(words)


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions, classes and methods in the order of the file; those inside functions are no interface."""
    for child in getattr(node, "body", []):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        if isinstance(child, ast.ClassDef | ast.If | ast.Try):
            yield from _definitions(child)
