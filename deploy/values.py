"""Reading numbers out of results safely, and writing them for people: used by the gates and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

NBSP = "\xa0"  # keeps a number and its unit on one line
MINUS = "−"
PREFIXES = ((12, "T"), (9, "G"), (6, "M"), (3, "k"))


def number(value: object) -> float | None:
    """``value`` as a float, or None unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole_number(value: object) -> int | None:
    """``value`` if it is an int that a float can hold (a bool is no number), else None."""
    return value if isinstance(value, int) and number(value) is not None else None


def section(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping under ``name``, empty when it is absent or something else."""
    found = of.get(name)
    return found if isinstance(found, Mapping) else {}


def rows(of: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The list of mappings under ``name``, empty when absent; entries of another type are left out."""
    return [row for row in entries(of, name) if isinstance(row, Mapping)]


def entries(of: Mapping[str, Any], name: str) -> list[Any]:
    """The list under ``name``, empty when it is absent or something else."""
    found = of.get(name)
    return list(found) if isinstance(found, list | tuple) else []


def visible(text: str) -> str:
    """``text`` on one line: control characters, line breaks and bidirectional marks become escapes."""
    return "".join(c if c.isprintable() or c == NBSP else _escaped(c) for c in text)


def points(fraction: float, signed: bool = False) -> str:
    """A fraction in percentage points: 0.0031 -> "0.31 points"."""
    text = f"{100 * fraction:+.2f}" if signed else f"{100 * fraction:.2f}"
    text = "0.00" if float(text) == 0 else text
    return text.replace("-", MINUS) + NBSP + "points"


def percent(fraction: float, places: int = 2) -> str:
    """A fraction as a percentage: 0.9123 -> "91.23 %"."""
    return f"{100 * fraction:.{places}f}".replace("-", MINUS) + NBSP + "%"


def significant(value: float, digits: int = 4) -> str:
    """``value`` with ``digits`` significant digits: 0.01234, 1.234, 1234; an exponent at the extremes."""
    if value == 0:
        return "0"
    if not 1e-9 <= abs(value) < 1e12:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}".replace("-", MINUS)


def milliseconds(value: float) -> str:
    """A latency: "1.234 ms"."""
    return significant(value) + NBSP + "ms"


def millijoules(value: float) -> str:
    """An energy: "1.234 mJ"."""
    return significant(value) + NBSP + "mJ"


def times(ratio: float) -> str:
    """A ratio: "1.97×"."""
    return significant(ratio, 3) + "×"


def shortened(before: float, after: float, unit: str = "") -> str:
    """Two large counts in three digits and one prefix: "1.81 G → 0.905 G", or "44.8 MB → 17.5 MB"."""
    size = max(abs(before), 1.0)
    power, prefix = next((pair for pair in PREFIXES if size >= 10 ** pair[0]), (0, ""))
    suffix = NBSP + prefix + unit if prefix + unit else ""
    first, last = (significant(x / 10**power, 3) if power else f"{x:g}" for x in (before, after))
    return f"{first}{suffix} → {last}{suffix}"


def span(low: float, high: float, form: Callable[[float], str]) -> str:
    """An interval, the unit said once: "0.01 to 0.61 points", "1.94× to 1.99×"."""
    first, last = form(low), form(high)
    head, gap, unit = first.partition(NBSP)
    return f"{head} to {last}" if gap and last.endswith(NBSP + unit) else f"{first} to {last}"


def metric_word(metric: object) -> str:
    """A metric as a reader calls it: "top1" is "top-1 accuracy"."""
    name = text(metric, "the metric")
    return f"top-{name[3:]} accuracy" if name in ("top1", "top5") else name


def scientific(value: float | None) -> str:
    """A small error: "1.2e-06", "0" for none at all; "not finite" where there is no number."""
    if value is None:
        return "not finite"
    return f"{value:.1e}" if value else "0"


def thinned(size: int, most: int) -> list[int]:
    """At most ``most`` positions spread evenly over ``range(size)``, the first and the last among them."""
    if size <= most:
        return list(range(size))
    return sorted({round(i * (size - 1) / (most - 1)) for i in range(most)})


def text(value: object, otherwise: str = "not measured") -> str:
    """Any value as a text; ``otherwise`` for None and for an empty text."""
    return otherwise if value is None or value == "" else str(value)


def count(value: object) -> str:
    """A whole number with thousands separated, else "not measured"."""
    found = whole_number(value)
    return "not measured" if found is None else f"{found:,}".replace("-", MINUS)


def measured(value: object, form: Callable[[float], str] = significant) -> str:
    """A finite number in the given form, else "not measured"."""
    found = number(value)
    return "not measured" if found is None else form(found)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
