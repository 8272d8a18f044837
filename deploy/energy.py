"""What one call takes of its device's energy: a counter of the device before and after many calls.

Such a counter is of the whole device, idle power and other programs included: a GPU by NVML (Volta and later,
nvmlDeviceGetTotalEnergyConsumption, in mJ), a CPU by the kernel's powercap zones, one for each package
(Documentation/power/powercap/powercap.rst, in uJ). Networks take turns, and each turn lasts from one tick of
the counter to another, as counters move on by ticks of 1 to 100 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deploy import telemetry
from deploy.errors import MeasureError, RunnerError
from deploy.parity import normal_inputs
from deploy.runners import Runner, check_outputs

POWERCAP = Path("/sys/class/powercap")
ROUNDS, SECONDS = 8, 1.0
"""Turns of each network, and the least that one lasts."""
PATIENCE = 2.0
"""Seconds without a tick after which a counter stands still."""
QUICK = 0.25
"""Quantile of the turns, as of latencies: what else runs only adds."""


class Counter(Protocol):
    """Of a device's energy, since whenever."""

    name: str

    def joules(self) -> float:
        """What it says now."""


@dataclass
class GpuCounter:
    """Of one GPU; nvml stands in for the module pynvml, initialised, handle for the device."""

    nvml: Any
    handle: Any
    name: str = "NVML, the whole GPU"

    def joules(self) -> float:
        """Since the driver was loaded."""
        return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3


@dataclass
class CpuCounter:
    """Of all packages of a CPU; zones: their folders."""

    zones: Sequence[Path]
    name: str = "powercap, whole CPU packages"
    _last: dict[Path, int] = field(default_factory=dict)
    _total: int = 0

    def joules(self) -> float:
        """Since it was asked first. A zone begins at 0 again at its range: ask within minutes."""
        for zone in self.zones:
            now = int((zone / "energy_uj").read_text())
            gone = now - self._last.get(zone, now)
            if gone < 0:
                gone += int((zone / "max_energy_range_uj").read_text())
            self._total += gone
            self._last[zone] = now
        return self._total / 1e6


def open_counter(*, gpu: bool, powercap: Path | None = None, nvml: Any = None) -> Counter:
    """The counter of the GPU that PyTorch uses, or of this machine's CPU. Raises RunnerError without one."""
    return _of_gpu(nvml or telemetry.nvml_module()) if gpu else _of_cpu(powercap or POWERCAP)


def _of_gpu(nvml: Any) -> Counter:
    if nvml is None:
        raise RunnerError("nvidia-ml-py is not installed", "energy", "pip install 'compress-release[gpu]'")
    handle = telemetry.device(nvml, telemetry.current_gpu())
    if handle is None:
        raise RunnerError("the NVIDIA driver does not answer", "energy", "see compress doctor")
    counter = GpuCounter(nvml, handle)
    try:
        counter.joules()
    except nvml.NVMLError as error:
        what = f"this GPU has no energy counter: {error}"
        raise RunnerError(what, "energy", "ask for a latency instead") from None
    return counter


def _of_cpu(powercap: Path) -> Counter:
    zones = [
        path.parent
        for path in sorted(powercap.glob("*/name"))
        if path.read_text().strip().startswith("package")
    ]
    if not zones:
        what = f"this machine has no energy counter: nothing is called package under {powercap}"
        raise RunnerError(what, "energy", "measure where there is one, or ask for a latency instead")
    counter = CpuCounter(zones)
    try:
        counter.joules()
    except OSError as error:
        what = f"cannot read {zones[0].name}/energy_uj: {error.strerror}"
        fix = f"chmod a+r {powercap}/*/energy_uj, as root"
        raise RunnerError(what, "energy", fix) from None
    return counter


def per_call(
    runners: Mapping[str, Runner],
    input_shapes: Sequence[Sequence[int]],
    batch: int,
    counter: Counter,
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Millijoules of one call by name, of runners that take turns on normal inputs of `batch`.

    A turn of each before the first is not counted: the device warms up. Raises MeasureError where the counter
    stands still.
    """
    inputs, turn = normal_inputs(input_shapes, batch, seed), _Turn(counter, seconds, clock)
    for runner in runners.values():
        runner.prepare(inputs)
        turn(runner)
        check_outputs(runner)
    found: dict[str, list[float]] = {name: [] for name in runners}
    order = np.random.default_rng(seed)
    for _ in range(rounds):
        for name in order.permutation(list(runners)):
            found[name].append(turn(runners[name]))
    return {name: float(np.quantile(values, QUICK)) for name, values in found.items()}


@dataclass(frozen=True)
class _Turn:
    counter: Counter
    seconds: float
    clock: Callable[[], float]

    def __call__(self, runner: Runner) -> float:
        """Millijoules of one call, from a tick to the first one after `seconds`."""
        begin, _ = self._to_tick(runner)
        calls, started = 0, self.clock()
        while self.clock() - started < self.seconds:
            runner()
            calls += 1
        end, more = self._to_tick(runner)
        return 1e3 * (end - begin) / (calls + more)

    def _to_tick(self, runner: Runner) -> tuple[float, int]:
        """The counter right after it moved on, and the calls until then."""
        before, calls, started = self.counter.joules(), 0, self.clock()
        while (now := self.counter.joules()) == before:
            if self.clock() - started > PATIENCE:
                what = f"the energy counter stands still ({self.counter.name})"
                raise MeasureError(what, "energy", "ask for a latency instead")
            runner()
            calls += 1
        return now, calls
