"""Selection under budgets: latency or energy, memory, MACs and parameters come down together, and the target
has the last word.

Each step is a knapsack (`knapsack.py`): of every class one of the widths that the target runs well, the most
importance kept, every cost within its budget. Costs are sums of products of widths, so what a width saves
depends on the others; it is taken as if they stayed, which a step of 2 % forgives, and the last step is
repeated until the costs of the network itself are met. A peak of memory is one cost for each op that may be
it. Then that network is measured, and where the model was wrong, the choice is made again with the model
corrected. Energy is foretold by the model of latency and corrected in the same way: a device that works draws
about the same power, less where a narrow network leaves part of it idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, log

import numpy as np

from compress.cost import CostModel, Resource, class_counts
from compress.knapsack import Infeasible, choose
from compress.select import Selection, Space, Target, ascending

WITHIN = 0.03
"""By how much less a network may take than asked; more it should not."""
AIM = 1 - WITHIN / 2
"""What is aimed at, as a share of what is asked for."""
LOOKS = 5
EARLY = (1 / 4, 5 / 8, 7 / 8)
"""Shares of the way, in logarithms, after which the model is checked before anything is lost."""
TRIES = 20
NUDGE = 0.005
"""By how much more or less is aimed at where the model comes back to a network that was tried."""
APART = 0.05
"""Networks of latencies nearer than this say nothing of how the model's error grows."""
STEEPEST = 4.0
"""Limit to the power that corrects a model. The least is 1: what leaves too early does not come back."""


Measure = Callable[[np.ndarray], float]
"""The share of the unpruned latency, or energy, that the network of keep, bool (units,), really takes."""


@dataclass(frozen=True)
class Look:
    """One network that was measured: shares of what the unpruned one takes. predicted: by the model as
    fitted. on_the_way: before the budgets were met."""

    asked: float
    predicted: float
    measured: float
    on_the_way: bool = False

    @property
    def fits(self) -> bool:
        """It takes what was asked, and hardly less."""
        return self.asked * (1 - WITHIN) <= self.measured <= self.asked

    @property
    def near(self) -> bool:
        """Within WITHIN of what was asked."""
        return abs(self.measured / self.asked - 1) <= WITHIN

    @property
    def met(self) -> bool:
        """It takes what was asked or less, by WITHIN."""
        return self.measured <= self.asked * (1 + WITHIN)


def narrow(scores: np.ndarray, keep: np.ndarray, where: Space, pace: float) -> Selection:
    """The next step towards all budgets of `where`, each at most `pace` (a share of the whole) further, and
    so far that about as large a share of the units leaves.

    What leaves is part of what would leave on the way to the budgets as things stand: a step alone would have
    to save its pace in whole blocks of channels, whatever they are worth. scores: (units,), higher is more
    important; keep: bool (units,). reached: the budgets themselves are met.
    """
    counts = class_counts(where.cmap, keep)
    ends = {target.kind: target.ratio for target in where.targets}
    order = ascending(scores, keep, where.cmap)
    levels = [own[own <= n] for own, n in zip(where.levels, counts, strict=True)]
    worth = [importance_at(scores[units], np.arange(len(units) + 1)) for units in order]
    chosen, gap = _fitting(where.cost, counts, levels, worth, ends)
    ahead = {kind: max(where.cost.ratio(kind, counts) - end, 0) for kind, end in ends.items()}
    way = max(*ahead.values(), float((counts - chosen).sum()) / len(keep))
    if way > pace:
        goals = {kind: end + (1 - pace / way) * ahead[kind] for kind, end in ends.items()}
        within = [own[own >= n] for own, n in zip(levels, chosen, strict=True)]
        chosen, _ = _fitting(where.cost, counts, within, worth, goals)
    kept = keep.copy()
    for units, before, after in zip(order, counts, chosen, strict=True):
        kept[units[: before - after]] = False
    reached = all(where.cost.ratio(kind, chosen) <= end + 1e-9 for kind, end in ends.items())
    return Selection(kept, reached, int(keep.sum() - kept.sum()), gap)


