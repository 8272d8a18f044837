"""Engines, really built by TensorRT-RTX, which needs no GPU for it; every refusal by text and exit code."""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import json
import os
import resource
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from compress.failures import named
from deploy import nvinfer, to_tensorrt
from deploy.engines import gpu_here, this_machine
from deploy.errors import ArtifactError, DeployError, ExportError, MeasureError, RunnerError
from deploy.to_onnx import export
from deploy.to_tensorrt import EngineOptions, build, check, main, sidecar_path

RTX = "tensorrt_rtx"
trt = pytest.importorskip(RTX, reason="tensorrt_rtx is not installed: pip install '.[tensorrt-rtx]'")
RANGE = EngineOptions(batches=(1, 4, 8))
NO_GPU = not torch.cuda.is_available()
without_gpu = pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU, so it does not fail")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return export(net.eval(), torch.randn(2, 3, 8, 8), tmp_path_factory.mktemp("onnx") / "m.onnx").path


@pytest.fixture(scope="module")
def built(onnx_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, to_tensorrt.Built]:
    engine = tmp_path_factory.mktemp("engines") / "m.engine"
    return engine, build(onnx_file, engine, RTX, RANGE, facts={"plan_sha256": "abc"})


def request(path: Path, folder: Path, options: EngineOptions = RANGE, **others: Any) -> dict[str, Any]:
    """What the library's own process gets; here it is answered in this one, which is quicker."""
    wanted = {"library": RTX, "onnx": str(path), "plan": str(folder / "plan"), "timing_cache": None}
    return asdict(options) | wanted | {"inspect": False} | others


def one_node(folder: Path, op: str, *, domain: str = "", shape: tuple[Any, ...] = ("batch", 4)) -> Path:
    """An ONNX file with one node `the_OP` from x to y."""
    kind = TensorProto.INT64 if op == "NonZero" else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], name=f"the_{op}", domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path = folder / f"{op}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


# -- what is built -------------------------------------------------------------------------------------


def test_the_sidecar_says_what_the_engine_is_tied_to(
    built: tuple[Path, to_tensorrt.Built], onnx_file: Path
) -> None:
    engine, done = built
    sidecar = json.loads(sidecar_path(engine).read_text())
    assert sidecar == done.sidecar
    assert sidecar["engine"] == {
        "file": "m.engine",
        "bytes": engine.stat().st_size,
        "sha256": hashlib.sha256(engine.read_bytes()).hexdigest(),
    }
    assert done.bytes == engine.stat().st_size > 0
    assert sidecar["onnx"]["sha256"] == hashlib.sha256(onnx_file.read_bytes()).hexdigest()
    assert (sidecar["library"], sidecar["library_version"]) == (RTX, trt.__version__)
    assert sidecar["options"] == json.loads(json.dumps(asdict(RANGE)))
    assert sidecar["facts"] == {"plan_sha256": "abc"}
    assert {key: sidecar[key] for key in ("gpu", "compute_capability", "driver")} == gpu_here()
    assert sidecar["flags"] == []
    assert done.seconds > 0
    assert (done.layers is None) == NO_GPU


def test_every_open_batch_gets_the_range(built: tuple[Path, to_tensorrt.Built]) -> None:
    sidecar = built[1].sidecar
    assert sidecar["inputs"] == [
        {
            "name": "input",
            "dtype": "FLOAT",
            "shape": [-1, 3, 8, 8],
            "least": [1, 3, 8, 8],
            "best": [4, 3, 8, 8],
            "most": [8, 3, 8, 8],
        }
    ]
    assert sidecar["outputs"] == [{"name": "output", "dtype": "FLOAT", "shape": [-1, 3]}]


def test_nothing_is_left_beside_the_engine(built: tuple[Path, to_tensorrt.Built]) -> None:
    wanted = {"m.engine", "m.engine.json"} | (set() if NO_GPU else {"m.engine.layers.json"})
    assert {path.name for path in built[0].parent.iterdir()} == wanted


