"""Runners: same outputs from each, refusals instead of silent fallbacks, and an honest `available()`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploy import ort_runners, runners
from deploy.errors import ArtifactError, RunnerError
from deploy.runners import StagedRunner, check_outputs, open_runner
from deploy.to_onnx import export

NO_CUDA = not torch.cuda.is_available()
X = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def onnx_file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(net, torch.randn(2, 4), tmp_path_factory.mktemp("onnx") / "m.onnx").path


def test_torch_and_onnxruntime_agree_with_the_module(net: nn.Module, onnx_file: Path) -> None:
    expected = net(torch.from_numpy(X)).detach().numpy()
    for kind, artifact in (("torch", net), ("onnxruntime", onnx_file)):
        runner = open_runner(kind, artifact)
        (found,) = runner.infer((X,))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert (runner.name, runner.threads, runner.timed) == (kind, 1, "host to host")
        runner.close()


def test_a_call_runs_the_prepared_inputs_at_any_batch(onnx_file: Path) -> None:
    runner = open_runner("onnxruntime", onnx_file)
    for batch in (1, 5):
        runner.prepare((X[:batch],))
        assert runner()[0].numpy().shape == (batch, 3)
    runner.close()


def test_nested_outputs_come_in_the_order_of_the_export() -> None:
    class Nested(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"b": x + 1, "a": (x + 2, x + 3)}

    outputs = open_runner("torch", Nested().eval()).infer((X,))
    assert [round(float((output - X).mean())) for output in outputs] == [1, 2, 3]


def test_onnxruntime_session_has_the_threads_asked_for_and_one_provider(onnx_file: Path) -> None:
    runner = open_runner("onnxruntime", onnx_file, threads=2)
    assert isinstance(runner, ort_runners.OrtRunner)
    options = runner._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert runner.providers == ("CPUExecutionProvider",)


def test_torch_threads_are_given_back(net: nn.Module) -> None:
    before = torch.get_num_threads()
    runner = open_runner("torch", net, threads=before + 1)
    runner.infer((X,))
    assert torch.get_num_threads() == before + 1
    runner.close()
    assert torch.get_num_threads() == before


def test_a_provider_other_than_the_one_asked_for_is_refused(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fallen:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort_runners, "_session", lambda *_: Fallen())
    with pytest.raises(
        RunnerError, match="CUDAExecutionProvider was asked for, CPUExecutionProvider came"
    ) as caught:
        open_runner("onnxruntime_cuda", onnx_file)
    assert caught.value.exit_code == 6


def test_cpu_fallback_is_switched_off_for_cuda(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU-only onnxruntime that claims CUDA: without the option it would give a CPU session and no error.
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with (
        pytest.raises(RunnerError, match="does not run on CUDA alone"),
        pytest.warns(UserWarning, match="CUDA"),
    ):
        open_runner("onnxruntime_cuda", onnx_file)


@pytest.mark.skipif(not NO_CUDA, reason="this machine has CUDA")
def test_cuda_kinds_say_what_is_missing(
    net: nn.Module, onnx_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        RunnerError, match=r"^torch_cuda: no CUDA device that PyTorch can use; install "
    ) as caught:
        open_runner("torch_cuda", net)
    assert caught.value.exit_code == 6
    with pytest.raises(RunnerError, match=r"^onnxruntime_cuda: .*CUDAExecutionProvider; .*onnxruntime-gpu"):
        open_runner("onnxruntime_cuda", onnx_file)
    assert capfd.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="no CUDA device")
def test_torch_cuda_agrees_with_the_cpu_and_leaves_the_module_there(net: nn.Module) -> None:
    runner = open_runner("torch_cuda", net)
    (found,) = runner.infer((X,))
    np.testing.assert_allclose(found, net(torch.from_numpy(X)).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert next(net.parameters()).device.type == "cpu"
    assert runner()[0].is_cuda


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_file_is_an_artifact_error(
    content: bytes | None, onnx_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(onnx_file.read_bytes()[:-40] if content is None else content)
    with pytest.raises(
        ArtifactError, match=r"onnxruntime cannot load it: .*; export the model again"
    ) as caught:
        open_runner("onnxruntime", bad)
    assert caught.value.exit_code == 8
    assert str(caught.value).count(str(bad)) == 1
    assert capfd.readouterr() == ("", "")


def test_wrong_requests_are_refused_with_the_remedy(net: nn.Module, onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RunnerError, match=r"^tensorrt9: unknown runner; use one of torch, torch_compile, torch_cuda, "
    ):
        open_runner("tensorrt9", onnx_file)
    with pytest.raises(RunnerError, match=r"^torch: 0 threads; use 1 or more"):
        open_runner("torch", net, threads=0)
    with pytest.raises(RunnerError, match=r"^torch: cannot run a \w*Path; give it an nn\.Module"):
        open_runner("torch", onnx_file)
    with pytest.raises(
        RunnerError, match=r"^onnxruntime: cannot run a Sequential; give it the path of an ONNX file"
    ):
        open_runner("onnxruntime", net)
    with pytest.raises(ArtifactError, match="no such file; export the model first"):
        open_runner("onnxruntime", tmp_path / "none.onnx")


def test_wrong_inputs_are_refused(onnx_file: Path) -> None:
    runner = open_runner("onnxruntime", onnx_file)
    with pytest.raises(RunnerError, match="2 inputs given, the model has 1"):
        runner.prepare((X, X))
    with pytest.raises(RunnerError, match=r"^onnxruntime: the run failed: .*Got: 3 Expected: 4"):
        runner.infer((X[:, :3],))


def test_the_module_imports_without_torch_and_onnxruntime() -> None:
    code = "import sys, deploy.availability; print({'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_outputs_are_poisoned_and_written_again(onnx_file: Path, net: nn.Module) -> None:
    for kind, artifact in (("torch", net), ("onnxruntime", onnx_file)):
        runner = open_runner(kind, artifact)
        (expected,) = runner.infer((X,))
        check_outputs(runner)
        np.testing.assert_array_equal(runner.outputs()[0], expected)
        runner.close()


def test_a_run_that_writes_nothing_is_caught(onnx_file: Path) -> None:
    runner = open_runner("onnxruntime", onnx_file)
    assert isinstance(runner, ort_runners.OrtRunner)
    runner.prepare((X,))
    runner()
    runner._session = SimpleNamespace(
        get_outputs=runner._session.get_outputs, run_with_iobinding=lambda binding: None
    )
    with pytest.raises(RunnerError, match=r"^onnxruntime: output 0 was not written, or .*; compare it with"):
        check_outputs(runner)


@pytest.mark.parametrize(
    ("values", "poisoned"),
    [
        (np.array([1.0, np.nan], np.float32), True),
        (np.array([1.0, 2.0], np.float16), False),
        (np.full(3, np.iinfo(np.int64).min), True),
        (np.array([np.iinfo(np.int64).min, 0]), False),  # a value that an integer output may well hold
        (np.zeros(3, bool), False),
        (np.zeros(0, np.int64), False),
    ],
)
def test_what_counts_as_poison(values: runners.Array, poisoned: bool) -> None:
    assert runners._is_poisoned(values) is poisoned
    filled = np.full(values.shape, runners.poison_value(values.dtype), values.dtype)
    assert runners._is_poisoned(filled) is (values.size > 0 and values.dtype != bool)


@pytest.mark.parametrize(
    ("kind", "precision", "fix"),
    [
        ("torch", "fp16", "use fp32"),
        ("torch_cuda", "int8", "use fp32 or tf32 or fp16 or bf16"),
        ("onnxruntime", "tf32", "use fp32, or a file that is tf32 itself"),
        ("onnxruntime_cuda", "fp16", "use fp32 or tf32, or a file that is fp16 itself"),
    ],
)
def test_precisions_that_a_kind_lacks(
    kind: str, precision: str, fix: str, net: nn.Module, onnx_file: Path
) -> None:
    artifact = net if kind in runners.TORCH_KINDS else onnx_file
    with pytest.raises(RunnerError) as caught:
        open_runner(kind, artifact, precision=precision)
    assert str(caught.value) == f"{kind}: no precision {precision}; {fix}"


@pytest.mark.slow
def test_torch_compile_agrees_with_the_module(net: nn.Module) -> None:
    runner = open_runner("torch_compile", net)
    (found,) = runner.infer((X,))
    np.testing.assert_allclose(found, net(torch.from_numpy(X)).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert (runner.name, runner.timed) == ("torch_compile", "host to host")
    runner.close()


def test_what_a_compiler_raises_is_one_line(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Any:
        def call(*_: object) -> None:
            raise RuntimeError("\nCppCompileError: C++ compile error\n\nCommand:\ng++ ...")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    runner = open_runner("torch_compile", net)
    with pytest.raises(RunnerError) as caught:
        runner.infer((X,))
    said = "torch_compile: torch.compile failed: CppCompileError: C++ compile error; install a C++ compiler"
    assert str(caught.value).startswith(said)
    runner.close()


def test_only_gpu_runners_are_staged(net: nn.Module, onnx_file: Path) -> None:
    assert not isinstance(open_runner("torch", net), StagedRunner)
    assert not isinstance(open_runner("onnxruntime", onnx_file), StagedRunner)
    assert issubclass(ort_runners.OrtGpuRunner, ort_runners.OrtRunner)
