"""The per-layer comparison: every reason on made-up rows, sums that add up, no layer counted twice."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from deploy import profile_view
from deploy.errors import MeasureError
from deploy.profile import (
    REASONS,
    Facts,
    LayerTime,
    NodeTime,
    Profile,
    balance,
    compare,
    document,
    gather,
    judge,
    totals,
)

FACTS = Facts(align=16, floor_ms=0.002, balance=20.0)


def layer(ms: float, **more: Any) -> LayerTime:
    """A convolution with 64 channels, 1e8 MACs and 1e6 bytes."""
    usual = LayerTime("c", "Conv", 1, ms, 0.5, "c", 100_000_000, 1_000_000, (64, 64))
    return replace(usual, **more)


BEFORE = layer(10.0)


@pytest.mark.parametrize(
    ("before", "after", "reason", "why"),
    [
        (BEFORE, layer(5.0, macs=50_000_000, channels=(64, 32)), "", ""),
        (BEFORE, layer(6.2, macs=50_000_000, channels=(64, 32)), "", ""),  # 0.81 of what was promised
        (BEFORE, layer(10.0, macs=99_000_000), "not pruned", "not pruned"),
        (layer(1.0, macs=None, bytes=None), layer(1.0, macs=None), "not pruned", "size not known"),
        (
            layer(0.008),
            layer(0.0055, macs=30_000_000, channels=(64, 32)),
            "overhead",
            "too small to matter: 5.5 µs, where calling a kernel costs 2 µs",
        ),
        (
            layer(0.03, calls=4),
            layer(0.02, calls=4, macs=30_000_000, channels=(64, 32)),
            "overhead",
            "too small to matter: 20 µs, where calling 4 kernels costs 8 µs",
        ),
        (
            BEFORE,
            layer(7.5, macs=51_600_000, channels=(64, 33)),
            "alignment",
            "33 channels run as 48: blocks of 16",
        ),
        (
            BEFORE,
            layer(30.0, op="FusedConv", macs=50_000_000, channels=(33, 33)),
            "alignment",
            "33 and 33 channels do not fill blocks of 16: FusedConv instead of Conv",
        ),
        (
            BEFORE,
            layer(9.0, op="Conv + Add", macs=50_000_000, channels=(64, 32)),
            "kernel switch",
            "Conv + Add instead of Conv",
        ),
        (
            BEFORE,
            layer(9.0, macs=5_000_000, bytes=900_000, channels=(64, 32)),
            "memory-bound",
            "5.56 MACs per byte, the machine balances at 20; 90% of the bytes are left",
        ),
        (
            layer(2.0, op="Add", macs=0, channels=None),
            layer(1.9, op="Add", macs=0, bytes=500_000, channels=None),
            "memory-bound",
            "computes nothing but moves 50% of the bytes",
        ),
        (
            BEFORE,
            layer(9.0, macs=50_000_000, bytes=500_000, channels=(64, 32)),
            "unexplained",
            "50% of the work in 90% of the time, by the same kernels",
        ),
        (
            BEFORE,
            layer(9.5, macs=25_000_000, bytes=500_000, channels=(64, 17)),
            "unexplained",
            "25% of the work in 95% of the time, by the same kernels; 17 channels do not fill blocks of 16",
        ),
    ],
)
def test_every_reason(before: LayerTime, after: LayerTime, reason: str, why: str) -> None:
    assert judge(before, after, FACTS) == (reason, why)
    assert reason in ("", *REASONS)


def test_a_depthwise_layer_is_memory_bound_where_no_balance_is_known() -> None:
    before, after = layer(5.0, channels=(1, 64)), layer(4.9, macs=50_000_000, channels=(1, 32))
    found = judge(before, after, Facts(align=16, floor_ms=0.002))
    assert found == ("memory-bound", "depthwise: moves 100% of the bytes")


def test_an_odd_width_that_was_there_before_is_no_reason() -> None:
    before = layer(5.0, channels=(3, 64))
    after = layer(4.5, macs=50_000_000, channels=(3, 32))
    assert judge(before, after, FACTS)[0] == "unexplained"


def node(name: str, op: str, ms: float, **more: Any) -> NodeTime:
    return NodeTime(name, op, ms, module=name.split(" ")[0], **more)


NODES = (
    node("a", "Conv", 3.0, macs=3_000_000, bytes=30_000, channels=(3, 8)),
    node("a", "ReorderOutput", 0.5, macs=0, bytes=20_000),
    node("a > MaxPool", "MaxPool", 1.0, macs=0, bytes=60_000),
    node("a", "Reshape", 0.01, macs=0, bytes=0, moves=False),
    node("b", "Gemm", 0.25, macs=1_000, bytes=500, channels=(8, 10)),
)


def test_kernels_are_gathered_into_layers_and_counted_once() -> None:
    found = gather(NODES, source="made up", run_ms=5.0, runs=7)
    assert [one.name for one in found.layers] == ["a", "a > MaxPool", "b"]
    first = found.layers[0]
    assert (first.op, first.calls, first.macs, first.bytes) == (
        "Conv + ReorderOutput + Reshape",
        3,
        3e6,
        50_000,
    )
    assert (first.channels, first.module) == ((3, 8), "a")
    assert found.layers_ms == pytest.approx(sum(one.ms for one in NODES))
    assert found.layers_ms + found.outside_ms == pytest.approx(5.0)
    assert sum(one.share for one in found.layers) == pytest.approx(found.layers_ms / 5.0)
    assert found.floor_ms == 0.01


def test_without_a_kernel_that_moves_nothing_the_cheapest_one_is_the_floor() -> None:
    nodes = [one for one in NODES if one.moves] + [node("a", "view", 0.0, moves=False)]
    assert gather(nodes, source="", run_ms=5.0, runs=1).floor_ms == 0.25


def test_kernels_that_exceed_their_run_are_refused_medians_may_a_little() -> None:
    whole = sum(one.ms for one in NODES)
    assert gather(NODES, source="", run_ms=whole * 0.99, runs=1).run_ms == pytest.approx(whole)
    with pytest.raises(
        MeasureError, match=r"^profile: 5 kernels take 4\.76 ms of a run of 4 ms; profile more"
    ):
        gather(NODES, source="", run_ms=4.0, runs=1)
    with pytest.raises(MeasureError, match="0 kernels"):
        gather([], source="", run_ms=4.0, runs=1)


def profiles() -> tuple[Profile, Profile]:
    smaller = (
        node("a", "Conv", 1.5, macs=1_500_000, bytes=20_000, channels=(3, 8)),
        node("a > MaxPool", "MaxPool", 0.99, macs=0, bytes=30_000),
        node("a > Gather", "Gather", 0.2, macs=0, bytes=10_000),
    )
    return gather(NODES, source="x", run_ms=5.0, runs=7), gather(smaller, source="x", run_ms=3.0, runs=9)


def test_layers_are_matched_by_name_and_each_comes_once() -> None:
    before, after = profiles()
    rows = compare(before, after, align=16)
    assert [row.layer for row in rows] == ["a", "a > MaxPool", "b", "a > Gather"]
    assert [row.reason for row in rows] == ["", "memory-bound", "gone", "new"]
    assert rows[0].speedup == pytest.approx(3.51 / 1.5)
    assert rows[0].macs_ratio == 0.5
    assert rows[1].macs_ratio == 0.5  # of bytes
    assert sum(row.before_ms or 0 for row in rows) == pytest.approx(before.layers_ms)
    assert sum(row.after_ms or 0 for row in rows) == pytest.approx(after.layers_ms)


def test_the_callers_macs_go_before_the_profilers() -> None:
    before, after = profiles()
    row = compare(before, after, align=16, macs_before={"a": 100}, macs_after={"a": 25})[0]
    assert row.macs_ratio == 0.25
    assert row.reason == "kernel switch"
    assert compare(before, after, align=16, macs_before={"z": 1})[0].macs_ratio == 0.5


def test_balance_is_what_the_best_layers_reached() -> None:
    before, after = profiles()
    # 1.5e6 MACs in 1.5 ms; 60,000 bytes in 1 ms; the Gemm takes as long as the floor allows.
    assert balance(before, after) == pytest.approx(1_000_000 / 60_000)
    assert balance(gather([node("a", "Add", 1.0)], source="", run_ms=2.0, runs=1)) is None


def test_totals_add_up_and_say_whether_they_fit_the_latency() -> None:
    before, _ = profiles()
    assert totals(before).agrees is None
    found = totals(before, 4.6)
    assert found.layers_ms + found.outside_ms == pytest.approx(found.run_ms)
    assert (found.ratio, found.agrees) == (pytest.approx(5.0 / 4.6), True)
    assert totals(before, 4.0).agrees is False


def result(**more: Any) -> dict[str, Any]:
    before, after = profiles()
    made = document(before, after, compare(before, after, align=16), measured_ms=(4.6, 2.0), **more)
    found: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    return found


def test_the_document_has_rows_totals_and_time_by_reason() -> None:
    found = result()
    assert [row["layer"] for row in found["rows"]] == ["a", "a > MaxPool", "b", "a > Gather"]
    assert found["reasons"] == {"memory-bound": 0.99, "new": 0.2}
    assert found["totals"]["before"]["agrees"] is True
    assert found["totals"]["after"]["agrees"] is False
    assert found["balance_macs_per_byte"] == pytest.approx(1_000_000 / 60_000)


def test_the_table_has_every_layer_the_rest_and_the_whole() -> None:
    found = profile_view.table(result())
    assert [row[0] for row in found.rows][-3:] == ["a > Gather", "outside the layers", "the whole run"]
    assert all(len(row) == len(found.headers) == len(found.kinds) for row in found.rows)
    cells = [[cell.replace("\xa0", " ") for cell in row] for row in found.rows]
    assert cells[0][2:] == ["3.510 ms", "1.500 ms", "70.2 %", "2.34×", "50.0 %", ""]
    assert cells[2][2:4] == ["0.2500 ms", "none"]
    assert cells[-1][2:6] == ["5.000 ms", "3.000 ms", "100.0 %", "1.67×"]


def test_the_sentence_says_how_far_to_trust_it() -> None:
    said = " ".join(profile_view.sentences(result())).replace("\xa0", " ")
    assert said.startswith(
        "Original: 4.760 ms in layers and 0.2400 ms outside the layers make 5.000 ms a run, "
    )
    assert "4.600 ms without a profiler (+9 %), which fits." in said
    assert "2.000 ms without a profiler (+50 %), so trust the shares more than the milliseconds." in said
    assert said.endswith(
        "Layers that are not as fast as their MACs promise: memory-bound 0.9900 ms, new 0.2000 ms."
    )


def test_the_chart_draws_the_costliest_layers_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = profile_view.chart(result())
    texts = re.findall(r">([^<>]+)</text>", drawn)
    assert {"a", "a &gt; MaxPool", "outside the layers", "2.34×", "1.01×, memory-bound"} <= set(texts)
    assert drawn == profile_view.chart(result())
    monkeypatch.setattr(profile_view, "MOST_BARS", 1)
    few = re.findall(r">([^<>]+)</text>", profile_view.chart(result()))
    assert "a" in few
    assert "a &gt; MaxPool" not in few
    assert profile_view.chart({}) == ""
