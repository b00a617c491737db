"""The profile of a configuration from beginning to end, and the search of a learning rate alone.

What was measured is on disk after every candidate, so that a profile that is stopped has cost nothing in vain.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fs_fwdllm.config import Config
from fs_fwdllm.profiler.candidates import candidates_for
from fs_fwdllm.profiler.measure import Budget, Measured, Watch, check_profile, lead, measure, rank, search_rates
from fs_fwdllm.profiler.report import describe_lead, profile_table, rate_table, write_profile, write_winner
from fs_fwdllm.profiler.trial import Trial
from fs_fwdllm.report.terminal import loading, say
from fs_fwdllm.report.units import format_metric, format_seconds
from fs_fwdllm.running.session import Session

__all__ = ["TRIAL_KEYS", "Profile", "run_profile", "run_rate_search"]

#: Keys that make a trial shorter and that nobody wants in the configuration that comes of it.
TRIAL_KEYS = ("data.subsample", "fwdllm.data.max_test_samples", "federate.total_round_num", "eval.freq")

#: A search of rates alone looks further, since the configured one may be for another number of parameters.
_RATE_FACTORS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Profile:
    """What a profile left: the winner's configuration, if anything was measured, and whether all of it was."""

    winner: Path | None
    finished: bool


def run_profile(
    config: Config, folder: Path, probes: int, passes: int, into: Config | None = None, console: Console | None = None
) -> Profile:
    """Measure every candidate for ``config``, show the table, write the files after each.

    Args:
        into: what the winner is written into, where that is not the configuration of the trials.
        console: where progress is shown; standard output unless told.

    Raises:
        ConfigError: the method needs backpropagation, or there is no evaluation split.
        ModelError: no candidate could be measured.
        FwdLLMError: whatever a run would raise while it loads.
    """
    console = console or Console(highlight=False)
    budget = Budget(probes=probes, forward_passes=passes)
    session, split = _open(config, console)
    candidates = candidates_for(config, session.loaded.model, session.loaded.task)
    rates = len(budget.rate_factors)
    say(console, f"{len(candidates)} candidates: {passes:,} forward passes each, after an eighth at {rates} rates")
    found: list[Measured] = []
    finished = False
    try:
        with _shown(console, len(candidates), found) as watch_of:
            for number, candidate in enumerate(candidates):
                found.append(measure(session, candidate, budget, watch_of(number, candidate.name)))
                if any(math.isfinite(item.loss_after) for item in found):
                    write_profile(folder, into or config, rank(found), budget)
                if not console.is_terminal:
                    say(console, _describe(number, len(candidates), found[-1]))
        finished = True
    except KeyboardInterrupt:
        where = f"; what was measured is in {folder}" if found else ""
        say(console, f"stopped after {len(found)} of {len(candidates)} candidates{where}")
    if not found:
        return Profile(None, finished)
    ranked = rank(found)
    console.print(profile_table(ranked))
    winner = write_profile(folder, into or config, ranked, budget)
    certainty = lead(ranked)
    if certainty is not None:
        say(console, describe_lead(certainty, split))
    return Profile(winner, finished)


def run_rate_search(
    config: Config, folder: Path, passes: int, into: Config | None = None, console: Console | None = None
) -> Profile:
    """Try learning rates over five orders of magnitude with what ``config`` trains and how; write ``winner.yaml``.

    Arguments and errors are those of :func:`run_profile`.
    """
    console = console or Console(highlight=False)
    budget = Budget(forward_passes=passes, rate_factors=_RATE_FACTORS)
    session, split = _open(config, console)
    before = session.evaluate(session.parts.trainables)
    assert before is not None, "there is an evaluation split"
    say(console, f"{len(_RATE_FACTORS)} learning rates, {passes:,} forward passes each, judged on the {split} split; "
        f"the loss is {format_metric(before['loss'])} before")  # fmt: skip
    trials: list[Trial] = []
    finished = False
    try:
        with _shown(console, 1, []) as watch_of:
            trials.extend(search_rates(session, budget, watch_of(0, "configuration")))
        finished = True
    except KeyboardInterrupt:
        say(console, f"stopped after {len(trials)} of {len(_RATE_FACTORS)} learning rates")
    if not trials:
        return Profile(None, finished)
    trials.sort(key=lambda trial: trial.loss_after)
    console.print(rate_table(trials, before["loss"]))
    best = trials[0]
    if not best.loss_after < before["loss"]:
        say(console, "warning: at no rate did the loss fall; spend more --passes, or train something else")
    note = f"learning rate {best.learning_rate:g} had the lowest evaluation loss ({best.loss_after:.4f}) of those tried"
    return Profile(write_winner(folder, into or config, best.learning_rate, note), finished)


def _open(config: Config, console: Console) -> tuple[Session, str]:
    """The session, judged on validation rows where there are any, and the name of the split that is used."""
    order = config.eval.model_copy(update={"split": ["val", "test"]})
    with loading(config, console):
        session = Session.open(config.model_copy(update={"eval": order}))
    check_profile(session)
    if session.data.val:
        return session, "validation"
    say(
        console,
        "warning: data.splits gives no validation rows, so the choice is made on the test rows: what is then measured "
        "on them is better than it will be on others",
    )
    return session, "test"


def _describe(number: int, candidates: int, item: Measured) -> str:
    name = f"{number + 1}/{candidates} {item.candidate.name}"
    if item.problem:
        return f"{name}: {item.problem}"
    return (
        f"{name}: {item.trainable:,} parameters, cosine {item.cosine:.3f}, loss {item.loss_before:.4f} -> "
        f"{item.loss_after:.4f} at learning rate {item.learning_rate:g}"
    )


@contextmanager
def _shown(console: Console, candidates: int, found: Sequence[Measured]) -> Iterator[_Watches]:
    """On a terminal, the table so far and a line of what is being done; elsewhere a line for each thing begun."""
    if not console.is_terminal:
        yield _Watches(candidates, lambda text: say(console, text))
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show(text: str) -> None:
            table = [profile_table(rank(found))] if found else []
            live.update(Group(*table, Text(text)), refresh=True)

        yield _Watches(candidates, show)


class _Watches:
    """Makes, for each candidate, the function that is told of its progress; knows how much is left of all."""

    def __init__(self, candidates: int, show: Callable[[str], None]) -> None:
        self._candidates = candidates
        self._show = show
        self._started = time.monotonic()

    def __call__(self, number: int, name: str) -> Watch:
        def watch(doing: str, share: float) -> None:
            done = number + share
            counter = f"{number + 1}/{self._candidates} " if self._candidates > 1 else ""
            left = ""
            if done > 0:
                left_s = (time.monotonic() - self._started) / done * (self._candidates - done)
                left = f", {format_seconds(left_s)} left"
            self._show(f"{counter}{name}: {doing}{left}")

        return watch
