"""What the GPU did while it was measured: clocks, power, temperature, slowdowns, memory, other processes.

A thread asks the driver (NVML, package nvidia-ml-py) ten times a second. Without NVML it does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from types import TracebackType
from typing import Any

INTERVAL_S = 0.1
# NVML's names of the bits, in plain words. The first two say that nobody wanted more.
REASONS = {
    "nvmlClocksEventReasonGpuIdle": "idle",
    "nvmlClocksEventReasonApplicationsClocksSetting": "clocks set by the user",
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
    "nvmlClocksEventReasonSwThermalSlowdown": "software thermal slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "hardware thermal slowdown",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonDisplayClockSetting": "display clocks",
}
HARMLESS = ("idle", "clocks set by the user")
CLOCK_SPREAD = 0.1  # a clock that moved by more than this share deserves a word


@dataclass(frozen=True)
class Sample:
    """One look; None for what this GPU does not tell. `processes` that compute on it, this one included."""

    sm_mhz: float | None
    memory_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    memory_bytes: float | None
    processes: float | None
    reasons: int | None


class Telemetry:
    """Watches one GPU in a `with` block. `uuid` as the driver has it, "" for the first GPU.

    `nvml` stands in for the module pynvml where the logic is tested without it.
    """

    def __init__(self, uuid: str = "", *, interval_s: float = INTERVAL_S, nvml: Any = None) -> None:
        self._uuid, self._interval_s = uuid, interval_s
        self._nvml: Any = nvml
        self._handle: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.samples: list[Sample] = []

    def __enter__(self) -> Telemetry:
        self._nvml = self._nvml or nvml_module()
        self._handle = device(self._nvml, self._uuid) if self._nvml is not None else None
        if self._handle is not None:
            self._thread = threading.Thread(target=self._watch, name="telemetry", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._nvml.nvmlShutdown()

    def _watch(self) -> None:
        while True:
            self.samples.append(look(self._nvml, self._handle))
            if self._stop.wait(self._interval_s):
                return

    def summary(self) -> dict[str, Any] | None:
        """Least, median and most of each number, the share of looks with each reason; None without looks."""
        return summarize(self.samples, self._nvml) if self.samples else None


def nvml_module() -> Any:
    """NVML's Python module, None where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def device(nvml: Any, uuid: str = "") -> Any:
    """A GPU's handle, by its UUID as the driver has it, "" for the first; None where the driver has none.
    NVML is initialised where there is one."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(0)
    except nvml.NVMLError:
        nvml.nvmlShutdown()
        return None


def current_gpu() -> str:
    """The UUID of the GPU that PyTorch uses, as NVML writes it; "" without one."""
    import torch

    if not torch.cuda.is_available():
        return ""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def look(nvml: Any, handle: Any) -> Sample:
    """One sample; what the driver refuses to tell is None."""

    def ask(question: Callable[[], float]) -> float | None:
        try:
            return question()
        except nvml.NVMLError:
            return None

    reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    return Sample(
        sm_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        memory_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        power_w=ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
        temperature_c=ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        memory_bytes=ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
        processes=ask(lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))),
        reasons=None if reasons is None else int(reasons),
    )


def summarize(samples: Sequence[Sample], nvml: Any) -> dict[str, Any]:
    """Samples as a row for results: `other_processes` is the most that computed beside this one.

    Inside a container process ids are not the driver's: this process is taken to be one of those listed.
    """
    numbers = [field.name for field in fields(Sample) if field.name not in ("reasons", "processes")]
    found: dict[str, Any] = {"samples": len(samples)}
    for name in numbers:
        values = [value for sample in samples if (value := getattr(sample, name)) is not None]
        if values:
            found[name] = {"min": min(values), "median": median(values), "max": max(values)}
    listed = [int(sample.processes) for sample in samples if sample.processes is not None]
    found["other_processes"] = max(max(listed) - 1, 0) if listed else None
    masks = [sample.reasons for sample in samples if sample.reasons is not None]
    bits = {said: getattr(nvml, name, 0) for name, said in REASONS.items()}
    shares = {said: sum(bool(mask & bit) for mask in masks) / len(samples) for said, bit in bits.items()}
    found["reasons"] = {said: share for said, share in shares.items() if share}
    return found


def warnings(summary: dict[str, Any] | None) -> tuple[str, ...]:
    """What in a summary makes a measurement doubtful, as sentences."""
    if summary is None:
        return ()
    slowed = {said: share for said, share in summary["reasons"].items() if said not in HARMLESS}
    told = [f"the GPU was slowed down ({said}) in {share:.0%} of the time" for said, share in slowed.items()]
    if others := summary["other_processes"]:
        told.append(f"{others} other process{'es' if others > 1 else ''} computed on the same GPU")
    clock = summary.get("sm_mhz")
    if clock and clock["min"] < (1 - CLOCK_SPREAD) * clock["max"]:
        told.append(f"the GPU's clock moved between {clock['min']:.0f} and {clock['max']:.0f} MHz")
    return tuple(told)
