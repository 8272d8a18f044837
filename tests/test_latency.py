"""Latency: the protocol (on a clock of our own), the statistics, and speed-ups that do not cry wolf."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploy.errors import MeasureError, RunnerError
from deploy.latency import Latency, measure, speedup, summarize
from deploy.runners import Array, open_runner
from tests.runner_doubles import Idle


class Clock:
    """Stands still unless a runner moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Fake(Idle):
    """Takes `seconds[i % len]` of the clock for its i-th call, and writes its name to the log."""

    def __init__(
        self, label: str, clock: Clock, seconds: Sequence[float], log: list[str] | None = None
    ) -> None:
        self.label, self.clock, self.seconds = label, clock, seconds
        self.log: list[str] = [] if log is None else log
        self.calls = 0

    def __call__(self) -> Sequence[Any]:
        self.clock.now += self.seconds[self.calls % len(self.seconds)]
        self.calls += 1
        self.log.append(self.label)
        return ()


def blocks(log: Sequence[str]) -> list[str]:
    return [label for index, label in enumerate(log) if index == 0 or log[index - 1] != label]


def test_rounds_are_pairs_in_random_seeded_order() -> None:
    def order(seed: int) -> list[str]:
        clock = Clock()
        log: list[str] = []
        runners = {label: Fake(label, clock, [0.01], log) for label in "ab"}
        measure(runners, [(3,)], 1, repeats=30, seconds=0, seed=seed, warmup_seconds=0, clock=clock)
        return log[6:]  # two warm-up calls and a check of each

    log = order(0)
    pairs = [tuple(log[index : index + 2]) for index in range(0, len(log), 2)]
    assert len(pairs) == 30
    assert set(pairs) == {("a", "b"), ("b", "a")}
    assert order(0) == log
    assert order(1) != log


def test_warm_up_and_first_call_are_kept_out_of_the_samples() -> None:
    clock = Clock()
    runner = Fake("a", clock, [5.0] + [0.0625] * 1000)
    (found,) = measure(
        {"m": runner}, [(3,)], 4, repeats=4, seconds=1.0, warmup_seconds=6.0, clock=clock
    ).latency
    assert found.first_ms == pytest.approx(5000)
    assert runner.calls == 1 + 16 + 1 + 16  # the first, more until 6 s are over, a check, 1 s of timing
    assert found.repeats_ms == ((62.5,) * 4,) * 4
    assert found.throughput_per_s == 4 / 0.0625
    assert runner.prepared[0].shape == (4, 3)


def test_slow_models_get_at_least_ten_samples() -> None:
    clock = Clock()
    found = measure({"m": Fake("a", clock, [9.0])}, [(3,)], 1, 3, 0.1, warmup_seconds=0, clock=clock).latency[
        0
    ]
    assert [len(repeat) for repeat in found.repeats_ms] == [4, 4, 4]


def test_a_slow_spell_of_the_machine_does_not_touch_the_paired_ratio() -> None:
    clock = Clock()

    class Slowing(Fake):
        def __call__(self) -> Sequence[Any]:
            self.clock.now += self.seconds[0] * (3.0 if 30 < self.clock.now - 100 < 60 else 1.0)
            return ()

    runners = {"original": Slowing("a", clock, [0.2]), "dense": Slowing("b", clock, [0.1])}
    found = measure(runners, [(3,)], 1, repeats=20, seconds=20.0, warmup_seconds=0, clock=clock)
    (speed,) = found.speedup
    assert speed.ratio == pytest.approx(2.0)
    assert speed.verdict == "faster"
    assert max(latency.cv for latency in found.latency) > 0.3
    assert any("not quiet" in warning for warning in found.latency[0].warnings)


def test_statistics_of_known_samples() -> None:
    runner = Fake("a", Clock(), [1.0])
    rows = [[float(value) for value in range(1, 51)], [float(value) for value in range(51, 102)]]
    found = summarize(rows, runner=runner, model="dense", batch=2, first_ms=7.0)
    assert (found.min, found.median, found.mean, found.max) == (1, 51, 51, 101)
    assert (found.p90, found.p95, found.p99) == (91, 96, 100)
    assert found.cv == pytest.approx(np.std(range(1, 102)) / 51)
    assert found.throughput_per_s == pytest.approx(2 / 0.051)


