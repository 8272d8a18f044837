"""Scores, cost, target and alignment in; the channels to keep out.

Channels leave in steps from one aligned width of their layer to the next lower one, cheapest step
first, so every intermediate network is one the target runs well and no layer is ever emptied.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd

import numpy as np

from compress.channelmap import ChannelMap
from compress.cost import CostModel, class_counts, cost_model
from compress.errors import ModelError

KINDS = ("macs", "params", "units", "memory", "latency", "energy")
MEASURED = ("latency", "energy")
"""Those that only the target knows."""


@dataclass(frozen=True)
class Target:
    """kind: one of KINDS; ratio: the share that is to stay, 0 < ratio < 1."""

    kind: str
    ratio: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown target {self.kind}: {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        if not 0 < self.ratio < 1:
            raise ModelError(
                f"{self.kind}_ratio is {self.ratio}", fix="give a share between 0 and 1, both excluded"
            )


@dataclass(frozen=True)
class Selection:
    """keep: bool (units,). reached: whether the target is met. removed: units removed by this call. gap: the
    share of the importance given up that a better choice might have kept, as far as it is known."""

    keep: np.ndarray
    reached: bool
    removed: int
    gap: float = 0.0


@dataclass(frozen=True)
class Space:
    """What may be chosen: allowed widths per class, ascending; cost; target; how steps are ranked. budgets:
    further targets, all to be met (`budget.py`); empty where one target is approached unit by unit."""

    cmap: ChannelMap
    cost: CostModel
    levels: tuple[np.ndarray, ...]
    target: Target
    per_cost: bool = True
    budgets: tuple[Target, ...] = ()

    @property
    def targets(self) -> tuple[Target, ...]:
        """All that is to be met, the leading one first."""
        return self.budgets or (self.target,)

    @property
    def measured(self) -> Target | None:
        """The one that has to be measured, if there is one."""
        return next((target for target in self.targets if target.kind in MEASURED), None)

    @property
    def narrowest(self) -> np.ndarray:
        """Counts of the narrowest network there may be, (classes,)."""
        return np.array([own[0] for own in self.levels])


def space(
    cmap: ChannelMap, target: Target, *, align: int = 1, min_keep: float = 0.1, per_cost: bool = True
) -> Space:
    """All widths a pruning may end at.

    align: kept channels are multiples of it (a smaller power of two in layers not wider than it).
    min_keep: least share of each layer's channels that stays, at least one unit.
    Raises ModelError when nothing can be pruned or the target lies below the narrowest network.
    """
    found = Space(cmap, cost_model(cmap), levels_of(cmap, align, min_keep), target, per_cost)
    check_reachable(found, f"lower prune.min_keep ({min_keep:g}) or prune.align ({align})")
    return found


def levels_of(cmap: ChannelMap, align: int, min_keep: float) -> tuple[np.ndarray, ...]:
    """The widths that each class may end at. Raises ModelError when nothing can be pruned."""
    if cmap.units == 0:
        raise ModelError(
            "the model has no prunable unit",
            fix="every channel is pinned: `compress inspect` lists why, by op and source line",
        )
    return tuple(widths(len(m), align, int(cmap.multiplicity[m].min()), min_keep) for m in cmap.members())


def check_reachable(where: Space, fix: str) -> None:
    """Raises ModelError where the narrowest network is above a target."""
    for target in where.targets:
        if target.kind == "energy":
            continue  # it may fall further than its model says: known when it is measured
        least = where.cost.ratio(target.kind, where.narrowest)
        if least > target.ratio:
            what = f"{target.kind}_ratio {target.ratio:g} cannot be reached: {least:.3f} is the least"
            raise ModelError(what, fix=f"{fix}, or shorten prune.keep")


def widths(units: int, align: int, multiplicity: int, min_keep: float) -> np.ndarray:
    """Allowed kept counts of a class of `units`, ascending; the full width is always allowed."""
    step = align // gcd(align, multiplicity)
    while step >= units and step > 1:
        step //= 2
    floor = max(1, ceil(min_keep * units - 1e-9))
    allowed = np.arange(step, units + 1, step)
    return np.unique(np.append(allowed[allowed >= floor], units))


def remove(scores: np.ndarray, keep: np.ndarray, where: Space, count: int | None = None) -> Selection:
    """Remove at least `count` of the least important units (all that the target asks if None).

    scores: (units,), higher is more important; keep: bool (units,), what is still there.
    Stops as soon as the target is met; the step that meets it is the cheapest one that does.
    """
    keep = keep.copy()
    counts = class_counts(where.cmap, keep)
    order = ascending(scores, keep, where.cmap)
    removed = 0
    while not _met(where, counts) and (count is None or removed < count):
        moves = _moves(scores, counts, order, where)
        if not moves:
            break
        ending = [move for move in moves if move.meets]
        cheapest = min(moves, key=lambda move: move.price)
        move = cheapest
        if ending:
            last = min(ending, key=lambda m: m.loss)
            move = last if last.loss <= cheapest.loss or cheapest in ending else cheapest
        gone = order[move.group][: move.units]
        order[move.group] = order[move.group][move.units :]
        keep[gone] = False
        counts = _after(counts, move)
        removed += move.units
    return Selection(keep, _met(where, counts), removed)


@dataclass(frozen=True)
class _Move:
    """Narrow class `group` by `units`; loss: their summed importance; price: what it is ranked by.

    meets: whether the target is then met.
    """

    group: int
    units: int
    loss: float
    price: float
    meets: bool


def _met(where: Space, counts: np.ndarray) -> bool:
    return where.cost.ratio(where.target.kind, counts) <= where.target.ratio + 1e-12


def _after(counts: np.ndarray, move: _Move) -> np.ndarray:
    after = counts.copy()
    after[move.group] -= move.units
    return after


def ascending(scores: np.ndarray, keep: np.ndarray, cmap: ChannelMap) -> list[np.ndarray]:
    """Kept units of each class, least important first (ties by position)."""
    kept = [own[keep[own]] for own in cmap.members()]
    return [m[np.argsort(scores[m], kind="stable")] for m in kept]


def _moves(scores: np.ndarray, counts: np.ndarray, order: list[np.ndarray], where: Space) -> list[_Move]:
    """The next narrower width of every class, with its price per unit or per share of the target saved."""
    below = [levels[levels < n] for levels, n in zip(where.levels, counts, strict=True)]
    by = np.array([n - b[-1] if b.size else 0 for b, n in zip(below, counts, strict=True)])
    ratios = where.cost.ratios(where.target.kind, counts, by)
    price_of = np.maximum(by, 1).astype(float)
    if where.per_cost:
        price_of = np.maximum(where.cost.ratio(where.target.kind, counts) - ratios, 1e-12)
    found = []
    for group in np.flatnonzero(by):
        loss = float(scores[order[group][: by[group]]].sum())
        meets = bool(ratios[group] <= where.target.ratio + 1e-12)
        found.append(_Move(int(group), int(by[group]), loss, loss / price_of[group], meets))
    return found
