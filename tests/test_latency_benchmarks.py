"""The latency benchmarks' own sums: what counts as reached, as worst, as ahead."""

from __future__ import annotations

import numpy as np

from benchmarks import latency_accuracy, latency_budget, latency_model


def test_random_widths_are_allowed_ones() -> None:
    levels = [np.array([8, 16]), np.array([16, 32, 48, 64]), np.array([5])]
    rng = np.random.default_rng(0)
    drawn = [latency_model.random_widths(levels, rng) for _ in range(50)]
    assert all(n in own for counts in drawn for n, own in zip(counts, levels, strict=True))
    assert len({tuple(counts) for counts in drawn}) > 4


def test_errors_are_summed_up_over_all_and_by_model() -> None:
    rows = [
        {"model": "a", "batch": 1, "error": -0.02},
        {"model": "a", "batch": 1, "error": 0.04},
        {"model": "b", "batch": 1, "error": 0.10},
    ]
    found = latency_model.summary(rows)
    assert (found["median_error"], found["worst_error"], found["prunings"]) == (0.04, 0.1, 3)
    assert found["models"]["a batch 1"]["worst_error"] == 0.04


def test_within_three_percent_on_either_side_counts_as_reached() -> None:
    rows = [{"reached": reached, "looks": [[1, 1]] * n} for n, reached in enumerate((0.96, 0.98, 1.02, 1.05))]
    found = latency_budget.summary(rows)
    assert (found["asked"], found["reached_within_3_percent"], found["most_looks"]) == (4, 2, 3)
    assert found["worst"] == 0.05


def test_latency_is_ahead_where_no_other_mean_is_higher() -> None:
    def row(criterion: str, accuracy: float, target: float) -> dict[str, object]:
        facts = {"model": "net", "tool": "compress", "latency_ratio": target, "macs_ratio": 0.5}
        return {**facts, "criterion": criterion, "accuracy": accuracy, "target": target}

    rows = [
        row("latency", 0.9, 0.5),
        row("macs", 0.89, 0.5),
        row("latency", 0.8, 0.3),
        row("macs", 0.82, 0.3),
    ]
    found = latency_accuracy.summary(rows)
    assert (found["of"], found["best_mean_by_latency"]) == (2, 1)
    assert found["points"]["net at 0.5"]["latency"]["mean"] == 0.9
