"""Numbers as a reader wants them: few digits, a unit, a dash for what is not known."""

from __future__ import annotations

import math

MISSING = "–"
THIN_SPACE = "\u202f"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, thousands grouped: 0.0123, 4.83, 1,234."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals > digits + 2:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, decimals)}f}"


def share(value: float | None) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{number(100 * value)}{THIN_SPACE}%"


def ratio(value: float | None) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{number(value)}×"


def count(value: float | None) -> str:
    """12,345 below a hundred thousand, then 63.0 M."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 1e5:
        return f"{value:,.0f}"
    return _scaled(value, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")))


def size(value: float | None) -> str:
    """Bytes, in powers of 1,000."""
    return _scaled(value, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def duration(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    if value >= 60:
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        units = (f"{hours}{THIN_SPACE}h" if hours else "", f"{minutes}{THIN_SPACE}min", f"{seconds}{THIN_SPACE}s")
        return " ".join(part for part in units[: 2 if hours else 3] if part)
    return _scaled(value, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))


def _scaled(value: float | None, units: tuple[tuple[float, str], ...]) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    factor, unit = next((entry for entry in units if abs(value) >= 0.9995 * entry[0]), units[-1])
    return f"{number(value / factor)}{THIN_SPACE}{unit}"
