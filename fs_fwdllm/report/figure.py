"""What the pictures share: a figure without a display, axes with units, colours and lines, and writing the file."""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fs_fwdllm.report.files import disk_errors_named
from fs_fwdllm.report.units import byte_unit, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS", "GREY", "LINE_STYLES", "X_AXES", "draw", "label_axes", "label_log_axes", "label_modelled_time",
    "new_figure", "save_figure", "shortened", "show_legend", "smoothed", "write_caption", "write_warning",
]  # fmt: skip

#: Okabe and Ito's palette, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#777777"
#: One for each colour, so that a curve on top of an equal one lets it show through.
LINE_STYLES = (
    "-",
    (0, (5, 2)),
    (0, (2, 1.5)),
    (0, (6, 2, 1.5, 2)),
    "-",
    (0, (5, 2)),
    (0, (2, 1.5)),
    (0, (6, 2, 1.5, 2)),
)

#: What a result can be plotted against: name in :meth:`RunRecord.series`, and the axis label.
X_AXES = {
    "round": "round",
    "bytes": "upload + download",
    "forward_passes": "forward passes",
    "seconds": "time [s]",
}

#: Times that people have in mind, for a logarithmic axis.
_TIMES_S: dict[float, str] = {
    **{count * 10**power: f"{count * 10**power:g} s" for power in (-3, -2, -1, 0) for count in (1, 2, 5)},
    **{count: f"{count} s" for count in (10, 30)},
    **{60 * count: f"{count} min" for count in (1, 2, 5, 10, 30)},
    **{3600 * count: f"{count} h" for count in (1, 2, 5, 12)},
    **{86400 * count: f"{count} d" for count in (1, 2, 5, 10, 20, 50, 100)},
}
_MOST_TIMES = 7
_DOTS_PER_INCH = 100
_FEW_POINTS = 40
#: Part of a curve that a smoothed point is the mean of.
_SMOOTHED_SHARE = 0.1


def new_figure(
    rows: int, columns: int, width_px: int, height_px: int, title: str, caption: str = ""
) -> tuple[Figure, Sequence[Any]]:
    """A titled figure of ``rows`` times ``columns`` axes (row by row), drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_px / _DOTS_PER_INCH, height_px / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
    figure.suptitle(title, fontsize=15, parse_math=False)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(True, color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    if caption:
        write_caption(figure, caption)
    return figure, axes


def write_caption(figure: Figure, text: str) -> None:
    """Facts below the panels, broken between words."""
    columns = int(figure.get_size_inches()[0] * 11.5)
    lines = (textwrap.fill(line, columns, break_long_words=False) for line in text.splitlines())
    figure.supxlabel("\n".join(lines), fontsize=10.5, color="#333333", parse_math=False, linespacing=1.5)


def write_warning(axis: Axes, text: str) -> None:
    """A warning in red above a panel."""
    axis.set_title(textwrap.fill(text, 150), fontsize=11, color="#B00020", loc="left", parse_math=False)


def draw(
    axis: Axes,
    x: Sequence[float],
    y: Sequence[float],
    *,
    label: str,
    colour: str,
    width_pt: float = 1.8,
    style: Any = "-",
    opacity: float = 1.0,
) -> None:
    """One curve; few points are marked, so that a single one can be seen."""
    marker = "o" if len(x) <= _FEW_POINTS else None
    axis.plot(
        x, y, color=colour, linewidth=width_pt, linestyle=style, marker=marker, markersize=2 + width_pt, alpha=opacity,
        label=_as_it_is(label) if label else None,
    )  # fmt: skip


def _as_it_is(label: str) -> str:
    """A label that a legend neither leaves out (a leading underscore) nor takes for mathematics."""
    return (f" {label}" if label.startswith("_") else label).replace("$", r"\$")


def shortened(name: str, characters: int = 22) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= characters else f"{name[: characters - 1]}…"


def smoothed(values: Sequence[float]) -> list[float]:
    """Running means over a tenth of the points, half of it at the ends; short series stay as they are."""
    reach = int(len(values) * _SMOOTHED_SHARE / 2)
    return [
        fmean(values[max(0, position - reach) : position + reach + 1]) if reach else values[position]
        for position in range(len(values))
    ]


def show_legend(axis: Axes, **changes: Any) -> None:
    """A legend without a frame, where something has a label."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9.5, **changes)


def label_axes(axis: Axes, x: str, y_label: str, *, y_is_bytes: bool = False) -> None:
    """Label both axes; bytes get the unit that suits their size, large counts a prefix (k, M, G)."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    label = X_AXES[x]
    if x == "bytes":
        label = f"{label} [{_tick_bytes(axis.xaxis)}]"
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=x == "round"))
    low, high = axis.get_xlim()
    if x == "round" and high - low < 1:  # a single round
        axis.set_xticks([round((low + high) / 2)])
    if x == "forward_passes":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(label, fontsize=11)
    axis.set_ylabel(f"{y_label} [{_tick_bytes(axis.yaxis)}]" if y_is_bytes else y_label, fontsize=11)


def _tick_bytes(axis: Axis) -> str:
    """Put ticks at round numbers of the binary unit that suits the axis, and return the unit."""
    from matplotlib.ticker import MaxNLocator

    low, high = axis.get_view_interval()
    divisor, unit = byte_unit(high)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low / divisor, high / divisor)
    shown = [tick for tick in ticks if low <= tick * divisor <= high]
    axis.set_ticks([tick * divisor for tick in shown], [f"{tick:g}" for tick in shown])
    return unit


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
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", nonpositive="mask")
    low, high = axis.get_xlim()
    shown = [second for second in _TIMES_S if low <= second <= high]
    shown = shown[:: 1 + len(shown) // _MOST_TIMES]
    axis.set_xticks(shown, [_TIMES_S[second] for second in shown])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(f"modelled time on {device} (logarithmic)", fontsize=11)
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
