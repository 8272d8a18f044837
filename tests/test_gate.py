"""Gates: right verdicts at the edges, never a pass on missing data, and no heavy import."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from deploy import gate
from deploy.errors import MeasureError

SPEED = {"runner": "onnxruntime", "batch": 32}


def accuracy(lost: int, gained: int, n: int, before: float = 0.9) -> dict[str, Any]:
    flips = {"lost": lost, "gained": gained}
    after = before - (lost - gained) / n
    return {"accuracy": {"metric": "top1", "before": before, "after": after, "n": n, "flips": flips}}


def speedup(ratio: float, low: float, high: float, pairs: int = 20) -> dict[str, Any]:
    return {"speedup": [{**SPEED, "ratio": ratio, "low": low, "high": high, "pairs": pairs}]}


def latency(samples: list[float], pairs: int = 20) -> dict[str, Any]:
    row = {**SPEED, "model": "dense", "samples_ms": samples, "median": median(samples)}
    return {"latency": [row], **speedup(2.0, 1.9, 2.1, pairs)}


def parity(**changes: Any) -> dict[str, Any]:
    row = {"model": "dense", "batch": 2, "relative": 1e-6, "tolerance": 1e-4, "passed": True, **changes}
    return {"parity": [row]}


def one(results: dict[str, Any], **gates: Any) -> gate.Gate:
    (found,) = gate.judge(results, gates)
    return found


GOOD: dict[str, dict[str, Any]] = {
    "target": {"pruning": {"reached": True, "stop_reason": "target met"}},
    "accuracy_drop": accuracy(30, 25, 10_000),
    "metric_drop": {
        "accuracy": {"metric": "return", "before": 265.0, "after": 260.5, "n": 20, "share": False}
    },
    "speedup": speedup(2.0, 1.9, 2.1),
    "latency_ms": latency([5.0 + 0.01 * (i % 7) for i in range(200)]),
    "size_ratio": {"cost": {"onnx_bytes": {"before": 1000, "after": 400}}},
    "parity": parity(),
}
LIMITS: dict[str, Any] = {
    "target": True,
    "accuracy_drop": 0.01,
    "metric_drop": 5.0,
    "speedup": 1.5,
    "latency_ms": 6.0,
    "size_ratio": 0.5,
    "parity": True,
}


@pytest.mark.parametrize("name", gate.GATE_KEYS)
def test_a_good_measurement_passes_and_a_missing_one_is_inconclusive(name: str) -> None:
    assert one(GOOD[name], **{name: LIMITS[name]}, batch=32).verdict == "pass"
    missing = one({}, **{name: LIMITS[name]})
    assert missing.verdict == "inconclusive"
    assert missing.value is None
    assert missing.message.endswith(".")


def test_gates_left_out_are_not_judged() -> None:
    assert gate.judge({}, {}) == ()
    assert gate.judge({}, {"speedup": None, "parity": False, "runner": "onnxruntime", "batch": None}) == ()
    assert gate.verdict(()) == "no gates"
    assert gate.exit_code(()) == 0


def test_the_worst_gate_decides() -> None:
    everything: dict[str, Any] = {}
    limits = {name: limit for name, limit in LIMITS.items() if name != "metric_drop"}  # of another task
    for name in limits:
        everything |= GOOD[name]
    good = gate.judge(everything, limits)
    assert [found.name for found in good] == [name for name in gate.GATE_KEYS if name in limits]
    assert (gate.verdict(good), gate.exit_code(good)) == ("pass", 0)
    unsure = gate.judge({**everything, "accuracy": None}, limits)
    assert (gate.verdict(unsure), gate.exit_code(unsure)) == ("inconclusive", 5)
    bad = gate.judge({**everything, "accuracy": None}, {**limits, "size_ratio": 0.1})
    assert (gate.verdict(bad), gate.exit_code(bad)) == ("fail", 5)


def test_a_gate_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        MeasureError, match=r"gates: there is no gate 'speed\\x1b'; use one of target, accuracy_drop, "
    ):
        gate.judge({}, {"speed\x1b": 2})
    with pytest.raises(MeasureError, match="the limit of speedup is nan; give a finite number"):
        gate.judge({}, {"speedup": math.nan})


def test_a_target_that_was_missed_fails() -> None:
    pruning = {"reached": False, "stop_reason": "58.0% of the original's energy measured, 50.0% asked for"}
    found = one({"pruning": pruning}, target=True)
    assert (found.verdict, found.value) == ("fail", 0.0)
    assert found.message == (
        "Pruning stopped short of its target: 58.0% of the original's energy measured, 50.0% asked for. "
        "Ask for less, or set gates.target to false where less will do."
    )


def test_the_drop_comes_from_the_flips_with_a_paired_interval() -> None:
    drop = gate.accuracy_drop(accuracy(131, 100, 10_000))
    assert drop is not None
    assert drop.value == pytest.approx(0.0031)
    # By hand: ((132 - 101) / 10002) ± 1.96 sqrt((132 + 101 - 31² / 10002) / 10002²)
    half = 1.959964 * math.sqrt(132 + 101 - 31**2 / 10_002) / 10_002
    assert (drop.low, drop.high) == pytest.approx((31 / 10_002 - half, 31 / 10_002 + half))


def test_no_flip_at_all_still_has_a_width() -> None:
    drop = gate.accuracy_drop(accuracy(0, 0, 100))
    assert drop is not None
    assert (drop.value, drop.low < -0.01, drop.high > 0.01) == (0.0, True, True)


def test_without_flips_the_interval_is_wider() -> None:
    paired = accuracy(131, 100, 10_000)
    unpaired = {"accuracy": {**paired["accuracy"], "flips": None}}
    near, far = gate.accuracy_drop(paired), gate.accuracy_drop(unpaired)
    assert near is not None
    assert far is not None
    assert far.half_width > 1.5 * near.half_width
    assert "not paired" in one(unpaired, accuracy_drop=0.01).message


def test_the_interval_covers_the_true_drop() -> None:
    rng, n, covered = random.Random(1), 400, 0
    for _ in range(400):
        flips = rng.choices(("lost", "gained", "same"), (0.05, 0.02, 0.93), k=n)
        drop = gate.accuracy_drop(accuracy(flips.count("lost"), flips.count("gained"), n))
        assert drop is not None
        covered += drop.low <= 0.03 <= drop.high
    assert 0.92 <= covered / 400 <= 0.99


@pytest.mark.parametrize(
    ("lost", "gained", "n", "limit", "verdict"),
    [
        (100, 0, 10_000, 0.01, "pass"),  # exactly the limit, in floats that do not subtract evenly
        (101, 0, 10_000, 0.01, "fail"),
        (2, 1, 100, 0.01, "inconclusive"),  # the interval is wider than ± 3 points
        (40, 1, 100, 0.01, "fail"),  # too few examples, yet the whole interval is beyond the limit
        (1, 40, 100, 0.01, "pass"),  # too few examples, yet the whole interval is a gain
        (0, 0, 10_000, 0.0, "inconclusive"),  # "no drop at all" needs more than equal counts
        (20, 90, 10_000, 0.0, "pass"),
    ],
)
def test_accuracy_verdicts(lost: int, gained: int, n: int, limit: float, verdict: str) -> None:
    assert one(accuracy(lost, gained, n, before=0.5), accuracy_drop=limit).verdict == verdict


@pytest.mark.parametrize(
    ("before", "n", "majority", "verdict"),
    [
        (0.08, 600, 0.11, "inconclusive"),  # wrong weights, or the classes in another order
        (0.12, 600, 0.11, "inconclusive"),  # above, but not by more than chance
        (0.15, 600, 0.11, "pass"),
        (0.992, 10_000, 0.99, "pass"),  # a rare class, and enough examples to see that it is found
        (0.992, 600, 0.99, "inconclusive"),
        (1.0, 600, 1.0, "inconclusive"),  # one class only
        (0.08, 600, None, "pass"),  # a measure of one's own
    ],
)
def test_an_accuracy_that_a_constant_answer_has_too_permits_nothing(
    before: float, n: int, majority: float | None, verdict: str
) -> None:
    found = accuracy(0, 0, n, before)
    found["accuracy"]["majority"] = majority
    assert one(found, accuracy_drop=0.01).verdict == verdict


def test_what_to_look_at_where_a_constant_answer_is_as_good() -> None:
    found = accuracy(45, 141, 600, before=0.08)
    found["accuracy"]["majority"] = 0.1083
    assert one(found, accuracy_drop=0.02).message.endswith(
        "the limit is 2.00\xa0points. But the original's 8.00\xa0% on 600 examples cannot be told from "
        "always giving the most frequent answer (10.83\xa0%): check model.weights, the order of the classes, "
        "data.mean and data.std, or train it first."
    )
    found = accuracy(100, 0, 600, before=0.3)
    found["accuracy"]["majority"] = 0.5
    assert one(found, accuracy_drop=0.02).verdict == "fail"  # lost is lost


@pytest.mark.parametrize(
    ("before", "after", "limit", "verdict"),
    [
        (265.0, 260.0, 5.0, "pass"),
        (265.0, 259.0, 5.0, "fail"),
        (-5.10, -4.68, 0.1, "pass"),  # minus an error: higher is better all the same
        (-4.68, -5.10, 0.1, "fail"),
        (31.2, 31.2, 0.5, "pass"),
        (0.985, 0.979, 0.01, "pass"),  # a mean average precision: no binomial interval around it
    ],
)
def test_a_metric_that_is_no_share_is_judged_in_its_own_units(
    before: float, after: float, limit: float, verdict: str
) -> None:
    found = {"accuracy": {"metric": "score", "before": before, "after": after, "n": 500, "share": False}}
    judged = one(found, metric_drop=limit)
    assert (judged.verdict, judged.low, judged.high) == (verdict, None, None)
    assert judged.value == pytest.approx(before - after)
    assert gate.fall(found) == judged.value
    other = one(found, accuracy_drop=limit)
    assert other.verdict == "inconclusive"
    assert other.message == (
        "Score is no share of right answers, so its fall has no interval: set gates.metric_drop, in its own "
        "units, in place of gates.accuracy_drop."
    )


def test_what_a_metric_lost_is_told_in_its_own_units() -> None:
    assert one(GOOD["metric_drop"], metric_drop=4.0).message == (
        "Return falls by 4.5, from 265 to 260.5 on 20 examples (one figure each, no interval); the limit is "
        "4. Prune less, fine-tune longer, or raise gates.metric_drop."
    )


@given(st.integers(0, 400), st.integers(1, 400), st.floats(0, 1))
def test_the_interval_of_a_share_is_that_of_scipy(right: int, n: int, majority: float) -> None:
    right = min(right, n)
    low = binomtest(right, n).proportion_ci(0.95, method="wilson").low
    if abs(low - majority) > 1e-9:
        told = not gate.untold({"before": right / n, "n": n, "majority": majority})
        assert told == (low > majority)


def test_an_inconclusive_accuracy_says_how_many_examples_resolve_it() -> None:
    found = one(accuracy(2, 1, 100), accuracy_drop=0.01)
    assert found.message == (
        "Top-1 accuracy falls by 1.00\xa0points on 100 examples (95 % interval of the drop −3.31 to "
        "5.27\xa0points; 2 answers lost, 1 gained); the limit is 1.00\xa0points. 100 examples are too few "
        "for this limit: use about 205, or a limit of 1.44\xa0points."
    )


@pytest.mark.parametrize(
    "change",
    [
        {"after": None},
        {"n": None},
        {"n": 0},
        {"n": True},
        {"after": math.nan},
        {"after": 91.2, "before": 93.0},
        {"flips": {"lost": 900, "gained": 0}},  # contradicts the accuracies
        {"flips": {"lost": -1, "gained": -1}},
        {"flips": {"lost": 9000, "gained": 9000}},
        {"flips": {}},
        {"flips": "many"},
    ],
)
def test_accuracy_that_makes_no_sense_never_passes(change: dict[str, Any]) -> None:
    results = {"accuracy": {**accuracy(0, 0, 10_000)["accuracy"], **change}}
    assert one(results, accuracy_drop=1.0).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("results", "verdict", "words"),
    [
        (
            speedup(2.0, 1.5, 2.1),
            "pass",
            "2.00× as fast with onnxruntime, batch 32 (95 % interval 1.50× to 2.10×)",
        ),
        (
            speedup(1.6, 1.49, 1.7),
            "inconclusive",
            "raise bench.repeats, quiet the machine, or lower gates.speedup",
        ),
        (speedup(1.2, 1.1, 1.49), "fail", "Prune more"),
        (speedup(2.0, 1.9, 2.1, pairs=4), "inconclusive", "4 interleaved pairs are too few"),
        (speedup(2.0, 2.1, 1.9), "inconclusive", "no valid interval"),
        (speedup(2.0, math.nan, 2.1), "inconclusive", "no valid interval"),
        ({"speedup": speedup(2, 1.9, 2.1)["speedup"] * 2}, "inconclusive", "2 measurements claim"),
    ],
)
def test_speedup_verdicts(results: dict[str, Any], verdict: str, words: str) -> None:
    found = one(results, speedup=1.5, batch=32)
    assert found.verdict == verdict
    assert words in found.message


def test_the_largest_batch_is_judged_even_when_it_was_not_measured() -> None:
    results = {**speedup(2.0, 1.9, 2.1), "latency": [{"runner": "onnxruntime", "batch": 32}]}
    assert one(results, speedup=1.5).verdict == "pass"
    results["provenance"] = {"config": {"bench": {"batches": [1, 64]}}}
    found = one(results, speedup=1.5)
    assert found.verdict == "inconclusive"
    assert found.message == (
        "No measurement with runner onnxruntime and batch 64. "
        "Add them to bench.runners and bench.batches, and measure."
    )


def test_latency_verdicts() -> None:
    samples = [5.0 + 0.1 * (i % 11) for i in range(220)]
    assert one(latency(samples), latency_ms=6.0).verdict == "pass"
    assert one(latency(samples), latency_ms=5.0).verdict == "fail"
    drifting = [5.0 + 0.01 * i for i in range(200)]
    unsure = one(latency(drifting), latency_ms=6.05)
    assert unsure.verdict == "inconclusive"
    assert "The interval contains the limit" in unsure.message
    assert one(latency(samples, pairs=4), latency_ms=6.0).verdict == "inconclusive"
    assert one(latency([*samples, math.nan]), latency_ms=6.0).verdict == "inconclusive"
    assert one(latency([*samples, -1.0]), latency_ms=6.0).verdict == "inconclusive"


def test_drift_widens_the_interval_of_a_median() -> None:
    rng = random.Random(2)
    values = [5.0 + 0.01 * i for i in range(400)]
    drifting = gate.median_interval(values, 20)
    rng.shuffle(values)
    mixed = gate.median_interval(values, 20)
    assert drifting is not None
    assert mixed is not None
    assert drifting.half_width > 2 * mixed.half_width
    assert gate.median_interval(values[:4], 20) is None
    # Of 20 stretches, the 6th and 15th medians bound the middle with 95.9 %.
    assert gate.median_interval([float(i) for i in range(20)], 20) == gate.Interval(9.5, 5.0, 14.0)


def test_parity_fails_on_any_bad_check() -> None:
    good = parity()["parity"]
    original = {**good[0], "model": "original"}
    assert one({"parity": [original]}, parity=True).verdict == "inconclusive"
    assert one({"parity": [original, *good]}, parity=True).verdict == "pass"
    failed = one({"parity": [*good, {**good[0], "batch": 7, "relative": 2e-4, "passed": False}]}, parity=True)
    assert failed.verdict == "fail"
    assert "differs from PyTorch at batch 7: relative error 2.0e-04, tolerance 1.0e-04" in failed.message
    assert one(parity(relative=2e-4), parity=True).verdict == "fail"  # whatever "passed" claims
    assert one(parity(relative=math.nan), parity=True).verdict == "inconclusive"
    assert one(parity(relative=math.nan, passed=False), parity=True).verdict == "fail"
    assert one(parity(passed=None), parity=True).verdict == "inconclusive"


def test_hostile_names_are_escaped_in_messages() -> None:
    results = {
        "speedup": [{"runner": "a\x1b[31m\n", "batch": 1, "ratio": 2, "low": 1.9, "high": 2.1, "pairs": 9}]
    }
    found = one(results, speedup=1.5, runner="a\x1b[31m\n", batch=1)
    assert found.verdict == "pass"
    assert found.message.replace("\xa0", " ").isprintable()


numbers = st.floats(0.01, 100, allow_nan=False)
junk = st.one_of(
    st.none(), st.text(max_size=3), st.just(math.nan), st.just(math.inf), st.booleans(), st.just([])
)


@st.composite
def counts(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(1, 20_000))
    lost = draw(st.integers(0, n // 2))
    gained = (
        draw(st.integers(0, n - lost)) if draw(st.booleans()) else draw(st.integers(0, min(lost, n - lost)))
    )
    before = max(lost / n, min(0.7, 1 - gained / n))
    return accuracy(lost, gained, n, before)


@given(counts(), st.floats(0, 1), st.floats(0, 1))
def test_a_looser_accuracy_limit_keeps_a_pass(results: dict[str, Any], a: float, b: float) -> None:
    tight, loose = (one(results, accuracy_drop=limit) for limit in sorted((a, b)))
    assert tight.verdict != "pass" or loose.verdict == "pass"
    assert tight.low is not None
    assert tight.high is not None
    assert tight.value is not None
    assert tight.low <= tight.value <= tight.high


ORDER = {"fail": 0, "inconclusive": 1, "pass": 2}


@given(st.lists(numbers, min_size=3, max_size=3), st.integers(0, 40), numbers, numbers)
def test_a_lower_speedup_limit_is_never_harder(ends: list[float], pairs: int, a: float, b: float) -> None:
    low, ratio, high = sorted(ends)
    results = speedup(ratio, low, high, pairs)
    hard, easy = (one(results, speedup=limit, batch=32) for limit in sorted((a, b), reverse=True))
    assert ORDER[hard.verdict] <= ORDER[easy.verdict]
    assert pairs >= gate.MIN_PAIRS or easy.verdict == "inconclusive"


@given(st.lists(numbers, min_size=1, max_size=60), st.integers(0, 40), numbers, numbers)
def test_a_higher_latency_limit_is_never_harder(samples: list[float], pairs: int, a: float, b: float) -> None:
    hard, easy = (one(latency(samples, pairs), latency_ms=limit, batch=32) for limit in sorted((a, b)))
    assert ORDER[hard.verdict] <= ORDER[easy.verdict]


@given(st.integers(1, 10**9), st.integers(1, 10**9), numbers, numbers)
def test_a_larger_size_limit_is_never_harder(before: int, after: int, a: float, b: float) -> None:
    results = {"cost": {"onnx_bytes": {"before": before, "after": after}}}
    hard, easy = (one(results, size_ratio=limit) for limit in sorted((a, b)))
    assert ORDER[hard.verdict] <= ORDER[easy.verdict]


@settings(max_examples=300)
@given(st.data())
def test_a_broken_number_never_passes(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(gate.GATE_KEYS))
    broken = data.draw(st.sampled_from(BREAKABLE[name]))
    results = replaced(GOOD[name], broken, data.draw(junk))
    assert one(results, **{name: LIMITS[name]}, batch=32).verdict != "pass"


BREAKABLE: dict[str, list[tuple[Any, ...]]] = {
    "target": [("pruning",)],
    "metric_drop": [("accuracy",), ("accuracy", "before"), ("accuracy", "after")],
    "accuracy_drop": [("accuracy",), ("accuracy", "before"), ("accuracy", "after"), ("accuracy", "n")],
    "speedup": [
        ("speedup",),
        *[("speedup", 0, key) for key in ("ratio", "low", "high", "pairs", "runner", "batch")],
    ],
    "latency_ms": [
        ("latency",),
        ("latency", 0, "samples_ms"),
        ("latency", 0, "model"),
        ("speedup", 0, "pairs"),
    ],
    "size_ratio": [("cost",), ("cost", "onnx_bytes"), ("cost", "onnx_bytes", "before")],
    "parity": [("parity",), ("parity", 0, "relative"), ("parity", 0, "tolerance"), ("parity", 0, "model")],
}


def replaced(found: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``found`` with the value at ``path`` replaced."""
    if not path:
        return value
    copied = list(found) if isinstance(found, list) else dict(found)
    copied[path[0]] = replaced(found[path[0]], path[1:], value)
    return copied


def test_the_gate_needs_no_heavy_library() -> None:
    heavy = {"torch", "numpy", "onnx", "matplotlib", "jinja2"}
    code = f"import sys, deploy.gate; print(sorted({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
