"""A latency model of one network on one target: milliseconds as a function of kept units per class.

A layer that turns `a` channels into `b` takes

    t(a, b) = c0 + c1 a + c2 b + c3 a b,    c >= 0

starting it, reading what goes in, writing what comes out, and multiplying. Layers of one kind share their
coefficients, which are fitted to networks of many widths measured on the target (`deploy.latency_table`). A
sum of products of counts is what MACs are too, so a latency goes wherever they go (`cost.py`).

A narrow network may be faster than the sum of its layers: its weights stay in the caches. So the share of the
latency that is left is the share of the sum, to a power that is fitted to the networks measured; it is 1 for
the unpruned one, which is measured beside each of them.

Targets compute in blocks of channels. Widths that are whole blocks are all a model of products has to
describe; the others are rounded up to blocks first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import nnls

from compress.channelmap import ChannelMap
from compress.cost import CostModel, Products, class_counts, in_blocks
from compress.errors import ModelError
from compress.trace import GraphNet

if TYPE_CHECKING:
    from deploy.latency_table import Entry

LEAST_SIZES = 2
"""Widths at which a layer that can be narrowed must have been measured."""
POWERS = (0.25, 4.0)
"""Between these lies the power of the sum of layers; noise on a network that hardly changes says anything."""


@dataclass(frozen=True)
class Widths:
    """(in, out) channels of every layer as functions of counts: base + weight @ counts.

    base (layers, 2), weight (layers, 2, classes); pairs: MACs of one layer per pair of channels and example.
    """

    names: tuple[str, ...]
    base: np.ndarray
    weight: np.ndarray
    pairs: Mapping[str, float]

    def at(self, counts: np.ndarray) -> dict[str, tuple[int, int]]:
        """By layer, at class counts (classes,)."""
        sizes = np.rint(self.base + self.weight @ counts).astype(int)
        return {name: (int(a), int(b)) for name, (a, b) in zip(self.names, sizes, strict=True)}


def widths_of(cmap: ChannelMap) -> Widths:
    """The layers of a network: modules with parameters, each by its largest parameter."""
    largest: dict[str, str] = {}
    for name in sorted(cmap.parameters):
        module = name.rpartition(".")[0]
        if module not in largest or _size(cmap, name) > _size(cmap, largest[module]):
            largest[module] = name
    full = class_counts(cmap, np.ones(cmap.units, dtype=bool))
    base, weight = np.zeros((len(largest), 2)), np.zeros((len(largest), 2, len(full)))
    for row, name in enumerate(largest.values()):
        for dim, size in enumerate(cmap.shapes[name][:2]):
            units = cmap.axes.get((name, dim), np.full(size, -1))
            cut = units[units >= 0]
            side = 1 - dim  # a weight's rows write, its columns read
            base[row, side] = size - len(cut)
            found = np.bincount(cmap.classes[cut], minlength=len(full)) if len(cut) else np.zeros(len(full))
            weight[row, side] = found / np.maximum(full, 1)
    pairs: dict[str, float] = {}
    for term in cmap.terms:
        module = term.weight.rpartition(".")[0]
        pairs[module] = pairs.get(module, 0.0) + term.factor
    return Widths(tuple(largest), base, weight, pairs)


def _size(cmap: ChannelMap, name: str) -> int:
    return int(np.prod(cmap.shapes[name]))


def fingerprint(net: GraphNet, cmap: ChannelMap) -> str:
    """The architecture at its size of input, whatever its weights are."""
    work = [(term.weight, term.factor) for term in cmap.terms]
    facts = [net.code, sorted(cmap.shapes.items()), cmap.classes.tolist(), work]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LatencyModel:
    """products: milliseconds of class counts; layers: of each of its terms, "" for what lies outside all.
    original_ms: measured. error: root mean square of how far a network that was left out of the fit
    is from its measurement, relative; nan with too few networks to tell. networks: that it was fitted to.
    """

    products: Products
    layers: tuple[str, ...]
    original_ms: float
    error: float
    networks: int

    @property
    def known_error(self) -> float | None:
        """The error, None where there were too few networks to tell."""
        return None if np.isnan(self.error) else self.error

    def ms(self, counts: np.ndarray) -> float:
        """Of the network with these counts."""
        return self.products.total(counts)

    def by_layer(self, counts: np.ndarray) -> dict[str, float]:
        """Milliseconds of each layer, adding up to the network's."""
        found: dict[str, float] = {}
        terms = self.products.terms(counts)
        for name, ms in zip(self.layers, terms * (self.ms(counts) / terms.sum()), strict=True):
            found[name] = found.get(name, 0.0) + float(ms)
        return found

    def added_to(self, cost: CostModel) -> CostModel:
        """A cost model that knows latency too."""
        return replace(cost, latency=self.products, latency_ms=self.original_ms)


