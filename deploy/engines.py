"""What an engine is tied to, and whether it may be loaded here.

Loading an engine runs native code that was made for one version of a library and, mostly, one GPU. So it
goes by its sidecar, the JSON file beside it that `deploy.to_tensorrt` wrote: unknown content is never
deserialized, and an engine for something else than what is here is refused with the command that builds it
again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.errors import ArtifactError, RunnerError
from deploy.nvinfer import load

TOOL, FORMAT = "compress-release", 1
_SIDECAR_BYTES = 16 * 2**20
# TensorRT-RTX without a compute capability: "8.0, 8.6, 8.9, 12.0, and later" (NVIDIA, CPU-only AOT).
_PORTABLE_FROM = (8, 0)


def sidecar_path(engine: Path) -> Path:
    """Where the sidecar of an engine lies."""
    return engine.with_suffix(f"{engine.suffix}.json")


def this_machine(library: str) -> dict[str, Any]:
    """What an engine of `library` meets here: library and its version, GPU 0 (None without), system.

    Raises RunnerError if the library is not installed or does not import.
    """
    version = str(load(library).__version__)
    return {"library": library, "library_version": version, **gpu_here(), "platform": system_here()}


def gpu_here() -> dict[str, str | None]:
    """Name, compute capability and driver of the GPU that PyTorch takes, each None if unknown."""
    import torch

    from deploy.machine import gpus

    if not torch.cuda.is_available():
        return {"gpu": None, "compute_capability": None, "driver": None}
    major, minor = torch.cuda.get_device_capability()
    driver = next((gpu["driver"] for gpu in gpus()), None)
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}", "driver": driver}


def system_here() -> str:
    return f"{platform.system()} {platform.machine()}"


def check(engine: Path, *, here: Mapping[str, Any]) -> dict[str, Any]:
    """The sidecar of an engine that may be run `here` (see this_machine); else raises, see `read`."""
    return read(engine, here=here)[1]


def read(engine: Path, *, here: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The content of an engine that this tool built for what is here, and its sidecar.

    Raises ArtifactError if the engine is missing or its hash is not that of a sidecar of this tool, and
    RunnerError with the reason and the rebuild command if library, version, system, GPU or driver differ.
    The hash keeps out mix-ups and foreign files, not someone who can write both files.
    """
    sidecar = read_sidecar(engine)
    if not engine.is_file():
        raise ArtifactError("no such file", str(engine), f"build it: {sidecar['rebuild']}")
    content = engine.read_bytes()
    if hashlib.sha256(content).hexdigest() != sidecar["engine"]["sha256"]:
        raise ArtifactError(
            f"is not the engine that {sidecar_path(engine).name} describes; it was not loaded",
            str(engine),
            f"build it again: {sidecar['rebuild']}",
        )
    reason = _mismatch(sidecar, here)
    if here["gpu"] is None and not reason:
        what = "needs an NVIDIA GPU and driver, and PyTorch sees none here"
        raise RunnerError(what, str(engine), "run it on a machine that has them")
    reason = reason or _gpu_mismatch(sidecar, here) or _driver_mismatch(sidecar, here)
    if reason:
        raise RunnerError(reason, str(engine), f"build it again in its folder: {sidecar['rebuild']}")
    return content, sidecar


def read_sidecar(engine: Path) -> dict[str, Any]:
    path = sidecar_path(engine)
    fix = "build the engine with this tool; it was not loaded"
    if not path.is_file():
        raise ArtifactError(f"has no {path.name} beside it, so nobody knows what it is", str(engine), fix)
    try:
        if path.stat().st_size > _SIDECAR_BYTES:
            raise ValueError("too large")
        document = json.loads(path.read_text(encoding="utf-8"))
        known = document["tool"] == TOOL and document["format"] == FORMAT
        known = known and bool(document["rebuild"] and document["engine"]["sha256"] and document["options"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"is not a sidecar of this tool: {error!r}", str(path), fix) from error
    if not known:
        raise ArtifactError("is not a sidecar of this tool, or of another version", str(path), fix)
    return dict(document)


def _mismatch(sidecar: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Why the engine must not run with the library and system that are here, "" if it may."""
    library, built, now = sidecar["library"], sidecar["library_version"], here["library_version"]
    if library != here["library"]:
        return f"is an engine of {library}, not of {here['library']}"
    same_major = built.split(".")[0] == now.split(".")[0] and _number(built) <= _number(now)
    if built != now and not (sidecar["options"]["version_compatible"] and same_major):
        return f"was built with {library} {built}, here is {now}"
    if library == "tensorrt" and sidecar["platform"] != here["platform"]:
        return f"was built on {sidecar['platform']}, here is {here['platform']}"
    return ""


def _gpu_mismatch(sidecar: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """TensorRT times its kernels on one GPU; a TensorRT-RTX engine is for compute capabilities."""
    asked, now = sidecar["options"]["compute_capability"], str(here["compute_capability"])
    found = f"here is {here['gpu']} ({now})"
    if sidecar["library"] == "tensorrt":
        if (sidecar["gpu"], sidecar["compute_capability"]) != (here["gpu"], now):
            return f"was built on {sidecar['gpu']} ({sidecar['compute_capability']}), {found}"
        return ""
    if asked is None:
        return "" if _number(now) >= _PORTABLE_FROM else f"is for compute capability 8.0 and later, {found}"
    meant = sidecar["compute_capability"] if asked == "current" else asked
    return "" if meant == now else f"was built for compute capability {meant}, {found}"


def _driver_mismatch(sidecar: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Newer drivers run what older ones did, not the reverse."""
    built, now = sidecar["driver"], here["driver"]
    if built and now and _number(now) < _number(built):
        return f"was built with driver {built}, here is the older {now}"
    return ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
