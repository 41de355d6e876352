"""Numbers as a reader wants them: few digits, a unit, a dash for what is not known."""

from __future__ import annotations

import math

MISSING = "–"
THIN_SPACE = "\u202f"
SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
BYTE_SCALES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, thousands grouped: 0.0123, 4.83, 1,234."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    if decimals > digits + 2:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, decimals)}f}"


def share(value: float | None) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.1f}{THIN_SPACE}%"


def ratio(value: float | None) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{number(value)}×"


def count(value: float | None) -> str:
    """12,345 below a hundred thousand, then 63.0 M."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 1e5:
        return f"{value:,.0f}"
    return _scaled(value, (*SCALES, (1e3, "k")))


def tick(value: float) -> str:
    """A round number of an axis, without zeros at its end: 0.15, 4.5, 12, 2,000, 12 M, 1.5e-4."""
    if abs(value) >= 1e6:
        factor, unit = next(entry for entry in SCALES if abs(value) >= entry[0])
        return f"{value / factor:.6g}{THIN_SPACE}{unit}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:,.6g}"
    mantissa, exponent = f"{value:.4e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def size_tick(value: float) -> str:
    """Bytes on an axis: 1.2 GB."""
    factor, unit = next((entry for entry in BYTE_SCALES if abs(value) >= entry[0]), BYTE_SCALES[-1])
    return f"{value / factor:.4g}{THIN_SPACE}{unit}"


def size(value: float | None) -> str:
    """Bytes, in powers of 1,000."""
    return _scaled(value, BYTE_SCALES)


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
