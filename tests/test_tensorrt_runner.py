"""The TensorRT runner against a double of the library that really computes, in host memory.

The double's objects have no attribute that the class of that name in the installed bindings lacks.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploy import nvinfer, tensorrt_runner
from deploy.errors import RunnerError
from deploy.runners import StagedRunner, check_outputs, open_runner
from deploy.tensorrt_runner import PycudaBuffers, TensorRTRunner, TorchBuffers, open_tensorrt
from deploy.to_onnx import export
from deploy.to_tensorrt import EngineOptions, build

RTX = "tensorrt_rtx"
trt = pytest.importorskip(RTX, reason="tensorrt_rtx is not installed: pip install '.[tensorrt-rtx]'")
NO_CUDA = not torch.cuda.is_available()
X = np.arange(12, dtype=np.float32).reshape(2, 6)
SIDECAR = {
    "library": RTX,
    "library_version": "1.7",
    "options": {"version_compatible": False},
    "inputs": [{"name": "x", "dtype": "FLOAT", "shape": [-1, 6], "least": [1, 6], "most": [4, 6]}],
    "outputs": [{"name": "y", "dtype": "FLOAT", "shape": [-1, 2]}],
}


class Double:
    """An object with the given attributes, all of which the real class must have, as must any set later."""

    def __init__(self, real: Any, **attributes: Any) -> None:
        object.__setattr__(self, "_real", real)
        for name, value in attributes.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        assert hasattr(self._real, name), f"{self._real.__name__} has no {name}"
        object.__setattr__(self, name, value)


class Context:
    """What an execution context does: y[:, 0] is the sum of each row of x, y[:, 1] is twice that."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs: list[int] = []
        self.writes = self.accepts = True
        self.open: list[str] = []
        self.output_shape: tuple[int, ...] | None = None
        self.double = Double(
            trt.IExecutionContext,
            set_input_shape=self.set_input_shape,
            infer_shapes=lambda: self.open,
            get_tensor_shape=self.get_tensor_shape,
            set_tensor_address=self.set_tensor_address,
            execute_async_v3=self.execute_async_v3,
            profiler=None,
        )

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.accepts

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name] if name == "x" else self.output_shape or (self.shapes["x"][0], 2)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def _memory(self, name: str) -> np.ndarray[Any, Any]:
        shape = self.get_tensor_shape(name)
        floats = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses[name])
        return np.frombuffer(floats, np.float32).reshape(shape)

    def execute_async_v3(self, handle: int) -> bool:
        self.runs.append(handle)
        if self.writes and not Graph.capturing:
            self._memory("y")[:] = self._memory("x").sum(1, keepdims=True) * [1, 2]
        if self.double.profiler is not None:
            for name, ms in (("sum", 0.25), ("twice", 0.5)):
                self.double.profiler.report_layer_time(name, ms)
        return self.accepts


class Stream:
    """A stream on which everything has happened at once."""

    cuda_stream = 4711

    def __init__(self, handle: int | None = None) -> None:
        self.handle = handle
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


class Graph:
    """A CUDA graph of the runs that were started while it was captured."""

    capturing = False

    def __init__(self) -> None:
        self.replays = 0
        self.run: Any = None

    def replay(self) -> None:
        self.replays += 1
        self.run()


@contextlib.contextmanager
def capture(graph: Graph, stream: Stream) -> Iterator[None]:
    assert isinstance(stream, Stream)
    Graph.capturing = True
    yield
    Graph.capturing = False


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's names, which must exist, in host memory."""
    monkeypatch.setattr(tensorrt_runner, "_DEVICE", "cpu")
    assert {"cuda_stream", "synchronize"} <= set(dir(torch.cuda.Stream))
    assert "replay" in dir(torch.cuda.CUDAGraph)
    doubles = {"Stream": Stream, "ExternalStream": Stream, "CUDAGraph": Graph, "graph": capture}
    doubles |= {"stream": lambda _: contextlib.nullcontext(), "init": lambda: None}
    for name, double in doubles.items():
        monkeypatch.setattr(torch.cuda, name, double)


