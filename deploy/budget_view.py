"""Budgets, for people: the latency or energy that was asked for, predicted and measured, and the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deploy.tables import Table
from deploy.values import count, measured, millijoules, milliseconds, number, percent, rows, section, text


@dataclass(frozen=True)
class _Led:
    """What led the run: its section of the budget, what the unpruned network takes of it, in which unit."""

    facts: Mapping[str, Any]
    whole: float | None
    shown: Callable[[float], str]
    is_energy: bool = False

    @classmethod
    def of(cls, budget: Mapping[str, Any]) -> _Led:
        energy, latency = section(budget, "energy"), section(budget, "latency")
        if energy:
            return cls(energy, number(energy.get("original_mj")), millijoules, is_energy=True)
        return cls(latency, number(latency.get("original_ms")), milliseconds)

    def part(self, ratio: object) -> str:
        """So much of it; a share where the whole is not known."""
        whole = self.whole
        return measured(ratio, _share if whole is None else lambda x: self.shown(x * whole))


def table(budget: Mapping[str, Any]) -> Table:
    """Every network that was measured on the way; the last is the one that was taken, if it was measured.

    Predicted is by the model as it was fitted, without what the networks before have corrected.
    """
    led = _Led.of(budget)
    looks = rows(led.facts, "looks")
    last = len(looks) if number(led.facts.get("measured_ratio")) is not None else 0
    body = []
    for which, look in enumerate(looks, start=1):
        asked, found = number(look.get("asked")), number(look.get("measured"))
        shown = (led.part(look.get(key)) for key in ("asked", "predicted", "measured"))
        off = percent(found / asked - 1, 1) if asked and found is not None else ""
        taken = "taken" if which == last else "on the way" if look.get("on_the_way", True) else "tried"
        body.append((count(which), *shown, measured(found, _share), off, taken))
    headers = ("Network", "Asked", "Predicted", "Measured", "Of the original", "Off by", "")
    return Table(headers, "rrrrrrt", tuple(body))


def sentences(budget: Mapping[str, Any]) -> list[str]:
    """What was asked for where, whether it was met, and how far the model was off; none without a budget."""
    led = _Led.of(budget)
    if not led.facts:
        return []
    asked, ratio = led.part(led.facts.get("asked_ratio")), measured(led.facts.get("asked_ratio"), _share)
    whole = measured(led.whole, led.shown) + (" a call" if led.is_energy else "")
    said = f"Asked for: {asked}, {ratio} of the original's {whole}, on {place(led.facts)}"
    if led.is_energy:
        said += f", by {text(led.facts.get('counter'))}"
    return [f"{said}.", _outcome(led), _model(led)]


def memory_said(budget: Mapping[str, Any]) -> list[str]:
    """What was asked of the activations that lie in memory at once, and what came of it; none without."""
    memory, asked = section(budget, "memory"), section(budget, "asked").get("memory_ratio")
    before, after = number(memory.get("before")), number(memory.get("after"))
    if not before or after is None:
        return []
    pair = f"{before / 1024:,.1f} → {after / 1024:,.1f} KiB per example"
    said = f"Peak activation memory: {pair} ({percent(after / before, 1)})"
    return [f"{said}, asked for {measured(asked, _share)}; it is at {text(memory.get('op_after'))}."]


def place(latency: Mapping[str, Any]) -> str:
    """Target and setting of a measurement."""
    threads = latency.get("threads")
    how = (
        f"{text(latency.get('runner'))} {text(latency.get('version'), '')}".strip(),
        text(latency.get("precision")),
        f"batch {text(latency.get('batch'))}",
        f"{text(threads)} thread{'' if threads == 1 else 's'}",
        text(latency.get("hardware")),
    )
    return f"{text(latency.get('target'))} ({', '.join(how)})"


def _outcome(led: _Led) -> str:
    """How near the network that was taken comes to what was asked."""
    asked, found = number(led.facts.get("asked_ratio")), number(led.facts.get("measured_ratio"))
    if not asked or found is None:
        return "The network that pruning ends with was not measured there."
    off, within = found / asked - 1, number(led.facts.get("within")) or 0.0
    took = f"The network that was taken takes {led.part(found)} there"
    if abs(off) <= within:
        return f"{took}, within {percent(within, 0)} of it."
    if off < 0:
        return f"{took}, {percent(-off, 1)} less than asked: the widths allowed have nothing nearer."
    return f"{took}, {percent(off, 1)} more than asked."


def _model(led: _Led) -> str:
    fitted = f"The latency model is fitted to {count(led.facts.get('networks'))} measured networks"
    fitted += ", and energy is taken to go with it" if led.is_energy else ""
    error = number(led.facts.get("model_error"))
    if error is None:
        return f"{fitted}, too few to say how far it is off."
    return f"{fitted}; at one that is left out it is {percent(error, 1)} off (root mean square)."


def _share(value: float) -> str:
    return percent(value, 1)
