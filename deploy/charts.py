"""The report's charts: small SVG figures drawn by matplotlib, the same bytes for the same numbers.

Colours become CSS variables of the page (the light colour is the fallback), so one chart serves the light and
the dark page. Text stays text. Blue is always the pruned model and orange the original: any colour vision
tells the two apart, and the labels say it too.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from deploy.metric import metric_of
from deploy.tables import latency_rows
from deploy.values import (
    entries,
    milliseconds,
    number,
    rows,
    section,
    text,
    thinned,
    times,
    visible,
    whole_number,
)

INK, MUTED, LINE, SOFT = "#1b2431", "#5c6776", "#dde3ea", "#e8edf3"
BLUE, ORANGE = "#1f6fb3", "#c4560c"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", SOFT: "soft", BLUE: "blue", ORANGE: "orange"}

WIDTH = 10.0  # inches; the page shows it about 1000 pixels wide
MAX_BARS = 160  # with more layers the chart shows those that cost most
COLUMN_BARS = 44  # more bars than this are set in two columns
MAX_POINTS = 160
BINS = 72
NAMED_LINES = 6  # classes of units that the drawing of sensitivities names
PANELS = 24  # latency panels in the chart; the table has them all
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
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.7,
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


def draw(results: Mapping[str, Any]) -> dict[str, str]:
    """The SVG charts by name; one without data is an empty text."""
    bars = layer_bars(results)
    panels, ratios = _latency_panels(results), _ratios(results)
    wanted = section(section(section(results, "provenance"), "config"), "gates")
    drawn = {"pruning": _pruning_panels(results)}
    drawn |= {stage: _epoch_panels(results, stage) for stage in ("train", "finetune")}
    return {
        "layers": layers(bars) if bars else "",
        "latency": latency(panels[:PANELS]) if panels else "",
        "speedup": speedups(ratios[:PANELS], number(wanted.get("speedup"))) if ratios else "",
    } | {name: progress(found, name) if found else "" for name, found in drawn.items()}


def layer_bars(results: Mapping[str, Any]) -> list[Bar]:
    """One bar per layer in network order; of very many layers, those that cost most."""
    found: list[tuple[float, int, Bar]] = []
    for row in rows(results, "layers"):
        before, after = whole_number(row.get("before")), whole_number(row.get("after"))
        if before is not None and after is not None and 0 <= after <= before and before > 0:
            bar = Bar(text(row.get("name")), before, after, bool(row.get("pinned")))
            found.append((number(row.get("macs_before")) or 0.0, len(found), bar))
    kept = sorted(found, key=lambda one: (-one[0], one[1]))[:MAX_BARS]
    return [bar for _, _, bar in sorted(kept, key=lambda one: one[1])]


def layers(bars: Sequence[Bar]) -> str:
    """Horizontal bars: the share of its channels that each layer keeps, "kept / before" beside it."""
    with _style():
        columns = 2 if len(bars) > COLUMN_BARS else 1
        lines = -(-len(bars) // columns)
        step = 0.17 if columns == 2 else 0.205
        figure = _figure(0.55 + step * lines)
        for column, axes in enumerate(_grid(figure, 1, columns)):
            _bar_column(axes, bars[column * lines : (column + 1) * lines], lines, 34 if columns == 2 else 60)
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
        lines = -(-len(panels) // columns)
        figure = _figure(0.2 + 1.75 * lines)
        grid = _grid(figure, lines, columns)
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


def _drawable(value: object) -> float | None:
    """A finite number of a size that leaves the rest of its chart visible; the tables have the others."""
    found = number(value)
    return found if found is not None and abs(found) < 1e12 else None


def _line(found: Sequence[Mapping[str, Any]], x: str, y: str, label: str, second: bool = False) -> Series:
    """A series of the points that have both coordinates."""
    pairs = [(_drawable(row.get(x)), _drawable(row.get(y))) for row in found]
    known = tuple((a, b) for a, b in pairs if a is not None and b is not None)
    return Series(label, known, second)


def _pruning_panels(results: Mapping[str, Any]) -> list[Panel]:
    found = rows(section(results, "pruning"), "history")
    latency = _line(found, "step", "latency_ratio", "latency, predicted", True)
    second = latency if latency.points else _line(found, "step", "params_ratio", "parameters", True)
    kept, is_share = (_line(found, "step", "macs_ratio", "MACs"), second), metric_of(results).is_share
    measure = "Accuracy" if is_share else "Metric"
    panels = [
        Panel("Share kept", "pruning step", kept, percent=True),
        Panel("Loss", "pruning step", (_line(found, "step", "loss", "loss"),)),
        Panel(measure, "pruning step", (_line(found, "step", "accuracy", "accuracy"),), percent=is_share),
    ]
    return [panel for panel in panels if any(one.points for one in panel.series)]


def _epoch_panels(results: Mapping[str, Any], stage: str) -> list[Panel]:
    found, best = rows(section(results, stage), "history"), number(section(results, stage).get("best_epoch"))
    loss = (
        _line(found, "epoch", "loss", "training"),
        _line(found, "epoch", "validation_loss", "validation", True),
    )
    value = (_line(found, "epoch", "validation", "validation"),)
    rate, is_share = (_line(found, "epoch", "lr", "learning rate"),), metric_of(results).is_share
    measure = "accuracy" if is_share else "metric"
    panels = [
        Panel("Loss", "epoch", loss, mark=best),
        Panel(f"Validation {measure}", "epoch", value, percent=is_share, mark=best),
        Panel("Learning rate", "epoch", rate, mark=best),
    ]
    return [panel for panel in panels if any(one.points for one in panel.series)]


def _latency_panels(results: Mapping[str, Any]) -> list[Samples]:
    groups: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {}
    for row in latency_rows(results):
        samples = tuple(x for x in map(_drawable, entries(row, "samples_ms")) if x is not None)
        if samples and row.get("model") in ("original", "dense"):
            place = groups.setdefault((text(row.get("runner")), text(row.get("batch"))), {})
            place[str(row["model"])] = samples
    return [
        Samples(f"{runner}, batch {batch}", found.get("original", ()), found.get("dense", ()))
        for (runner, batch), found in groups.items()
    ]


def _ratios(results: Mapping[str, Any]) -> list[Ratio]:
    found = []
    for row in rows(results, "speedup"):
        ratio, low, high = (_drawable(row.get(key)) for key in ("ratio", "low", "high"))
        if ratio is not None and low is not None and high is not None:
            where = f"{text(row.get('runner'))}, batch {text(row.get('batch'))}"
            found.append(Ratio(where, ratio, low, high))
    return found


def _bar_column(axes: Any, bars: Sequence[Bar], lines: int, longest: int) -> None:
    axes.barh(range(len(bars)), [1.0] * len(bars), height=0.66, color=SOFT)
    colours = [MUTED if bar.after >= bar.before else BLUE for bar in bars]
    axes.barh(range(len(bars)), [bar.after / bar.before for bar in bars], height=0.66, color=colours)
    for row, bar in enumerate(bars):
        label = f"{bar.after:,} / {bar.before:,}" + ("  pinned" if bar.pinned else "")
        axes.text(1.015, row, label, va="center", color=MUTED, fontsize=8)
    axes.set_xlim(0, 1.24)
    axes.set_ylim(lines - 0.4, -0.6)
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
    if panel.percent:  # nothing is kept, and no accuracy lies, above 100 %
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))


def _latency_panel(axes: Any, panel: Samples) -> None:
    import numpy

    axes.set_title(_trim(panel.title, 60))
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
    axes.margins(x=0.04)
    axes.set_ylim(0, 1.25)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_xlabel("ms per call")


def _note(axes: Any, x: float, y: float, label: str, right: bool) -> None:
    """A label a few points to the right or to the left of a position."""
    offset, side = (6, "left") if right else (-6, "right")
    axes.annotate(label, (x, y), (offset, 0), textcoords="offset points", ha=side, va="center", fontsize=8.5)


def _trim(name: str, longest: int) -> str:
    """A name made printable; one that is too long loses its first parts, the last ones tell layers apart."""
    name = visible(name)
    if len(name) <= longest:
        return name
    tail = name[-(longest - 1) :]
    cut = tail.find(".")
    return "…" + (tail[cut + 1 :] if 0 <= cut < longest // 2 else tail)


def draw_study(found: Mapping[str, Any], path: Path) -> None:
    """Scores against the truth, one panel per criterion, on logarithmic axes; the ending says the format."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    names = list(found["scores"])
    truth = found["truths"]["minibatch"]
    agreement = {row["criterion"]: row["spearman"] for row in found["rows"] if row["truth"] == "minibatch"}
    with _style():
        figure = _figure(2.3 * -(-len(names) // 4))
        panels = _grid(figure, -(-len(names) // 4), 4)
        for panel, name in zip(panels, names, strict=False):
            pairs = [(x, y) for x, y in zip(found["scores"][name], truth, strict=True) if x > 0 and y > 0]
            panel.loglog(*zip(*pairs, strict=True) if pairs else ([], []), ".", markersize=2, color=BLUE)
            told = agreement[name]
            panel.set_title(f"{name}\n{'-' if told is None else f'{told:.2f}'}", fontsize=8)
            panel.tick_params(labelsize=6)
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_locator(LogLocator(numticks=4))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
                axis.set_minor_locator(NullLocator())
                axis.set_minor_formatter(NullFormatter())
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        figure.supxlabel("score", fontsize=8)
        figure.supylabel("squared change of the loss", fontsize=8)
        figure.set_facecolor("white")
        figure.savefig(path)


def draw_sensitivity(found: Mapping[str, Any], path: Path) -> None:
    """Loss and measure against the share kept, a line per class of units; the most sensitive are named."""
    from matplotlib import colormaps

    classes = rows(found, "classes")
    colours = colormaps["viridis"].resampled(NAMED_LINES + 1)
    with _style():
        figure = _figure(4.5)
        for panel, key, title in zip(
            _grid(figure, 1, 2), ("loss", "value"), ("loss", text(found.get("metric"))), strict=True
        ):
            for place, one in reversed(list(enumerate(classes))):
                points = [(1.0, found[key]), *((p["share"], p[key]) for p in rows(one, "points"))]
                known = [(x, y) for x, y in points if number(y) is not None]
                named = place < NAMED_LINES
                colour = colours(place) if named else LINE
                more = f" and {len(one['layers']) - 1} more" if len(one["layers"]) > 1 else ""
                label = _trim(one["layers"][0], 40) + more if named else None
                panel.plot(*zip(*known, strict=True) if known else ([], []), ".-", color=colour, label=label)
            panel.set_title(title)
            panel.set_xlabel("share of one layer's channels kept")
            panel.xaxis.set_inverted(True)
        handles, labels = panel.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3, fontsize=7)
        figure.set_facecolor("white")
        figure.savefig(path)


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


def _grid(figure: Any, lines: int, columns: int) -> list[Any]:
    return list(figure.subplots(lines, columns, squeeze=False, subplot_kw={"facecolor": "none"}).ravel())


def _svg(figure: Any, name: str, alt: str) -> str:
    """The figure as an inline SVG: the page's fonts and colours, ids of its own, no date, no style sheet."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Text stays text, so it is the page's font that must have the glyph.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style)[ >].*?</\1>\s*", "", svg, flags=re.S)
    tags = "".join(re.findall(r"<[^>]*>", svg))
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", tags))
    # Only tags are rewritten: what a name says stays as it is.
    svg = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0], name, used), svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg {view[0] if view else ""} role="img" aria-label="{alt}">'
    return re.sub(r">\s+<", "><", head + svg[svg.index(">") + 1 :]) + "\n"


def _tag(tag: str, name: str, used: set[str]) -> str:
    tag = re.sub(r"\s*font-family:[^;\"]*;?", "", tag)
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(url\(|href=")#', rf"\1#{name}-", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var(--{variable},{colour})")
    return tag
