"""Which of several runs belong together, and what sets the others apart.

Runs that differ only in ``seed`` are one group, whose curves are a mean and a spread. What a group is called is what
its configuration says and another's does not: the words of a legend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fs_fwdllm.config import Config
from fs_fwdllm.report.caption import adapter_name
from fs_fwdllm.report.record import RunRecord, RunSummary, method_name, short_name

__all__ = ["Curve", "RunGroup", "group_runs", "incomparable", "run_names"]

#: Keys that say where a run is kept and watched, and not what it does.
_ELSEWHERE = (
    "seed", "outdir", "expname", "wandb.", "eval.freq", "eval.metrics", "fwdllm.checkpoint_every", "fwdllm.tensorboard",
    "fwdllm.log_clients",
)  # fmt: skip
#: Keys of which a method's name tells the sum.
_OF_METHOD = ("federate.method", "trainer.type", "fwdllm.estimator", "fwdllm.probes", "fwdllm.parts", "fwdllm.fleet")
#: Keys without which two curves are not of one task.
_OF_TASK = {
    "model": ("model.type", "model.task"),
    "data": ("data.root", "data.type", "data.subsample", "fwdllm.data."),
    "split": ("data.splits", "eval.split"),
}
#: What is trained is told in one word.
_ADAPTER = "llm.adapter."
#: Keys that are named before others where many differ.
_TOLD_FIRST = ("model.type", "data.type", "train.optimizer.lr", "train.optimizer.")
#: Last parts of keys that say nothing without the part before.
_VAGUE = frozenset({"type", "kind", "use", "method", "task", "every"})
#: Differences that a label has room for.
_MOST_WORDS = 3


@dataclass(frozen=True)
class Curve:
    """Means over a group's seeds, point by point; ``spread`` is the standard deviation, or zeros for one run."""

    x: list[float]
    y: list[float]
    spread: list[float]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration with different seeds.

    Attributes:
        label: what the configuration says and other groups' do not.
        name: the first run's, and how many others there are.
    """

    label: str
    name: str
    records: list[RunRecord]
    summaries: list[RunSummary]

    def curve(self, x: str, y: str) -> Curve:
        """The mean curve over the rounds that all runs have; ``x`` and ``y`` as in :meth:`RunRecord.series`."""
        runs = [_points(record, x, y) for record in self.records]
        shared = [number for number in runs[0] if all(number in run for run in runs)]
        values = [[run[number] for run in runs] for number in shared]
        return Curve(
            x=[fmean(x for x, _ in points) for points in values],
            y=[fmean(y for _, y in points) for points in values],
            spread=[stdev(y for _, y in points) if len(points) > 1 else 0.0 for points in values],
        )

    def mean(self, number: Callable[[RunSummary], float | None]) -> float | None:
        """The mean of a number over the runs; ``None`` if one has none."""
        found = [number(summary) for summary in self.summaries]
        known = [value for value in found if value is not None]
        return fmean(known) if known and len(known) == len(found) else None

    def deviation(self, number: Callable[[RunSummary], float | None]) -> float | None:
        """The standard deviation of a number over two and more runs."""
        known = [value for value in map(number, self.summaries) if value is not None]
        return stdev(known) if len(known) > 1 else None


def _points(record: RunRecord, x: str, y: str) -> dict[int, tuple[float, float]]:
    found = {line["round"]: (record.value(line, x), record.value(line, y)) for line in record.rounds}
    return {number: (a, b) for number, (a, b) in found.items() if a is not None and b is not None}


def group_runs(records: Sequence[RunRecord]) -> list[RunGroup]:
    """The groups in the order of their first runs. A seed that comes twice begins a group of its own."""
    grouped: list[tuple[dict[str, str], list[RunRecord]]] = []
    without_meaning = {key for record in records for key in record.config.ignored_keys()}
    for record in records:
        settings = {key: value for key, value in _settings(record.config).items() if key not in without_meaning}
        home = next(
            (held for known, held in grouped if known == settings and record.config.seed not in _seeds(held)), None
        )
        if home is None:
            grouped.append((settings, [record]))
        else:
            home.append(record)
    labels, names = _labels(grouped), run_names([held[0] for _, held in grouped])
    return [
        RunGroup(label, name, held, [record.summary() for record in held])
        for label, name, (_, held) in zip(labels, names, grouped, strict=True)
    ]


def _seeds(records: Sequence[RunRecord]) -> set[int]:
    return {record.config.seed for record in records}


def _settings(config: Config) -> dict[str, str]:
    """Every setting that makes a run what it is, by dotted key, as text."""
    flat = _flat(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not key.startswith(_ELSEWHERE)}


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, list) and len(tree) == 1 and isinstance(tree[0], dict):
        tree = tree[0]
    if not isinstance(tree, dict):
        return {prefix: f"{tree:g}" if isinstance(tree, float) else str(tree)}
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def _labels(grouped: Sequence[tuple[dict[str, str], list[RunRecord]]]) -> list[str]:
    """What differs between the groups, in words; the folder's name where that tells them apart no more."""
    every = [settings for settings, _ in grouped]
    keys = list(dict.fromkeys(key for settings in every for key in settings))
    differing = [key for key in keys if len({settings.get(key) for settings in every}) > 1]
    differing.sort(key=lambda key: next((n for n, told in enumerate(_TOLD_FIRST) if key.startswith(told)), 99))
    methods = {method_name(held[0].config) for _, held in grouped}
    labels = [_label(settings, held, differing, len(methods) > 1) for settings, held in grouped]
    names, named = run_names([held[0] for _, held in grouped]), []
    for label, name, (_, held) in zip(labels, names, grouped, strict=True):
        label = f"{label}: {name}".removeprefix(": ") if not label or labels.count(label) > 1 else label
        named.append(f"{label} ({len(held)} seeds)" if len(held) > 1 else label)
    return named


def run_names(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its folder's, or the path where folders share a name."""
    names = [record.folder.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder.path) for record in records]


def _label(settings: dict[str, str], held: Sequence[RunRecord], differing: Sequence[str], methods_differ: bool) -> str:
    config = held[0].config
    told = (*(_OF_METHOD if methods_differ else ()), _ADAPTER)
    words = [method_name(config)] if methods_differ else []
    words += [adapter_name(config)] if any(key.startswith(_ADAPTER) for key in differing) else []
    room = _MOST_WORDS + len(words)
    words += [_word(key, settings[key]) for key in differing if not key.startswith(told) and settings.get(key)]
    more = [f"{len(words) - room} more keys"] if len(words) > room + 1 else []
    return ", ".join([*words[: room if more else room + 1], *more])


def _word(key: str, value: str) -> str:
    *parents, name = key.split(".")
    if name in _VAGUE and parents:
        name = parents[-1]
    return f"{name.replace('_', ' ')} {short_name(value) if '/' in value else value}"


def incomparable(groups: Sequence[RunGroup]) -> str:
    """A warning if the groups do not have one model, one data set and one way to split it; else empty."""
    every = [_settings(group.records[0].config) for group in groups]
    keys = {key for settings in every for key in settings}
    different = [
        what
        for what, prefixes in _OF_TASK.items()
        if any(len({settings.get(key) for settings in every}) > 1 for key in keys if key.startswith(prefixes))
    ]
    if not different:
        return ""
    return f"warning: these runs differ in {', '.join(different)}: their curves are not of one task"
