"""Line charts as inline SVG whose colours are the page's own, so that they suit its light and its dark dress."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from engine.report.quantities import tick
from engine.report.series import Series

NUM_COLOURS = 6
LOG_SPAN = 20.0
ROUND_STEPS = (1, 2, 2.5, 5, 10)
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.autolimit_mode": "round_numbers",
    "axes.ymargin": 0.0,
    "axes.xmargin": 0.0,
}

# matplotlib knows no CSS variables: these stand-ins are exchanged for them in the SVG
INK, GRID = "#0f0001", "#0f0002"
SERIES = tuple(f"#0e000{i}" for i in range(NUM_COLOURS))
VARIABLES = {INK: "var(--muted)", GRID: "var(--rule)"} | {SERIES[i]: f"var(--series-{i})" for i in range(NUM_COLOURS)}

DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)))


@dataclass(frozen=True)
class Line:
    """A curve with its name in the legend. ``colour`` counts from 0; each colour has its own dashes as well."""

    label: str
    series: Series
    colour: int


@dataclass(frozen=True)
class Level:
    """A value that does not change with the steps, as a horizontal line."""

    label: str
    value: float
    colour: int


@dataclass(frozen=True)
class Chart:
    title: str
    svg: str
    legend: tuple[tuple[str, int], ...]
    """label and colour"""
    note: str = ""


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    levels: Sequence[Level] = (),
    y_format: Callable[[float], str] = tick,
    from_zero: bool = False,
) -> Chart:
    """A chart over steps. The scale is logarithmic when positive values span more than LOG_SPAN, and says so."""
    lines = [line for line in lines if len(line.series)]
    values = [float(v) for line in lines for v in line.series.values] + [level.value for level in levels]
    logarithmic = not from_zero and min(values) > 0 and max(values) / min(values) > LOG_SPAN
    with mpl.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(5.4, 2.75), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for level in levels:
            axes.axhline(level.value, color=SERIES[level.colour], linestyle=DASHES[level.colour], linewidth=1.3)
        for line in lines:
            _draw(axes, line)
        _dress(axes, y_label + (", log scale" if logarithmic else ""), y_format, logarithmic)
        if from_zero:
            axes.update_datalim([(0.0, 0.0)])
            axes.autoscale_view()
        axes.set_xlim(0.0, max(1.0, *(float(line.series.steps[-1]) for line in lines)))
        if from_zero and max(values) == 0:
            axes.set_ylim(0.0, 1.0)
        svg = _svg(figure)
    legend = tuple((line.label, line.colour) for line in lines) + tuple((level.label, level.colour) for level in levels)
    merged = any(line.series.merged for line in lines)
    return Chart(
        title, svg, legend, "Each point is the mean of several records; the band holds them all." if merged else ""
    )


def _draw(axes: Axes, line: Line) -> None:
    curve, colour = line.series, SERIES[line.colour]
    if curve.merged:
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
    marker: Any = {"marker": "o", "markersize": 3.5} if len(curve) <= 12 else {}
    axes.plot(
        curve.steps, curve.values, color=colour, linestyle=DASHES[line.colour], linewidth=1.5, clip_on=False, **marker
    )


def _dress(axes: Axes, y_label: str, y_format: Callable[[float], str], logarithmic: bool) -> None:
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: y_format(value)))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, pad=6)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)


def _svg(figure: Figure) -> str:
    """The figure as an element to put into HTML: no prolog, no metadata, no addresses, the page's width and colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(
        r'\sid="(?:figure|axes|patch|matplotlib|xtick|ytick|line2d|text|PolyCollection|FillBetween)[\w.]*"', "", svg
    )
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.strip()
