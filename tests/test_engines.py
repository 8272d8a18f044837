"""Whether an engine may be loaded here, by its sidecar; and that the names in use are in the bindings."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from deploy import engines, nvinfer
from deploy.engines import check, read, sidecar_path, this_machine
from deploy.errors import ArtifactError, RunnerError
from deploy.runners import open_runner
from deploy.to_tensorrt import EngineOptions

RTX = "tensorrt_rtx"
trt = pytest.importorskip(RTX, reason="tensorrt_rtx is not installed: pip install '.[tensorrt-rtx]'")
RANGE = EngineOptions(batches=(1, 4, 8))

L4 = {"gpu": "NVIDIA L4", "compute_capability": "8.9", "driver": "580.65.06", "platform": "Linux x86_64"}
HERE = {"library": RTX, "library_version": trt.__version__, **L4}


def written(folder: Path, **changes: Any) -> Path:
    """An engine of four bytes with a sound sidecar, but for `changes`."""
    engine = folder / "m.engine"
    engine.write_bytes(b"plan")
    document = {
        "tool": "compress-release",
        "format": 1,
        "engine": {"sha256": hashlib.sha256(b"plan").hexdigest()},
        "options": json.loads(json.dumps(asdict(RANGE))),
        "rebuild": "python -m deploy.to_tensorrt m.onnx m.engine",
        **HERE,
        **changes,
    }
    sidecar_path(engine).write_text(json.dumps(document))
    return engine


def options(**changes: Any) -> dict[str, Any]:
    return asdict(replace(RANGE, **changes))


def test_a_sound_engine_is_read_with_its_sidecar(tmp_path: Path) -> None:
    content, sidecar = read(written(tmp_path), here=HERE)
    assert content == b"plan"
    assert sidecar == check(tmp_path / "m.engine", here=HERE)


@pytest.mark.parametrize(
    ("changes", "here", "said"),
    [
        ({}, {"library": "tensorrt"}, "is an engine of tensorrt_rtx, not of tensorrt"),
        (
            {"library_version": "1.6.0.0"},
            {},
            rf"was built with tensorrt_rtx 1\.6\.0\.0, here is {trt.__version__}",
        ),
        (
            {},
            {"compute_capability": "7.5"},
            r"is for compute capability 8\.0 and later, here is NVIDIA L4 \(7\.5",
        ),
        (
            {"options": options(compute_capability="12.0")},
            {},
            r"was built for compute capability 12\.0, here is NVIDIA L4 \(8\.9\)",
        ),
        (
            {"options": options(compute_capability="current"), "compute_capability": "8.6"},
            {},
            r"was built for compute capability 8\.6, here is NVIDIA L4",
        ),
        ({}, {"driver": "570.10"}, r"was built with driver 580\.65\.06, here is the older 570\.10"),
        (
            {"library": "tensorrt"},
            {"library": "tensorrt", "gpu": "NVIDIA L40S"},
            r"was built on NVIDIA L4 \(8\.9\), here is NVIDIA L40S \(8\.9\)",
        ),
        (
            {"library": "tensorrt"},
            {"library": "tensorrt", "platform": "Windows AMD64"},
            "was built on Linux x86_64, here is Windows AMD64",
        ),
    ],
)
def test_an_engine_for_something_else_is_refused_with_the_rebuild_command(
    changes: dict[str, Any], here: dict[str, Any], said: str, tmp_path: Path
) -> None:
    engine = written(tmp_path, **changes)
    fix = "build it again in its folder: python -m deploy.to_tensorrt m.onnx m.engine"
    with pytest.raises(RunnerError, match=rf"m\.engine: {said}.*; {fix}$") as caught:
        check(engine, here=HERE | here)
    assert caught.value.exit_code == 6


def test_without_a_gpu_no_engine_runs(tmp_path: Path) -> None:
    said = r"m\.engine: needs an NVIDIA GPU and driver, and PyTorch sees none here; run it on a machine that"
    with pytest.raises(RunnerError, match=said) as caught:
        check(written(tmp_path), here=HERE | {"gpu": None, "compute_capability": None, "driver": None})
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("changes", "here"),
    [
        ({"gpu": None, "compute_capability": None, "driver": None}, {}),
        ({}, {"compute_capability": "12.0", "gpu": "NVIDIA GeForce RTX 5090"}),
        ({}, {"driver": "590.1"}),
        ({}, {"driver": None}),
        ({"options": options(compute_capability="8.9")}, {}),
        ({"options": options(version_compatible=True), "library_version": "1.6.0.0"}, {}),
        ({"library": "tensorrt"}, {"library": "tensorrt"}),
    ],
)
def test_an_engine_that_fits_is_accepted(
    changes: dict[str, Any], here: dict[str, Any], tmp_path: Path
) -> None:
    assert check(written(tmp_path, **changes), here=HERE | here)["tool"] == "compress-release"


def test_version_compatible_engines_run_on_later_versions_of_the_major_only(tmp_path: Path) -> None:
    engine = written(tmp_path, options=options(version_compatible=True))
    for version in ("1.6.9.9", "2.0.0.0"):
        with pytest.raises(RunnerError, match=f"here is {version}"):
            check(engine, here=HERE | {"library_version": version})


FOREIGN: dict[str, Callable[[Path], object]] = {
    "changed engine": lambda engine: engine.write_bytes(b"plan!"),
    "no sidecar": lambda engine: sidecar_path(engine).unlink(),
    "no JSON": lambda engine: sidecar_path(engine).write_text("{"),
    "a list": lambda engine: sidecar_path(engine).write_text("[1]"),
    "another tool's": lambda engine: sidecar_path(engine).write_text('{"tool": "x", "format": 1}'),
    "of another format": lambda engine: written(engine.parent, format=2),
    "without a hash": lambda engine: written(engine.parent, engine={}),
    "no engine": lambda engine: engine.unlink(),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=list(FOREIGN))
def test_an_engine_of_unknown_origin_is_never_deserialized(
    change: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = written(tmp_path)
    change(engine)

    def deserialize(*_: Any, **__: Any) -> Any:
        raise AssertionError("deserialized")

    monkeypatch.setattr(nvinfer, "open_engine", deserialize)
    with pytest.raises(ArtifactError, match=r"m\.engine") as caught:
        open_runner(RTX, engine)
    assert caught.value.exit_code == 8


def test_a_large_sidecar_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = written(tmp_path)
    monkeypatch.setattr(engines, "_SIDECAR_BYTES", 10)
    with pytest.raises(ArtifactError, match=r"is not a sidecar of this tool: .*too large"):
        check(engine, here=HERE)


def test_this_machine_names_library_gpu_and_system() -> None:
    found = this_machine(RTX)
    assert (found["library"], found["library_version"]) == (RTX, trt.__version__)
    assert found["platform"].startswith(os.uname().sysname)
    assert (found["gpu"] is not None) == torch.cuda.is_available()


# -- names ---------------------------------------------------------------------------------------------

# How the code calls an object -> what it is in the library.
CALLED = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "fault": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "runtime_config": "IRuntimeConfig",
}
# What the code asks of TensorRT-RTX alone.
ONLY_RTX = {
    "ComputeCapability",
    "num_compute_capabilities",
    "set_compute_capability",
    "create_runtime_config",
    "DynamicShapesKernelSpecializationStrategy",
}


def names_used(module: ModuleType, library: ModuleType) -> Iterator[tuple[Any, str]]:
    """Every (object of the library, attribute) in a module's code, by what its variables are called."""

    def meant(node: ast.AST) -> Any:
        last = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if last == "trt":
            return library
        if last in CALLED:
            return getattr(library, CALLED[last], None)
        owner = meant(node.value) if isinstance(node, ast.Attribute) else None
        found = getattr(owner, last, None) if isinstance(owner, type | ModuleType) else None
        return found if isinstance(found, type) else None

    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and meant(node.value) is not None:
            yield meant(node.value), node.attr


@pytest.mark.parametrize("library", nvinfer.LIBRARIES)
def test_every_name_that_is_used_exists_in_the_bindings(library: str) -> None:
    bindings = pytest.importorskip(library, reason=f"{library} is not installed")
    used = set()
    for module in (nvinfer, importlib.import_module("deploy.tensorrt_runner")):
        used |= set(names_used(module, bindings))
    missing = {
        f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in used if not hasattr(owner, name)
    }
    assert not {name for name in missing if library == RTX or name.split(".")[-1] not in ONLY_RTX}
    assert len(used) > 50
    seen = {name for _, name in used}
    assert {"set_shape", "execute_async_v3", "infer_shapes", "TF32", "parse_from_file", "JSON"} <= seen
