"""Stages of a call on a GPU, throughput over several streams: on doubles with a clock, and on a real GPU."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploy.errors import MeasureError
from deploy.gpu_latency import Stages, Stopwatch, enqueue_warning, throughput
from deploy.latency import measure
from deploy.runners import StagedRunner, open_runner
from deploy.telemetry import Telemetry
from tests.cuda_doubles import FakeCuda
from tests.runner_doubles import Staged

NO_CUDA = not torch.cuda.is_available()


def test_events_tell_the_stages_apart() -> None:
    cuda = FakeCuda()
    runner = Staged(cuda, enqueue_s=0.0005)
    assert isinstance(runner, StagedRunner)
    found = Stopwatch(cuda, cuda.clock).time(runner)
    assert found.h2d_ms == pytest.approx(1.0)
    assert found.compute_ms == pytest.approx(8.0)
    assert found.d2h_ms == pytest.approx(0.5)
    assert found.enqueue_ms == pytest.approx(0.5)
    assert cuda.now == pytest.approx(100.0 + 0.0095)  # the host waited for the last copy


def test_a_gpu_that_waits_for_the_cpu_is_told() -> None:
    cuda = FakeCuda()
    watch = Stopwatch(cuda, cuda.clock)
    slow = [watch.time(Staged(cuda, compute=0.001, enqueue_s=0.004)) for _ in range(3)]
    assert slow[0].compute_ms >= 3.0  # idle until the launch came
    assert enqueue_warning(slow) == (
        "enqueueing takes 4 ms of 4 ms compute: the CPU may be the limit, use a CUDA graph"
    )
    assert enqueue_warning([watch.time(Staged(cuda))]) == ""
    assert enqueue_warning([Stages(1, 1, 1, None)]) == ""


def test_a_runner_without_a_stream_is_timed_by_the_clock() -> None:
    cuda = FakeCuda()
    runner = Staged(cuda)
    runner.stream = None
    found = Stopwatch(None, cuda.clock).time(runner)
    assert (found.h2d_ms, found.compute_ms, found.d2h_ms) == pytest.approx((1.0, 8.0, 0.5))
    assert found.enqueue_ms is None


class Seen(Telemetry):
    """A GPU that was slowed down."""

    def __enter__(self) -> Seen:
        return self

    def summary(self) -> dict[str, Any]:
        return {"samples": 3, "reasons": {"power cap": 0.5, "idle": 0.1}, "other_processes": 2}


def test_rows_of_gpu_runners_have_stages_telemetry_and_warnings() -> None:
    cuda = FakeCuda()
    runners = {
        "original": Staged(cuda, h2d=0.004),
        "dense": Staged(cuda, h2d=0.004, compute=0.004, enqueue_s=0.0039),
    }
    found = measure(
        runners,
        [(3,)],
        8,
        repeats=5,
        seconds=1.0,
        warmup_seconds=0,
        clock=cuda.clock,
        stopwatch=Stopwatch(cuda, cuda.clock),
        watch=Seen,
    )
    rows = [json.loads(json.dumps(latency.as_dict(), allow_nan=False)) for latency in found.latency]
    for row, compute in zip(rows, (8.0, 4.0), strict=True):
        assert row["median"] == pytest.approx(compute)  # a sample is compute alone
        assert row["gpu"]["by"] == "CUDA events"
        assert {key: row["gpu"][key]["p99"] for key in ("h2d", "compute", "d2h")} == pytest.approx(
            {"h2d": 4.0, "compute": compute, "d2h": 0.5}
        )
        assert row["gpu"]["telemetry"]["samples"] == 3
        assert len(row["samples_ms"]) >= 10
        assert "the GPU was slowed down (power cap) in 50% of the time" in row["warnings"]
        assert "2 other processes computed on the same GPU" in row["warnings"]
    assert not any("enqueueing" in warning for warning in rows[0]["warnings"])
    assert any("use a CUDA graph" in warning for warning in rows[1]["warnings"])
    assert rows[0]["throughput_per_s"] == pytest.approx(8 / 0.008)
    assert found.speedup[0].ratio == pytest.approx(2.0)


def test_rows_by_the_clock_say_so_and_have_no_enqueue_time() -> None:
    cuda = FakeCuda()
    runner = Staged(cuda)
    runner.stream = None
    found = measure({"m": runner}, [(3,)], 1, 5, 0.1, warmup_seconds=0, clock=cuda.clock, watch=Seen)
    gpu = found.latency[0].gpu
    assert gpu is not None
    assert (gpu["by"], gpu["enqueue"]) == ("host clock", None)
    assert gpu["compute"]["median"] == pytest.approx(8.0)


def test_several_streams_overlap() -> None:
    def per_s(streams: int) -> float:
        cuda = FakeCuda()
        runners = [Staged(cuda, enqueue_s=0.0001) for _ in range(streams)]
        found = throughput(runners, 4, 1.0, cuda=cuda, clock=cuda.clock)
        assert (found.streams, found.batch) == (streams, 4)
        assert found.calls == sum(runner.calls for runner in runners) - streams
        assert found.per_s == pytest.approx(found.calls * 4 / found.seconds)
        assert found.seconds >= 1.0
        return found.per_s

    alone = per_s(1)
    assert alone == pytest.approx(4 / 0.0096, rel=0.05)
    assert per_s(4) == pytest.approx(4 * alone, rel=0.05)


def test_runners_that_share_a_stream_are_refused() -> None:
    cuda = FakeCuda()
    stream = cuda.Stream()
    shared = [Staged(cuda, stream=stream), Staged(cuda, stream=stream)]
    without = Staged(cuda)
    without.stream = None
    for runners in (shared, [without], []):
        with pytest.raises(MeasureError, match="cannot run at once; give each a CUDA stream of its own"):
            throughput(runners, 1, 0.1, cuda=cuda, clock=cuda.clock)


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="no CUDA device")
class TestOnAGpu:
    def test_stages_and_graph_of_a_real_model(self) -> None:
        net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(40)]).eval()
        runners = {kind: open_runner(kind, net) for kind in ("torch_cuda", "torch_cuda_graph")}
        found = measure(runners, [(256,)], 8, repeats=5, seconds=0.5)
        eager, graph = (latency.gpu or {} for latency in found.latency)
        assert eager["by"] == "CUDA events"
        assert graph["enqueue"]["median"] < eager["enqueue"]["median"]
        assert all(eager[stage]["min"] > 0 for stage in ("h2d", "compute", "d2h"))

    def test_throughput_of_a_real_model(self) -> None:
        net = nn.Linear(64, 64).eval()
        runners = [open_runner("torch_cuda_graph", net) for _ in range(2)]
        for runner in runners:
            runner.prepare((np.zeros((4, 64), np.float32),))
        staged = [runner for runner in runners if isinstance(runner, StagedRunner)]
        assert throughput(staged, 4, 0.1).per_s > 0
