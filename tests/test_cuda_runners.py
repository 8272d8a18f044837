"""Runners on a CUDA stream and as a CUDA graph: the logic on doubles, the real thing where there is a GPU."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploy import ort_runners
from deploy.errors import RunnerError
from deploy.runners import StagedRunner, check_outputs, open_runner
from deploy.to_onnx import export
from deploy.torch_runners import TorchCudaRunner, TorchGraphRunner
from tests.cuda_doubles import OF_TORCH_CUDA, FakeCuda, FakeEvent, FakeGraph, FakeStream

NO_CUDA = not torch.cuda.is_available()
X = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_CUDA, reason="no CUDA device")]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def public(double: type) -> set[str]:
    return {name for name in vars(double) if not name.startswith("_")}


def test_the_doubles_have_only_what_torch_cuda_has() -> None:
    assert public(FakeCuda) - {"clock"} == set(OF_TORCH_CUDA)
    assert all(hasattr(torch.cuda, name) for name in OF_TORCH_CUDA)
    assert public(FakeStream) - {"work"} <= set(dir(torch.cuda.Stream))
    assert public(FakeEvent) <= set(dir(torch.cuda.Event))
    assert public(FakeGraph) - {"body", "replays"} <= set(dir(torch.cuda.CUDAGraph))
    assert "stream" in inspect.signature(torch.cuda.graph.__init__).parameters
    assert "end_event" in inspect.signature(torch.cuda.Event.elapsed_time).parameters


def fake(net: nn.Module, kind: type[TorchCudaRunner] = TorchCudaRunner, **named: Any) -> TorchCudaRunner:
    return kind(net, 1, cuda=FakeCuda(), device="cpu", **named)


def test_a_cuda_runner_is_staged_and_computes_what_the_module_computes(net: nn.Module) -> None:
    runner = fake(net)
    assert isinstance(runner, StagedRunner)
    expected = net(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(runner.infer((X,))[0], expected, rtol=1e-5, atol=1e-6)
    runner.copy_in()
    runner.enqueue()
    runner.copy_out()
    np.testing.assert_allclose(runner._host_outputs[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    check_outputs(runner)
    runner.close()
    assert next(net.parameters()).device.type == "cpu"


def test_half_precision_converts_model_inputs_and_outputs(net: nn.Module) -> None:
    expected = net(torch.from_numpy(X)).detach().numpy()
    for precision, wanted in (("fp16", np.float16), ("bf16", np.float32)):
        (found,) = fake(net, precision=precision).infer((X,))
        assert found.dtype == wanted
        np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)
    assert next(net.parameters()).dtype == torch.float32


def test_tf32_holds_during_the_run_and_no_longer() -> None:
    seen: list[tuple[bool, bool]] = []

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return x

    for precision in ("fp32", "tf32"):
        fake(Looks(), precision=precision).infer((X,))
    assert seen == [(False, False), (True, True)]
    assert not torch.backends.cuda.matmul.allow_tf32


def graph_runner(net: nn.Module) -> TorchGraphRunner:
    """A graph whose replay does compute, as a real one does: into the outputs of the capture."""
    runner = fake(net, TorchGraphRunner)
    assert isinstance(runner, TorchGraphRunner)

    def body() -> None:
        with torch.inference_mode():
            runner._outputs[0].copy_(runner._module(*runner._inputs))

    FakeGraph.body = staticmethod(body)
    return runner


@pytest.fixture
def clean_graph() -> Iterator[None]:
    yield
    FakeGraph.body = staticmethod(lambda: None)
    FakeGraph.replays = 0


@pytest.mark.usefixtures("clean_graph")
def test_a_graph_is_captured_per_input_and_replayed_per_call(net: nn.Module) -> None:
    runner = graph_runner(net)
    for batch in (5, 2):
        (found,) = runner.infer((X[:batch],))
        np.testing.assert_allclose(found, net(torch.from_numpy(X[:batch])).detach().numpy(), atol=1e-6)
    assert runner._cuda.log == ["synchronize", "capture"] * 2
    assert FakeGraph.replays == 2
    check_outputs(runner)
    runner.close()


@pytest.mark.usefixtures("clean_graph")
def test_a_graph_that_writes_nothing_is_caught(net: nn.Module) -> None:
    runner = fake(net, TorchGraphRunner)
    runner.prepare((X,))
    with pytest.raises(RunnerError, match=r"^torch_cuda_graph: output 0 was not written"):
        check_outputs(runner)


@pytest.mark.usefixtures("clean_graph")
def test_what_cannot_be_captured_is_told_in_one_line(net: nn.Module) -> None:
    class Refuses(FakeCuda):
        @contextlib.contextmanager
        def graph(self, cuda_graph: FakeGraph, stream: Any = None) -> Iterator[None]:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore\nlines")
            yield

    runner = TorchGraphRunner(net, 1, cuda=Refuses(), device="cpu")
    with pytest.raises(RunnerError) as caught:
        runner.prepare((X,))
    assert str(caught.value) == (
        "torch_cuda_graph: cannot be captured as a CUDA graph: CUDA error: operation not permitted when "
        "stream is capturing; take out what makes the CPU wait (.item(), shapes that depend on data), or "
        "use torch_cuda"
    )


@pytest.mark.skipif(not NO_CUDA, reason="this machine has CUDA")
@pytest.mark.parametrize("kind", ["torch_cuda", "torch_cuda_graph", "torch_cuda_compile"])
def test_every_cuda_kind_says_what_is_missing(kind: str, net: nn.Module) -> None:
    with pytest.raises(RunnerError, match=rf"^{kind}: no CUDA device that PyTorch can use; install "):
        open_runner(kind, net)


@pytest.fixture(scope="module")
def onnx_file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(net, torch.randn(2, 4), tmp_path_factory.mktemp("onnx") / "m.onnx").path


@pytest.mark.parametrize("kind", ["onnxruntime_tensorrt", "onnxruntime_nvtensorrtrtx"])
def test_onnxruntime_on_tensorrt_says_what_is_missing(kind: str, onnx_file: Path) -> None:
    missing = {
        "onnxruntime_tensorrt": r"built without TensorrtExecutionProvider; .*onnxruntime-gpu.*TensorRT 10",
        "onnxruntime_nvtensorrtrtx": r"the plug-in is not installed; pip install onnxruntime-ep-nv-tensorrt",
    }
    with pytest.raises(RunnerError, match=rf"^{kind}: .*{missing[kind]}"):
        open_runner(kind, onnx_file)


def plugin(monkeypatch: pytest.MonkeyPatch, devices: list[Any], fails: str = "") -> list[tuple[str, str]]:
    """A plug-in package and the ONNX Runtime functions that it is registered through; what was registered."""
    import sys

    import onnxruntime

    package = ModuleType(ort_runners.PLUGIN)
    package.get_ep_name = lambda: "NvTensorRTRTXExecutionProvider"  # type: ignore[attr-defined]
    package.get_library_path = lambda: "libplugin.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ort_runners.PLUGIN, package)
    registered: list[tuple[str, str]] = []

    def register(name: str, path: str) -> None:
        if fails:
            raise RuntimeError(fails)
        registered.append((name, path))

    for name in ("register_execution_provider_library", "get_ep_devices"):
        assert hasattr(onnxruntime, name)
    assert hasattr(onnxruntime.OrtEpDevice, "ep_name")
    assert hasattr(onnxruntime.SessionOptions, "add_provider_for_devices")
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices if registered else [])
    return registered


def test_the_plugin_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = (SimpleNamespace(ep_name=f"{name}ExecutionProvider") for name in ("NvTensorRTRTX", "CPU"))
    registered = plugin(monkeypatch, [other, ours])
    assert ort_runners.plugin_devices() == [ours]
    assert ort_runners.plugin_devices() == [ours]
    assert registered == [("NvTensorRTRTXExecutionProvider", "libplugin.so")]


def test_a_plugin_that_fails_or_finds_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, [])
    with pytest.raises(RunnerError, match="the plug-in finds no GPU that it supports; bench it on"):
        ort_runners.plugin_devices()
    plugin(monkeypatch, [], fails="libcudart.so.13: cannot open shared object file")
    with pytest.raises(RunnerError, match=r"the plug-in cannot be loaded: libcudart\.so\.13: cannot open"):
        ort_runners.plugin_devices()


def test_an_onnxruntime_gpu_runner_copies_into_the_bound_memory(onnx_file: Path) -> None:
    import onnxruntime

    assert all(hasattr(onnxruntime.OrtValue, name) for name in ("update_inplace", "numpy"))

    class OnCpu(ort_runners.OrtGpuRunner):
        _device = "cpu"

    runner = OnCpu(onnx_file, 1)
    assert isinstance(runner, StagedRunner)
    before = runner.infer((X,))[0].copy()
    runner._values = [(runner._values[0][0], X + 1)]
    runner.copy_in()
    runner.enqueue()
    runner.copy_out()
    assert not np.allclose(before, runner.outputs()[0])
    check_outputs(runner)
    assert runner.timed == "host to host"


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("kind", ["torch_cuda", "torch_cuda_graph", "torch_cuda_compile"])
    @pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
    def test_torch_kinds_agree_with_the_cpu(self, kind: str, precision: str, net: nn.Module) -> None:
        runner = open_runner(kind, net, precision=precision)
        tolerance = 1e-4 if precision == "fp32" else 0.05
        (found,) = runner.infer((X,))
        expected = net(torch.from_numpy(X)).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
        check_outputs(runner)
        runner.close()
