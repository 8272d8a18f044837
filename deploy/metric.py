"""How a task's measure is told: a share of right answers in percent and points, any other as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deploy.values import MINUS, metric_word, percent, points, section


@dataclass(frozen=True)
class Metric:
    """word: in a sentence; is_share: of right answers, so that it lies in 0..1 and has an interval."""

    word: str
    is_share: bool

    @property
    def form(self) -> Callable[[float], str]:
        """How a value is written."""
        return percent if self.is_share else _plain

    def change(self, value: float, signed: bool = False) -> str:
        """A difference of two values: 0.31 points, or +0.42."""
        if self.is_share:
            return points(value, signed)
        return ("+" if signed and value > 0 else "") + _plain(value)

    @property
    def title(self) -> str:
        """At the start of a line."""
        return self.word[:1].upper() + self.word[1:]


def metric_of(results: Mapping[str, Any]) -> Metric:
    """The measure that results.json was made with; what does not say is a share."""
    found = section(results, "accuracy")
    return Metric(metric_word(found.get("metric")), found.get("share") is not False)


def _plain(value: float) -> str:
    return f"{value:.5g}".replace("-", MINUS)
