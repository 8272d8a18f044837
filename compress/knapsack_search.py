"""Prices for the resources of a knapsack, and from them a choice that fits.

Cutting planes lower the Lagrangian dual, whose value is a bound whatever the prices; what the best prices
choose is made to fit, filled up and improved by exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.knapsack_table import ROUNDING, Table

CUTS = 80
TIGHT = 1e-3  # as a share of what is kept and of what is given up: such a gap is not worth more time
STARTS = 4
NEAR = 256  # moves that are tried in pairs
EXCHANGES = 64


@dataclass(frozen=True)
class Dual:
    """prices (resources,); bound: the dual value at them; picks: what prices near them choose, best first."""

    prices: np.ndarray
    bound: float
    picks: list[np.ndarray]

    def rules_out(self, table: Table) -> bool:
        """Whether the bound, rounding aside, is less than what any choice has: then none fits."""
        least = float(np.minimum.reduceat(table.values, table.start).sum())
        return self.bound + 1e-6 * (1 + float(self.prices.sum())) < least


def dual_of(table: Table) -> Dual:
    """min over prices >= 0 of sum(prices) + sum_g max_l (value - prices . cost), by cutting planes."""
    resources = table.costs.shape[1]
    box = 1.0  # values are shares: with one resource no price above 1 is ever best
    prices, best, bound = np.zeros(resources), np.zeros(resources), np.inf
    weights = np.ones(1)
    planes: list[np.ndarray] = []
    chosen: list[np.ndarray] = []
    for _ in range(CUTS):
        picks = table.first(table.values - table.costs @ prices)
        plane = np.append(1 - table.used(picks), table.value(picks))
        planes.append(plane)
        chosen.append(picks)
        if (here := float(plane[:-1] @ prices + plane[-1])) < bound:
            best, bound = prices, here
        prices, lowest, weights = _lowest(np.array(planes), box)
        if bound - lowest <= 1e-7:
            on_edge = resources > 1 and prices.max() > box * 0.999
            if not on_edge or box > 1e4 or Dual(best, bound, []).rules_out(table):
                break
            box *= 8
            prices, lowest, weights = _lowest(np.array(planes), box)
    height = np.array(planes) @ np.append(best, 1.0)
    order = np.argsort(-height, kind="stable")[:STARTS]
    return Dual(best, bound, [_mixed(chosen, weights), *(chosen[k] for k in order)])


def _mixed(chosen: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Each plane's choice in its share of the groups, evenly: near the budgets however much is tied."""
    spread = (np.arange(len(chosen[0])) + 0.5) * (np.sqrt(5) - 1) / 2 % 1
    active = np.flatnonzero(weights > 1e-9)
    plane = np.searchsorted(np.cumsum(weights[active])[:-1], spread)
    mixed: np.ndarray = np.array([chosen[k] for k in active])[plane, np.arange(len(spread))]
    return mixed


def _lowest(planes: np.ndarray, box: float) -> tuple[np.ndarray, float, np.ndarray]:
    """Prices and height of the lowest point on or above all planes; the share of each in holding it up."""
    from scipy.optimize import linprog

    count, size = planes.shape
    solved = linprog(
        np.append(np.zeros(size - 1), 1.0),
        A_ub=np.hstack([planes[:, :-1], -np.ones((count, 1))]),
        b_ub=-planes[:, -1],
        bounds=[(0.0, box)] * (size - 1) + [(None, None)],
        method="highs",
    )
    point = np.asarray(solved.x)
    return point[:-1], float(point[-1]), -np.asarray(solved.ineqlin.marginals)


def primal(table: Table, dual: Dual) -> np.ndarray | None:
    """The best that fits near the dual's choices; None where they cannot be made to fit."""
    found: np.ndarray | None = None
    for start in dual.picks:
        picks = repaired(table, start, dual.prices)
        if picks is None:
            continue
        picks = exchanged(table, filled(table, picks, dual.prices), dual)
        if found is None or table.value(picks) > table.value(found):
            found = picks
        if dual.bound - table.value(found) <= allowance(table.value(found)):
            break
    return found


