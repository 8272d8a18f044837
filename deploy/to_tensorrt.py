"""ONNX to an engine of TensorRT or TensorRT-RTX, with a sidecar that says what the engine is tied to.

    python -m deploy.to_tensorrt dense.onnx dense.engine --library tensorrt_rtx --batches 1,8,32

Precision is not among the options: it lies in the ONNX file, as types, casts and Q/DQ pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy import errors, files
from deploy.engines import FORMAT, TOOL, check, gpu_here, read_sidecar, sidecar_path, system_here
from deploy.errors import ArtifactError, DeployError, MeasureError, RunnerError
from deploy.nvinfer import LIBRARIES, installed

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from deploy.nvinfer import main; main()"


__all__ = ["LIBRARIES", "Built", "EngineOptions", "build", "check", "sidecar_path"]


@dataclass(frozen=True)
class EngineOptions:
    """How to build; None leaves the choice to the library.

    `batches`: least, best and most of inputs with an open batch. `tf32`: tensor cores may round fp32 factors
    to 10 bits. `workspace_mib`: limit on scratch memory, MiB. `builder_level`: 0 (fast build) to 5 (fast
    engine). `refit`: weights can be replaced later. `version_compatible`: later versions of the library's
    major can run it. `compute_capability`: tensorrt_rtx only, "8.9" or "current"; None is 8.0 and later.
    Raises MeasureError for values that cannot be meant.
    """

    batches: tuple[int, int, int] = (1, 1, 1)
    tf32: bool = False
    workspace_mib: int | None = None
    builder_level: int | None = None
    refit: bool = False
    version_compatible: bool = False
    compute_capability: str | None = None

    def __post_init__(self) -> None:
        if len(self.batches) != 3 or not 1 <= self.batches[0] <= self.batches[1] <= self.batches[2]:
            shown = ", ".join(map(str, self.batches))
            raise MeasureError(f"{shown} is no range", "batches", "give least, best, most")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise MeasureError(f"{self.workspace_mib} MiB", "workspace_mib", "give 1 or more")
        if self.builder_level is not None and not 0 <= self.builder_level <= 5:
            raise MeasureError(f"{self.builder_level} is no level", "builder_level", "give 0 to 5")
        if not re.fullmatch(r"\d+\.\d|current", self.compute_capability or "current"):
            raise MeasureError(
                f"is {self.compute_capability!r}", "compute_capability", 'give "8.9", or "current"'
            )


@dataclass(frozen=True)
class Built:
    """An engine that was written: bytes, seconds to parse and build, its sidecar, and the inspector's layers
    (None without a GPU)."""

    bytes: int
    seconds: float
    sidecar: dict[str, Any]
    layers: list[Any] | None


def build(
    onnx: Path,
    engine: Path,
    library: str,
    options: EngineOptions,
    *,
    timing_cache: Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Built:
    """Build `engine` from `onnx` in a process of its own; write it and its sidecar whole or not at all.

    With a GPU the inspector's layers are written too, to ENGINE.layers.json. `timing_cache` (TensorRT only)
    is read if it is there, and written anew. `facts` is the caller's part of the sidecar. Raises MeasureError
    for a wrong request, RunnerError where library, driver or GPU are missing, ExportError for what the
    library will not build, ArtifactError for a damaged ONNX file, OSError where a file cannot be written.
    """
    installed(library)
    if options.compute_capability is not None and library != "tensorrt_rtx":
        raise MeasureError(f"{library} builds for the GPU at hand", "compute_capability", "leave it out")
    source = _file_facts(onnx)
    gpu = gpu_here()
    with files.scratch(engine) as folder:
        request = asdict(options) | {
            "library": library,
            "onnx": str(onnx),
            "plan": str(folder / engine.name),
            "timing_cache": None if timing_cache is None else str(timing_cache),
            "inspect": gpu["gpu"] is not None,
        }
        reply = _in_child(request, engine)
        seconds, layers = float(reply.pop("seconds")), reply.pop("layers")
        sidecar = {
            "tool": TOOL,
            "format": FORMAT,
            "engine": _file_facts(folder / engine.name),
            "onnx": source,
            "library": library,
            **reply,
            **gpu,
            "platform": system_here(),
            "options": asdict(options) | {"batches": list(options.batches)},
            "facts": dict(facts or {}),
            "rebuild": _command(onnx, engine, library, options, timing_cache),
        }
        _publish_all(folder, engine, timing_cache, sidecar, layers)
    return Built(sidecar["engine"]["bytes"], seconds, sidecar, layers)


def _file_facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactError("no such file", str(path), "export the model first")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}


def _in_child(request: Mapping[str, Any], engine: Path) -> dict[str, Any]:
    """What the library's own process answers, or the error that it met."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD, json.dumps(sys.path)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        how = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        fix = "try a smaller largest batch, or another version of the library"
        raise RunnerError(f"the build ended early ({how}): {last}", request["library"], fix)
    reply: dict[str, Any] = json.loads(done.stdout)
    kind = reply.get("error")
    if kind == "OSError":
        raise OSError(*reply["args"], str(engine))
    if kind is not None:
        raise getattr(errors, kind)(*reply["args"])
    return reply


