"""The optimum of a knapsack, or bounds of it: a dynamic programme for one resource, HiGHS for several."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.knapsack_search import filled, repaired
from compress.knapsack_table import Table

CELLS = 20_000_000  # steps of one dynamic programme; its table of choices has no more entries
BUCKETS = 1 << 15
VALUE_SCALE = 1e4  # HiGHS' tolerances are absolute: large numbers make them small
COST_SCALE = 1e3


@dataclass(frozen=True)
class Solved:
    """picks: the choice found, if any; bound: an upper bound; proven_empty: nothing fits."""

    picks: np.ndarray | None
    bound: float
    proven_empty: bool = False


def programmed(core: Table) -> Solved | None:
    """Dynamic programme over the cost in buckets: rounded up it never overspends, rounded down it bounds."""
    open_ = np.diff(np.append(core.start, len(core.values))) > 1
    buckets = min(BUCKETS, CELLS // len(core.values))
    if buckets < 4 * open_.sum():
        return None  # rounding would eat what there is to gain
    steps = core.costs[:, 0] * buckets
    if (whole := _whole(core, buckets)) is not None:
        up, buckets = whole
        down = up
    else:
        up = np.minimum(np.ceil(steps - 1e-9), buckets).astype(int)
        down = np.floor(steps * (1 - 1e-12)).astype(int)
    _, moves = _best_within(core, up, buckets)
    bound = _best_within(core, down, buckets)[0]
    return Solved(_walked(core, moves, up, buckets), bound)


def _whole(core: Table, most: int) -> tuple[np.ndarray, int] | None:
    """Costs and room as multiples of their common divisor, at most `most` of them."""
    raw = core.costs[:, 0] * core.unit[0]
    whole = np.rint(raw)
    if core.unit[0] < 1:  # in this unit everything would be 0
        return None
    if np.abs(raw - whole).max() > 1e-9 + 1e-12 * core.unit[0]:
        return None
    common = max(int(np.gcd.reduce(whole.astype(np.int64))), 1)
    room = int(core.unit[0] / common)
    return ((whole / common).astype(int), room) if room <= most else None


def _best_within(core: Table, steps: np.ndarray, buckets: int) -> tuple[float, np.ndarray]:
    """The most value within `buckets`; and for each group and each room the level that gives it."""
    best = np.zeros(buckets + 1)
    ends = np.append(core.start[1:], len(core.values))
    moves = np.zeros((len(core.start), buckets + 1), dtype=np.int32)
    for g, (start, end) in enumerate(zip(core.start, ends, strict=True)):
        if end - start == 1:
            best += core.values[start]
            moves[g] = start
            continue
        after = np.full(buckets + 1, -np.inf)
        for level in range(start, end):
            shift = steps[level]
            value = best[: buckets + 1 - shift] + core.values[level]
            better = value > after[shift:]
            np.copyto(after[shift:], value, where=better)
            np.copyto(moves[g, shift:], level, where=better)
        best = after
    return float(best[-1]), moves


def _walked(core: Table, moves: np.ndarray, steps: np.ndarray, buckets: int) -> np.ndarray:
    """The levels behind the last entry of the table, (groups,)."""
    picks = np.zeros(len(core.start), dtype=int)
    for g in range(len(picks) - 1, -1, -1):
        picks[g] = moves[g, buckets]
        buckets -= steps[picks[g]]
    return picks


def highs(table: Table, gap: float = 0.0, seconds: float | None = None, nodes: int | None = None) -> Solved:
    """HiGHS. It may overspend by its own tolerance; then it gets that much less and solves again.

    Where no time is left for that, its choice is made to fit as any other.
    """
    bound, limit, started = np.inf, 1.0, time.monotonic()
    fitted: np.ndarray | None = None
    left = seconds
    for _ in range(3):
        options = {"mip_rel_gap": gap, "time_limit": left, "node_limit": nodes}
        status, x, dual_bound = _milp(table, limit, options)
        if status == 2:
            return Solved(fitted, bound, proven_empty=limit == 1)
        if limit == 1 and dual_bound is not None:
            bound = dual_bound
        picks = None if x is None else table.first(x)
        if picks is None or table.fits(picks):
            return Solved(picks if fitted is None else _better(table, fitted, picks), bound)
        prices = np.zeros(len(table.unit))
        made = repaired(table, picks, prices)
        fitted = fitted if made is None else _better(table, filled(table, made, prices), fitted)
        left = None if seconds is None else seconds - (time.monotonic() - started)
        if left is not None and left <= 0:
            break
        limit -= 2 * (table.used(picks).max() - limit)
    return Solved(fitted, bound)


def _better(table: Table, one: np.ndarray, other: np.ndarray | None) -> np.ndarray:
    return one if other is None or table.value(one) >= table.value(other) else other


def _milp(
    table: Table, limit: float, options: dict[str, float | None]
) -> tuple[int, np.ndarray | None, float | None]:
    """scipy's status, how much of each level is taken (levels,), and the bound."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    given: Any = {name: option for name, option in options.items() if option is not None}
    row = np.arange(len(table.values))
    one_each = csr_array((np.ones(len(row)), (table.group, row)))
    with _silence():
        solved = milp(
            -VALUE_SCALE * table.values,
            integrality=np.ones(len(row), dtype=int),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(COST_SCALE * table.costs.T), -np.inf, COST_SCALE * limit),
            ],
            options=given,
        )
    bound = solved.mip_dual_bound
    return int(solved.status), solved.x, None if bound is None else -float(bound) / VALUE_SCALE


@contextmanager
def _silence() -> Iterator[None]:
    """HiGHS prints a line past its own settings (jump-dev/HiGHS.jl, issue 312), into what may be JSON."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # nothing is open there
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
