"""The part of ``fs-fwdllm doctor`` that measures a configuration's slopes: what is kept, and what to change."""

from __future__ import annotations

import importlib
from typing import Any

from rich.console import Console

from fs_fwdllm.report.terminal import compact_table, say

__all__ = ["tell_slopes"]


def tell_slopes(config: Any, probes: int) -> bool:
    """Print what every source of slopes is worth; returns whether all of them can be kept."""
    module = importlib.import_module("fs_fwdllm.profiler.slopes")
    checks = module.check_slopes(config, probes)
    console = Console(highlight=False)
    table = compact_table("slopes", "part", "correlation", "relative error", "verdict")
    for check in checks:
        verdict = "keep" if check.is_enough else "change"
        table.add_row(
            check.slopes, check.match or "all", f"{check.correlation:.4f}", f"{check.relative_error:.3g}", verdict
        )
    console.print(table)
    say(console, f"correlation with backpropagation in float32 along {probes} directions; {module.ENOUGH} is enough")
    for check in checks:
        if not check.is_enough:
            say(console, f"{check.slopes}: {_advice(check, config, module.ENOUGH)}", "yellow")
    return all(check.is_enough for check in checks)


def _advice(check: Any, config: Any, enough: float) -> str:
    if check.correlation != check.correlation:
        return "the exact slopes are all zero where training starts, or the measured ones are not finite"
    better = [(correlation, radius) for radius, correlation in check.other_radii if correlation >= enough]
    if better:
        correlation, radius = max(better)
        return f"set fwdllm.radius {radius:g} (correlation {correlation:.4f})"
    ways = ["fwdllm.estimator forward_mode, which has no radius"] if check.other_radii else []
    if config.fwdllm.base.compute_dtype not in ("auto", "float32"):
        ways.append("fwdllm.base.compute_dtype float32")
    return f"use {' or '.join(ways)}" if ways else "compare the device's arithmetic with another one's"
