"""How much each class of units matters before any training: its least important ones left out.

A class is a layer's channels, or a residual stream's. One class at a time is masked, which is exactly the
network without those units, and evaluated; then the weights are put back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from compress.channelmap import ChannelMap
from compress.cost import CostModel, cost_model
from compress.inspection import written_by
from compress.surgery import mask
from compress.task import Evaluation
from compress.trace import get_tensor

SHARES = (0.9, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Point:
    """One class at one width. share: asked for. kept: units left, at least one. macs: of the network then."""

    share: float
    kept: int
    loss: float
    value: float
    macs: int


@dataclass(frozen=True)
class Sensitivity:
    """One class of units. layers: what writes it, as `inspect` names them. points: one per share, in order.

    rise: mean over the points of how much the loss rises.
    """

    layers: tuple[str, ...]
    units: int
    points: tuple[Point, ...]
    rise: float


def sensitivity(
    net: nn.Module,
    cmap: ChannelMap,
    scores: np.ndarray,
    evaluate: Callable[[nn.Module], Evaluation],
    *,
    shares: Sequence[float] = SHARES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Evaluation, list[Sensitivity]]:
    """The evaluation of `net` as it is, and every class with its least important units left out.

    scores: (units,), higher is more important. shares: of a class's units, kept. progress gets how many of
    how many evaluations are done. The most sensitive class comes first. `net` ends as it was, also where
    `evaluate` raises.
    """
    full = evaluate(net)
    members = cmap.members()
    widths = [[max(1, round(share * len(own))) for share in shares] for own in members]
    total = sum(len(set(kept) - {len(own)}) for kept, own in zip(widths, members, strict=True))
    names, model, done, found = written_by(cmap), cost_model(cmap), 0, []
    for number, own in enumerate(members):
        order, seen = own[np.argsort(scores[own], kind="stable")], {len(own): full}
        for kept in widths[number]:
            if kept not in seen:
                with _without(net, cmap, order[: len(own) - kept]):
                    seen[kept] = evaluate(net)
                done += 1
                progress(done, total)
        points = [
            Point(share, kept, seen[kept].loss, seen[kept].value, _macs(model, number, kept))
            for share, kept in zip(shares, widths[number], strict=True)
        ]
        rise = sum(point.loss - full.loss for point in points) / len(points)
        found.append(Sensitivity(tuple(names[number]), len(own), tuple(points), rise))
    return full, sorted(found, key=lambda one: -one.rise)


@contextmanager
def _without(net: nn.Module, cmap: ChannelMap, units: np.ndarray) -> Iterator[None]:
    """Inside, these units are left out; afterwards the weights have the bits that they had."""
    keep = np.ones(cmap.units, dtype=bool)
    keep[units] = False
    touched = {name: get_tensor(net, name) for name, _ in cmap.reads}
    before = {name: tensor.detach().clone() for name, tensor in touched.items()}
    try:
        mask(net, cmap, keep)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in touched.items():
                tensor.copy_(before[name])


def _macs(model: CostModel, number: int, kept: int) -> int:
    counts = model.full.copy()
    counts[number] = kept
    return round(model.macs.total(counts))
