"""What `compress inspect` measures, for people: the loss without channels, and latency against importance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.show import Data, line, shorter, titled
from deploy.budget_view import place
from deploy.values import count, measured, milliseconds, number, percent, rows, significant, text, thinned

if TYPE_CHECKING:
    from rich.console import Console

MOST_POINTS = 25
MOST_CLASSES = 20
NAMED = 3


def show_sensitivity(console: Console, found: Data) -> None:
    """Every class of units at several widths, the most sensitive first."""
    metric, total = text(found.get("metric"), ""), max(1, int(found["macs"]))

    def value(given: object) -> str:
        return measured(given, (lambda x: percent(x, 1)) if metric == "top1" else significant)

    line(console, text(found.get("model"), ""), "bold")
    whole = f"loss {measured(found.get('loss'), _three)}, {metric} {value(found.get('value'))}"
    line(console, f"{whole} with all channels, on {count(found.get('images'))} validation examples")
    shares = [percent(share, 0) for share in found["shares"]]
    heads = ("layers", "channels", f"MACs saved at {shares[-1]}", f"loss at {shares[0]}", *shares[1:])
    heads += (f"{metric} at {shares[0]}", *shares[1:])
    cells = [
        (
            shorter(one["layers"]),
            count(one.get("units")),
            percent(1 - rows(one, "points")[-1]["macs"] / total, 1),
            *(measured(point.get("loss"), _three) for point in rows(one, "points")),
            *(value(point.get("value")) for point in rows(one, "points")),
        )
        for one in rows(found, "classes")
    ]
    title = f"a share of one layer's channels kept, the least important ({found['criterion']}) left out"
    titled(console, f"{title}; most sensitive first", heads, cells, right=tuple(range(1, len(heads))), fold=0)


def _three(value: float) -> str:
    return significant(value, 3)


def show_front(console: Console, found: Data) -> None:
    """Where it was measured and how well it is known, the classes by what they cost, then the front."""
    line(console, text(found.get("model"), ""), "bold")
    line(console, place(found))
    fitted = f"the model is fitted to {count(found.get('networks'))} measured networks"
    error = number(found.get("model_error"))
    far = f"{measured(error, _share)} off at one that it has not seen" if error else "too few to say how well"
    line(console, f"{measured(found.get('original_ms'), milliseconds)} unpruned; {fitted}, {far}")
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


def _share(value: float) -> str:
    return percent(value, 1)


def _ms(value: float) -> str:
    return significant(value, 3)


def _ratio(value: float) -> str:
    return significant(value, 2)
