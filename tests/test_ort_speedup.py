"""benchmarks/ort_speedup.py: what counts as short of the MACs, and how lost time is told."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ort_speedup import summary, told_by_time


def row(speedup: float, ratio: float, why: str = "") -> dict[str, Any]:
    return {"speedup": speedup, "macs_ratio": ratio, "why": why}


@pytest.mark.parametrize(("speedup", "enough"), [(1.6, True), (1.59, False)])
def test_a_row_is_short_below_0_8_of_its_macs(speedup: float, enough: bool) -> None:
    assert summary([row(speedup, 0.5)])["at_least_0_8_of_macs"] == int(enough)


def test_only_short_rows_count_as_explained() -> None:
    rows = [row(2.0, 0.5, "no need"), row(1.1, 0.5, "memory-bound 3 ms"), row(1.1, 0.5)]
    assert summary(rows) == {"rows": 3, "at_least_0_8_of_macs": 1, "explained": 1}


def test_lost_time_is_told_by_reason_the_largest_first() -> None:
    lost = {"not pruned": 1.0, "memory-bound": 2.5, "outside the layers": 0.25, "gone": -3.0, "new": 0.1}
    worst = {"memory-bound": (2.0, "features.3: depthwise"), "not pruned": (1.0, "stem")}
    assert told_by_time(lost, worst, 0.85) == (
        "0.85 ms more than the MACs promise: memory-bound 2.50 ms (most in features.3: depthwise); "
        "not pruned 1.00 ms (most in stem); outside the layers 0.25 ms"
    )
    assert told_by_time({"gone": -1.0}, {}, -1.0) == ""