@pytest.fixture
def context() -> Context:
    return Context()


def library(context: Context | None, engine: bool = True) -> Any:
    """The library's module, whose runtime loads any content as an engine with that context."""
    inspector = Double(
        trt.EngineInspector, get_engine_information=lambda _: json.dumps({"Layers": [{"Name": "sum"}]})
    )
    opened = Double(
        trt.ICudaEngine,
        get_tensor_dtype=lambda name: trt.DataType.FLOAT,
        create_runtime_config=lambda: Double(trt.IRuntimeConfig),
        create_execution_context=lambda config: context.double if context else None,
        create_engine_inspector=lambda: inspector,
    )
    runtime = Double(trt.Runtime, deserialize_cuda_engine=lambda plan: opened if engine else None)
    same = ("ILogger", "IProfiler", "DynamicShapesKernelSpecializationStrategy", "LayerInformationFormat")
    return Double(
        trt, __name__=RTX, Runtime=lambda log: runtime, **{name: getattr(trt, name) for name in same}
    )


@pytest.fixture
def runner(context: Context, cuda: None) -> TensorRTRunner:
    return TensorRTRunner(nvinfer.open_engine(library(context), b""), SIDECAR, TorchBuffers())


def expected(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x.sum(1, keepdims=True) * np.array([1, 2], np.float32)


# -- running -------------------------------------------------------------------------------------------


def test_it_runs_any_batch_of_the_range_on_its_own_stream(runner: TensorRTRunner, context: Context) -> None:
    for x in (X, X[:1], np.concatenate([X, X])):
        (found,) = runner.infer((x,))
        np.testing.assert_array_equal(found, expected(x))
    assert set(context.runs) == {Stream.cuda_stream}
    assert (runner.name, runner.providers) == (RTX, ("tensorrt_rtx 1.7",))
    assert (runner.timed, runner.threads) == ("compute, inputs and outputs on the GPU", 1)
    assert runner.buffers == "torch"


def test_a_call_runs_the_prepared_inputs_and_waits(runner: TensorRTRunner) -> None:
    runner.prepare((X,))
    waits = runner.stream.waits  # type: ignore[attr-defined]  # the double's
    (found,) = runner()
    np.testing.assert_array_equal(found.numpy(), expected(X))
    assert runner.stream.waits == waits + 1  # type: ignore[attr-defined]
    runner.enqueue()
    assert runner.stream.waits == waits + 1  # type: ignore[attr-defined]


def test_inputs_that_are_views_arrive_in_their_order(runner: TensorRTRunner) -> None:
    view = np.ascontiguousarray(X.T).T
    np.testing.assert_array_equal(runner.infer((view,))[0], expected(X))


def test_an_engine_that_writes_nothing_is_caught(runner: TensorRTRunner, context: Context) -> None:
    runner.infer((X,))  # the right result may lie in memory still
    context.writes = False
    said = r"^tensorrt_rtx: output 0 was not written, or the model computes NaN; compare it with PyTorch"
    with pytest.raises(RunnerError, match=said):
        runner.infer((X,))


def test_the_graph_is_captured_once_and_replayed(context: Context, cuda: None) -> None:
    opened = nvinfer.open_engine(library(context), b"")
    runner = TensorRTRunner(opened, SIDECAR, TorchBuffers(), cuda_graph=True)
    runner.prepare((X,))
    assert len(context.runs) == 2  # one before, and the one that is captured
    runner._graph.run = lambda: context.execute_async_v3(0)
    runner()
    runner()
    assert runner._graph.replays == 2
    np.testing.assert_array_equal(runner()[0].numpy(), expected(X))
    runner.prepare((X[:1],))
    assert runner._graph.replays == 0
    runner.close()
    assert runner._graph is None


def test_a_graph_that_cannot_be_captured(
    context: Context, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def refused(graph: Graph, stream: Stream) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    opened = nvinfer.open_engine(library(context), b"")
    runner = TensorRTRunner(opened, SIDECAR, TorchBuffers(), cuda_graph=True)
    with pytest.raises(
        RunnerError, match=r"no CUDA graph: operation not permitted.*; run it without cuda_graph"
    ):
        runner.prepare((X,))


def test_layer_times_come_by_run_and_layer(runner: TensorRTRunner) -> None:
    runner.prepare((X,))
    layers, whole = runner.layer_times(3)
    assert layers == [{"sum": 0.25, "twice": 0.5}] * 3
    assert len(whole) == 3
    assert min(whole) > 0


def test_the_inspector_lists_the_layers(runner: TensorRTRunner, context: Context) -> None:
    assert runner.layers() == [{"Name": "sum"}]
    request = {"version_compatible": False}
    log = nvinfer.make_log(trt)
    assert nvinfer._inspected(library(context), log, b"", request) == [{"Name": "sum"}]
    log.errors.append("not for this GPU")
    assert nvinfer._inspected(library(context, engine=False), log, b"", request) is None
    assert log.warnings == ["layers were not inspected: the engine does not load: not for this GPU"]


# -- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "uint8", "int32", "int64", "bool"])
@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_what_goes_in_comes_out(dtype: str, shape: tuple[int, ...], cuda: None) -> None:
    pair = TorchBuffers().pair(shape, dtype)
    pair.host[...] = 1
    pair.copy_in()
    pair.host[...] = 0
    pair.copy_out()
    assert pair.host.dtype == dtype
    np.testing.assert_array_equal(pair.host, np.ones(shape, dtype))
    assert pair.address == pair.device.data_ptr()


def test_stages_move_inputs_and_outputs_apart_from_the_run(runner: TensorRTRunner) -> None:
    assert isinstance(runner, StagedRunner)
    runner.prepare((X,))
    runner.copy_in()
    runner.enqueue()
    runner.copy_out()
    np.testing.assert_array_equal(runner._outputs["y"].host, expected(X))
    runner.poison()
    assert np.isnan(runner.outputs()[0]).all()
    check_outputs(runner)


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """pycuda's functions, by its documentation, in host memory."""

    class Memory(bytearray):
        def __int__(self) -> int:
            return ctypes.addressof(ctypes.c_char.from_buffer(self))

    def copy_in(memory: Memory, array: np.ndarray[Any, Any], stream: Stream) -> None:
        memory[:] = array.tobytes()

    def copy_out(array: np.ndarray[Any, Any], memory: Memory, stream: Stream) -> None:
        array[...] = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)

    copies = {"memcpy_htod_async": copy_in, "memcpy_dtoh_async": copy_out}
    own = SimpleNamespace(handle=1234)
    driver = SimpleNamespace(Stream=lambda: own, mem_alloc=Memory, pagelocked_empty=np.empty, **copies)
    package = ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]  # as the import of a submodule does
    for name, module in (("", package), (".driver", driver), (".autoprimaryctx", ModuleType("a"))):
        monkeypatch.setitem(sys.modules, f"pycuda{name}", module)