def test_the_rebuild_command_builds_the_same_and_keeps_the_facts(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "some folder" / "m.engine"
    options = replace(RANGE, tf32=True, workspace_mib=64, builder_level=2, compute_capability="8.9")
    first = build(onnx_file, engine, RTX, options, facts={"plan": 1}).sidecar
    engine.write_bytes(b"damaged")
    monkeypatch.chdir(engine.parent)
    python, m, module, *words = shlex.split(first["rebuild"])
    assert (python, m, module) == ("python", "-m", "deploy.to_tensorrt")
    assert main(words) == 0
    second = json.loads(sidecar_path(engine).read_text())
    for sidecar in (first, second):
        sidecar["engine"] = {}  # tactics are timed where there is a GPU: the bytes may differ
    assert second == first
    assert first["flags"] == ["TF32"]
    assert (first["workspace_bytes"], first["builder_level"]) == (64 * 2**20, 2)
    assert capsys.readouterr().out.startswith("m.engine: ")


def test_half_precision_comes_from_the_types_in_the_file(tmp_path: Path) -> None:
    half = export(nn.Linear(8, 4).half().eval(), torch.randn(2, 8).half(), tmp_path / "h.onnx").path
    reply = nvinfer.compile_network(request(half, tmp_path))
    assert [port["dtype"] for port in reply["inputs"] + reply["outputs"]] == ["HALF", "HALF"]
    assert (tmp_path / "plan").stat().st_size > 0


def test_int8_comes_from_quantisation_pairs_in_the_file(onnx_file: Path, tmp_path: Path) -> None:
    from onnxruntime import quantization as q

    class Batches(q.CalibrationDataReader):  # type: ignore[misc]  # an untyped library
        def __init__(self) -> None:
            draw = np.random.default_rng(0)
            self.rest = iter([{"input": draw.standard_normal((4, 3, 8, 8), np.float32)} for _ in range(2)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    path = tmp_path / "q.onnx"
    signed = {"activation_type": q.QuantType.QInt8, "weight_type": q.QuantType.QInt8}
    symmetric = {"extra_options": {"ActivationSymmetric": True, "QuantizeBias": False}}
    q.quantize_static(onnx_file, path, Batches(), per_channel=True, **signed, **symmetric)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    nvinfer.compile_network(request(path, tmp_path))
    assert (tmp_path / "plan").stat().st_size > 0


def test_a_fixed_batch_is_its_own_range(tmp_path: Path) -> None:
    reply = nvinfer.compile_network(request(one_node(tmp_path, "Relu", shape=(2, 4)), tmp_path))
    port = reply["inputs"][0]
    assert port["shape"] == port["least"] == port["best"] == port["most"] == [2, 4]


# -- what is refused: the libraries' own failures ------------------------------------------------------

DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "garbage": lambda _: b"garbage",
    "truncated": lambda content: content[:-40],
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_onnx_file_is_an_artifact_error(
    damage: Callable[[bytes], bytes], onnx_file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(damage(onnx_file.read_bytes()))
    with pytest.raises(ArtifactError, match=r"^bad\.onnx: is not ONNX: .*; export it again$") as caught:
        nvinfer.compile_network(request(bad, tmp_path))
    assert caught.value.exit_code == 8


@pytest.mark.parametrize(
    ("op", "domain", "said"),
    [
        ("Det", "", r"Det \(the_Det\): UNSUPPORTED_NODE"),
        ("NonZero", "", r"NonZero \(the_NonZero\): UNSUPPORTED_NODE: .*NonZero plugin creator"),
        ("Mine", "my.ops", r"Mine \(the_Mine\): INVALID_NODE: .*Plugin not found"),
    ],
)
def test_an_operator_it_lacks_is_named_with_its_node(op: str, domain: str, said: str, tmp_path: Path) -> None:
    fix = "leave that operator out of the model, or bench ONNX"
    with pytest.raises(ExportError, match=rf"^{op}\.onnx: the parser refuses {said}.*; {fix}$") as caught:
        nvinfer.compile_network(request(one_node(tmp_path, op, domain=domain), tmp_path))
    assert caught.value.exit_code == 4


BUILD_FAILURES: dict[str, tuple[EngineOptions, type[DeployError], str]] = {
    "fp32 on Turing": (
        replace(RANGE, compute_capability="7.5"),
        ExportError,
        r"FP32 GEMM is not supported.*; convert the model to fp16, or name another compute capability$",
    ),
    "too little workspace": (
        replace(RANGE, workspace_mib=1),
        ExportError,
        r"within workspace limit.*; raise workspace_mib$",
    ),
    "no lean runtime": (
        replace(RANGE, version_compatible=True),
        RunnerError,
        r"libnvinfer_lean.*; build without version_compatible: the lean runtime is not installed$",
    ),
}
WITHOUT_GPU: dict[str, tuple[EngineOptions, type[DeployError], str]] = {
    "current": (
        replace(RANGE, compute_capability="current"),
        RunnerError,
        r"cudaError 35.*; build it on a machine with an NVIDIA GPU and driver, or name a compute capability",
    ),
    "refit": (
        replace(RANGE, refit=True),
        RunnerError,
        r"CUDA_SUCCESS.*; build it on a machine with an NVIDIA GPU and driver, or without refit$",
    ),
}


@pytest.mark.parametrize(
    "name", [*BUILD_FAILURES, *(pytest.param(n, marks=without_gpu) for n in WITHOUT_GPU)]
)
def test_a_failed_build_quotes_the_library_and_says_what_helps(
    name: str, onnx_file: Path, tmp_path: Path
) -> None:
    options, kind, said = (BUILD_FAILURES | WITHOUT_GPU)[name]
    with pytest.raises(kind, match=rf"^m\.onnx: tensorrt_rtx builds no engine: .*{said}") as caught:
        nvinfer.compile_network(request(onnx_file, tmp_path, options))
    assert caught.value.exit_code == (6 if kind is RunnerError else 4)
    assert not (tmp_path / "plan").exists()


def test_without_a_profile_the_library_refuses(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvinfer, "_add_profile", lambda *_: [])
    with pytest.raises(ExportError, match="no optimization profile has been defined") as caught:
        nvinfer.compile_network(request(onnx_file, tmp_path))
    assert caught.value.exit_code == 4


def test_a_gpu_it_does_not_know_is_refused_with_those_it_knows(onnx_file: Path, tmp_path: Path) -> None:
    said = r"^tensorrt_rtx 1\.\S+: builds for no GPU of compute capability 9\.0; use one of 7\.5, 8\.0, 8\.6,"
    with pytest.raises(RunnerError, match=said):
        nvinfer.compile_network(request(onnx_file, tmp_path, replace(RANGE, compute_capability="9.0")))


def test_more_than_an_open_batch_is_refused(tmp_path: Path) -> None:
    path = one_node(tmp_path, "Relu", shape=("batch", "length"))
    said = r"^input x: shape \[-1, -1\] is open in more than the batch; export it with fixed sizes$"
    with pytest.raises(ExportError, match=said):
        nvinfer.compile_network(request(path, tmp_path))


def test_an_unknown_reason_is_quoted_shortened() -> None:
    error = nvinfer.refusal(["first", *("x" * 400 for _ in range(4))], "builds no engine", "m.onnx")
    assert isinstance(error, ExportError)
    assert "first" not in str(error)
    assert len(str(error)) < 1100
    assert nvinfer.quote([]) == "no reason given"


# -- what is refused: requests -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batches": (8, 4, 1)}, "batches: 8, 4, 1 is no range; give least, best, most"),
        ({"batches": (1, 8)}, "batches: 1, 8 is no range; give least, best, most"),
        ({"batches": (0, 1, 1)}, "batches: 0, 1, 1 is no range; give least, best, most"),
        ({"workspace_mib": 0}, "workspace_mib: 0 MiB; give 1 or more"),
        ({"builder_level": 6}, "builder_level: 6 is no level; give 0 to 5"),
        ({"compute_capability": "89"}, 'compute_capability: is \'89\'; give "8.9", or "current"'),
    ],
)
def test_options_that_cannot_be_meant(values: dict[str, Any], said: str) -> None:
    with pytest.raises(MeasureError) as caught:
        EngineOptions(**values)
    assert (str(caught.value), caught.value.exit_code) == (said, 3)


def test_wrong_requests_are_refused_before_anything_starts(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "m.engine"
    with pytest.raises(MeasureError, match=r"^openvino: unknown library; use one of tensorrt, tensorrt_rtx$"):
        build(onnx_file, engine, "openvino", RANGE)
    with pytest.raises(ArtifactError, match=r"none\.onnx: no such file; export the model first"):
        build(tmp_path / "none.onnx", engine, RTX, RANGE)
    (tmp_path / "tensorrt.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        MeasureError, match=r"^compute_capability: tensorrt builds for the GPU at hand; leave"
    ):
        build(onnx_file, engine, "tensorrt", replace(RANGE, compute_capability="8.9"))
    assert not engine.exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_a_library_that_is_not_installed(onnx_file: Path, tmp_path: Path) -> None:
    said = r"^tensorrt: not installed; pip install 'compress-release\[tensorrt\]'$"
    with pytest.raises(RunnerError, match=said) as caught:
        build(onnx_file, tmp_path / "m.engine", "tensorrt", RANGE)
    assert caught.value.exit_code == 6
    with pytest.raises(RunnerError, match=said):
        this_machine("tensorrt")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "raise ImportError('no libnvinfer.so.11')",
            "does not import: ImportError: no libnvinfer.so.11; rein",
        ),
        (
            "import os; os.kill(os.getpid(), 11)",
            r"the build ended early \(killed by signal 11\): no message; try",
        ),
        ("import os; os._exit(3)", r"the build ended early \(exit 3\): no message; try a smaller"),
    ],
)
def test_a_library_that_breaks_breaks_its_own_process(
    code: str, said: str, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "engines"
    with pytest.raises(RunnerError, match=f"^tensorrt: {said}"):
        build(onnx_file, folder / "m.engine", "tensorrt", RANGE)
    assert list(folder.iterdir()) == []


def test_a_builder_that_does_not_start_says_what_was_logged() -> None:
    class Library:
        @staticmethod
        def Builder(log: Any) -> Any:
            log.errors.append("CUDA initialization failure with error: 35")
            raise TypeError("factory function returned nullptr")

    said = "^tensorrt: starts no builder: CUDA initialization failure with error: 35; build it on a machine"
    with pytest.raises(RunnerError, match=said):
        nvinfer._builder(Library, nvinfer.make_log(trt), "tensorrt")


def test_the_log_keeps_errors_and_warnings_apart_and_drops_the_rest() -> None:
    log = nvinfer.make_log(trt)
    for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        log.log(getattr(trt.ILogger.Severity, severity), severity)
    assert (log.errors, log.warnings) == (["INTERNAL_ERROR", "ERROR"], ["WARNING"])


# -- full TensorRT, as far as its names go: TensorRT-RTX under its name ---------------------------------


@pytest.fixture
def as_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from tensorrt_rtx import *\n__version__ = '11.4.0.106'\n"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "lib")


@pytest.mark.usefixtures("as_tensorrt")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_timing_cache_is_written_and_used_again(onnx_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "caches" / "l4.cache"
    first = build(onnx_file, tmp_path / "m.engine", "tensorrt", RANGE, timing_cache=cache).sidecar
    assert (first["timing_cache"], first["library_version"]) == ("new", "11.4.0.106")
    assert cache.is_file()
    assert "--timing-cache caches/l4.cache" in first["rebuild"]
    second = build(onnx_file, tmp_path / "m.engine", "tensorrt", RANGE, timing_cache=cache).sidecar
    assert second["timing_cache"] == "reused"


def test_tensorrt_rtx_has_no_timing_cache(onnx_file: Path, tmp_path: Path) -> None:
    reply = nvinfer.compile_network(request(onnx_file, tmp_path, timing_cache=str(tmp_path / "cache")))
    assert reply["timing_cache"] is None
    assert not (tmp_path / "plan.cache").exists()


# -- whole or not at all -------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may have 64 KiB, less than an engine has; child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_an_engine_that_does_not_fit_on_the_disk(onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        build(onnx_file, tmp_path / "m.engine", RTX, RANGE)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "m.engine"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moves", [0, 1])
def test_a_full_disk_ends_with_code_7_and_nothing_that_would_be_loaded(
    moves: int, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real, done = tmp_path / "m.engine", os.replace, []

    def replace_until_full(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise OSError(errno.ENOSPC, "No space left on device", source)
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_until_full)
    with pytest.raises(OSError, match="No space left") as caught:
        build(onnx_file, engine, RTX, RANGE)
    known = named(caught.value)
    assert getattr(known, "exit_code", None) == 7
    assert "m.engine" in str(known)
    assert [path.name for path in tmp_path.iterdir()] == ["m.engine"][:moves]
    if engine.exists():
        with pytest.raises(ArtifactError, match=r"has no m\.engine\.json beside it"):
            check(engine, here={})


def test_a_failed_build_leaves_the_engine_before_it(
    built: tuple[Path, to_tensorrt.Built], onnx_file: Path
) -> None:
    folder = built[0].parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ExportError, match="workspace"):
        build(onnx_file, built[0], RTX, replace(RANGE, workspace_mib=1))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# -- command -------------------------------------------------------------------------------------------


def test_the_command_ends_with_one_line_and_the_exit_code(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(onnx_file), str(tmp_path / "m.engine"), "--library", RTX]
    assert main([*words, "--batches", "1-8"]) == 3
    assert capsys.readouterr().err == "error: --batches: '1-8' is no range; give LEAST,BEST,MOST\n"
    assert main([*words, "--workspace-mib", "1"]) == 4
    assert capsys.readouterr().err.startswith("error: m.onnx: tensorrt_rtx builds no engine: ")
