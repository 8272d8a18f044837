"""MACs, parameters and memory of any choice of channels, from label counts: no re-trace, no copy.

One multiply-add is one MAC. Every cost is a sum of products of kept counts, and units of one class
always appear together on the same axes, so a cost is a function of the kept count per class alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.channelmap import ChannelMap
from compress.memory import Points

CELLS = 1 << 20  # widths that are looked at together


@dataclass(frozen=True)
class Products:
    """(sum_t factor[t] * prod_j w(base[t, j] + weight[t, j] . n)) ** power over class counts n.

    factor (terms,), base (terms, j), weight (terms, j, classes). w rounds up to whole blocks of channels.
    """

    factor: np.ndarray
    base: np.ndarray
    weight: np.ndarray
    block: int = 1
    power: float = 1.0

    def terms(self, counts: np.ndarray) -> np.ndarray:
        """Each term of the sum at class counts (classes,); shape (terms,)."""
        value: np.ndarray = self.factor * self._blocks(self.base + self.weight @ counts).prod(axis=1)
        return value

    def narrowed(self, counts: np.ndarray, by: np.ndarray) -> np.ndarray:
        """The total after narrowing one class at a time by `by` (..., classes); shape (..., classes)."""
        now, rows = self.base + self.weight @ counts, by.reshape(-1, by.shape[-1])
        found = np.empty(rows.shape)
        some = max(1, CELLS // max(self.weight.size, 1))
        for start in range(0, len(rows), some):
            widths = now[..., None] - self.weight * rows[start : start + some, None, None]
            found[start : start + some] = self.factor @ self._blocks(widths).prod(axis=2)
        value: np.ndarray = found.reshape(by.shape) ** self.power
        return value

    def _blocks(self, widths: np.ndarray) -> np.ndarray:
        return widths if self.block == 1 else in_blocks(widths, self.block)

    def total(self, counts: np.ndarray) -> float:
        """The sum, to its power, at class counts (classes,)."""
        return float(self.terms(counts).sum() ** self.power)


def in_blocks(widths: np.ndarray, block: int) -> np.ndarray:
    """Channels as a target computes them: rounded up to whole blocks, or in the first to a power of two."""
    whole = np.ceil(np.round(widths / block, 9)) * block
    part = np.exp2(np.ceil(np.round(np.log2(np.maximum(widths, 1)), 9)))
    return np.where(widths > block / 2, whole, np.where(widths > 0, part, 0.0))


@dataclass(frozen=True)
class Resource:
    """A cost as a share of that of the whole network."""

    cost: Products | Points
    whole: float

    def ratio(self, counts: np.ndarray) -> float:
        """The share that is left at class counts (classes,)."""
        return self.cost.total(counts) / self.whole

    def ratios(self, counts: np.ndarray, by: np.ndarray) -> np.ndarray:
        """`ratio` after narrowing one class at a time by `by` (..., classes); shape (..., classes)."""
        return self.cost.narrowed(counts, by) / self.whole


@dataclass(frozen=True)
class CostModel:
    """Cost of kept counts per class. full: units per class in the unpruned model, (classes,). latency: in
    milliseconds on one target, None where it was not measured; latency_ms: of the unpruned model. What share
    of the energy is left is taken to be that of the latency. memory: of activations, None where no budget
    asks for it."""

    macs: Products
    params: Products
    full: np.ndarray
    latency: Products | None = None
    latency_ms: float = 1.0
    memory: Points | None = None

    def ratio(self, kind: str, counts: np.ndarray) -> float:
        """Share that is left of `macs`, `params`, `units`, `latency`, `energy` or (peak) `memory`."""
        return self._of(kind).ratio(counts)

    def ratios(self, kind: str, counts: np.ndarray, by: np.ndarray) -> np.ndarray:
        """`ratio` after narrowing one class at a time by `by`; shape (classes,)."""
        return self._of(kind).ratios(counts, by)

    def resources(self, kind: str, goal: float, low: np.ndarray, high: np.ndarray) -> list[Resource]:
        """What has to be at most `goal`, each, for `ratio` to be, at counts between low and high (classes,).

        Memory is one resource for each op that may be the peak, all else is one.
        """
        share = self._of(kind)
        if not isinstance(share.cost, Points):
            return [share]
        some = share.cost.highest(low, high, goal * share.whole)
        one = np.ones(1)
        return [
            Resource(Products(one, base.reshape(1, 1), weight.reshape(1, 1, -1)), share.whole)
            for base, weight in zip(some.base, some.weight, strict=True)
        ]

    def _of(self, kind: str) -> Resource:
        if kind == "units":
            each = Products(np.ones(1), np.zeros((1, 1)), np.ones((1, 1, len(self.full))))
            return Resource(each, max(float(self.full.sum()), 1.0))
        if kind in ("latency", "energy"):
            assert self.latency is not None
            return Resource(self.latency, self.latency_ms)
        cost = {"macs": self.macs, "params": self.params, "memory": self.memory}[kind]
        assert cost is not None
        return Resource(cost, max(cost.total(self.full), 1.0))


@dataclass(frozen=True)
class Layer:
    """One contraction before and after: output channels and MACs per example."""

    name: str
    kind: str
    before: int
    after: int
    macs_before: int
    macs_after: int
    pinned: bool


def class_counts(cmap: ChannelMap, keep: np.ndarray) -> np.ndarray:
    """Kept units per class; keep is bool (units,)."""
    classes = int(cmap.classes.max(initial=-1)) + 1
    return np.bincount(cmap.classes[keep], minlength=classes)


def cost_model(cmap: ChannelMap) -> CostModel:
    """The cost of a channel map as a function of kept counts per class."""
    full = class_counts(cmap, np.ones(cmap.units, dtype=bool))
    macs = [(t.factor, [cmap.unit_of_label[c] for c in t.counts]) for t in cmap.terms]
    params = []
    for name in cmap.parameters:
        shape = cmap.shapes[name]
        cut = [cmap.axes[name, d] for d in range(len(shape)) if (name, d) in cmap.axes]
        rest = [s for d, s in enumerate(shape) if (name, d) not in cmap.axes]
        params.append((float(np.prod(rest)), cut))
    return CostModel(_products(macs, cmap, full), _products(params, cmap, full), full)


def _products(
    terms: Sequence[tuple[float, list[np.ndarray]]], cmap: ChannelMap, full: np.ndarray
) -> Products:
    width = max((len(vectors) for _, vectors in terms), default=0)
    base = np.ones((len(terms), width))
    weight = np.zeros((len(terms), width, len(full)))
    for t, (_, vectors) in enumerate(terms):
        for j, units in enumerate(vectors):
            members = units[units >= 0]
            base[t, j] = len(units) - len(members)
            counts = np.bincount(cmap.classes[members], minlength=len(full))
            weight[t, j] = counts / np.maximum(full, 1)
    return Products(np.array([factor for factor, _ in terms]), base, weight)


def layers(cmap: ChannelMap, keep: np.ndarray) -> tuple[Layer, ...]:
    """Every contraction with a weight, in the order of the graph."""
    model = cost_model(cmap)
    before, after = model.macs.terms(model.full), model.macs.terms(class_counts(cmap, keep))
    table = []
    for term, old, new in zip(cmap.terms, before, after, strict=True):
        if not term.weight:
            continue
        rows = cmap.unit_of_label[term.counts[0]]
        kept = int(((rows < 0) | keep[rows]).sum())
        name = term.weight.removesuffix(".weight")
        table.append(Layer(name, term.kind, len(rows), kept, round(old), round(new), bool((rows < 0).all())))
    return tuple(table)
