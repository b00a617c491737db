"""The host's ``lda`` and ``meta`` splitters, corrected, for our runs.

The host's ``lda`` never ends on data without categories, its ``meta`` fails with fewer categories than clients, and
both divide training, validation and test independently, so that a client is tested on categories it never saw. Here the
training rows are divided by :mod:`fs_fwdllm.data.splitters`, and the rows of a category in the other splits go to the
clients that train on it, in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fs_fwdllm.data.splitters import split_lda, split_meta
from fs_fwdllm.errors import ConfigError, DataError

__all__ = ["CategorySplitter", "corrected", "make_splitter"]

_DEFAULT_ALPHA = 0.5
_run: tuple[int, str] | None = None


@contextmanager
def corrected(seed: int, data_type: str) -> Iterator[None]:
    """While open, :func:`make_splitter` answers for the host's names."""
    global _run
    _run = (seed, data_type)
    try:
        yield
    finally:
        _run = None


def make_splitter(kind: str, client_num: int, **arguments: Any) -> CategorySplitter | None:
    """Our splitter for ``lda`` and ``meta`` during a run of ours; ``None`` otherwise.

    Raises:
        ConfigError: an unknown argument, or an ``alpha`` that is not above 0.
    """
    if _run is None or kind not in ("lda", "meta"):
        return None
    seed, data_type = _run
    alpha = arguments.pop("alpha", _DEFAULT_ALPHA)
    if arguments:
        raise ConfigError(f"data.splitter_args: unknown argument {next(iter(arguments))!r}; allowed is 'alpha'")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise ConfigError(f"data.splitter_args: alpha must be a number above 0, but is {alpha!r}")
    return CategorySplitter(kind, client_num, float(alpha), seed, data_type)


class CategorySplitter:
    """Divides data sets over clients by category; the first one it is given is the training split.

    Args:
        kind: ``lda`` or ``meta``.
        alpha: concentration of ``lda``.
        source: the data's name, for messages.
    """

    def __init__(self, kind: str, client_num: int, alpha: float, seed: int, source: str) -> None:
        self.client_num = client_num
        self._kind, self._alpha, self._seed, self._source = kind, alpha, seed, source
        self._held: dict[int, np.ndarray] = {}

    def __call__(self, dataset: Any, prior: Any = None, **_: Any) -> list[Any]:
        """One subset of ``dataset`` per client.

        Raises:
            DataError: the samples have no categories.
        """
        codes = np.array([int(sample["categories"]) for sample in dataset], dtype=np.int64)
        if len(np.unique(codes)) < 2:
            raise DataError(
                f"{self._source}: data.splitter {self._kind} groups samples by category, but they have none; set "
                "data.splitter to iid"
            )
        if not self._held:
            parts = self._divide(codes)
            self._held = {int(code): np.array([(codes[part] == code).sum() for part in parts]) for code in set(codes)}
        else:
            parts = self._follow(codes)
        return [self._subset(dataset, part) for part in parts]

    def _divide(self, codes: np.ndarray) -> list[np.ndarray]:
        if self._kind == "lda":
            return split_lda(codes, self.client_num, self._alpha, self._seed)
        return split_meta(codes, self.client_num, self._seed)

    def _follow(self, codes: np.ndarray) -> list[np.ndarray]:
        """Rows of each category to the clients that train on it, in proportion to how many rows of it they hold."""
        pieces: list[list[np.ndarray]] = [[] for _ in range(self.client_num)]
        for code in np.unique(codes).tolist():
            rows = np.flatnonzero(codes == code)
            held = self._held.get(code, np.ones(self.client_num))
            cuts = np.rint(np.cumsum(held)[:-1] / held.sum() * len(rows)).astype(np.int64)
            for client, piece in enumerate(np.split(rows, cuts)):
                pieces[client].append(piece)
        return [np.sort(np.concatenate(own)) for own in pieces]

    @staticmethod
    def _subset(dataset: Any, rows: np.ndarray) -> Any:
        from torch.utils.data import Dataset, Subset

        chosen = rows.tolist()
        return Subset(dataset, chosen) if isinstance(dataset, Dataset) else [dataset[row] for row in chosen]
