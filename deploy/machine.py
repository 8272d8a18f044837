"""What a measurement was taken on: hardware, system, library versions. No user, host or folder names."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

VERSIONS_OF = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "pycuda",
    "numpy",
    "scipy",
)


def describe() -> dict[str, Any]:
    """Facts for a report, ready for JSON; what is unknown is None or left out.

    `logical_cpus` are those this process may use; memory is in bytes; `commit` is that of this tool's
    source tree, None outside one, with "-dirty" when a tracked file differs from it.
    """
    import psutil
    import torch

    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cpus": _usable_cpus(),
        "avx512": "avx512f" in cpu_flags(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "gpus": gpus(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that decide results, those that are installed."""
    found = {}
    for package in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def cpu_model() -> str:
    """The CPU's marketing name, else the architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction set flags by Linux's names ("avx512f"); empty where the system does not tell."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo (x86: model name, flags; Arm: Features), else ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next(
        (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), ""
    )


def _usable_cpus() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes, compute capability and driver of each NVIDIA GPU; empty without any."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [_gpu(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, driver: str) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return {
        "name": nvml.nvmlDeviceGetName(handle),
        "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        "compute_capability": f"{major}.{minor}",
        "driver": driver,
    }


def commit(folder: Path | None = None) -> str | None:
    """The git commit that `folder`'s files come from, "-dirty" if they differ; None if git cannot tell.

    None means the folder of this package. It must be tracked: a package installed inside somebody's
    repository is not that repository's commit.
    """
    folder = folder or Path(__file__).parent
    tracked = _git(folder, "ls-files", ".")
    head = _git(folder, "rev-parse", "HEAD")
    if not tracked or not head:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return head if changed == "" else f"{head}-dirty"


def _git(folder: Path, *arguments: str) -> str | None:
    # fsmonitor is a program named in the repository's config: do not let status start it.
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
