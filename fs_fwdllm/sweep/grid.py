"""From words to points, and from a point to the configuration of its run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fs_fwdllm.config import Config, load_config
from fs_fwdllm.config.keys import schema_keys
from fs_fwdllm.errors import ConfigError, nearest, shown

__all__ = ["SEED", "Grid", "Point", "parse_grid"]

SEED = "seed"
#: What the sweep itself decides.
_NOT_TO_SWEEP = {
    "outdir": "--out names the folder of a sweep",
    "expname": "every point has a folder of its own, and --out names the sweep's",
    "eval.split": "a sweep chooses on validation rows",
}
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
_NOT_IN_A_NAME = re.compile(r"[^\w.+=,-]")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a value for every axis, and a seed."""

    values: tuple[tuple[str, str], ...]
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder; it depends on nothing but the point, so that a larger grid finds it again."""
        whole = ",".join(f"{key}={value}" for key, value in (*self.values, (SEED, str(self.seed))))
        name = _NOT_IN_A_NAME.sub("_", whole)[:_LONGEST_NAME]
        return name if name == whole else f"{name}-{hashlib.blake2b(whole.encode(), digest_size=4).hexdigest()}"

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in (*self.values, (SEED, str(self.seed))))


@dataclass(frozen=True)
class Grid:
    """What is swept.

    Attributes:
        fixed: overrides of every point.
        axes: keys with the values to try, in the order they were given.
        seeds: every setting is run once with each.
    """

    fixed: tuple[tuple[str, str], ...]
    axes: tuple[tuple[str, tuple[str, ...]], ...]
    seeds: tuple[int, ...]

    def points(self) -> list[Point]:
        """All combinations of the axes' values, each with every seed."""
        keys = [key for key, _ in self.axes]
        combinations = product(*(values for _, values in self.axes))
        return [Point(tuple(zip(keys, chosen, strict=True)), seed) for chosen in combinations for seed in self.seeds]

    def configuration(self, cfg: str | Path, point: Point, out: Path, validation: float) -> Config:
        """The configuration of a point's run: evaluated on validation rows, in a folder below ``out``.

        Args:
            validation: share of the rows that are held out from training where the file has no validation rows.

        Raises:
            ConfigError: as :func:`~fs_fwdllm.config.load_config` has it; or too few training rows would be left.
        """
        pairs = (*self.fixed, *point.values, (SEED, str(point.seed)))
        config = load_config(cfg, [word for pair in pairs for word in pair])
        train, held_out, test = config.data.splits
        if held_out == 0:
            if train <= validation:
                raise ConfigError(
                    f"data.splits {config.data.splits}: has no validation rows, and holding out {validation:g} for "
                    "them leaves nothing to train on; give a second share, or a smaller --validation"
                )
            config.data.splits = [round(train - validation, 12), validation, test]
        config.eval.split = ["val"]
        judged = config.eval.best_res_update_round_wise_key
        if judged.startswith("test_"):
            config.eval.best_res_update_round_wise_key = f"val_{judged.removeprefix('test_')}"
        config.fwdllm.check_saved = False  # what is saved is the run's that follows
        config.outdir, config.expname = str(out), point.name
        return config


def parse_grid(words: Sequence[str], seeds: Sequence[int] = (), own_seed: int = 0) -> Grid:
    """A grid from ``key value [value ...] key value [value ...] ...``.

    A key with one value is an override of every point, one with several is an axis. ``seed`` with several values, or
    ``seeds``, says how often each setting is run; else it is run once, with ``own_seed``, the file's.

    Raises:
        ConfigError: a key is unknown, stands twice, has no value, or is not to be swept; there is nothing to compare.
    """
    chosen: dict[str, list[str]] = {}
    for key, values in _grouped(words):
        if key in chosen:
            raise ConfigError(f"{key}: stands twice; give all its values behind it once")
        if not values:
            raise ConfigError(f"{key}: stands without a value; give one to set it, or several to try them")
        chosen[key] = list(dict.fromkeys(values))
    for key in chosen.keys() & _NOT_TO_SWEEP:
        raise ConfigError(f"{key} {chosen[key][0]}: {_NOT_TO_SWEEP[key]}")
    given = chosen.pop(SEED, [])
    if given and seeds:
        raise ConfigError(f"seed {' '.join(given)}: the seeds are given by --seeds, too; keep one of them")
    grid = Grid(
        fixed=tuple((key, values[0]) for key, values in chosen.items() if len(values) == 1),
        axes=tuple((key, tuple(values)) for key, values in chosen.items() if len(values) > 1),
        seeds=tuple(dict.fromkeys(seeds)) or tuple(map(_seed, given)) or (own_seed,),
    )
    if len(grid.points()) < 2:
        raise ConfigError(
            "there is nothing to compare: give a key several values (train.optimizer.lr 0.01 0.1 1), or several --seeds"
        )
    return grid


def _grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Keys and the words behind each. The word behind a key is its value, whatever it looks like."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if groups and not groups[-1][1]:
            groups[-1][1].append(word)
        elif _is_key(word):
            groups.append((word, []))
        elif not groups or _looks_like_a_key(word):
            known = [key.name for key in schema_keys()]
            raise ConfigError(
                f"{shown(word)}: is no key of a configuration{nearest(word, known)} (fs-fwdllm config keys lists them)"
            )
        else:
            groups[-1][1].append(word)
    return groups


def _is_key(word: str) -> bool:
    return any(word == key.name or (key.open and word.startswith(f"{key.name}.")) for key in schema_keys())


def _looks_like_a_key(word: str) -> bool:
    sections = {key.name.partition(".")[0] for key in schema_keys() if "." in key.name}
    return bool(_DOTTED.fullmatch(word)) and word.partition(".")[0] in sections


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"seed {shown(text)}: must be a whole number") from None
