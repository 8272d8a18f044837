"""The levels of a knapsack in one row, in numbers that make every budget 1; which of them can go at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

OVERSPEND = 1e-9  # share of a budget that rounding may overspend
ROUNDING = 1e-10  # the same within the solver, in shares of what a budget leaves above the least costs


@dataclass(frozen=True)
class Table:
    """The levels of all groups in one row, each group's by cost.

    values (n,); costs (n, resources): what a level costs above the least of its group, in shares of what the
    budget leaves for that, so that every budget is 1; unit: that 1 in the caller's units; start (groups,):
    first level of each group; group (n,); at (n,): position in the caller's row.
    """

    values: np.ndarray
    costs: np.ndarray
    unit: np.ndarray
    start: np.ndarray
    group: np.ndarray
    at: np.ndarray

    def only(self, mask: np.ndarray) -> Table:
        """The levels in mask; every group must have one."""
        group = self.group[mask]
        start = np.searchsorted(group, np.arange(len(self.start)))
        return Table(self.values[mask], self.costs[mask], self.unit, start, group, self.at[mask])

    def first(self, score: np.ndarray) -> np.ndarray:
        """The first level with the highest score in each group, (groups,)."""
        best = np.maximum.reduceat(score, self.start)
        hits = np.flatnonzero(score == best[self.group])
        chosen: np.ndarray = hits[np.searchsorted(hits, self.start)]
        return chosen

    def used(self, picks: np.ndarray) -> np.ndarray:
        """(resources,)."""
        total: np.ndarray = self.costs[picks].sum(axis=0)
        return total

    def fits(self, picks: np.ndarray) -> bool:
        return bool((self.used(picks) <= 1 + ROUNDING).all())

    def value(self, picks: np.ndarray) -> float:
        return float(self.values[picks].sum())

    def moves(self, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What going to each level from its group's pick adds in value (n,) and in costs (n, resources)."""
        here = picks[self.group]
        return self.values - self.values[here], self.costs - self.costs[here]

    def moved(self, picks: np.ndarray, to: np.ndarray) -> np.ndarray:
        picks = picks.copy()
        picks[self.group[to]] = to
        return picks


def table_of(
    values: np.ndarray, costs: np.ndarray, budgets: np.ndarray, start: np.ndarray, group: np.ndarray
) -> Table:
    """In shares of the top value and of the budgets, by cost within a group, the dominated ones left out."""
    limit = budgets * (1 + OVERSPEND)
    unit = np.where(limit > 0, limit, np.maximum(costs.max(axis=0), 1e-300) * 1e-12)
    top = np.maximum.reduceat(values, start).sum() or 1.0
    table = Table(values / top, costs / unit, unit, start, group, np.arange(len(values)))
    order = np.lexsort((table.at, -values, table.costs.sum(axis=1), group))
    table = replace(table, values=table.values[order], costs=table.costs[order], at=order)
    return table.only(_undominated(table)) if len(budgets) == 1 else table


def _undominated(table: Table) -> np.ndarray:
    """Levels that no cheaper one equals; for one resource. With several, prices pass dominated ones over."""
    rank = np.unique(table.values, return_inverse=True)[1] + table.group * len(table.values)
    before = np.concatenate(([-1], np.maximum.accumulate(rank)[:-1]))
    better: np.ndarray = rank > before
    better[table.start] = True
    return better


def tightened(table: Table) -> Table | None:
    """Without levels that fit beside nothing and resources that nothing overspends then, costs counted from
    each group's least; None: nothing fits."""
    while True:
        least = np.minimum.reduceat(table.costs, table.start, axis=0)
        room = 1 + ROUNDING - least.sum(axis=0)
        above = table.costs - least[table.group]
        possible = (above <= room).all(axis=1)
        if (room < 0).any() or not np.logical_or.reduceat(possible, table.start).all():
            return None
        if possible.all():
            size = np.where(room > 10 * ROUNDING, room, 1.0)
            return _scarce(replace(table, costs=above / size, unit=table.unit * size))
        table = table.only(possible)


def _scarce(table: Table) -> Table:
    """Without resources that the dearest levels together do not overspend; the scarcest always stays."""
    most = np.maximum.reduceat(table.costs, table.start, axis=0).sum(axis=0)
    scarce = most > 1
    scarce[np.argmax(most)] = True
    return replace(table, costs=table.costs[:, scarce], unit=table.unit[scarce])
