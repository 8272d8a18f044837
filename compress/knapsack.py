"""The multiple-choice knapsack with several budgets: one level for each group, the most value that fits.

Lagrange multipliers price the resources (Kelley's cutting planes; the lowest dual value is the bound: Fisher,
Management Science 27, 1981). Repair, filling and exchanges make what they choose fit and spend what is left.
Where a gap remains, levels that cannot belong to anything better leave for good, and what is left of the
problem goes to a dynamic programme (one resource; Pisinger, EJOR 83, 1995) or to HiGHS (several).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.knapsack_optimal import Solved, highs, programmed
from compress.knapsack_search import TIGHT, Dual, allowance, dual_of, exchanged, filled, primal
from compress.knapsack_table import OVERSPEND, Table, table_of, tightened

CORE = 1_000  # levels that HiGHS gets for one look
NODES = 20
LOOKS = 3
COARSE = 5  # HiGHS may take seconds: with several resources so many times the gap is small enough


class Infeasible(ValueError):
    """No choice fits. least: the least reachable cost of each resource on its own, (resources,); budgets.

    together: each budget can be met, but not all of them at once.
    """

    def __init__(self, least: np.ndarray, budgets: np.ndarray) -> None:
        self.least = least
        self.budgets = budgets
        self.together = bool((least <= budgets * (1 + OVERSPEND)).all())
        super().__init__(least, budgets)

    def __str__(self) -> str:
        pairs = ", ".join(f"{a:g} of {b:g}" for a, b in zip(self.least, self.budgets, strict=True))
        return f"no choice fits all budgets; least cost of each resource: {pairs}"


@dataclass(frozen=True)
class Choice:
    """levels: the level of each group, (groups,); value: their sum; costs: what they use, (resources,).

    bound: no choice that fits has more value; top: the value of the best levels if nothing had a cost.
    """

    levels: np.ndarray
    value: float
    bound: float
    top: float
    costs: np.ndarray

    @property
    def gap(self) -> float:
        """(bound - value) / bound: the share of the optimum that may be missing."""
        return (self.bound - self.value) / self.bound if self.bound > self.value else 0.0

    @property
    def loss_gap(self) -> float:
        """(bound - value) / (top - value): the share of what is given up that might be saved."""
        return (self.bound - self.value) / (self.top - self.value) if self.bound > self.value else 0.0


def choose(values: Sequence[np.ndarray], costs: Sequence[np.ndarray], budgets: np.ndarray) -> Choice:
    """One level of each group, nearly as valuable as possible, and a bound that says how nearly.

    values[g]: (levels,), not negative; costs[g]: (levels, resources), not negative; budgets: (resources,).
    Neither need rise from level to level. Rounding may overspend a budget by 1e-9 of it, nothing else may.
    Time is linear in the levels, save for sorting; the dynamic programme's is levels that are still open
    times buckets of cost, at most 20 million for each of its tables. Deterministic.
    Raises Infeasible, ValueError for misshapen input, and TimeoutError when several budgets are so tight that
    in a minute no choice is found and none ruled out.
    """
    given = _Given.of(values, costs, budgets)
    table = tightened(given.table)
    if table is None:
        raise given.infeasible()
    dual = dual_of(table)
    if dual.rules_out(table):
        raise given.infeasible()
    found = primal(table, dual)
    if found is None:
        return exact(values, costs, budgets, gap=0.01, seconds=60.0)
    picks, bound = _closed(table, dual, found)
    return given.choice(table.at[picks], bound)


def exact(
    values: Sequence[np.ndarray],
    costs: Sequence[np.ndarray],
    budgets: np.ndarray,
    *,
    gap: float = 0.0,
    seconds: float | None = None,
) -> Choice:
    """The same by HiGHS: the optimum, or within `gap` of it, or the best after `seconds`.

    Raises Infeasible, ValueError for misshapen input, and TimeoutError when time is up before anything fits.
    """
    given = _Given.of(values, costs, budgets)
    table = tightened(given.table)
    if table is None:
        raise given.infeasible()
    solved = highs(table, gap=gap, seconds=seconds)
    if solved.proven_empty:
        raise given.infeasible()
    if solved.picks is None:
        raise TimeoutError("HiGHS found no choice that fits all budgets, and did not rule one out either")
    return given.choice(table.at[solved.picks], solved.bound)


@dataclass(frozen=True)
class _Given:
    """What the caller gave, in one row: values (n,), costs (n, resources); first (groups,): their starts."""

    values: np.ndarray
    costs: np.ndarray
    budgets: np.ndarray
    first: np.ndarray
    table: Table

    @classmethod
    def of(cls, values: Sequence[np.ndarray], costs: Sequence[np.ndarray], budgets: np.ndarray) -> _Given:
        sizes = np.array([len(own) for own in values], dtype=int)
        budgets = np.asarray(budgets, dtype=float)
        if not len(sizes) or len(costs) != len(sizes) or not sizes.all() or budgets.ndim != 1:
            raise ValueError("a knapsack needs groups with levels, costs for each, and a row of budgets")
        if any(np.shape(own) != (n, len(budgets)) for own, n in zip(costs, sizes, strict=True)):
            raise ValueError(f"the costs of a group must have the shape (levels, {len(budgets)})")
        row = np.concatenate(values).astype(float)
        spent = np.concatenate(costs).astype(float)
        for name, numbers in (("values", row), ("costs", spent), ("budgets", budgets)):
            if not (np.isfinite(numbers) & (numbers >= 0)).all():
                raise ValueError(f"{name} must be finite numbers, none below 0")
        first = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        group = np.repeat(np.arange(len(sizes)), sizes)
        return cls(row, spent, budgets, first, table_of(row, spent, budgets, first, group))

    def infeasible(self) -> Infeasible:
        return Infeasible(np.minimum.reduceat(self.costs, self.first, axis=0).sum(axis=0), self.budgets)

    def choice(self, at: np.ndarray, bound: float) -> Choice:
        """at: the chosen positions in the caller's row; bound as a share of the top value."""
        top = float(np.maximum.reduceat(self.values, self.first).sum())
        value = float(self.values[at].sum())
        bound = min(bound * (top or 1.0), top)
        bound = bound if bound > value * (1 + 1e-12) else value
        return Choice(at - self.first, value, bound, top, self.costs[at].sum(axis=0))


