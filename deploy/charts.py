"""The report's charts: small SVG figures drawn by matplotlib, the same bytes for the same numbers.

Colours become CSS variables of the page (the light colour is the fallback), so one chart serves the light and
the dark page. Text stays text. Blue is always the pruned model and orange the original: any colour vision
tells the two apart, and the labels say it too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

from deploy.values import milliseconds, thinned, times, visible

INK, MUTED, LINE, SOFT = "#1b2431", "#5c6776", "#dde3ea", "#e8edf3"
BLUE, ORANGE = "#1f6fb3", "#c4560c"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", SOFT: "soft", BLUE: "blue", ORANGE: "orange"}

WIDTH = 10.0  # inches; the page shows it about 1000 pixels wide
MAX_BARS = 160  # with more layers the chart shows those that cost most
COLUMN_BARS = 44  # more bars than this are set in two columns
MAX_POINTS = 160
BINS = 72
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a "$" in a layer's name is a dollar sign
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.7,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Bar:
    """One layer: how many of its output channels are kept."""

    name: str
    before: int
    after: int
    pinned: bool


@dataclass(frozen=True)
class Series:
    """A line through (x, y) points. ``second`` draws it dashed in the second colour."""

    label: str
    points: tuple[tuple[float, float], ...]
    second: bool = False


@dataclass(frozen=True)
class Panel:
    """One small line chart: its lines, and a marked position on the x axis where there is one."""

    title: str
    x_label: str
    series: tuple[Series, ...]
    percent: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class Samples:
    """The raw latencies of both models with one runner and batch, in milliseconds."""

    title: str
    original_ms: tuple[float, ...]
    dense_ms: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """A speed-up with its 95 % interval."""

    label: str
    ratio: float
    low: float
    high: float


def layers(bars: Sequence[Bar]) -> str:
    """Horizontal bars: the share of its channels that each layer keeps, "kept / before" beside it."""
    with _style():
        columns = 2 if len(bars) > COLUMN_BARS else 1
        rows = -(-len(bars) // columns)
        step = 0.17 if columns == 2 else 0.205
        figure = _figure(0.55 + step * rows)
        for column, axes in enumerate(_grid(figure, 1, columns)):
            _bar_column(axes, bars[column * rows : (column + 1) * rows], rows, 30 if columns == 2 else 60)
        return _svg(figure, "layers", f"Share of channels kept in each of {len(bars)} layers")


def progress(panels: Sequence[Panel], name: str) -> str:
    """Small line charts side by side, one question each."""
    with _style():
        figure = _figure(2.55)
        for axes, panel in zip(_grid(figure, 1, len(panels)), panels, strict=True):
            _line_panel(axes, panel)
        return _svg(figure, name, ", ".join(panel.title for panel in panels))


def latency(panels: Sequence[Samples]) -> str:
    """How the latencies of both models are spread, one panel per runner and batch, medians labelled."""
    with _style():
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure = _figure(0.2 + 1.75 * rows)
        grid = _grid(figure, rows, columns)
        for axes, panel in zip(grid, panels, strict=False):
            _latency_panel(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        return _svg(figure, "latency", "Spread of the latencies of the original and the pruned model")


def speedups(ratios: Sequence[Ratio], limit: float | None) -> str:
    """Every speed-up with its 95 % interval, the line of no change, and the gate's limit if there is one."""
    with _style():
        figure = _figure(0.65 + 0.27 * len(ratios))
        (axes,) = _grid(figure, 1, 1)
        for row, one in enumerate(ratios):
            axes.plot([one.low, one.high], [row, row], color=BLUE, linewidth=3.2, solid_capstyle="round")
            axes.plot([one.ratio], [row], marker="o", markersize=6.5, color=BLUE)
            label = f"{times(one.ratio)} ({times(one.low)} to {times(one.high)})"
            _note(axes, one.high, row, label, right=True)
        right = max([one.high for one in ratios] + [1.0, limit or 1.0])
        left = min([one.low for one in ratios] + [1.0])
        width = right - left or 1.0
        axes.set_xlim(left - 0.08 * width, right + 0.25 * width)
        axes.set_ylim(len(ratios) - 0.4, -0.6)
        axes.set_yticks(range(len(ratios)), [_trim(one.label, 40) for one in ratios], color=INK)
        axes.grid(visible=False, axis="y")
        axes.axvline(1.0, color=MUTED, linewidth=1.2)
        if limit is not None:
            axes.axvline(limit, color=ORANGE, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlabel("times as fast as the original (1 = no change; dashed = the gate's limit)")
        return _svg(figure, "speedup", "Speed-up with its 95 % interval")


def _bar_column(axes: Any, bars: Sequence[Bar], rows: int, longest: int) -> None:
    axes.barh(range(len(bars)), [1.0] * len(bars), height=0.66, color=SOFT)
    colours = [MUTED if bar.after >= bar.before else BLUE for bar in bars]
    axes.barh(range(len(bars)), [bar.after / bar.before for bar in bars], height=0.66, color=colours)
    for row, bar in enumerate(bars):
        label = f"{bar.after:,} / {bar.before:,}" + ("  pinned" if bar.pinned else "")
        axes.text(1.015, row, label, va="center", color=MUTED, fontsize=8)
    axes.set_xlim(0, 1.24)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), [_trim(bar.name, longest) for bar in bars], color=INK, fontsize=8)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.xaxis.tick_top()
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)


