"""``bytes.csv``: what every client received and sent in every round, counted on the serialised frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from fs_fwdllm.report.files import disk_errors_named, write_text_atomically

__all__ = ["TrafficLog", "TrafficRow", "read_traffic"]


@dataclass(frozen=True)
class TrafficRow:
    """Bytes of one client in one round: ``download_bytes`` from the server to it, ``upload_bytes`` from it."""

    round: int
    client: int
    download_bytes: int
    upload_bytes: int


_HEADER = tuple(field.name for field in fields(TrafficRow))


def read_traffic(path: Path) -> list[TrafficRow]:
    """The rows of ``path``; none when it is absent. A row that a killed run left half-written is passed over."""
    if not path.exists():
        return []
    rows: list[TrafficRow] = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for cells in csv.reader(io.StringIO(text[: text.rfind("\n") + 1])):
        if len(cells) == len(_HEADER) and all(cell.isdigit() for cell in cells):
            rows.append(TrafficRow(*map(int, cells)))
    return rows


class TrafficLog:
    """Appends to ``bytes.csv`` after dropping what a resumed run will do again.

    Args:
        path: the file; made with its header when absent.
        start_round: rows of this round and later ones are dropped.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path: Path, start_round: int) -> None:
        self._path = path
        kept = [row for row in read_traffic(path) if row.round < start_round]
        write_text_atomically(path, _as_csv([_HEADER]) + _as_csv(astuple(row) for row in kept))
        with disk_errors_named(path):
            self._file = path.open("a", encoding="utf-8", newline="")

    def write(self, rows: Iterable[TrafficRow]) -> None:
        """Append ``rows`` and flush them."""
        with disk_errors_named(self._path):
            self._file.write(_as_csv(astuple(row) for row in rows))
            self._file.flush()

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        with disk_errors_named(self._path):
            self._file.close()


def _as_csv(rows: Iterable[tuple[object, ...]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