def importance_at(ascending_scores: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """What a class keeps at each level: the sum of its most important units."""
    total = np.concatenate(([0.0], np.cumsum(np.maximum(ascending_scores, 0)[::-1])))
    return np.asarray(total[levels])


def _costs(part: Resource, counts: np.ndarray, levels: list[np.ndarray]) -> list[np.ndarray]:
    """The share of the whole network's cost that is left with one class at each of its levels."""
    longest = max(len(own) for own in levels)
    by = np.array(
        [n - own[np.arange(longest).clip(max=len(own) - 1)] for n, own in zip(counts, levels, strict=True)]
    )
    left = part.ratios(counts, by.T)
    return [left[: len(own), group] for group, own in enumerate(levels)]


def _fitting(
    cost: CostModel,
    counts: np.ndarray,
    levels: list[np.ndarray],
    worth: list[np.ndarray],
    goals: dict[str, float],
) -> tuple[np.ndarray, float]:
    """Counts whose own costs meet the goals, or the narrowest; and how far from the best they may be.

    worth: by class, what its n most important units are worth, for n = 0, 1, ...

    A choice that costs more than its class-by-class costs add up to is made again with so much less to spend,
    and where that leads nowhere, from that choice on.
    """
    narrowest = np.array([own[0] for own in levels])
    pairs = [(p, goal) for kind, goal in goals.items() for p in cost.resources(kind, goal, narrowest, counts)]
    parts, asked = [part for part, _ in pairs], np.array([goal for _, goal in pairs])
    costs = [_costs(part, counts, levels) for part in parts]
    now = np.array([part.ratio(counts) for part in parts])
    least = np.array([[own[0] for own in found] for found in costs])
    spent = [np.stack([found[g] - found[g][0] for found in costs], 1) for g in range(len(counts))]
    aims, chosen = asked.copy(), counts
    kept = [own[at] for own, at in zip(worth, levels, strict=True)]
    for _ in range(TRIES):
        budgets = aims - (now + (least - now[:, None]).sum(axis=1))
        if (budgets < 0).any():
            break
        try:
            found = choose(kept, [np.maximum(own, 0) for own in spent], budgets)
        except (Infeasible, TimeoutError):
            break
        chosen = np.array([own[at] for own, at in zip(levels, found.levels, strict=True)])
        over = np.array([part.ratio(chosen) for part in parts]) - asked
        if (over <= 1e-9).all():
            return chosen, found.loss_gap
        added = aims - budgets + found.costs
        aims = np.where(over > 1e-9, np.minimum(aims, added) - over, aims)
    if (chosen == counts).all():
        return narrowest, 0.0
    return _fitting(
        cost, chosen, [own[own <= n] for own, n in zip(levels, chosen, strict=True)], worth, goals
    )


@dataclass(frozen=True)
class Closed:
    """A selection and the looks that it took. ends: the selection is the last, which takes what was asked or
    comes as near to it as the widths allow, and the last look is at it."""

    selection: Selection
    looks: tuple[Look, ...]
    ends: bool


def close(
    scores: np.ndarray,
    keep: np.ndarray,
    where: Space,
    pace: float,
    measure: Measure,
    before: Sequence[Look] = (),
) -> Closed:
    """`narrow`, and where that ends the pruning, until the network that it ends with takes what is asked.

    What has left does not come back, so a model that is off by much has to be found out before: there is
    a look on the way too, at some shares of it (EARLY). before: the looks of earlier steps.
    """
    early: list[Look] = []
    tried: list[tuple[Look, Selection]] = []
    beside = 1.0  # of what is aimed at
    while len(tried) < LOOKS and abs(beside - 1) <= WITHIN:
        known = (*before, *early, *(look for look, _ in tried))
        now = corrected(where, known)
        chosen = narrow(scores, keep, _aimed(now, beside), pace)
        is_last = chosen.reached or _is_narrowest(where, chosen)
        if not is_last and (early or tried or not _passes(now, keep, chosen.keep)):
            return Closed(chosen, known[len(before) :], ends=False)
        if any((chosen.keep == other.keep).all() for _, other in tried):
            beside += NUDGE if tried[-1][0].measured < aimed_at(where) else -NUDGE
            continue
        beside = 1.0
        predicted, measured = _modelled(where, chosen.keep), measure(chosen.keep)
        look = Look(aimed_at(where) / AIM, predicted, measured, on_the_way=not is_last)
        if not is_last:
            early.append(look)
            continue
        tried.append((look, chosen))
        if look.fits:
            break
    best = min(range(len(tried)), key=lambda n: _miss(tried[n][0]))
    rest = [look for number, (look, _) in enumerate(tried) if number != best]
    return Closed(tried[best][1], (*early, *rest, tried[best][0]), ends=True)


def _is_narrowest(where: Space, chosen: Selection) -> bool:
    return np.array_equal(class_counts(where.cmap, chosen.keep), where.narrowest)


def _passes(where: Space, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether one of the shares of the way is passed where a look is taken; in powers of what is asked."""
    old, new = _modelled(where, before), _modelled(where, after)
    return any(new <= aimed_at(where) ** share < old for share in EARLY)


def _aimed(where: Space, share: float) -> Space:
    """With so many times the budget of what is measured."""
    moved = (t.ratio * share if t == where.measured else t.ratio for t in where.budgets)
    budgets = tuple(Target(t.kind, min(ratio, 0.999)) for t, ratio in zip(where.budgets, moved, strict=True))
    return replace(where, budgets=budgets)


def _modelled(where: Space, keep: np.ndarray) -> float:
    """The share of the unpruned latency, or energy, that the model gives these units."""
    return where.cost.ratio("latency", class_counts(where.cmap, keep))


def aimed_at(where: Space) -> float:
    """The share of what is measured that is aimed at."""
    assert where.measured is not None
    return where.measured.ratio


def _miss(look: Look) -> tuple[bool, float]:
    return not look.met, abs(look.measured / look.asked - AIM)


def corrected(where: Space, looks: Sequence[Look]) -> Space:
    """With the model that the networks measured say: a power of the fitted one, and a factor.

    In logarithms, the line through the last network and the last one before it that differs enough; the first
    of all is the unpruned one, at 1 by definition. That networks take more than the model says is believed
    at the end only: a look on the way that is wrong would take out what does not come back.
    """
    latency = where.cost.latency
    telling = [look for look in looks if not look.on_the_way or look.measured < look.predicted]
    if not telling or latency is None:
        return where
    *others, (x, y) = [(0.0, 0.0), *((log(look.predicted), log(look.measured)) for look in telling)]
    apart = [(x - u, y - v) for u, v in others if abs(x - u) >= APART]
    power = float(np.clip(apart[-1][1] / apart[-1][0], 1, STEEPEST)) if apart else 1.0
    scale = exp(y - power * x) * where.cost.latency_ms ** (1 - power)
    total = latency.power * power
    scaled = replace(latency, factor=latency.factor * scale ** (1 / total), power=total)
    return replace(where, cost=replace(where.cost, latency=scaled))
