"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["byte_unit", "format_bytes", "format_count", "format_metric", "format_seconds", "short_count"]

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def byte_unit(largest_bytes: float) -> tuple[float, str]:
    """``(divisor, name)`` of the binary unit in which ``largest_bytes`` reads best."""
    divisor, unit = 1.0, _BYTE_UNITS[0]
    for name in _BYTE_UNITS[1:]:
        if largest_bytes < divisor * 1024:
            break
        divisor, unit = divisor * 1024, name
    return divisor, unit


def format_bytes(count_bytes: float | None) -> str:
    """``1536`` as ``1.5 KiB``; ``None`` as a dash."""
    if count_bytes is None:
        return "-"
    divisor, unit = byte_unit(abs(count_bytes))
    return f"{count_bytes:.0f} B" if unit == "B" else f"{count_bytes / divisor:.1f} {unit}"


def format_count(count: float | None) -> str:
    """``12345`` as ``12,345``; ``None`` as a dash."""
    return "-" if count is None else f"{count:,.0f}"


def short_count(count: float | None) -> str:
    """``12345`` as it is, ``1234567`` as ``1.23 M``; ``None`` as a dash."""
    if count is None or count < 1e6:
        return format_count(count)
    divisor, unit = next((size, name) for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if count >= size)
    return f"{count / divisor:.3g} {unit}"


def format_metric(value: float | None) -> str:
    """Four digits that matter; ``None`` (not measured, or not a number) as a dash."""
    return "-" if value is None else f"{value:#.4g}".rstrip(".")


def format_seconds(duration_s: float | None) -> str:
    """``12.3 s`` below a minute, ``2 min 05 s`` below an hour, ``1 h 02 min`` above; ``None`` as a dash."""
    if duration_s is None:
        return "-"
    if duration_s < 59.95:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
