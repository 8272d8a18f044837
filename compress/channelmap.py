"""Run a traced graph on channel labels; the result is the ChannelMap.

Everything later is a short consequence of it: importance sums over a unit's slices, masks zero a
unit's reading slices, surgery selects every axis by the kept units, cost counts labels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from compress.labels import Granularity, Ledger, Pin, Term, Writer, core
from compress.product_rules import GATE
from compress.rounds import flags, labels_of, run
from compress.trace import Traced, get_tensor


@dataclass(frozen=True)
class PinnedChannels:
    """A group of channels that stays: how many, in which parameters, why, at which op and line."""

    reason: str
    op: str
    source: str
    channels: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class ChannelMap:
    """Which removable unit every index of every axis belongs to.

    axes: (name, dim) -> int64 (size,): unit of each index, -1 where the index stays.
    reads: the axes whose slices read a unit (a contraction's input columns).
    nodes: node name -> labels of its output (a list for ops with several outputs).
    unit_of_label: int64: label -> unit, -1 for none; label 0 is "stays".
    classes: int64 (units,): units of one class appear in exactly the same axes, so they are
    interchangeable for cost and alignment: a layer's channels, or a residual stream's.
    multiplicity: int64 (units,): indices a unit takes on the axis where it takes fewest.
    inexact: channels that may leave on request although that changes others, and why.
    """

    units: int
    axes: dict[tuple[str, int], np.ndarray]
    reads: frozenset[tuple[str, int]]
    nodes: dict[str, Any]
    unit_of_label: np.ndarray
    classes: np.ndarray
    multiplicity: np.ndarray
    terms: tuple[Term, ...]
    pinned: tuple[PinnedChannels, ...]
    inexact: tuple[PinnedChannels, ...]
    writers: tuple[Writer, ...]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]

    def members(self) -> list[np.ndarray]:
        """The units of each class, ascending."""
        return [np.flatnonzero(self.classes == c) for c in range(int(self.classes.max(initial=-1)) + 1)]


def channel_map(
    traced: Traced,
    keep: Sequence[str] = (),
    *,
    in_place: bool = False,
    counted: Collection[str] = (),
    granularity: Granularity = Granularity(),  # noqa: B008  # frozen
) -> ChannelMap:
    """Label every axis of a traced model.

    keep: names of parameters none of whose channels may be removed. in_place: also pin channels whose
    number is written into the model's Python code, so that a plan fits the user's own module, and
    those that the nodes `counted` count, whose numbers are the code's although a graph does not tell.
    granularity: what leaves as one where there is a choice.
    Raises ModelError when an op cannot even be shaped (data-dependent output sizes).
    """
    ledger, env, component = run(traced, keep, in_place, counted, granularity)
    return _finish(ledger, env, component, traced)


def _finish(ledger: Ledger, env: dict[fx.Node, Any], component: np.ndarray, traced: Traced) -> ChannelMap:
    unit_of_label = _units(ledger, component)
    ledger.alive = torch.from_numpy(unit_of_label >= 0)
    nodes = {node.name: labels_of(value, ledger) for node, value in env.items()}
    names = dict.fromkeys(str(node.target) for node in env if node.op == "get_attr")
    tensors = {name: get_tensor(traced.net, name) for name in names}
    axes = {key: unit_of_label[labels.start : labels.stop] for key, labels in ledger.axes.items()}
    axes = {key: units for key, units in axes.items() if (units >= 0).any()}
    read = np.zeros(ledger.issued, dtype=bool)
    for labels in ledger.read:
        read[labels.reshape(-1)] = True
    reads = frozenset(
        key
        for key in axes
        if key[0].startswith(GATE) or read[ledger.axes[key].start : ledger.axes[key].stop].any()
    )
    units = int(unit_of_label.max(initial=-1)) + 1
    aligned = _aligned_axes(ledger.terms)
    classes, multiplicity = _classes(axes, units, _pieces(nodes, unit_of_label), aligned)
    return ChannelMap(
        units,
        axes,
        reads,
        nodes,
        unit_of_label,
        classes,
        multiplicity,
        tuple(ledger.terms),
        _pinned(ledger, ledger.pins, component),
        _pinned(ledger, _alive(ledger.inexact, unit_of_label), component),
        tuple(ledger.writers.values()),
        {name: tuple(t.shape) for name, t in tensors.items() if not name.startswith(GATE)},
        frozenset(name for name, t in tensors.items() if isinstance(t, torch.nn.Parameter)),
    )


def _pieces(nodes: dict[str, Any], unit_of_label: np.ndarray) -> list[np.ndarray]:
    """The units in each part of every split, so that no part of it is ever emptied."""
    parts = [piece for labels in nodes.values() if isinstance(labels, list) for piece in labels]
    units = [np.unique(unit_of_label[core(part).numpy()]) for part in parts if isinstance(part, Tensor)]
    return [found[found >= 0] for found in units]


def _units(ledger: Ledger, component: np.ndarray) -> np.ndarray:
    """Number the components that are produced and not pinned, in the order of the graph."""
    removable = flags(component, ledger.produced) & ~flags(component, (p.labels for p in ledger.pins))
    removable[component[0]] = False
    chosen = np.where(removable[component])[0]
    _, first, inverse = np.unique(component[chosen], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    units = np.full(ledger.issued, -1, dtype=np.int64)
    units[chosen] = rank[inverse]
    return units


def _aligned_axes(terms: Sequence[Term]) -> set[tuple[str, int]]:
    """The axes whose sizes are those of a contraction's input or output, which a target likes aligned."""
    both = {(term.weight, dim) for term in terms for dim in (0, 1)}
    return both - {(term.weight, 1) for term in terms if term.kind.endswith("groups")}


def _classes(
    axes: dict[tuple[str, int], np.ndarray],
    units: int,
    pieces: Sequence[np.ndarray],
    aligned: set[tuple[str, int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Classes of units with equal axes (and equal pieces), and each unit's least count on an aligned axis."""
    signature = np.zeros(units, dtype=np.uint64)
    least = np.full(units, np.iinfo(np.int64).max)
    codes = np.random.default_rng(0).integers(1, 2**63, size=len(axes) + len(pieces), dtype=np.uint64)
    for code, members in zip(codes[len(axes) :], pieces, strict=True):
        signature[members] += code
    for code, (key, members) in zip(codes[: len(axes)], axes.items(), strict=True):
        counts = np.bincount(members[members >= 0], minlength=units)
        signature += code * counts.astype(np.uint64)
        if key in aligned:
            least = np.where(counts > 0, np.minimum(least, counts), least)
    least[least == np.iinfo(np.int64).max] = 1
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return rank[inverse].astype(np.int64), least


def _alive(pins: Sequence[Pin], unit_of_label: np.ndarray) -> list[Pin]:
    return [pin for pin in pins if (unit_of_label[pin.labels] >= 0).any()]


def _pinned(ledger: Ledger, pins: Sequence[Pin], component: np.ndarray) -> tuple[PinnedChannels, ...]:
    """Every group of produced channels that the pins name once, under the first reason that hit it."""
    produced = flags(component, ledger.produced)
    owner = np.full(ledger.issued, -1, dtype=np.int64)
    names = list(ledger.axes)
    for index, labels in enumerate(ledger.axes.values()):
        owner[labels.start : labels.stop] = index
    seen = np.zeros_like(produced)
    found: dict[tuple[str, str, str], list[int]] = {}
    for pin in pins:  # in the order in which they were found
        fresh = np.unique(component[pin.labels])
        fresh = fresh[produced[fresh] & ~seen[fresh]]
        seen[fresh] = True
        if fresh.size:
            found.setdefault((pin.reason, pin.op, pin.source), []).extend(fresh.tolist())
    report = []
    for (reason, op, source), components in found.items():
        members = np.isin(component, components)
        parameters = dict.fromkeys(names[i][0] for i in np.unique(owner[members]) if i >= 0)
        report.append(PinnedChannels(reason, op, source, len(components), tuple(parameters)))
    return tuple(report)
