"""What can be had before anything is trained: importance kept against latency, and which layers cost it.

The importance that a network keeps stands for its accuracy, as it does while pruning. What a network takes is
what the latency model of its target says (`latency.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.budget import importance_at, narrow
from compress.channelmap import ChannelMap
from compress.cost import CostModel, class_counts
from compress.inspection import written_by
from compress.latency import LatencyModel
from compress.select import Space, Target, ascending

if TYPE_CHECKING:
    from deploy.latency_table import Entry

PACE = 0.02
"""How far apart the points of a front are, as a share of the unpruned latency."""
STAIRCASES = 6


@dataclass(frozen=True)
class Point:
    """One network. latency_ms: predicted; low_ms and high_ms: a model's error to either side, the same where
    it is known; the ratios are of the unpruned network's; importance: the share of all that is kept."""

    latency_ms: float
    low_ms: float | None
    high_ms: float | None
    ratio: float
    macs_ratio: float
    params_ratio: float
    units: int
    importance: float


@dataclass(frozen=True)
class ClassCost:
    """What one class of units costs and what it is worth. layers: those that write it.

    layers_ms: of all layers that it is an input or an output of; saved_ms: what the network would take less
    with this class alone at `narrowest`; latency_share: that over the network's; importance_share: what is
    given up for it, over all there is; ratio: of these two, None where nothing can be narrowed.
    """

    layers: tuple[str, ...]
    units: int
    narrowest: int
    layers_ms: float
    saved_ms: float
    latency_share: float
    importance_share: float
    ratio: float | None


@dataclass(frozen=True)
class Staircase:
    """The network's latency against the channels of one class, one by one, with the others whole. good: the
    channels that are whole blocks of the target."""

    layers: tuple[str, ...]
    channels: tuple[int, ...]
    ms: tuple[float, ...]
    good: tuple[int, ...]


@dataclass(frozen=True)
class Outlook:
    """One network on one target before training. cost knows the latency; scores: (units,), higher is more
    important; levels: the widths that each class may end at."""

    cmap: ChannelMap
    cost: CostModel
    latency: LatencyModel
    levels: tuple[np.ndarray, ...]
    scores: np.ndarray

    @property
    def narrowest(self) -> np.ndarray:
        """Counts of the narrowest network there may be, (classes,)."""
        return np.array([own[0] for own in self.levels])

    @cached_property
    def kept(self) -> list[np.ndarray]:
        """By class, the share of all importance that its n most important units have, for n = 0, 1, ..."""
        total = max(float(np.maximum(self.scores, 0).sum()), 1e-300)
        everything = np.ones(self.cmap.units, dtype=bool)
        order = ascending(self.scores, everything, self.cmap)
        return [importance_at(self.scores[own], np.arange(len(own) + 1)) / total for own in order]

    def importance(self, counts: np.ndarray) -> float:
        """The share of all importance that the best network with these counts keeps."""
        return float(sum(own[n] for own, n in zip(self.kept, counts, strict=True)))

    def front(self, pace: float = PACE) -> list[Point]:
        """From the unpruned network to the narrowest in steps of `pace`, each the best choice of widths."""
        keep = np.ones(self.cmap.units, dtype=bool)
        found = [self._point(self.cost.full)]
        least = self.cost.ratio("latency", self.narrowest)
        if least >= 1:
            return found
        where = Space(self.cmap, self.cost, self.levels, Target("latency", least))
        while True:
            chosen = narrow(self.scores, keep, where, pace)
            keep = chosen.keep
            if chosen.removed:
                found.append(self._point(class_counts(self.cmap, keep)))
            if chosen.reached or not chosen.removed:
                return found

    def _point(self, counts: np.ndarray) -> Point:
        ms, error = self.latency.ms(counts), self.latency.known_error
        if np.array_equal(counts, self.cost.full):
            error = 0.0  # measured, and what all others are held against
        low, high = (None, None) if error is None else (ms * max(1 - error, 0), ms * (1 + error))
        latency, macs, params = (self.cost.ratio(kind, counts) for kind in ("latency", "macs", "params"))
        return Point(ms, low, high, latency, macs, params, int(counts.sum()), self.importance(counts))

    def classes(self) -> list[ClassCost]:
        """Every class of units, those first that save most latency for their importance."""
        names, kept, whole = written_by(self.cmap), self.kept, self.latency.ms(self.cost.full)
        by_layer, touched = self.latency.by_layer(self.cost.full), self._touched()
        found = []
        for number, levels in enumerate(self.levels):
            saved = whole - self.latency.ms(self._with(number, int(levels[0])))
            lost = float(kept[number][-1] - kept[number][levels[0]])
            found.append(
                ClassCost(
                    layers=tuple(names[number]),
                    units=int(levels[-1]),
                    narrowest=int(levels[0]),
                    layers_ms=sum(by_layer[name] for name in touched[number]),
                    saved_ms=saved,
                    latency_share=saved / whole,
                    importance_share=lost,
                    ratio=saved / whole / lost if lost > 0 else None,
                )
            )
        return sorted(found, key=lambda one: (one.ratio is None, -(one.ratio or 0.0)))

    def _touched(self) -> list[set[str]]:
        """By class, the layers whose latency depends on its width."""
        depends = (self.latency.products.weight != 0).any(axis=1)
        layers = np.array(self.latency.layers)
        return [set(layers[depends[:, number]].tolist()) for number in range(len(self.levels))]

    def _with(self, number: int, count: int) -> np.ndarray:
        counts = self.cost.full.copy()
        counts[number] = count
        return counts

    def staircases(self, good: Sequence[np.ndarray], most: int = STAIRCASES) -> list[Staircase]:
        """Of the classes that would save most. good: by class, the widths that the target runs well."""
        names, whole = written_by(self.cmap), self.latency.ms(self.cost.full)
        least = [self.latency.ms(self._with(n, int(own[0]))) for n, own in enumerate(self.levels)]
        steepest = [n for n in np.argsort(least, kind="stable").tolist() if least[n] < whole][:most]
        found = []
        for number in steepest:
            channels = range(int(self.levels[number][0]), int(self.levels[number][-1]) + 1)
            ms = tuple(self.latency.ms(self._with(number, count)) for count in channels)
            marked = tuple(int(width) for width in good[number])
            found.append(Staircase(tuple(names[number]), tuple(channels), ms, marked))
        return found

    def as_dict(self, good: Sequence[np.ndarray], measured: Sequence[Entry]) -> dict[str, Any]:
        """All of it, ready for JSON. measured: networks of the fit, with what they keep at best."""
        latency = self.latency
        counts = [np.array(entry.counts) for entry in measured]
        return {
            "original_ms": latency.original_ms,
            "model_error": latency.known_error,
            "networks": latency.networks,
            "points": [asdict(point) for point in self.front()],
            "measured": [
                {
                    "ratio": entry.ratio,
                    "predicted_ratio": latency.ms(own) / latency.original_ms,
                    "importance": self.importance(own),
                }
                for entry, own in zip(measured, counts, strict=True)
            ],
            "classes": [asdict(one) for one in self.classes()],
            "staircases": [asdict(one) for one in self.staircases(good)],
        }
