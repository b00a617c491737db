"""What runs cost: memory and bytes as measured, passes as counted, and the time of devices as modelled.

The system-cost analysis of FwdLLM (ATC 2024), with one difference: what was measured and what comes out of a model with
stated constants (:mod:`fs_fwdllm.report.device_model`) are never in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from fs_fwdllm.report.compare import common_curve, load_runs
from fs_fwdllm.report.device_model import DeviceModel, modelled_seconds
from fs_fwdllm.report.figure import COLOURS, draw, label_modelled_time, new_figure, save_figure
from fs_fwdllm.report.record import LOWER_IS_BETTER, RunRecord
from fs_fwdllm.report.traffic import read_traffic
from fs_fwdllm.report.units import format_bytes, format_count, format_metric, format_seconds

__all__ = ["analyse_costs"]

_PANEL_PX = (620, 460)
_COLUMNS = 3


@dataclass(frozen=True)
class _Costs:
    """One run's costs.

    Attributes:
        scores: the curve's value at the end of each round, ``None`` where it was not evaluated.
        seconds: modelled, at the end of each round, by device; ``None`` where the device cannot do the work.
        reached: position of the first round that is as good as the target; ``None`` for never, or without one.
    """

    label: str
    peak_rss_mib: float | None
    upload_bytes: float
    download_bytes: float
    client_rounds: int
    forward_passes: float
    backward_passes: float
    scores: list[float | None]
    seconds: dict[str, list[float] | None]
    reached: int | None
    passes_to_target: float | None

    def whole_s(self, device: str) -> float | None:
        seconds = self.seconds[device]
        return seconds[-1] if seconds else None

    def to_target_s(self, device: str) -> float | None:
        seconds = self.seconds[device]
        return seconds[self.reached] if seconds and self.reached is not None else None


def analyse_costs(
    paths: Sequence[str | Path], model: DeviceModel, output: str | Path, target: float | None = None
) -> tuple[Path, Table]:
    """Draw and tabulate what the runs of ``paths`` cost; ``output`` is the picture (PNG).

    Args:
        target: value of the runs' metric (or loss) whose first reaching is timed, too.

    Raises:
        CheckpointError: a path is not a run folder or has no round yet; ``output`` cannot be written.
        ConfigError: no path is given, or there are more runs than colours.
    """
    records, labels = load_runs(paths, "cost")
    y, y_label = common_curve(records)
    pairs = zip(records, labels, strict=True)
    costs = [_costs_of(record, label, model, y, target) for record, label in pairs]
    return _draw(costs, model, y_label, Path(output)), _table(costs, model, target)


def _costs_of(record: RunRecord, label: str, model: DeviceModel, y: str, target: float | None) -> _Costs:
    summary = record.summary()
    scores = [record.value(line, y) for line in record.rounds]
    reached = None if target is None else _first_reaching(scores, y, target)
    return _Costs(
        label=label,
        peak_rss_mib=summary.peak_rss_mib,
        upload_bytes=summary.upload_bytes or 0,
        download_bytes=summary.download_bytes or 0,
        client_rounds=sum(row.upload_bytes > 0 for row in read_traffic(record.folder.traffic_path)),
        forward_passes=summary.forward_passes or 0,
        backward_passes=summary.backward_passes or 0,
        scores=scores,
        seconds={name: modelled_seconds(record, device, model.network) for name, device in model.devices.items()},
        reached=reached,
        passes_to_target=None if reached is None else record.rounds[reached].get("forward_passes"),
    )


def _first_reaching(scores: Sequence[float | None], y: str, target: float) -> int | None:
    sign = -1.0 if y.rpartition(".")[2] in {*LOWER_IS_BETTER, "train_loss"} else 1.0
    good = (number for number, value in enumerate(scores) if value is not None and sign * value >= sign * target)
    return next(good, None)


def _table(costs: Sequence[_Costs], model: DeviceModel, target: float | None) -> Table:
    rows: dict[str, list[str]] = {
        "peak RSS of the process, measured": [
            "-" if c.peak_rss_mib is None else f"{c.peak_rss_mib:.0f} MiB" for c in costs
        ],
        "upload a client and round": [format_bytes(c.upload_bytes / max(1, c.client_rounds)) for c in costs],
        "download a client and round": [format_bytes(c.download_bytes / max(1, c.client_rounds)) for c in costs],
        "forward passes": [format_count(c.forward_passes) for c in costs],
        "backward passes": [format_count(c.backward_passes) for c in costs],
    }
    for name in model.devices:
        rows[f"time on {name} (model)"] = [format_seconds(c.whole_s(name)) for c in costs]
    if target is not None:
        rows[f"forward passes to {format_metric(target)}"] = [format_count(c.passes_to_target) for c in costs]
        for name in model.devices:
            rows[f"time to {format_metric(target)} on {name} (model)"] = [
                format_seconds(c.to_target_s(name)) for c in costs
            ]
    runs = (Column(Text(c.label), justify="right", overflow="fold") for c in costs)
    table = Table(Column("run", style="bold"), *runs)
    for name, cells in rows.items():
        table.add_row(name, *map(Text, cells))
    return table


def _draw(costs: Sequence[_Costs], model: DeviceModel, y_label: str, output: Path) -> Path:
    """Bars of what was measured, then the curve against each device's modelled time."""
    bars = {
        "peak RSS of the process [MiB]": [c.peak_rss_mib or 0.0 for c in costs],
        "MiB a client and round": [
            (c.upload_bytes + c.download_bytes) / max(1, c.client_rounds) / 2**20 for c in costs
        ],
        "passes, forward + backward": [c.forward_passes + c.backward_passes for c in costs],
    }
    lines = 1 + -(-len(model.devices) // _COLUMNS)
    size = (_PANEL_PX[0] * _COLUMNS, _PANEL_PX[1] * lines)
    figure, axes = new_figure(lines, _COLUMNS, *size, title="costs: measured above, modelled time below")
    for axis, (name, values) in zip(axes, bars.items(), strict=False):
        axis.bar(range(len(values)), values, color=COLOURS[: len(values)])
        axis.set_axisbelow(True)
        axis.set_xticks([])
        axis.set_ylabel(name, fontsize=11)
    for axis, device in zip(axes[_COLUMNS:], model.devices, strict=False):
        for number, run in enumerate(costs):
            pairs = zip(run.seconds[device] or [], run.scores, strict=False)
            points = [(x, score) for x, score in pairs if score is not None]
            xs, ys = [x for x, _ in points], [score for _, score in points]
            draw(axis, xs, ys, label=run.label, colour=COLOURS[number])
        label_modelled_time(axis, device, y_label)
    for axis in axes[_COLUMNS + len(model.devices) :]:
        axis.set_visible(False)
    handles, names = axes[_COLUMNS].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), frameon=False, fontsize=11)
    return save_figure(figure, output)
