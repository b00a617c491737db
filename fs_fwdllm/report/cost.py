"""What runs cost: memory and bytes as measured, passes as counted, and the time of devices as modelled.

The system-cost analysis of FwdLLM (ATC 2024), with one difference: what was measured and what comes out of a model with
stated constants (:mod:`fs_fwdllm.report.device_model`) are never in one table, and the model's table says whose
constants they are and how they were scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fs_fwdllm.errors import ConfigError
from fs_fwdllm.evaluation.names import LOWER_IS_BETTER
from fs_fwdllm.report.compare import common_curve, load_runs
from fs_fwdllm.report.device_model import DeviceModel, PassCost, modelled_seconds, pass_cost
from fs_fwdllm.report.figure import (
    COLOURS,
    GREY,
    LINE_STYLES,
    draw,
    label_modelled_time,
    new_figure,
    save_figure,
    shortened,
)
from fs_fwdllm.report.groups import run_names
from fs_fwdllm.report.record import RunRecord
from fs_fwdllm.report.terminal import compact_table
from fs_fwdllm.report.traffic import read_traffic
from fs_fwdllm.report.units import byte_unit, format_bytes, format_metric, format_seconds, short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CostReport", "analyse_costs"]

_SIZE_PX = (1600, 1000)


@dataclass(frozen=True)
class CostReport:
    """A picture, a table of what was measured, tables of what was modelled, and how that was done, line by line."""

    picture: Path
    measured: Table
    modelled: list[Table]
    remarks: list[str]


@dataclass(frozen=True)
class _Costs:
    """One run's costs.

    Attributes:
        scores: the curve's value at the end of each round, ``None`` where it was not evaluated.
        pass_cost: how the constants were scaled; ``None`` where nothing can be modelled.
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
    pass_cost: PassCost | None
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
) -> CostReport:
    """Draw and tabulate what the runs of ``paths`` cost; ``output`` is the picture (PNG).

    Args:
        target: value of the runs' metric (or loss) whose first reaching is timed, too.

    Raises:
        CheckpointError: a path is not a run folder or has no round yet; ``output`` cannot be written.
        ConfigError: no path is given, or there are more runs than colours.
    """
    records = load_runs(paths, "cost")
    if len(records) > len(COLOURS):
        raise ConfigError(f"cost: takes 1 to {len(COLOURS)} run folders, but {len(records)} are given")
    y, y_label = common_curve(records)
    pairs = zip(records, run_names(records), strict=True)
    costs = [_costs_of(record, label, model, y, target) for record, label in pairs]
    modelled = [_modelled_table(costs, model)]
    if target is not None:
        modelled.append(_target_table(costs, model, f"{y_label} {format_metric(target)}"))
    return CostReport(
        _draw(costs, model, y_label, Path(output)), _measured_table(costs), modelled, _remarks(costs, model)
    )


def _costs_of(record: RunRecord, label: str, model: DeviceModel, y: str, target: float | None) -> _Costs:
    summary = record.summary()
    scores = [record.value(line, y) for line in record.rounds]
    reached = None if target is None else _first_reaching(scores, y, target)
    cost = pass_cost(record, model)
    return _Costs(
        label=label,
        peak_rss_mib=summary.peak_rss_mib,
        upload_bytes=summary.upload_bytes or 0,
        download_bytes=summary.download_bytes or 0,
        client_rounds=sum(row.upload_bytes > 0 for row in read_traffic(record.folder.traffic_path)),
        forward_passes=summary.forward_passes or 0,
        backward_passes=summary.backward_passes or 0,
        scores=scores,
        pass_cost=cost,
        seconds={
            name: modelled_seconds(record, device, model.network, cost) if cost else None
            for name, device in model.devices.items()
        },
        reached=reached,
        passes_to_target=None if reached is None else record.rounds[reached].get("forward_passes"),
    )


def _first_reaching(scores: Sequence[float | None], y: str, target: float) -> int | None:
    sign = -1.0 if y.rpartition(".")[2] in {*LOWER_IS_BETTER, "train_loss"} else 1.0
    good = (number for number, value in enumerate(scores) if value is not None and sign * value >= sign * target)
    return next(good, None)


def _remarks(costs: Sequence[_Costs], model: DeviceModel) -> list[str]:
    reference = model.measured_on
    found = [] if reference is None else [f"modelled time: the constants of the devices are for {reference.name}"]
    for run in costs:
        if run.pass_cost is None:
            found.append(
                f"{run.label}: no time is modelled, since the run did not note the arithmetic of its model and the "
                "constants say nothing about it; run it again with this version, or give --devices FILE with constants "
                "measured with its model and without the section measured_on"
            )
        else:
            found.append(f"{run.label}: {run.pass_cost.rule}")
    return found