def fit(
    own: Sequence[Entry],
    others: Sequence[Entry],
    widths: Widths,
    block: int,
    movable: np.ndarray | None = None,
) -> LatencyModel:
    """The model of a network from its own entries, the first of them unpruned, and those of other networks.

    block: channels that the target computes at once. movable: bool (classes,), those that have more than one
    width; None: all. Raises ModelError for a layer that the entries do not describe: nothing is guessed.
    """
    movable = np.ones(widths.weight.shape[-1], dtype=bool) if movable is None else movable
    can_change = {
        name: bool(w[:, movable].any()) for name, w in zip(widths.names, widths.weight, strict=True)
    }
    whole = _fitted(own, others, widths, block, can_change)
    errors = []
    if len(own) > 3:
        for out in range(1, len(own)):
            rest = [entry for number, entry in enumerate(own) if number != out]
            try:
                without = _fitted(rest, others, widths, block, can_change)
            except ModelError:
                continue
            predicted = without.ms(np.array(own[out].counts)) / without.original_ms
            errors.append(predicted / own[out].ratio - 1)
    error = float(np.sqrt(np.mean(np.square(errors)))) if errors else float("nan")
    return replace(whole, error=error)


def _fitted(
    own: Sequence[Entry],
    others: Sequence[Entry],
    widths: Widths,
    block: int,
    can_change: Mapping[str, bool],
) -> LatencyModel:
    first = own[0]
    usual = float(np.median([entry.original_ms for entry in own]))
    samples = _samples([*own, *others], usual, {entry.model for entry in own})
    _refuse_unseen(first, samples, can_change)
    coefficients = {kind: _coefficients(samples[kind], block) for kind in {row.kind for row in first.rows}}
    columns = {name: number for number, name in enumerate(widths.names)}
    factors, bases, weights, layers = [], [], [], []
    for row in first.rows:
        at = columns.get(anchor_of(row.name))
        a, b = _sides(widths, at)
        for c, sides in zip(coefficients[row.kind], ((), (a,), (b,), (a, b)), strict=True):
            if c > 0:
                factors.append(c)
                bases.append([side[0] for side in sides] + [1.0] * (2 - len(sides)))
                weights.append([side[1] for side in sides] + [np.zeros_like(a[1])] * (2 - len(sides)))
                layers.append(row.name)
    outside = float(np.median([e.outside_ms * usual / e.original_ms for e in own]))
    factors.append(outside)
    bases.append([1.0, 1.0])
    weights.append([np.zeros(widths.weight.shape[-1])] * 2)
    layers.append("")
    products = Products(np.array(factors), np.array(bases), np.array(weights), block)
    products = _to_power(products, own, usual)
    return LatencyModel(products, tuple(layers), usual, float("nan"), len(own))


def _to_power(products: Products, own: Sequence[Entry], usual: float) -> Products:
    """The sum to the power that fits the networks best, and scaled to the unpruned one (the first)."""
    sums = np.array([products.total(np.array(entry.counts)) for entry in own])
    left, measured = np.log(sums / sums[0]), np.log([entry.ratio for entry in own])
    power = float(np.clip(left @ measured / (left @ left), *POWERS)) if left.any() else 1.0
    scale = usual ** (1 / power) / sums[0]
    return replace(products, factor=products.factor * scale, power=power)


def _sides(widths: Widths, at: int | None) -> tuple[tuple[float, np.ndarray], tuple[float, np.ndarray]]:
    """(base, weight) of the channels in and of those out; no layer, no channels."""
    if at is None:
        none = (0.0, np.zeros(widths.weight.shape[-1]))
        return none, none
    (a, b), (u, v) = widths.base[at], widths.weight[at]
    return (float(a), u), (float(b), v)


Sample = tuple[tuple[int, int], float]


def _samples(entries: Sequence[Entry], usual: float, own: set[str]) -> dict[str, list[Sample]]:
    """Widths and milliseconds by kind of layer, this network's own at its usual speed."""
    found: dict[str, list[Sample]] = {}
    for entry in entries:
        speed = usual / entry.original_ms if entry.model in own else 1.0
        for row in entry.rows:
            found.setdefault(row.kind, []).append((row.widths, row.ms * speed))
    return found


def _refuse_unseen(
    first: Entry, samples: Mapping[str, Sequence[Sample]], can_change: Mapping[str, bool]
) -> None:
    for row in first.rows:
        seen = {size for size, _ in samples[row.kind]}
        if can_change.get(anchor_of(row.name)) and len(seen) < LEAST_SIZES:
            what = f"the latency of {row.name} was measured at {len(seen)} width only, but it can be narrowed"
            raise ModelError(what, "budget", "delete the table of latencies, and they are measured anew")


def anchor_of(name: str) -> str:
    """The layer with parameters that a row belongs to or follows."""
    return name.partition(" > ")[0]


def _coefficients(samples: Sequence[Sample], block: int) -> np.ndarray:
    """c0 to c3 of a kind of layer; c0 alone where it has one width. Weights lie between those of relative
    errors and of absolute ones, so that narrow layers count, and wide ones, where the time goes, too."""
    sizes = in_blocks(np.array([size for size, _ in samples], dtype=float), block)
    ms = np.array([value for _, value in samples])
    if len({size for size, _ in samples}) < LEAST_SIZES:
        return np.array([float(np.median(ms)), 0.0, 0.0, 0.0])
    features = np.stack([np.ones(len(ms)), sizes[:, 0], sizes[:, 1], sizes.prod(1)], axis=1)
    scale = np.maximum(features.max(axis=0), 1e-12)
    importance = np.maximum(ms, 1e-3 * max(float(ms.max()), 1e-9)) ** -0.75
    found, _ = nnls(features / scale * importance[:, None], ms * importance)
    return np.asarray(found / scale)