def test_warnings_name_what_is_wrong() -> None:
    runner = Fake("a", Clock(), [1.0])

    def warnings(rows: Sequence[Sequence[float]]) -> tuple[str, ...]:
        return summarize(rows, runner=runner, model="m", batch=1, first_ms=1).warnings

    assert warnings([[1.0] * 20] * 5) == ()
    assert warnings([[1.0, 2.0] * 10] * 5) == (
        "coefficient of variation 33.3% is above 2.5%: the machine is not quiet",
    )
    assert warnings([[1.0] * 33] * 3) == (
        "too few samples for p99: 99, at least 100 are needed",
        "too few repeats for an interval: 3, at least 5 are needed",
    )


def test_the_row_for_the_results_is_json_with_all_samples_in_order() -> None:
    runner = Fake("a", Clock(), [1.0])
    found = summarize([[1.0, 2.0], [3.0000000004]], runner=runner, model="dense", batch=2, first_ms=7.0)
    row = json.loads(json.dumps(found.as_dict()))
    assert row["samples_ms"] == [1.0, 2.0, 3.0]
    wanted = (
        "runner model batch threads min median mean p90 p95 p99 max cv throughput_per_s first_ms warnings"
    )
    assert set(wanted.split()) <= set(row)
    assert (row["runner"], row["model"], row["batch"], row["threads"]) == ("fake", "dense", 2, 1)


def noisy(random: np.random.Generator, mean_ms: float, noise: Iterable[float]) -> list[list[float]]:
    """Rounds of 10 samples: `noise` scales whole rounds, each sample has a one-sided 5 % of its own."""
    return [list(mean_ms * scale * (1 + np.abs(random.normal(0, 0.05, 10)))) for scale in noise]


def verdicts(ratio: float, pairs: int, experiments: int = 100) -> list[str]:
    """Simulated measurements: both share a drifting machine, and each round of each is off by 3 % more."""
    found = []
    for seed in range(experiments):
        random = np.random.default_rng(seed)
        drift = np.exp(np.cumsum(random.normal(0, 0.05, pairs)))
        a = noisy(random, ratio, drift * np.exp(random.normal(0, 0.03, pairs)))
        b = noisy(random, 1.0, drift * np.exp(random.normal(0, 0.03, pairs)))
        found.append(speedup(a, b, seed=seed).verdict)
    return found


def test_identical_models_are_rarely_called_different() -> None:
    found = verdicts(1.0, 20)
    assert found.count("faster") + found.count("slower") <= 5, found
    # The samples are noisy enough to fool a naive test: unpaired means differ by over 5 % most of the time.
    random = np.random.default_rng(0)
    naive = [np.exp(np.cumsum(random.normal(0, 0.05, (2, 20)), axis=1)).mean(axis=1) for _ in range(100)]
    assert sum(abs(a / b - 1) > 0.05 for a, b in naive) > 50


def test_a_ten_percent_difference_is_found_in_both_directions() -> None:
    assert verdicts(1.10, 20).count("faster") >= 95
    assert verdicts(1 / 1.10, 20).count("slower") >= 95


def test_too_few_pairs_are_inconclusive_however_large_the_difference() -> None:
    assert set(verdicts(3.0, 4, 20)) == {"inconclusive"}
    assert set(verdicts(3.0, 5, 20)) == {"faster"}


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.001, 0.999] * 10, "no difference"),
        ([1.010, 1.012] * 10, "no difference"),  # surely above 1, surely below the minimum effect
        ([1.021, 1.025] * 10, "faster"),
        ([0.975, 0.979] * 10, "slower"),
        ([0.8, 1.2] * 10, "inconclusive"),
        ([1.001] * 8 + [1.03] * 8, "inconclusive"),
    ],
)
def test_verdicts_from_interval_and_minimum_effect(ratios: list[float], verdict: str) -> None:
    found = speedup([[ratio] for ratio in ratios], [[1.0]] * len(ratios))
    assert found.verdict == verdict
    assert found.low <= found.ratio <= found.high
    assert found.pairs == len(ratios)


