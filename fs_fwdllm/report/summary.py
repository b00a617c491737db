"""The few numbers of a finished run in one table."""

from __future__ import annotations

from rich import box
from rich.table import Column, Table
from rich.text import Text

from fs_fwdllm.report.record import RunSummary, metric_title
from fs_fwdllm.report.units import format_bytes, format_count, format_metric, format_seconds

__all__ = ["summary_table"]


def summary_table(summary: RunSummary) -> Table:
    """One line a fact; a fact without a value is left out."""
    name = metric_title(summary.metric) if summary.metric else ""
    best = "-" if summary.best is None else f"{format_metric(summary.best)} in round {summary.best_round}"
    facts = {
        "method": summary.method,
        "rounds": str(summary.rounds),
        f"{name}, before training": format_metric(summary.start),
        f"{name}, most frequent class": format_metric(summary.majority),
        f"{name}, at the end": format_metric(summary.final),
        f"{name}, best": best,
        "loss": format_metric(summary.loss) if summary.metric != "loss" else "-",
        "forward passes": format_count(summary.forward_passes),
        "backward passes": format_count(summary.backward_passes),
        "upload": format_bytes(summary.upload_bytes),
        "download": format_bytes(summary.download_bytes),
        "time": format_seconds(summary.duration_s),
        "peak RSS": "-" if summary.peak_rss_mib is None else f"{summary.peak_rss_mib:.0f} MiB",
        "peak device": "-" if summary.peak_device_mib is None else f"{summary.peak_device_mib:.0f} MiB",
    }
    table = Table(Column("run", style="bold"), Column(Text(summary.run), overflow="fold"), box=box.SIMPLE_HEAD)
    for fact, value in facts.items():
        if value != "-":
            table.add_row(fact, Text(value))
    return table
