"""Importance against latency as a drawing: the front, what each layer takes of both, and its staircase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.charts import BLUE, INK, MUTED, ORANGE, _figure, _style, _trim
from deploy.values import entries, milliseconds, number, percent, rows, text, thinned

MOST_CLASSES = 10
MOST_STAIRS = 6
COLUMNS = 3
MOST_STEPS = 600
MOST_MARKS = 40
FRONT, STAIRS = 4.3, 2.1  # inches of a line of panels


def draw_front(found: Mapping[str, Any], path: Path) -> None:
    """The front with its uncertainty and the networks that were measured, the classes that save most for
    their importance, and the staircases of those that cost most; the ending says the format."""
    stairs = rows(found, "staircases")[:MOST_STAIRS]
    lines = -(-len(stairs) // COLUMNS)
    heights = [FRONT, STAIRS * lines][: 1 + bool(stairs)]
    where = f"{text(found.get('target'))}, {text(found.get('precision'))}, batch {text(found.get('batch'))}"
    with _style():
        figure = _figure(sum(heights))
        figure.suptitle(
            f"{_trim(text(found.get('model'), ''), 60)} on {where}", x=0.01, ha="left", fontsize=11
        )
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        front, bars = parts[0].subplots(1, 2, width_ratios=(1.3, 1))
        _front(front, found)
        _bars(bars, rows(found, "classes")[:MOST_CLASSES])
        if stairs:
            _staircases(parts[1], stairs, lines)
        figure.set_facecolor("white")
        figure.savefig(path, dpi=150)


def _front(axes: Any, found: Mapping[str, Any]) -> None:
    """Latency grows to the right; what was measured lies on or below the line, being no best choice."""
    points = rows(found, "points")
    ms, kept = ([point[key] for point in points] for key in ("latency_ms", "importance"))
    low, high = ([number(point.get(key)) for point in points] for key in ("low_ms", "high_ms"))
    if None not in low:
        error = percent(number(found.get("model_error")) or 0.0, 1)
        axes.fill_betweenx(kept, low, high, color=BLUE, alpha=0.16, linewidth=0, label=f"model, ± {error}")
    axes.plot(ms, kept, ".-", color=BLUE, markersize=5, label="best choice of widths")
    whole = float(found["original_ms"])
    others = [one for one in rows(found, "measured") if one["ratio"] < 1]
    axes.plot(
        [one["ratio"] * whole for one in others], [one["importance"] for one in others],
        linestyle="none", marker="D", markersize=4.5, markerfacecolor="none", color=ORANGE,
        label="measured, not chosen by importance",
    )  # fmt: skip
    asked = number(found.get("asked_ratio"))
    if asked is not None:
        axes.axvline(asked * whole, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        said = f"budget {milliseconds(asked * whole)}"
        axes.annotate(
            said, (asked * whole, 0.32), (-4, 0), textcoords="offset points",
            ha="right", va="center", rotation=90, fontsize=8.5,
        )  # fmt: skip
    axes.set_title("Importance that is kept")
    axes.set_xlabel(f"ms per call (unpruned: {milliseconds(whole)})")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlim(0, whole * 1.06)
    axes.set_ylim(0, 1.04)
    axes.legend(facecolor="white", edgecolor="none", fontsize=8, labelcolor=INK, loc="lower right")


def _bars(axes: Any, classes: Sequence[Mapping[str, Any]]) -> None:
    """Two bars a class: long blue over short orange costs much and matters little."""
    for line, one in enumerate(classes):
        for offset, key, colour in ((-0.19, "latency_share", BLUE), (0.19, "importance_share", ORANGE)):
            axes.barh(line + offset, one[key], height=0.36, color=colour)
    shown = [f"{_name(one, 26)}  {one['units']} → {one['narrowest']}" for one in classes]
    axes.set_yticks(range(len(classes)), shown, color=INK, fontsize=8)
    axes.set_ylim(max(len(classes), 3) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.set_title("One class of channels at its narrowest")
    labels = (("latency saved", BLUE), ("importance lost", ORANGE))
    handles = [axes.barh([0], [0], color=colour, label=label) for label, colour in labels]
    # Below the axes, as bars may be as long as these are.
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.06), "ncols": 2}
    axes.legend(handles=handles, frameon=False, fontsize=8, labelcolor=INK, **below)


def _staircases(part: Any, stairs: Sequence[Mapping[str, Any]], lines: int) -> None:
    grid = part.subplots(lines, COLUMNS, squeeze=False)
    for axes, one in zip(grid.ravel(), stairs, strict=False):
        _staircase(axes, one)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms per call")
    for axes in grid.ravel()[len(stairs) :]:
        axes.set_axis_off()
    said = "The network, by the channels of one class (dots: whole blocks of the target)"
    part.suptitle(said, x=0.01, ha="left", fontsize=9.5)


def _staircase(axes: Any, one: Mapping[str, Any]) -> None:
    channels, ms = entries(one, "channels"), entries(one, "ms")
    shown = thinned(len(channels), MOST_STEPS)
    axes.plot(
        [channels[i] for i in shown],
        [ms[i] for i in shown],
        color=MUTED,
        linewidth=1.3,
        drawstyle="steps-pre",
    )
    by = dict(zip(channels, ms, strict=True))
    good = [width for width in entries(one, "good") if width in by]
    good = [good[i] for i in thinned(len(good), MOST_MARKS)]
    axes.plot(good, [by[width] for width in good], "o", color=BLUE, markersize=4)
    axes.set_title(_name(one, 34), fontsize=8.5)
    axes.set_xlabel("channels")
    axes.tick_params(labelsize=7.5)
    axes.margins(x=0.03, y=0.14)


def _name(one: Mapping[str, Any], longest: int) -> str:
    layers = [str(name) for name in entries(one, "layers")]
    more = f" + {len(layers) - 1}" if len(layers) > 1 else ""
    return _trim(layers[0] if layers else "", longest) + more