def allowance(value: float) -> float:
    """How much more would not be worth further time, next to what is kept and to what is given up.

    In shares of the top value.
    """
    return TIGHT * max(min(value, 1 - value), 0) + 1e-6


def repaired(table: Table, picks: np.ndarray, prices: np.ndarray) -> np.ndarray | None:
    """Moves with the least loss for what they relieve, all at once as far as needed; None: no way out."""
    while not table.fits(picks):
        used = table.used(picks)
        over = np.maximum(used - 1, 0)
        gain, cost = table.moves(picks)
        relief = -(cost @ (over / over.sum()))
        loss = np.maximum(cost @ prices - gain, 0)
        ratio = np.where(relief > ROUNDING, -loss / np.maximum(relief, ROUNDING), -np.inf)
        to = _ranked(table, ratio)
        left = np.maximum(used + np.cumsum(cost[to], axis=0) - 1, 0).sum(axis=1)
        if not len(to) or left.min() >= over.sum():
            return None
        ends = np.flatnonzero(left <= ROUNDING)
        stop = ends[0] if len(ends) else np.argmin(left)
        picks = table.moved(picks, to[: stop + 1])
    return picks


def filled(table: Table, picks: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """What is left is spent on the moves that gain most for its price."""
    while True:
        left = 1 + ROUNDING - table.used(picks)
        gain, cost = table.moves(picks)
        fits = (gain > 1e-15) & (cost <= left).all(axis=1)
        ratio = np.where(fits, gain / (np.maximum(cost, 0) @ (prices + 1e-6) + 1e-12), -np.inf)
        to = _ranked(table, ratio)
        if not len(to):
            return picks
        together = (np.cumsum(cost[to], axis=0) <= left).all(axis=1)
        picks = table.moved(picks, to[: max(1, len(to) if together.all() else int(np.argmin(together)))])


def _ranked(table: Table, ratio: np.ndarray) -> np.ndarray:
    """The level with the highest ratio of each group, highest first, groups without one left out."""
    to = table.first(ratio)
    to = to[ratio[to] > -np.inf]
    ranked: np.ndarray = to[np.argsort(-ratio[to], kind="stable")]
    return ranked


def exchanged(table: Table, picks: np.ndarray, dual: Dual) -> np.ndarray:
    """Single moves and pairs of them, the most gainful first, among those that cost least at the prices."""
    for _ in range(EXCHANGES):
        if dual.bound - table.value(picks) <= allowance(table.value(picks)):
            break
        gain, cost = table.moves(picks)
        loss = cost @ dual.prices - gain
        loss[picks] = np.inf
        near = np.argpartition(loss, NEAR)[:NEAR] if len(loss) > NEAR else np.arange(len(loss))
        near = np.sort(near[np.isfinite(loss[near])])
        pair = _best_pair(gain[near], cost[near], table.group[near], 1 + ROUNDING - table.used(picks))
        if pair is None:
            break
        picks = table.moved(picks, near[pair])
    return picks


def _best_pair(gain: np.ndarray, cost: np.ndarray, group: np.ndarray, left: np.ndarray) -> np.ndarray | None:
    """The one or two moves of different groups that fit and gain most; None where nothing gains."""
    fits = group[:, None] != group[None, :]
    np.fill_diagonal(fits, True)  # a move paired with itself stands for the move alone
    for own, most in zip(cost.T, left, strict=True):
        both = own[:, None] + own[None, :]
        np.fill_diagonal(both, own)
        fits &= both <= most
    total = gain[:, None] + gain[None, :]
    np.fill_diagonal(total, gain)
    total[~fits] = 0.0
    if not total.size or total.max() <= 1e-12:
        return None
    return np.unique(np.unravel_index(np.argmax(total), total.shape))