def _measured_table(costs: Sequence[_Costs]) -> Table:
    table = compact_table(
        "run", "peak RSS", "up", "down", "forward", "backward", title="measured; bytes are a client's in a round"
    )
    for run in costs:
        table.add_row(
            Text(run.label),
            "-" if run.peak_rss_mib is None else f"{run.peak_rss_mib:.0f} MiB",
            format_bytes(run.upload_bytes / max(1, run.client_rounds)),
            format_bytes(run.download_bytes / max(1, run.client_rounds)),
            short_count(run.forward_passes),
            short_count(run.backward_passes),
        )
    return table


def _modelled_table(costs: Sequence[_Costs], model: DeviceModel) -> Table:
    table = compact_table("run", *model.devices, title="modelled time of the run")
    for run in costs:
        table.add_row(Text(run.label), *(format_seconds(run.whole_s(name)) for name in model.devices))
    return table


def _target_table(costs: Sequence[_Costs], model: DeviceModel, target: str) -> Table:
    table = compact_table("run", "forward", *model.devices, title=f"passes and modelled time to {target}")
    for run in costs:
        times = (format_seconds(run.to_target_s(name)) for name in model.devices)
        table.add_row(Text(run.label), short_count(run.passes_to_target), *times)
    return table


def _draw(costs: Sequence[_Costs], model: DeviceModel, y_label: str, output: Path) -> Path:
    """Bars of what was measured; below them the modelled time by device, and the curve against two devices' time."""
    caption = "\n".join(_remarks(costs, model))
    title = "costs: measured above, modelled time below"
    figure, axes = new_figure(2, 3, *_SIZE_PX, title=title, caption=caption)
    traffic = [(run.upload_bytes + run.download_bytes) / max(1, run.client_rounds) for run in costs]
    divisor, unit = byte_unit(max(traffic))
    passes = [run.forward_passes + run.backward_passes for run in costs]
    _draw_bars(axes[0], costs, [run.peak_rss_mib or 0.0 for run in costs], "peak RSS of the process [MiB]")
    _draw_bars(axes[1], costs, [value / divisor for value in traffic], f"a client's bytes in a round [{unit}]")
    _draw_bars(axes[2], costs, passes, "passes, forward + backward", list(map(short_count, passes)))
    _draw_times(axes[3], costs, model)
    first, *others = model.devices
    _draw_curves(axes[4], costs, first, y_label)
    if others:
        _draw_curves(axes[5], costs, others[-1], y_label)
    axes[5].set_visible(bool(others))
    return save_figure(figure, output)


def _draw_bars(
    axis: Axes, costs: Sequence[_Costs], values: Sequence[float], x_label: str, labels: Sequence[str] | None = None
) -> None:
    from matplotlib.ticker import EngFormatter

    bars = axis.barh(range(len(values)), values, color=COLOURS[: len(values)])
    axis.bar_label(bars, labels=labels or [f"{value:,.4g}" for value in values], padding=4, fontsize=10)
    axis.margins(x=0.2)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_yticks(range(len(values)), [shortened(run.label) for run in costs], parse_math=False)
    axis.invert_yaxis()
    axis.set_xlabel(x_label, fontsize=11)


def _draw_times(axis: Axes, costs: Sequence[_Costs], model: DeviceModel) -> None:
    """For each device a bar a run; no bar where the device cannot do the work."""
    height = 0.8 / len(costs)
    for number, run in enumerate(costs):
        for row, device in enumerate(model.devices):
            seconds = run.whole_s(device)
            place = row + (number - (len(costs) - 1) / 2) * height
            bars = axis.barh([place], [seconds or 0.0], height, color=COLOURS[number])
            axis.bar_label(bars, labels=[format_seconds(seconds)], padding=4, fontsize=9)
    axis.margins(x=0.3)
    axis.set_axisbelow(True)
    axis.set_yticks(range(len(model.devices)), list(map(shortened, model.devices)), parse_math=False)
    axis.invert_yaxis()
    axis.xaxis.set_ticklabels([])
    axis.set_xlabel("modelled time of the whole run", fontsize=11)


def _draw_curves(axis: Axes, costs: Sequence[_Costs], device: str, y_label: str) -> None:
    for number, run in enumerate(costs):
        pairs = zip(run.seconds[device] or [], run.scores, strict=False)
        points = [(x, score) for x, score in pairs if score is not None and x > 0]
        xs, ys = [x for x, _ in points], [score for _, score in points]
        draw(axis, xs, ys, label=run.label, colour=COLOURS[number], style=LINE_STYLES[number])
    if not any(run.seconds[device] for run in costs):
        axis.text(0.5, 0.5, "no run can be modelled", transform=axis.transAxes, ha="center", color=GREY)
    label_modelled_time(axis, device, y_label)
