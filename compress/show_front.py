"""`compress inspect --target` for people: what can be had at which latency, and which layers cost it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.show import Data, line, shorter, titled
from deploy.values import count, measured, milliseconds, number, percent, rows, significant, text, thinned

if TYPE_CHECKING:
    from rich.console import Console

MOST_POINTS = 25
MOST_CLASSES = 20
NAMED = 3


def show_front(console: Console, found: Data) -> None:
    """Where it was measured and how well it is known, the classes by what they cost, then the front."""
    line(console, text(found.get("model"), ""), "bold")
    where = f"{text(found.get('runner'))}, {text(found.get('precision'))}, batch {text(found.get('batch'))}"
    threads = f"{text(found.get('threads'))} thread{'' if found.get('threads') == 1 else 's'}"
    line(console, f"{text(found.get('target'))}: {where}, {threads}, {text(found.get('hardware'))}")
    networks = f"a model of {count(found.get('networks'))} measured networks"
    error = number(found.get("model_error"))
    said = (
        "too few to say how well" if error is None else f"off by {percent(error, 1)} on one it has not seen"
    )
    line(console, f"{measured(found.get('original_ms'), milliseconds)} unpruned; {networks}, {said}")
    worth = _worth_it(rows(found, "classes"))
    if worth:
        line(console, f"cost much and matter little: {worth}")
    _classes(console, found)
    _front(console, found)


def _worth_it(classes: Sequence[Data]) -> str:
    """The first classes that save more than their share, in words; none where none does."""
    usual = 1 / max(1, len(classes))
    chosen = [
        one for one in classes if (number(one.get("ratio")) or 0.0) > 1 and one["latency_share"] >= usual / 2
    ][:NAMED]
    return "; ".join(
        f"{shorter(one['layers'])} ({percent(one['latency_share'], 1)} of the latency for "
        f"{percent(one['importance_share'], 1)} of the importance)"
        for one in chosen
    )


def _classes(console: Console, found: Data) -> None:
    cells = [
        (
            shorter(one["layers"]),
            f"{count(one.get('units'))} → {count(one.get('narrowest'))}",
            measured(one.get("layers_ms"), _ms),
            measured(one.get("saved_ms"), _ms),
            percent(one["latency_share"], 1),
            percent(one["importance_share"], 1),
            measured(one.get("ratio"), _ratio),
        )
        for one in rows(found, "classes")[:MOST_CLASSES]
    ]
    heads = ("layers", "channels", "ms", "ms saved", "of the latency", "of the importance", "ratio")
    left = len(rows(found, "classes")) - len(cells)
    more = f"; {left} more in --json" if left else ""
    title = f"what one class of channels at its narrowest saves and costs ({found['criterion']}){more}"
    titled(console, title, heads, cells, right=tuple(range(1, len(heads))), fold=0)


def _front(console: Console, found: Data) -> None:
    points, asked = rows(found, "points"), number(found.get("asked_ratio"))
    met = next((n for n, point in enumerate(points) if asked and point["ratio"] <= asked), None)
    shown = sorted({*thinned(len(points), MOST_POINTS), *([] if met is None else [met])})
    cells = [
        (
            measured(points[n].get("latency_ms"), _ms),
            _band(points[n]),
            percent(points[n]["ratio"], 0),
            percent(points[n]["macs_ratio"], 0),
            percent(points[n]["params_ratio"], 0),
            percent(points[n]["importance"], 1),
            f"the budget's {percent(asked or 0.0, 1)}" if n == met else "",
        )
        for n in shown
    ]
    heads = ("ms", "", "latency", "MACs", "parameters", "importance kept", "")
    titled(console, "what can be had, by the model", heads, cells, right=(0, 2, 3, 4, 5))


def _band(point: Data) -> str:
    low, high = number(point.get("low_ms")), number(point.get("high_ms"))
    return "" if low is None or high is None or low == high else f"± {_ms((high - low) / 2)}"


def _ms(value: float) -> str:
    return significant(value, 3)


def _ratio(value: float) -> str:
    return significant(value, 2)
