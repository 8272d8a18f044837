"""Stand-ins for torch.cuda, so that what runs on a GPU is tested without one. They compute on the CPU.

`FakeCuda` has a clock of its own: each piece of work takes the time that was set for it, on a stream that
works through its queue while the host goes on. A test says that every name here exists in torch.cuda.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class FakeStream:
    """A queue on the device: `free_at` is when what was enqueued so far will be done, in seconds."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.free_at = 0.0

    def work(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.cuda.now) + seconds

    def synchronize(self) -> None:
        self.cuda.now = max(self.cuda.now, self.free_at)


class FakeEvent:
    """Recorded where its stream then stands."""

    def __init__(self, cuda: FakeCuda, enable_timing: bool = False) -> None:
        assert enable_timing, "elapsed_time needs an event made for timing"
        self.cuda, self.at = cuda, float("nan")

    def record(self, stream: FakeStream) -> None:
        stream.work(0.0)
        self.at = stream.free_at

    def synchronize(self) -> None:
        self.cuda.now = max(self.cuda.now, self.at)

    def elapsed_time(self, end_event: FakeEvent) -> float:
        return (end_event.at - self.at) * 1e3


class FakeGraph:
    """Replays what was recorded in `graph`: nothing but what the test puts into `body`."""

    body: Callable[[], None] = staticmethod(lambda: None)
    replays = 0

    def replay(self) -> None:
        type(self).replays += 1
        type(self).body()


class FakeCuda:
    """torch.cuda as far as the runners and the stopwatch use it; `now` is the host's clock in seconds."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def Stream(self) -> FakeStream:
        return FakeStream(self)

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self, enable_timing)

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph()

    def synchronize(self) -> None:
        self.log.append("synchronize")

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, cuda_graph: FakeGraph, stream: Any = None) -> Iterator[None]:
        self.log.append("capture")
        yield


OF_TORCH_CUDA = ("Stream", "Event", "CUDAGraph", "synchronize", "stream", "graph")