def _line_panel(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(panel.title)
    for one in panel.series:
        if not one.points:
            continue
        xs, ys = zip(*(one.points[i] for i in thinned(len(one.points), MAX_POINTS)), strict=True)
        colour, dash = (ORANGE, (0, (4, 2))) if one.second else (BLUE, "-")
        dots = "o" if len(xs) <= 15 else ""
        axes.plot(xs, ys, color=colour, linestyle=dash, label=one.label, marker=dots, markersize=3.5)
    if len(panel.series) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.8)
    if panel.mark is not None:
        axes.axvline(panel.mark, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)))
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel(panel.x_label)
    axes.margins(x=0.03, y=0.12)


def _latency_panel(axes: Any, panel: Samples) -> None:
    import numpy

    axes.set_title(panel.title)
    shown = [x for x in (panel.original_ms, panel.dense_ms) if x]
    low = min(min(x) for x in shown)
    high = max(float(numpy.quantile(x, 0.99)) for x in shown)
    edges = numpy.linspace(low, max(high, low * 1.01), BINS + 1)
    middles = {name: median(x) for name, x in (("o", panel.original_ms), ("d", panel.dense_ms)) if x}
    rightmost = max(middles.values())
    for key, samples, colour in (("o", panel.original_ms, ORANGE), ("d", panel.dense_ms, BLUE)):
        if not samples:
            continue
        counts, _ = numpy.histogram(samples, bins=edges)
        heights = counts / max(1, counts.max())
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.45)
        axes.stairs(heights, edges, color=colour, linewidth=1.1)
        axes.axvline(middles[key], color=colour, linewidth=1.4)
        label = f"{'original' if key == 'o' else 'pruned'} {milliseconds(middles[key])}"
        _note(axes, middles[key], 1.14, label, right=len(middles) == 1 or middles[key] < rightmost)
    span = edges[-1] - edges[0]
    axes.set_xlim(edges[0] - 0.04 * span, edges[-1] + 0.04 * span)
    axes.set_ylim(0, 1.25)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_xlabel("ms per call")


def _note(axes: Any, x: float, y: float, label: str, right: bool) -> None:
    """A label a few points to the right or to the left of a position."""
    offset, side = (6, "left") if right else (-6, "right")
    axes.annotate(label, (x, y), (offset, 0), textcoords="offset points", ha=side, va="center", fontsize=8.5)


def _trim(text: str, longest: int) -> str:
    """The name made printable and, when too long, cut in its middle: both ends tell layers apart."""
    text = visible(text)
    if len(text) <= longest:
        return text
    head = (longest - 1) // 3
    return text[:head] + "…" + text[-(longest - 1 - head) :]


def _style() -> AbstractContextManager[None]:
    """matplotlib's own defaults with `STYLE` on top, whatever the user's matplotlibrc says."""
    import matplotlib

    defaults = {
        k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "toolbar"))
    }
    context: AbstractContextManager[None] = matplotlib.rc_context({**defaults, **STYLE})
    return context


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")


def _grid(figure: Any, rows: int, columns: int) -> list[Any]:
    grid = figure.subplots(rows, columns, squeeze=False, subplot_kw={"facecolor": "none"})
    return list(grid.ravel())


def _svg(figure: Any, name: str, alt: str) -> str:
    """The figure as an inline SVG: the page's fonts and colours, ids of its own, no date, no style sheet."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<(metadata|style)[ >].*?</\1>\s*", "", text, flags=re.S)
    tags = "".join(re.findall(r"<[^>]*>", text))
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", tags))
    # Only tags are rewritten: what a name says stays as it is.
    text = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0], name, used), text)
    view = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {view[0] if view else ""} role="img" aria-label="{alt}">'
    return re.sub(r">\s+<", "><", head + text[text.index(">") + 1 :]) + "\n"


def _tag(tag: str, name: str, used: set[str]) -> str:
    tag = re.sub(r"\s*font-family:[^;\"]*;?", "", tag)
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(url\(|href=")#', rf"\1#{name}-", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var(--{variable},{colour})")
    return tag
