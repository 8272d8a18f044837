"""What can run a model on this machine, why not, and what to do about it (`compress doctor`)."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from deploy.errors import RunnerError
from deploy.ort_runners import FIXES, PLUGIN, PLUGIN_FIX, PROVIDERS, plugin_devices
from deploy.runners import ORT_KINDS, TORCH_KINDS
from deploy.torch_runners import COMPILER_FIX, missing_compiler, torch_cuda_fix


@dataclass(frozen=True)
class Availability:
    """Whether something works here. `detail`: the version, or what is missing; `fix`: empty if usable."""

    name: str
    usable: bool
    detail: str
    fix: str


def available() -> tuple[Availability, ...]:
    """Every runner and runtime, in fixed order: does it work on this machine, and what to do if not.

    Never raises. Packages that can crash without a driver are imported in a process of their own.
    """
    checks: tuple[tuple[str, Callable[[], Availability]], ...] = (
        ("torch", lambda: Availability("torch", True, _version("torch"), "")),
        ("torch_compile", _check_torch_compile),
        *((name, functools.partial(_check_torch_cuda, name)) for name in TORCH_KINDS[2:]),
        *((name, functools.partial(_check_provider, name)) for name in ORT_KINDS),
        ("cuda driver", _check_driver),
        ("tensorrt", lambda: _check_package("tensorrt", "tensorrt", "compress-release[tensorrt]")),
        (
            "tensorrt_rtx",
            lambda: _check_package("tensorrt_rtx", "tensorrt_rtx", "compress-release[tensorrt-rtx]"),
        ),
        ("pycuda", lambda: _check_package("pycuda", "pycuda.driver", "compress-release[pycuda]")),
    )
    return tuple(_guarded(name, check) for name, check in checks)


def _guarded(name: str, check: Callable[[], Availability]) -> Availability:
    try:
        return check()
    except Exception as error:  # a broken installation can raise anything; the list must still be complete
        return Availability(name, False, f"{type(error).__name__}: {error}", f"reinstall {name}")


def _version(*packages: str) -> str:
    """The version of the first package that is installed, else ""."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return ""


def _check_torch_compile() -> Availability:
    lack = missing_compiler()
    return Availability("torch_compile", not lack, lack or _version("torch"), COMPILER_FIX if lack else "")


def _check_torch_cuda(name: str) -> Availability:
    import torch

    if not torch.cuda.is_available():
        return Availability(name, False, "torch.cuda.is_available() is False", torch_cuda_fix())
    if name == "torch_cuda_compile" and importlib.util.find_spec("triton") is None:
        return Availability(name, False, "triton is not installed", "pip install triton")
    if name == "torch_cuda_compile" and (lack := missing_compiler()):
        return Availability(name, False, lack, COMPILER_FIX)
    return Availability(name, True, torch.cuda.get_device_name(), "")


def _check_provider(name: str) -> Availability:
    import onnxruntime

    provider, version = PROVIDERS[name], _version("onnxruntime", "onnxruntime-gpu")
    plugin = name == "onnxruntime_nvtensorrtrtx"
    if plugin and importlib.util.find_spec(PLUGIN) is None:
        return Availability(name, False, "the plug-in is not installed", PLUGIN_FIX)
    if not plugin and provider not in onnxruntime.get_available_providers():
        return Availability(name, False, f"onnxruntime {version} was built without {provider}", FIXES[name])
    driver = _check_driver()
    if name != "onnxruntime" and not driver.usable:
        return Availability(name, False, driver.detail, driver.fix)
    if plugin:
        try:
            plugin_devices()
        except RunnerError as error:
            return Availability(name, False, error.what, error.fix)
    return Availability(name, True, f"{version} {provider}", "")


def _check_driver() -> Availability:
    """The driver library itself, as every CUDA runtime sees it (cuInit, CUDA driver API)."""
    import ctypes

    fix = "install an NVIDIA driver, on a machine with an NVIDIA GPU"
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Availability("cuda driver", False, "the driver library (libcuda) is not here", fix)
    code, number = int(library.cuInit(0)), ctypes.c_int(0)
    if code:
        return Availability("cuda driver", False, f"cuInit returned {code}", fix)
    library.cuDriverGetVersion(ctypes.byref(number))
    # The version is 1000 x major + 10 x minor (cuDriverGetVersion).
    return Availability("cuda driver", True, f"CUDA {number.value // 1000}.{number.value % 1000 // 10}", "")


def _check_package(name: str, module: str, extra: str) -> Availability:
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return Availability(name, False, "not installed", f"pip install '{extra}'")
    version = _version(name, f"{name.replace('_', '-')}-cu13", f"{name.replace('_', '-')}-cu13-bindings")
    failure = import_failure(module)
    if failure:
        return Availability(name, False, f"{version} does not import: {failure}", f"reinstall '{extra}'")
    driver = _check_driver()
    if not driver.usable:
        return Availability(name, False, f"{version} imports, but {driver.detail}", driver.fix)
    return Availability(name, True, version, "")


def import_failure(module: str, timeout_s: float = 60.0) -> str:
    """Why `import module` fails in a fresh process, "" if it works."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:g} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return last[0] if done.returncode else ""
