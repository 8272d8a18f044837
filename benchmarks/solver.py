"""The knapsack behind `latency` budgets: time and gap as networks grow, beside HiGHS on the same problem.

    python benchmarks/solver.py

1,000, 10,000 and 100,000 units with one budget (latency) and three (latency, MACs, parameters), each half way
from the least to the greatest cost: layers of 16 to 512 channels with every width allowed, the same at
multiples of 16, layers of ten, and units that stay or go on their own. Importances are Pareto or lognormal,
sorted within a layer; latency is a staircase a + b * ceil(n / 16) (4 in layers of ten), MACs and parameters
are lines. One thread; `choose` runs five times (the median counts), HiGHS once, for 60 s and the
time it takes to notice; not at 100,000 units, where that can be minutes. Goal: under 1 s and 0.5 % at 10,000.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import note, write
from compress.knapsack import Choice, choose, exact

REPEATS = 5
SECONDS = 60.0
MOST = 10_000  # units up to which HiGHS is asked
PROVEN = 1e-6  # the relative gap below which HiGHS' answer counts as the optimum
Problem = tuple[list[np.ndarray], list[np.ndarray], np.ndarray]


def shapes() -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, widths a layer may have, alignment)."""
    yield "layers, every width", (16, 32, 64, 128, 256, 512), 1
    yield "layers, multiples of 16", (16, 32, 64, 128, 256, 512), 16
    yield "layers of ten", (10,), 1
    yield "single units", (1,), 1


def problem(widths: tuple[int, ...], align: int, units: int, resources: int) -> Problem:
    """Layers until there are `units` channels; a single unit may go, of a layer something stays."""
    draw = np.random.default_rng(0)
    values, costs = [], []
    while units > 0:
        width = min(int(draw.choice(widths)), units)
        units -= width
        kept = np.arange(0 if width == 1 else 1, width + 1)
        kept = kept[(kept % align == 0) | (kept == width)]
        importance = draw.pareto(1.5, width) if draw.random() < 0.5 else draw.lognormal(0.0, 1.0, width)
        importance = -np.sort(-importance) * draw.lognormal()
        values.append(np.append(0.0, importance.cumsum())[kept])
        constant, step = draw.uniform(0.005, 0.05), draw.uniform(0.01, 0.1) * draw.lognormal()
        stair = np.ceil(kept / (16 if width >= 16 else 4))
        latency = np.where(kept > 0, constant + step * stair, 0.0)
        lines = np.outer(kept, draw.lognormal(3.0, 1.0, 2))
        costs.append(np.column_stack([latency, lines])[:, :resources])
    least, most = (sum(bound(own, axis=0) for own in costs) for bound in (np.min, np.max))
    return values, costs, np.asarray((least + most) / 2)


def measure(name: str, given: Problem, units: int) -> dict[str, Any]:
    """One row; true_gap is None where HiGHS proved nothing in time."""
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        found = choose(*given)
        taken.append(time.perf_counter() - started)
    row = {
        "shape": name,
        "units": units,
        "groups": len(given[0]),
        "levels": sum(len(own) for own in given[0]),
        "resources": len(given[2]),
        "seconds": round(statistics.median(taken), 4),
        "gap": round(found.gap, 7),
        "gap_of_what_is_given_up": round(found.loss_gap, 6),
        **(beside(found, given) if units <= MOST else {}),
    }
    note(" ".join(f"{k} {v}" for k, v in row.items()))
    return row


def beside(found: Choice, given: Problem) -> dict[str, Any]:
    """HiGHS' time and gap, and how much more value it has (less where negative), as a share."""
    started = time.perf_counter()
    try:
        best = exact(*given, seconds=SECONDS)
    except TimeoutError:
        best = None
    taken = round(time.perf_counter() - started, 3)
    if best is None:
        return {"true_gap": None, "exact_seconds": taken, "exact_gap": None, "behind_exact": None}
    behind = round((best.value - found.value) / best.value, 8)
    true_gap = max(behind, 0.0) if best.gap <= PROVEN else None
    gap = round(best.gap, 8)
    return {"true_gap": true_gap, "exact_seconds": taken, "exact_gap": gap, "behind_exact": behind}


def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of some rows; where HiGHS was asked, in how many it alone was faster and as good."""
    found = {
        "problems": len(rows),
        **{key: max(row[key] for row in rows) for key in ("seconds", "gap", "gap_of_what_is_given_up")},
    }
    proven = [row for row in rows if row.get("true_gap") is not None]
    if not proven:
        return found
    faster = sum(row["exact_seconds"] <= row["seconds"] for row in proven)
    true_gap = max(row["true_gap"] for row in proven)
    return {**found, "exact_proves": len(proven), "true_gap": true_gap, "exact_faster": faster}


def main() -> None:
    choose(*problem((16,), 1, 64, 3))  # imports
    exact(*problem((16,), 1, 64, 3))
    rows = [
        measure(name, problem(widths, align, units, resources), units)
        for units in (1_000, 10_000, 100_000)
        for name, widths, align in shapes()
        for resources in (1, 3)
    ]
    sizes = {units: worst([row for row in rows if row["units"] == units]) for units in (1_000, 100_000)}
    at_goal = worst([row for row in rows if row["units"] == 10_000])
    summary = {"units": 10_000, **at_goal, "at_1000_units": sizes[1_000], "at_100000_units": sizes[100_000]}
    write("solver", summary, rows)


if __name__ == "__main__":
    main()