@pytest.mark.usefixtures("cuda", "pycuda")
def test_pycuda_memory_gives_the_same_outputs_on_its_stream(context: Context) -> None:
    runner = TensorRTRunner(nvinfer.open_engine(library(context), b""), SIDECAR, PycudaBuffers())
    np.testing.assert_array_equal(runner.infer((X,))[0], expected(X))
    assert runner.buffers == "pycuda"
    assert runner.stream.handle == 1234  # type: ignore[attr-defined]  # pycuda's, as torch's external one
    context.writes = False
    with pytest.raises(RunnerError, match="output 0 was not written"):
        runner.infer((X,))


@pytest.mark.usefixtures("cuda")
def test_pycuda_that_does_not_import_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    said = r"^pycuda: does not import: .*; pip install 'compress-release\[pycuda\]', which needs a compiler"
    with pytest.raises(RunnerError, match=said) as caught:
        PycudaBuffers()
    assert caught.value.exit_code == 6


# -- refusing ------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused(runner: TensorRTRunner, context: Context) -> None:
    with pytest.raises(RunnerError, match=r"^tensorrt_rtx: 2 inputs given, the engine has 1$"):
        runner.prepare((X, X))
    with pytest.raises(RunnerError, match=r"^tensorrt_rtx: input x is float64, the engine takes float32$"):
        runner.prepare((X.astype(np.float64),))
    takes = r"the engine takes \[1, 6\] to \[4, 6\]; build it for that range of batches$"
    for x in (np.concatenate([X, X, X]), X[:, :5], X[0]):
        with pytest.raises(RunnerError, match=rf"input x has shape \[.*\], {takes}"):
            runner.prepare((np.ascontiguousarray(x),))
    assert context.runs == []


