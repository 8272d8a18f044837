"""Two artifacts side by side where one is an engine: what is run, and what is refused before it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.comparison import compare
from compress.errors import ConfigError, IntegrityError
from deploy import runners
from deploy.errors import ArtifactError, RunnerError
from deploy.ort_runners import open_ort
from deploy.to_onnx import export
from deploy.to_tensorrt import EngineOptions, build, sidecar_path
from tests.pipelines import Silent

RTX = "tensorrt_rtx"
pytest.importorskip(RTX, reason="tensorrt_rtx is not installed: pip install '.[tensorrt-rtx]'")
QUICK: dict[str, Any] = {"batches": (1, 2), "repeats": 3, "seconds": 0.01}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real engine beside its ONNX file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("engine")
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    onnx = export(net, torch.randn(2, 6), folder / "m.onnx").path
    build(onnx, folder / "m.engine", RTX, EngineOptions(batches=(1, 2, 4)))
    return folder / "m.engine"


def test_an_engine_is_run_by_the_library_it_is_for(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, events, opened = engine.with_suffix(".onnx"), Silent(), []

    def open_runner(kind: str, artifact: Path, threads: int) -> Any:
        opened.append((kind, artifact))
        runner = open_ort("onnxruntime", onnx, threads)  # the same numbers
        runner.timed = "host to host" if kind == "onnxruntime" else "compute"  # type: ignore[misc]
        return runner

    monkeypatch.setattr(runners, "open_runner", open_runner)
    found = compare(engine, onnx, events=events, **QUICK)
    assert opened == [(RTX, engine), ("onnxruntime", onnx)]
    assert found["passed"]
    assert (found["a"]["runner"], found["a"]["shapes"]) == (RTX, [[6]])
    assert found["size"]["a"] == engine.stat().st_size
    assert "the times span different things: compute in a, host to host in b" in events.seen
    assert compare(engine, engine, events=Silent(), **QUICK)["passed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_an_engine_is_refused(engine: Path) -> None:
    for pair in ((engine, engine.with_suffix(".onnx")), (engine.with_suffix(".onnx"), engine)):
        with pytest.raises(RunnerError, match=r"m\.engine: needs an NVIDIA GPU and driver") as caught:
            compare(*pair, events=Silent(), **QUICK)
        assert caught.value.exit_code == 6


def test_an_engine_of_unknown_origin_is_never_loaded(engine: Path, tmp_path: Path) -> None:
    onnx = engine.with_suffix(".onnx")
    alone = tmp_path / "alone.engine"
    shutil.copyfile(engine, alone)
    with pytest.raises(ArtifactError, match=r"has no alone\.engine\.json beside it") as caught:
        compare(alone, onnx, events=Silent(), **QUICK)
    assert caught.value.exit_code == 8
    sidecar_path(alone).write_text(json.dumps({"tool": "another"}))
    with pytest.raises(ArtifactError, match="is not a sidecar of this tool"):
        compare(onnx, alone, events=Silent(), **QUICK)
    partial = json.loads(sidecar_path(engine).read_text())
    del partial["inputs"]
    sidecar_path(alone).write_text(json.dumps(partial))
    with pytest.raises(IntegrityError, match=r"does not say what the engine takes: KeyError\('inputs'\)"):
        compare(onnx, alone, events=Silent(), **QUICK)
    shutil.copyfile(sidecar_path(engine), sidecar_path(alone))
    alone.write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=r"is not the engine that .* describes; it was not loaded"):
        compare(alone, onnx, events=Silent(), **QUICK)


def test_an_engine_of_other_inputs(engine: Path, tmp_path: Path) -> None:
    other = export(nn.Linear(5, 2).eval(), torch.randn(2, 5), tmp_path / "other.onnx").path
    with pytest.raises(ConfigError, match=r"takes inputs \[\[6\]\], .* takes \[\[5\]\]; compare like"):
        compare(engine, other, events=Silent(), **QUICK)
