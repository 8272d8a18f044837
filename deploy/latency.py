"""Latency by interleaved pairs, and the speed-up as a paired ratio with an interval.

Comparing two means cries wolf on a busy machine. Here the runners take turns (A B, B A, ...: random order
in each round), so that a slow spell of the machine hits all of them, and a difference is only called one
when the interval over rounds and a minimum effect agree. All times are in milliseconds.

On a GPU a sample is the compute time of one call between CUDA events; copies and enqueueing are apart.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy import telemetry
from deploy.errors import MeasureError
from deploy.gpu_latency import BY_CLOCK, BY_EVENTS, Stages, Stopwatch, enqueue_warning
from deploy.parity import normal_inputs
from deploy.runners import Runner, StagedRunner, check_outputs

WARMUP_SECONDS = 0.2  # trtexec's default
LEAST_SAMPLES = 10  # per runner, trtexec's default
LEAST_PAIRS = 5  # fewer medians cannot carry a 95 % interval: 2 * 0.5**5 = 6 %
MINIMUM_EFFECT = 0.02
QUICK = 0.25
"""Quantile of samples: what follows an interruption finds its caches cold."""
CV_LIMIT = 0.025  # trtexec warns above it
_RESAMPLES = 10_000

Clock = Callable[[], float]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Latency:
    """The time of one call of one runner at one batch size, in ms.

    `repeats_ms` holds every sample, one tuple per round, warm-up not included. `first_ms` is the very first
    call. `cv` is the coefficient of variation (standard deviation / mean). `timed` says what a call spans.
    `gpu`, on a GPU only: statistics of h2d, compute, d2h and enqueue in ms, `by` what they were timed, and
    the `telemetry` of the whole measurement.
    """

    runner: str
    model: str
    batch: int
    threads: int
    timed: str
    repeats_ms: tuple[tuple[float, ...], ...]
    min: float
    median: float
    mean: float
    p90: float
    p95: float
    p99: float
    max: float
    cv: float
    throughput_per_s: float
    first_ms: float
    warnings: tuple[str, ...]
    gpu: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row of results.json: samples in one list, in time order, rounded to 1 ns."""
        row = {key: value for key, value in vars(self).items() if key != "repeats_ms"}
        row["samples_ms"] = [round(sample, 6) for repeat in self.repeats_ms for sample in repeat]
        row["warnings"] = list(self.warnings)
        if self.gpu is None:
            del row["gpu"]
        return row


@dataclass(frozen=True)
class Speedup:
    """How many times faster the candidate is: `ratio` with its 95 % interval over `pairs` rounds."""

    runner: str
    batch: int
    ratio: float
    low: float
    high: float
    pairs: int
    verdict: str


@dataclass(frozen=True)
class Measurement:
    """One latency per runner, and one speed-up per runner after the first, which is the baseline."""

    latency: tuple[Latency, ...]
    speedup: tuple[Speedup, ...]

    @property
    def quick_ms(self) -> dict[str, float]:
        """By model, a low quantile of its samples, for which what else runs on the machine counts little."""
        return {row.model: float(np.quantile(np.concatenate(row.repeats_ms), QUICK)) for row in self.latency}


