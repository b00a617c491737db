"""What the pictures share: a figure without a display, axes with units, colours, and writing the file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fs_fwdllm.report.files import disk_errors_named
from fs_fwdllm.report.units import byte_unit, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS", "X_AXES", "draw", "label_axes", "label_log_axes", "label_modelled_time", "new_figure", "save_figure"
]  # fmt: skip

#: Okabe and Ito's palette, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")

#: What a result can be plotted against: name in :meth:`RunRecord.series`, and the axis label.
X_AXES = {
    "round": "round",
    "bytes": "upload + download",
    "forward_passes": "forward passes",
    "seconds": "time [s]",
}

_DOTS_PER_INCH = 100


def new_figure(rows: int, columns: int, width_px: int, height_px: int, title: str) -> tuple[Figure, Sequence[Any]]:
    """A titled figure of ``rows`` times ``columns`` axes (row by row), drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_px / _DOTS_PER_INCH, height_px / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
    figure.suptitle(title, fontsize=15, parse_math=False)
    axes = figure.subplots(rows, columns)
    for axis in axes.flat:
        axis.grid(True, color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def draw(axis: Axes, x: Sequence[float], y: Sequence[float], *, label: str, colour: str, width_pt: float = 1.8) -> None:
    """One curve; few points are marked, so that a single one can be seen."""
    marker = "o" if len(x) <= 40 else None
    label = f" {label}" if label.startswith("_") else label  # a legend leaves out names with a leading underscore
    label = label.replace("$", r"\$")
    axis.plot(x, y, color=colour, linewidth=width_pt, marker=marker, markersize=2 + width_pt, label=label)


def label_axes(axis: Axes, x: str, y_label: str) -> None:
    """Label both axes; bytes get the unit that suits their size, large counts a prefix (k, M, G)."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=x == "round")
    label = X_AXES[x]
    if x == "bytes":
        low, high = axis.get_xlim()
        divisor, unit = byte_unit(high)
        shown = [tick for tick in ticks.tick_values(low / divisor, high / divisor) if low <= tick * divisor <= high]
        axis.set_xticks([tick * divisor for tick in shown], [f"{tick:g}" for tick in shown])
        label = f"{label} [{unit}]"
    else:
        axis.xaxis.set_major_locator(ticks)
    if x == "forward_passes":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(label, fontsize=11)
    axis.set_ylabel(y_label, fontsize=11)


def label_log_axes(axis: Axes, x: str, y_label: str) -> None:
    """Label both axes of a logarithmic ``x``: for curves whose ends lie orders of magnitude apart."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log", nonpositive="mask")
    if x == "bytes":
        axis.xaxis.set_major_locator(LogLocator(base=16))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value).replace(".0", "")))
    else:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(f"{X_AXES[x]} (logarithmic)", fontsize=11)
    axis.set_ylabel(y_label, fontsize=11)


def label_modelled_time(axis: Axes, device: str, y_label: str) -> None:
    """Label both axes of a curve against the time that a model says a device would take, from seconds to weeks."""
    axis.set_xscale("log", nonpositive="mask")
    axis.set_xlabel(f"modelled time on {device} [s] (logarithmic)", fontsize=11)
    axis.set_ylabel(y_label, fontsize=11)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write ``figure`` as PNG in one step and return ``path``. Raises ``CheckpointError`` when it cannot be written."""
    with disk_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".png")
        try:
            with os.fdopen(handle, "wb") as file:
                figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path
