"""Telemetry: what NVML says becomes a summary and warnings; without NVML nothing happens."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from deploy import telemetry
from deploy.telemetry import Sample, Telemetry, current_gpu, look, summarize, warnings

POWER_CAP = pynvml.nvmlClocksEventReasonSwPowerCap
IDLE = pynvml.nvmlClocksEventReasonGpuIdle


class NvmlError(Exception):
    pass


def nvml(**changed: Any) -> SimpleNamespace:
    """Stands in for pynvml with one GPU; an exception as a value is raised."""
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetHandleByUUID": "by uuid",
        "nvmlDeviceGetClockInfo": 1500,
        "nvmlDeviceGetPowerUsage": 250_000,
        "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2**30),
        "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=os.getpid())],
        "nvmlDeviceGetCurrentClocksEventReasons": IDLE,
    } | changed

    def answer(value: Any) -> Any:
        def call(*_: object) -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        return call

    names = {name: getattr(pynvml, name) for name in telemetry.REASONS}
    names |= {name: getattr(pynvml, name) for name in ("NVML_CLOCK_SM", "NVML_CLOCK_MEM")}
    names["NVML_TEMPERATURE_GPU"] = pynvml.NVML_TEMPERATURE_GPU
    return SimpleNamespace(NVMLError=NvmlError, **names, **{k: answer(v) for k, v in answers.items()})


def test_the_double_has_only_what_pynvml_has() -> None:
    assert all(hasattr(pynvml, name) for name in vars(nvml()))
    memory = pynvml.c_nvmlMemory_t
    assert "used" in dict(memory._fields_)


def test_the_thread_looks_and_ends() -> None:
    before = threading.active_count()
    with Telemetry(interval_s=0.005, nvml=nvml()) as found:
        time.sleep(0.05)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert len(found.samples) >= 3
    summary = found.summary()
    assert summary is not None
    assert summary["power_w"] == {"min": 250.0, "median": 250.0, "max": 250.0}
    assert (summary["other_processes"], summary["reasons"]) == (0, {"idle": 1.0})


def test_even_the_shortest_block_gives_a_sample() -> None:
    with Telemetry(interval_s=60, nvml=nvml()) as found:
        pass
    assert len(found.samples) == 1


def test_the_gpu_is_found_by_its_uuid() -> None:
    seen: list[Any] = []
    double = nvml()
    double.nvmlDeviceGetHandleByUUID = lambda uuid: seen.append(uuid) or "by uuid"
    with Telemetry("GPU-1234", interval_s=60, nvml=double) as found:
        pass
    assert seen == ["GPU-1234"]
    assert found._handle == "by uuid"


@pytest.mark.parametrize(
    "module", [None, nvml(nvmlInit=NvmlError()), nvml(nvmlDeviceGetHandleByIndex=NvmlError())]
)
def test_without_nvml_nothing_happens(
    module: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    before = threading.active_count()
    with Telemetry() as found:
        assert threading.active_count() == before
    assert found.summary() is None
    assert warnings(found.summary()) == ()


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    double = nvml(nvmlDeviceGetPowerUsage=NvmlError(), nvmlDeviceGetComputeRunningProcesses=NvmlError())
    found = summarize([look(double, "handle")], double)
    assert "power_w" not in found
    assert found["other_processes"] is None
    assert found["temperature_c"]["median"] == 61
    assert warnings(found) == ()


def sample(sm_mhz: float, reasons: int, processes: int = 1) -> Sample:
    return Sample(sm_mhz, 2000, 300, 70, 2**30, processes, reasons)


def test_doubtful_measurements_are_told() -> None:
    looks = [sample(1900, 0), sample(1500, POWER_CAP, 3), sample(1600, POWER_CAP | IDLE), sample(1900, IDLE)]
    found = summarize(looks, nvml())
    assert found["reasons"] == {"idle": 0.5, "power cap": 0.5}
    assert warnings(found) == (
        "the GPU was slowed down (power cap) in 50% of the time",
        "2 other processes computed on the same GPU",
        "the GPU's clock moved between 1500 and 1900 MHz",
    )
    assert warnings(summarize([sample(1900, IDLE, 2)], nvml())) == (
        "1 other process computed on the same GPU",
    )


def test_the_gpu_in_use_is_named_as_nvml_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(torch._C._CudaDeviceProperties, "uuid")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"00-{i}"))
    assert current_gpu() == "GPU-00-1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert current_gpu() == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_is_seen() -> None:
    with Telemetry(current_gpu()) as found:
        torch.ones(1, device="cuda").sum().item()
        time.sleep(0.3)
    summary = found.summary()
    assert summary is not None
    assert summary["samples"] >= 2
    assert summary["temperature_c"]["max"] > 0