def measure(
    runners: Mapping[str, Runner],
    input_shapes: Sequence[Sequence[int]],
    batch: int,
    repeats: int = 20,
    seconds: float = 1.0,
    *,
    seed: int = 0,
    warmup_seconds: float = WARMUP_SECONDS,
    clock: Clock = time.perf_counter,
    progress: Progress = lambda done, of: None,
    stopwatch: Stopwatch | None = None,
    watch: Callable[[], telemetry.Telemetry] = lambda: telemetry.Telemetry(telemetry.current_gpu()),
) -> Measurement:
    """Time runners (model name -> runner; the first is the baseline) on normal inputs of `batch`.

    Each runner is warmed up for `warmup_seconds`, then timed in `repeats` rounds for at least `seconds` and
    10 calls in all. `seed` fixes inputs and orders. `progress(done, repeats)` is called after each round;
    an exception from it ends the measurement. Staged runners are timed by `stopwatch` while `watch()` looks
    at the GPU. Raises MeasureError for a request that cannot be timed, RunnerError for a runner that leaves
    its outputs unwritten.
    """
    if not runners or batch < 1 or repeats < 1 or not 0 <= seconds < float("inf"):
        raise MeasureError(
            f"cannot time {len(runners)} runners, batch {batch}, {repeats} repeats, {seconds} seconds",
            "latency",
            "use a batch and repeats of 1 or more, and a finite time",
        )
    inputs = normal_inputs(input_shapes, batch, seed)
    first_ms = {}
    for name, runner in runners.items():
        runner.prepare(inputs)
        first_ms[name] = _warm_up(runner, warmup_seconds, clock)
        check_outputs(runner)
    timer = _Timer(clock, stopwatch or Stopwatch(clock=clock))
    staged = any(isinstance(runner, StagedRunner) for runner in runners.values())
    with watch() if staged else contextlib.nullcontext() as looks:
        samples = _rounds(runners, repeats, seconds, np.random.default_rng(seed), timer, progress)
    seen = looks.summary() if looks else None
    latency = tuple(
        summarize(
            samples[name],
            runner=runner,
            model=name,
            batch=batch,
            first_ms=first_ms[name],
            stages=timer.stages.get(id(runner), ()),
            seen=seen,
        )
        for name, runner in runners.items()
    )
    baseline, *others = latency
    pairs = (
        speedup(baseline.repeats_ms, other.repeats_ms, runner=other.runner, batch=batch, seed=seed)
        for other in others
    )
    return Measurement(latency, tuple(pairs))


class _Timer:
    """Times calls: whole ones by the clock, those of staged runners in stages, which it keeps by runner."""

    def __init__(self, clock: Clock, stopwatch: Stopwatch) -> None:
        self.clock, self._stopwatch = clock, stopwatch
        self.stages: dict[int, list[Stages]] = {}

    def block(self, runner: Runner, least: int, seconds: float) -> tuple[float, ...]:
        """One turn: times in ms of `least` calls or of `seconds`, whichever is longer."""
        if isinstance(runner, StagedRunner):
            return self._staged_block(runner, least, seconds)
        times: list[float] = []
        begin = before = self.clock()
        while len(times) < least or before - begin < seconds:
            runner()
            after = self.clock()
            times.append((after - before) * 1e3)
            before = after
        return tuple(times)

    def _staged_block(self, runner: StagedRunner, least: int, seconds: float) -> tuple[float, ...]:
        found: list[Stages] = []
        begin = self.clock()
        while len(found) < least or self.clock() - begin < seconds:
            found.append(self._stopwatch.time(runner))
        self.stages.setdefault(id(runner), []).extend(found)
        return tuple(stage.compute_ms for stage in found)


def _warm_up(runner: Runner, seconds: float, clock: Clock) -> float:
    """Call until `seconds` have passed, at least twice; the time of the first call in ms."""
    begin = clock()
    runner()
    first = clock()
    runner()
    while clock() - begin < seconds:
        runner()
    return (first - begin) * 1e3


