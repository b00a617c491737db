"""The profile of a configuration from beginning to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from fs_fwdllm.config import Config
from fs_fwdllm.profiler.candidates import candidates_for
from fs_fwdllm.profiler.measure import Budget, measure, rank
from fs_fwdllm.profiler.report import profile_table, write_profile
from fs_fwdllm.running.session import Session

__all__ = ["run_profile"]


def run_profile(config: Config, folder: Path, probes: int, passes: int, say: Callable[[str], None]) -> Path:
    """Measure every candidate for ``config``, print the table, write the files; returns the winner's configuration.

    Raises:
        ConfigError: the method needs backpropagation, or there is no evaluation split.
        ModelError: no candidate could be measured.
        FwdLLMError: whatever a run would raise while it loads.
    """
    budget = Budget(probes=probes, forward_passes=passes)
    session = Session.open(config)
    candidates = candidates_for(config, session.loaded.model, session.loaded.task)
    rates = len(budget.rate_factors)
    say(f"{len(candidates)} candidates: {passes:,} forward passes each, after an eighth at each of {rates} rates")
    ranked = rank([measure(session, candidate, budget, say) for candidate in candidates])
    Console(highlight=False).print(profile_table(ranked))
    return write_profile(folder, config, ranked, budget)
