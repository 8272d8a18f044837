"""One call on a GPU taken apart: copy in, compute, copy out, and the time the CPU needs to enqueue it.

Events on the runner's stream say when the GPU passed each point, the host's clock how long enqueueing took.
Where a runtime keeps its stream to itself, the host's clock times each step, and enqueueing cannot be told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from deploy.errors import MeasureError
from deploy.runners import StagedRunner

ENQUEUE_LIMIT = 0.8  # above this share of compute the GPU may be waiting for the CPU (trtexec's limit too)
BY_EVENTS, BY_CLOCK = "CUDA events", "host clock"


@dataclass(frozen=True)
class Stages:
    """One call in ms; `enqueue_ms` is host time while the GPU works, None where it cannot be told."""

    h2d_ms: float
    compute_ms: float
    d2h_ms: float
    enqueue_ms: float | None


class Stopwatch:
    """Times the stages of calls. `cuda` stands in for torch.cuda where the logic is tested without a GPU."""

    def __init__(self, cuda: Any = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._given, self._clock = cuda, clock
        self._events: list[Any] = []

    def time(self, runner: StagedRunner) -> Stages:
        """One call of a prepared runner, copies included; returns when its outputs are on the host."""
        return self._by_clock(runner) if runner.stream is None else self._by_events(runner)

    def _by_events(self, runner: StagedRunner) -> Stages:
        if not self._events:
            self._events = [_cuda(self._given).Event(enable_timing=True) for _ in range(4)]
        begin, arrived, computed, returned = self._events
        begin.record(runner.stream)
        runner.copy_in()
        arrived.record(runner.stream)
        before = self._clock()
        runner.enqueue()
        enqueued = self._clock() - before
        computed.record(runner.stream)
        runner.copy_out()
        returned.record(runner.stream)
        returned.synchronize()
        return Stages(
            h2d_ms=float(begin.elapsed_time(arrived)),
            compute_ms=float(arrived.elapsed_time(computed)),
            d2h_ms=float(computed.elapsed_time(returned)),
            enqueue_ms=enqueued * 1e3,
        )

    def _by_clock(self, runner: StagedRunner) -> Stages:
        times = [self._clock()]
        for step in (runner.copy_in, runner.enqueue, runner.copy_out):
            step()
            times.append(self._clock())
        h2d, compute, d2h = ((b - a) * 1e3 for a, b in pairwise(times))
        return Stages(h2d, compute, d2h, None)


def _cuda(given: Any) -> Any:
    if given is not None:
        return given
    import torch

    return torch.cuda


def enqueue_warning(stages: Sequence[Stages]) -> str:
    """What to say where the CPU can hardly keep up, else ""."""
    known = [stage.enqueue_ms for stage in stages if stage.enqueue_ms is not None]
    if not known:
        return ""
    enqueue, compute = median(known), median(stage.compute_ms for stage in stages)
    if enqueue <= ENQUEUE_LIMIT * compute:
        return ""
    return (
        f"enqueueing takes {enqueue:.3g} ms of {compute:.3g} ms compute: the CPU may be the limit, "
        "use a CUDA graph"
    )


@dataclass(frozen=True)
class Throughput:
    """Examples per second with `streams` runners at once, copies included: not the inverse of a latency."""

    runner: str
    streams: int
    batch: int
    calls: int
    seconds: float
    per_s: float


def throughput(
    runners: Sequence[StagedRunner],
    batch: int,
    seconds: float = 1.0,
    *,
    cuda: Any = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Throughput:
    """Keep every one of `runners` (prepared with `batch`, each with a stream of its own) busy for `seconds`.

    One call per stream is under way at any time. Raises MeasureError for runners that share a stream or have
    none.
    """
    streams = [runner.stream for runner in runners]
    if not runners or batch < 1 or None in streams or len({id(stream) for stream in streams}) < len(streams):
        raise MeasureError(
            f"{len(runners)} runners cannot run at once", "throughput", "give each a CUDA stream of its own"
        )
    done = [_cuda(cuda).Event(enable_timing=True) for _ in runners]
    for runner, event in zip(runners, done, strict=True):  # the first calls do not count
        _start(runner, event)
    calls, begin = 0, clock()
    while clock() - begin < seconds:
        for runner, event in zip(runners, done, strict=True):
            event.synchronize()
            _start(runner, event)
            calls += 1
    for event in done:
        event.synchronize()
    spent = clock() - begin
    return Throughput(runners[0].name, len(runners), batch, calls, spent, calls * batch / spent)


def _start(runner: StagedRunner, event: Any) -> None:
    runner.copy_in()
    runner.enqueue()
    runner.copy_out()
    event.record(runner.stream)