def _rounds(
    runners: Mapping[str, Runner],
    repeats: int,
    seconds: float,
    random: np.random.Generator,
    timer: _Timer,
    progress: Progress,
) -> dict[str, list[tuple[float, ...]]]:
    names = list(runners)
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    least = -(-LEAST_SAMPLES // repeats)
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a call would be counted as the model's
    try:
        for done in range(repeats):
            for index in random.permutation(len(names)):
                name = names[index]
                samples[name].append(timer.block(runners[name], least, seconds / repeats))
            gc.collect(0)
            progress(done + 1, repeats)
    finally:
        if collecting:
            gc.enable()
    return samples


def statistics(values_ms: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """min, median, mean, p90, p95, p99, max and cv; percentiles by linear interpolation (numpy's default)."""
    flat = np.asarray(values_ms, dtype=np.float64)
    mean = float(flat.mean())
    median, p90, p95, p99 = (float(value) for value in np.percentile(flat, (50, 90, 95, 99)))
    return {
        "min": float(flat.min()),
        "median": median,
        "mean": mean,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "max": float(flat.max()),
        "cv": float(flat.std()) / mean if mean > 0 else 0.0,
    }


def summarize(
    repeats_ms: Sequence[Sequence[float]],
    *,
    runner: Runner,
    model: str,
    batch: int,
    first_ms: float,
    stages: Sequence[Stages] = (),
    seen: dict[str, Any] | None = None,
) -> Latency:
    """The statistics of raw samples; of `stages` and the telemetry `seen` during them, if there are any."""
    flat = np.concatenate([np.asarray(repeat, dtype=np.float64) for repeat in repeats_ms])
    found = statistics(flat)
    warnings = [*_warnings(flat.size, len(repeats_ms), found["cv"])]
    if stages:
        warnings += [*filter(None, [enqueue_warning(stages)]), *telemetry.warnings(seen)]
    return Latency(
        runner=runner.name,
        model=model,
        batch=batch,
        threads=runner.threads,
        timed=runner.timed,
        repeats_ms=tuple(tuple(repeat) for repeat in repeats_ms),
        throughput_per_s=batch / found["mean"] * 1e3 if found["mean"] > 0 else 0.0,
        first_ms=first_ms,
        warnings=tuple(warnings),
        gpu=_gpu(stages, seen) if stages else None,
        **found,
    )


def _gpu(stages: Sequence[Stages], seen: dict[str, Any] | None) -> dict[str, Any]:
    by_events = stages[0].enqueue_ms is not None
    found: dict[str, Any] = {"by": BY_EVENTS if by_events else BY_CLOCK}
    for field in fields(Stages):
        values = [value for stage in stages if (value := getattr(stage, field.name)) is not None]
        found[field.name.removesuffix("_ms")] = statistics(values) if values else None
    return found | {"telemetry": seen}


def _warnings(samples: int, repeats: int, cv: float) -> tuple[str, ...]:
    found = []
    if cv > CV_LIMIT:
        found.append(f"coefficient of variation {cv:.1%} is above {CV_LIMIT:.1%}: the machine is not quiet")
    if samples < 100:
        found.append(f"too few samples for p99: {samples}, at least 100 are needed")
    if repeats < LEAST_PAIRS:
        found.append(f"too few repeats for an interval: {repeats}, at least {LEAST_PAIRS} are needed")
    return tuple(found)


def speedup(
    baseline_ms: Sequence[Sequence[float]],
    candidate_ms: Sequence[Sequence[float]],
    *,
    runner: str = "",
    batch: int = 0,
    seed: int = 0,
    minimum_effect: float = MINIMUM_EFFECT,
) -> Speedup:
    """Baseline time over candidate time, from samples per round of an interleaved measurement.

    `ratio` is the median over rounds of median(baseline) / median(candidate); `low` and `high` bound it at
    95 % (percentile bootstrap over rounds, 10,000 resamples). "faster": the interval lies above 1 and the
    ratio is at least 1 + minimum_effect; "slower": the mirror image; "no difference": the whole interval
    is within the minimum effect; else, and with fewer than 5 rounds, "inconclusive".
    """
    if not baseline_ms or len(baseline_ms) != len(candidate_ms) or not all((*baseline_ms, *candidate_ms)):
        raise MeasureError(
            f"{len(baseline_ms)} and {len(candidate_ms)} rounds do not pair",
            "speedup",
            "measure both together",
        )
    ratios = np.array(
        [np.median(a) / np.median(b) for a, b in zip(baseline_ms, candidate_ms, strict=True)],
        dtype=np.float64,
    )
    picks = np.random.default_rng(seed).integers(0, ratios.size, size=(_RESAMPLES, ratios.size))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    ratio = float(np.median(ratios))
    verdict = _verdict(ratio, float(low), float(high), ratios.size, 1.0 + minimum_effect)
    return Speedup(runner, batch, ratio, float(low), float(high), int(ratios.size), verdict)


def _verdict(ratio: float, low: float, high: float, pairs: int, least: float) -> str:
    if pairs < LEAST_PAIRS:
        return "inconclusive"
    if low > 1.0 and ratio >= least:
        return "faster"
    if high < 1.0 and ratio <= 1.0 / least:
        return "slower"
    if low >= 1.0 / least and high <= least:
        return "no difference"
    return "inconclusive"