def test_the_ratio_is_the_median_of_paired_ratios_of_medians() -> None:
    a = [[2.0, 2.0, 50.0], [8.0], [3.0]]
    b = [[1.0], [2.0, 2.0, 2.0], [1.0]]
    assert speedup(a, b).ratio == 3.0  # of 2, 4 and 3


def test_the_interval_is_seeded() -> None:
    random = np.random.default_rng(0)
    a, b = noisy(random, 1.0, [1.0] * 9), noisy(random, 1.0, [1.0] * 9)
    assert speedup(a, b, seed=1) == speedup(a, b, seed=1)


def test_rounds_that_do_not_pair_are_refused() -> None:
    for a, b in (([], []), ([[1.0]], [[1.0], [1.0]]), ([[1.0]], [[]])):
        with pytest.raises(
            MeasureError, match=r"^speedup: \d and \d rounds do not pair; measure both together$"
        ):
            speedup(a, b)


@pytest.mark.parametrize(
    "change", [{"batch": 0}, {"repeats": 0}, {"seconds": -1.0}, {"seconds": float("inf")}]
)
def test_requests_that_cannot_be_timed_are_refused(change: dict[str, Any]) -> None:
    request: dict[str, Any] = {"batch": 1, "repeats": 3, "seconds": 0.1} | change
    with pytest.raises(MeasureError, match=r"^latency: cannot time 1 runners"):
        measure({"m": Fake("a", Clock(), [1.0])}, [(3,)], **request)


def test_an_exception_from_progress_ends_it_and_garbage_collection_is_on_again() -> None:
    clock = Clock()
    seen: list[tuple[int, int]] = []

    def stop(done: int, of: int) -> None:
        seen.append((done, of))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({"m": Fake("a", clock, [1.0])}, [(3,)], 1, 5, 0, warmup_seconds=0, clock=clock, progress=stop)
    assert seen == [(1, 5), (2, 5)]
    assert gc.isenabled()


def test_three_runners_are_each_compared_with_the_first() -> None:
    clock = Clock()
    runners = {name: Fake(name, clock, [cost]) for name, cost in (("original", 0.4), ("a", 0.2), ("b", 0.1))}
    found = measure(runners, [(3,)], 8, 6, 0, warmup_seconds=0, clock=clock)
    assert [latency.model for latency in found.latency] == ["original", "a", "b"]
    assert [speed.ratio for speed in found.speedup] == pytest.approx([2.0, 4.0])
    assert {(speed.runner, speed.batch, speed.pairs) for speed in found.speedup} == {("fake", 8, 6)}


def test_a_real_model_a_hundred_times_larger_is_slower() -> None:
    models = {"original": nn.Linear(1024, 1024).eval(), "dense": nn.Linear(1024, 8).eval()}
    runners = {name: open_runner("torch", model) for name, model in models.items()}
    found = measure(runners, [(1024,)], 64, repeats=5, seconds=0.05, warmup_seconds=0.01)
    assert found.speedup[0].ratio > 1.5
    assert all(isinstance(latency, Latency) and latency.min > 0 for latency in found.latency)
    assert found.latency[0].threads == 1
    assert torch.get_num_threads() == 1


def test_a_runner_that_leaves_its_outputs_unwritten_is_not_timed() -> None:
    class Silent(Fake):
        def outputs(self) -> tuple[Array, ...]:
            return (np.array([1.0, np.nan]),)

    runner = Silent("a", Clock(), [1.0])
    with pytest.raises(RunnerError, match=r"^fake: output 0 was not written"):
        measure({"m": runner}, [(3,)], 1, 3, 0.1, warmup_seconds=0, clock=runner.clock)


def test_rows_of_cpu_runners_have_no_gpu() -> None:
    found = summarize([[1.0]], runner=Fake("a", Clock(), [1.0]), model="m", batch=1, first_ms=1)
    assert found.gpu is None
    assert "gpu" not in found.as_dict()
