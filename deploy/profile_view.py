"""The per-layer profile for people: a table of every layer, and a chart of those that cost most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy.charts import BLUE, INK, MUTED, ORANGE, _figure, _grid, _style, _svg, _trim
from deploy.tables import Table
from deploy.values import MINUS, NBSP, measured, milliseconds, number, percent, rows, section, text, times

OUTSIDE = "outside the layers"
MOST_BARS = 30


@dataclass(frozen=True)
class Pair:
    """One layer's bars: milliseconds in both models (None: not there) and the note beside them."""

    name: str
    before_ms: float | None
    after_ms: float | None
    note: str


def table(profile: Mapping[str, Any]) -> Table:
    """Every layer in the order it runs, then what a run takes outside of them, then the whole."""
    body = [_line(row) for row in rows(profile, "rows")]
    for label, key in ((OUTSIDE, "outside_ms"), ("the whole run", "run_ms")):
        before, after = (number(section(section(profile, "totals"), m).get(key)) for m in ("before", "after"))
        ratio = times(before / after) if before and after and after > 0 and before > 0 else ""
        shown = (measured(before, milliseconds), measured(after, milliseconds), _share(profile, before))
        body.append((label, "", *shown, ratio, "", ""))
    headers = (
        "Layer",
        "Kernels",
        "Before",
        "After",
        "Share before",
        "Speed-up",
        "Work kept",
        "Why not faster",
    )
    return Table(headers, "ccrrrrrt", tuple(body))


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    kernels = text(row.get("op_after"), text(row.get("op_before"), ""))
    spent = (_time(row.get("before_ms")), _time(row.get("after_ms")))
    ratios = (measured(row.get("speedup"), times), measured(row.get("macs_ratio"), lambda x: percent(x, 1)))
    share = measured(row.get("share"), lambda x: percent(x, 1))
    return (text(row.get("layer")), kernels, *spent, share, *ratios, text(row.get("why"), ""))


def _time(value: object) -> str:
    return measured(value, milliseconds) if number(value) is not None else "none"


def _share(profile: Mapping[str, Any], spent: float | None) -> str:
    whole = number(section(section(profile, "totals"), "before").get("run_ms"))
    return percent(spent / whole, 1) if whole and spent is not None else ""


def sentences(profile: Mapping[str, Any]) -> list[str]:
    """How the layers add up, beside the latency without a profiler, and where the time that stayed is."""
    said = []
    for name, model in (("before", "original"), ("after", "pruned")):
        found = section(section(profile, "totals"), name)
        parts = [measured(found.get(key), milliseconds) for key in ("layers_ms", "outside_ms", "run_ms")]
        line = f"{model.capitalize()}: {parts[0]} in layers and {parts[1]} {OUTSIDE} make {parts[2]} a run"
        ratio = number(found.get("ratio"))
        if ratio is not None:
            latency = measured(found.get("measured_ms"), milliseconds)
            off = f"{100 * (ratio - 1):+.0f}".replace("-", MINUS) + NBSP + "%"
            fits = "which fits" if found.get("agrees") else "so trust the shares more than the milliseconds"
            line += f", against {latency} without a profiler ({off}), {fits}"
        said.append(line + ".")
    held = sorted(section(profile, "reasons").items(), key=lambda pair: -(number(pair[1]) or 0.0))
    kept = ", ".join(f"{reason} {measured(ms, milliseconds)}" for reason, ms in held)
    return [*said, *([f"Layers that are not as fast as their MACs promise: {kept}."] if kept else [])]


def chart(profile: Mapping[str, Any]) -> str:
    """Both models' time in each of the layers that cost most, and outside them; SVG, "" without rows."""
    pairs = _pairs(profile)
    if not pairs:
        return ""
    with _style():
        figure = _figure(0.75 + 0.27 * len(pairs))
        (axes,) = _grid(figure, 1, 1)
        for row, pair in enumerate(pairs):
            for place, spent, colour in ((-0.19, pair.before_ms, ORANGE), (0.19, pair.after_ms, BLUE)):
                axes.barh(row + place, spent or 0.0, height=0.34, color=colour)
        widest = max(max(pair.before_ms or 0.0, pair.after_ms or 0.0) for pair in pairs) or 1.0
        for row, pair in enumerate(pairs):
            end = max(pair.before_ms or 0.0, pair.after_ms or 0.0)
            axes.text(end + 0.012 * widest, row, pair.note, va="center", color=MUTED, fontsize=8)
        axes.set_xlim(0, 1.4 * widest)
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.set_yticks(range(len(pairs)), [_trim(pair.name, 44) for pair in pairs], color=INK, fontsize=8)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("ms per run: original (orange, above) and pruned (blue, below)")
        return _svg(figure, "profile", "Time in each layer of the original and the pruned model")


def _pairs(profile: Mapping[str, Any]) -> list[Pair]:
    found = [_pair(row) for row in rows(profile, "rows")]
    costly = sorted(found, key=lambda pair: -max(pair.before_ms or 0.0, pair.after_ms or 0.0))[:MOST_BARS]
    kept = [pair for pair in found if pair in costly]
    spent = [
        number(section(section(profile, "totals"), name).get("outside_ms")) for name in ("before", "after")
    ]
    return [*kept, Pair(OUTSIDE, spent[0], spent[1], "")] if kept else []


def _pair(row: Mapping[str, Any]) -> Pair:
    speedup, reason = number(row.get("speedup")), text(row.get("reason"), "")
    note = ", ".join(filter(None, ("" if speedup is None else times(speedup), reason)))
    return Pair(text(row.get("layer")), number(row.get("before_ms")), number(row.get("after_ms")), note)
