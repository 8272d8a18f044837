"""Stand-ins for runners: they take time on a clock of the test's own, and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy.runners import Array
from tests.cuda_doubles import FakeCuda, FakeStream


class Idle:
    """A runner but for the call: it has no outputs. `prepared` is what it was given."""

    name, threads, timed = "fake", 1, "host to host"
    providers: tuple[str, ...] = ("cpu",)
    prepared: tuple[Array, ...] = ()

    def prepare(self, inputs: Sequence[Array]) -> None:
        self.prepared = tuple(inputs)

    def poison(self) -> None: ...

    def outputs(self) -> tuple[Array, ...]:
        return ()

    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        return ()

    def close(self) -> None: ...


class Staged(Idle):
    """Takes set seconds: `h2d`, `compute` and `d2h` of its stream, `enqueue_s` of the host."""

    name, providers, timed = "torch_cuda", ("cuda",), "compute, inputs and outputs on the GPU"

    def __init__(
        self,
        cuda: FakeCuda,
        h2d: float = 0.001,
        compute: float = 0.008,
        d2h: float = 0.0005,
        enqueue_s: float = 0.002,
        stream: FakeStream | None = None,
    ) -> None:
        self.cuda, self.seconds, self.enqueue_s = cuda, (h2d, compute, d2h), enqueue_s
        self.stream: Any = stream or cuda.Stream()
        self.calls = 0

    def _work(self, seconds: float) -> None:
        if isinstance(self.stream, FakeStream):
            self.stream.work(seconds)
        else:
            self.cuda.now += seconds

    def copy_in(self) -> None:
        self._work(self.seconds[0])

    def enqueue(self) -> None:
        self.calls += 1
        if self.stream is not None:
            self.cuda.now += self.enqueue_s
        self._work(self.seconds[1])

    def copy_out(self) -> None:
        self._work(self.seconds[2])

    def __call__(self) -> Sequence[Any]:
        self.enqueue()
        if self.stream is not None:
            self.stream.synchronize()
        return ()