def _command(
    onnx: Path, engine: Path, library: str, options: EngineOptions, timing_cache: Path | None
) -> str:
    """What builds the engine again, to be run in the engine's folder."""
    folder = engine.parent
    words = ["python", "-m", "deploy.to_tensorrt", os.path.relpath(onnx, folder), engine.name]
    words += ["--library", library, "--batches", ",".join(map(str, options.batches))]
    for name in ("workspace_mib", "builder_level", "compute_capability"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("tf32", "refit", "version_compatible"):
        words += [f"--{name.replace('_', '-')}"] if getattr(options, name) else []
    if timing_cache is not None:
        words += ["--timing-cache", os.path.relpath(timing_cache, folder)]
    return shlex.join(words)


# -- files ---------------------------------------------------------------------------------------------


def _publish_all(
    folder: Path, engine: Path, timing_cache: Path | None, sidecar: Any, layers: list[Any] | None
) -> None:
    """The engine, what came with it, and the sidecar after what it vouches for."""
    plan, layers_path = folder / engine.name, engine.with_suffix(f"{engine.suffix}.layers.json")
    moves = [(plan, engine)]
    if layers is not None:
        moves.append((_write_json(folder / "layers", layers), layers_path))
    moves.append((_write_json(folder / "sidecar", sidecar), sidecar_path(engine)))
    cache = plan.with_name(f"{plan.name}.cache")
    if timing_cache is not None and cache.exists():
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        moves.append((cache, timing_cache))
    for temporary, target in moves:
        files.publish(temporary, target)
    if layers is None:
        layers_path.unlink(missing_ok=True)  # those of the engine before


def _write_json(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


# -- command -------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m deploy.to_tensorrt", description="Build an engine from ONNX.")
    parser.add_argument("onnx", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--batches", default="1,1,1", metavar="LEAST,BEST,MOST")
    parser.add_argument("--workspace-mib", type=int)
    parser.add_argument("--builder-level", type=int)
    parser.add_argument("--compute-capability")
    parser.add_argument("--timing-cache", type=Path)
    for flag in ("--tf32", "--refit", "--version-compatible"):
        parser.add_argument(flag, action="store_true")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Build as the command line says, keeping the facts of a sidecar that is replaced; returns the exit
    code."""
    asked = vars(_parser().parse_args(words))
    onnx, engine, library = asked.pop("onnx"), asked.pop("engine"), asked.pop("library")
    cache, batches = asked.pop("timing_cache"), asked.pop("batches")
    try:
        if not re.fullmatch(r"\d+,\d+,\d+", batches):
            raise MeasureError(f"{batches!r} is no range", "--batches", "give LEAST,BEST,MOST")
        least, best, most = map(int, batches.split(","))
        options = EngineOptions(batches=(least, best, most), **asked)
        facts = read_sidecar(engine)["facts"] if sidecar_path(engine).is_file() else {}
        built = build(onnx, engine, library, options, timing_cache=cache, facts=facts)
    except DeployError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {error.filename}: {error.strerror}\n")
        return 7
    sys.stdout.write(f"{engine}: {built.bytes} bytes in {built.seconds:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
