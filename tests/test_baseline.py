"""A release against an earlier one: never a pass where nothing was compared, and the words that say why."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy import baseline
from deploy.baseline import Tolerances

GATES = {"runner": "onnxruntime", "batch": 8}
WHERE = {"runner": "onnxruntime", "batch": 8}
MACHINE = {
    "cpu": "Some CPU",
    "architecture": "x86_64",
    "physical_cores": 4,
    "logical_cpus": 8,
    "avx512": True,
    "os": "Linux 6.1",
    "gpus": [],
    "versions": {"torch": "2.14.1", "torchvision": "0.29.1", "onnxruntime": "1.32.0"},
}


def samples(middle: float, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [middle * (1 + 0.004 * (rng.random() - 0.5)) for _ in range(200)]


def release(
    middle: float = 5.0, after: float = 0.92, size: int = 1000, original: str = "a" * 64
) -> dict[str, Any]:
    """results.json of a release whose original model takes 10 ms."""
    ratio = 10 / middle
    return {
        "data": {"test_fingerprint": "digits"},
        "accuracy": {"metric": "top1", "before": 0.93, "after": after, "n": 10_000, "flips": None},
        "cost": {"onnx_bytes": {"before": 2000, "after": size}},
        "latency": [{**WHERE, "model": "dense", "threads": 1, "samples_ms": samples(middle)}],
        "speedup": [{**WHERE, "ratio": ratio, "low": 0.99 * ratio, "high": 1.01 * ratio, "pairs": 20}],
        "provenance": {
            "machine": copy.deepcopy(MACHINE),
            "artifacts": [{"path": "original.onnx", "sha256": original, "bytes": 2000}],
        },
    }


def judged(now: dict[str, Any], then: dict[str, Any], **tolerated: float) -> dict[str, Any]:
    return {gate.name: gate for gate in baseline.judge(now, then, GATES, Tolerances(**tolerated))}


def test_the_same_release_again_passes() -> None:
    found = judged(release(), release())
    assert tuple(found) == baseline.GATES
    assert {gate.verdict for gate in found.values()} == {"pass"}
    assert found["baseline_latency"].message.replace("\xa0", " ") == (
        "The median call takes 1.00× of the baseline's with onnxruntime, batch 8 (95 % interval 0.980× to "
        "1.02×; each against the same original); the limit is 1.05×."
    )


@pytest.mark.parametrize(
    ("name", "now", "words"),
    [
        ("baseline_latency", release(6.0), "Prune more, or tolerate more: --tolerate latency=..."),
        ("baseline_accuracy", release(after=0.90), "or tolerate more: --tolerate accuracy=..."),
        ("baseline_size", release(size=1021), "1,021 bytes, the baseline's 1,000: a ratio of 1.021"),
    ],
)
def test_each_that_is_worse_fails_and_no_other(name: str, now: dict[str, Any], words: str) -> None:
    found = judged(now, release())
    assert {gate.name for gate in found.values() if gate.verdict == "fail"} == {name}
    assert words in found[name].message


@pytest.mark.parametrize("name", ["accuracy", "latency", "size"])
def test_what_is_tolerated_passes(name: str) -> None:
    found = judged(release(6.0, 0.9, 1021), release(), **{name: 0.3})
    assert {g.name for g in found.values() if g.verdict == "pass"} == {f"baseline_{name}"}


def test_an_interval_that_contains_the_limit_is_inconclusive() -> None:
    found = judged(release(5.25), release())["baseline_latency"]
    assert (found.verdict, found.limit) == ("inconclusive", 1.05)
    assert "The interval contains the limit: raise bench.repeats" in found.message


def test_other_originals_are_compared_by_their_medians() -> None:
    then = release(original="b" * 64)
    found = judged(release(), then)["baseline_latency"]
    assert found.verdict == "pass"
    assert "on two occasions" in found.message
    assert judged(release(6.0), then)["baseline_latency"].verdict == "fail"
    then["latency"][0]["samples_ms"] = [5.0] * 3
    assert judged(release(), then)["baseline_latency"].verdict == "inconclusive"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("provenance", "machine", "cpu"), "Other\x1b CPU", "cpu is Other\\x1b CPU there and Some CPU here"),
        (("provenance", "machine", "versions", "onnxruntime"), "1.31.0", "onnxruntime is 1.31.0 there"),
        (("provenance", "machine", "gpus"), [{"name": "T4"}], "GPUs is "),
        (("latency", 0, "threads"), 2, "threads is 2 there and 1 here"),
        (("latency", 0, "precision"), "int8", "precision is int8 there and not recorded here"),
        (("provenance", "machine"), {}, "the machine of one of them is not recorded"),
        (("latency",), [], "In the baseline: No measurement with runner onnxruntime and batch 8."),
    ],
)
def test_what_was_measured_otherwise_cannot_decide_latency(path: Any, value: Any, words: str) -> None:
    then = release(50.0)  # ever so much slower: a pass, if it were compared
    place: Any = then
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    found = judged(release(), then)
    assert found["baseline_latency"].verdict == "inconclusive"
    assert words in found["baseline_latency"].message
    assert found["baseline_accuracy"].verdict == found["baseline_size"].verdict == "pass"


def test_other_libraries_and_another_kernel_do_not_matter() -> None:
    then = release()
    then["provenance"]["machine"]["os"] = "Linux 6.2"
    then["provenance"]["machine"]["versions"] |= {"torch": "2.13", "torchvision": "0.28"}
    assert judged(release(), then)["baseline_latency"].verdict == "pass"


@pytest.mark.parametrize("change", [{"metric": "loss"}, {"after": None}, {"n": None}])
def test_accuracies_that_cannot_be_compared_never_pass(change: dict[str, Any]) -> None:
    then = release()
    then["accuracy"] |= change
    assert judged(release(), then)["baseline_accuracy"].verdict == "inconclusive"


def test_other_test_data_cannot_decide_accuracy() -> None:
    for prints in (("digits", "letters"), ("", ""), (None, None)):
        now, then = release(), release()
        now["data"]["test_fingerprint"], then["data"]["test_fingerprint"] = prints
        found = judged(now, then)["baseline_accuracy"]
        assert found.verdict == "inconclusive"
        assert "by another metric or on other data" in found.message


def test_accuracies_on_the_same_examples_are_paired() -> None:
    now, then = release(after=0.915), release()
    apart = judged(now, then)["baseline_accuracy"]
    then["accuracy"]["wrong"] = [*range(800)]
    now["accuracy"]["wrong"] = [*range(20, 870)]
    paired = judged(now, then)["baseline_accuracy"]
    assert "70 answers lost, 20 gained" in paired.message
    assert "not paired" in apart.message
    assert (paired.value, apart.value) == pytest.approx((0.005, 0.005))
    assert paired.high - paired.low < 0.3 * (apart.high - apart.low)
    now["accuracy"]["wrong"] = [*range(300)]  # contradicts the accuracies
    assert judged(now, then)["baseline_accuracy"].verdict == "inconclusive"
    now["accuracy"]["wrong"] = ["a", None]
    assert "not paired" in judged(now, then)["baseline_accuracy"].message


def test_a_missing_baseline_is_no_pass() -> None:
    found = baseline.missing("runs/\x1bold")
    assert (found.name, found.verdict) == ("baseline", "inconclusive")
    assert found.message.startswith(
        "There is no baseline at runs/\\x1bold, so nothing was compared with it. "
    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3), lambda x: st.lists(x, max_size=2)
    )
)
def test_junk_in_a_baseline_never_passes(junk: Any) -> None:
    then = release()
    for section in ("accuracy", "cost", "latency", "provenance"):
        found = judged(release(), {**then, section: junk})
        hit = {"accuracy": "accuracy", "cost": "size"}.get(section, "latency")
        assert found[f"baseline_{hit}"].verdict == "inconclusive"
    assert judged(release(), {})["baseline_size"].verdict == "inconclusive"