def test_what_the_library_refuses_is_quoted(runner: TensorRTRunner, context: Context) -> None:
    runner._opened.log.errors.append("invalid dimensions")
    context.accepts = False
    with pytest.raises(RunnerError, match=r"^tensorrt_rtx: the shape of x was refused: invalid dimensions$"):
        runner.prepare((X,))
    context.accepts = True
    runner.prepare((X,))
    context.accepts = False
    with pytest.raises(RunnerError, match=r"^tensorrt_rtx: the run was refused: invalid dimensions$"):
        runner()


def test_shapes_that_stay_open_are_refused(runner: TensorRTRunner, context: Context) -> None:
    context.output_shape = (-1, 2)
    with pytest.raises(RunnerError, match=r"^tensorrt_rtx: the shape of output y depends on the data$"):
        runner.prepare((X,))
    context.open = ["y"]
    with pytest.raises(RunnerError, match=r"^tensorrt_rtx: the shape of y stays open$"):
        runner.prepare((X,))


def test_engines_that_do_not_load_or_start_are_refused(context: Context) -> None:
    with pytest.raises(RunnerError, match=r"^tensorrt_rtx: the engine does not load: no reason given$"):
        nvinfer.open_engine(library(context, engine=False), b"")
    with pytest.raises(RunnerError, match=r"^tensorrt_rtx: the engine does not start: no reason given$"):
        nvinfer.open_engine(library(None), b"")


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"^tensorrt_rtx: unknown buffers cupy; use one of torch, pycuda$"):
        open_runner(RTX, tmp_path, buffers="cupy")
    with pytest.raises(RunnerError, match=r'^tensorrt_rtx: pycuda has no CUDA graphs; use buffers "torch"$'):
        open_tensorrt(tmp_path, RTX, buffers="pycuda", cuda_graph=True)
    with pytest.raises(RunnerError, match="cannot run a Linear; give it the path of an engine"):
        open_runner(RTX, nn.Linear(2, 2))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    torch.save(net.state_dict(), folder / "net.pt")
    onnx = export(net, torch.randn(2, 6), folder / "m.onnx").path
    build(onnx, folder / "m.engine", RTX, EngineOptions(batches=(1, 2, 4)))
    return folder / "m.engine"


@pytest.mark.skipif(not NO_CUDA, reason="this machine has CUDA")
def test_without_a_gpu_a_sound_engine_is_refused_with_the_reason(engine: Path) -> None:
    said = (
        r"m\.engine: needs an NVIDIA GPU and driver, and PyTorch sees none here; run it on a machine that has"
    )
    with pytest.raises(RunnerError, match=said) as caught:
        open_runner(RTX, engine)
    assert caught.value.exit_code == 6


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_a_gpu_it_agrees_with_pytorch(engine: Path, cuda_graph: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    net.load_state_dict(torch.load(engine.parent / "net.pt", weights_only=True))
    runner = open_tensorrt(engine, RTX, cuda_graph=cuda_graph)
    (found,) = runner.infer((X,))
    np.testing.assert_allclose(found, net(torch.from_numpy(X)).detach().numpy(), rtol=1e-4, atol=1e-4)
    assert runner.layer_times(2)
    runner.close()