def _closed(table: Table, dual: Dual, found: np.ndarray) -> tuple[np.ndarray, float]:
    """The gap narrowed: what could still be better is solved on its own, smaller each time."""
    bound, several = dual.bound, len(dual.prices) > 1
    score = table.values - table.costs @ dual.prices
    regret = np.maximum.reduceat(score, table.start)[table.group] - score
    for _ in range(LOOKS):
        value = table.value(found)
        enough = allowance(value) * (COARSE if several else 1)
        if bound - value <= enough:
            break
        mask = dual.bound - regret > value  # what the bound would be with this level forced in
        mask[found] = True
        core = tightened(replace(table.only(mask), at=np.flatnonzero(mask)))
        solved = None if core is None else _core(core, enough / max(value, TIGHT))
        if core is None or solved is None:
            break
        bound = min(bound, max(value, solved.bound))
        if solved.picks is not None and table.fits(picks := core.at[solved.picks]):
            picks = exchanged(table, filled(table, picks, dual.prices), replace(dual, bound=bound))
            found = picks if table.value(picks) > value else found
        if several or table.value(found) == value:
            break
    return found, bound


def _core(core: Table, gap: float) -> Solved | None:
    """A small problem within `gap` of its optimum, or bounds of it; None where it is not small enough."""
    if core.costs.shape[1] == 1:
        return programmed(core)
    return highs(core, gap=gap, nodes=NODES) if len(core.values) <= CORE else None
