"""Runners: same outputs from each, refusals instead of silent fallbacks, and an honest `available()`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploy import runners
from deploy.errors import ArtifactError, RunnerError
from deploy.runners import Availability, available, open_runner
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
    assert isinstance(runner, runners.OrtRunner)
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

    monkeypatch.setattr(runners, "_session", lambda *_: Fallen())
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
        RunnerError, match=r"^tensorrt9: unknown runner; use one of torch, torch_cuda, onnxruntime"
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


def test_available_lists_everything_and_gives_a_fix_for_what_is_not_usable() -> None:
    found = {entry.name: entry for entry in available()}
    assert list(found) == [
        "torch",
        "torch_cuda",
        "onnxruntime",
        "onnxruntime_cuda",
        "cuda driver",
        "tensorrt",
        "tensorrt_rtx",
        "pycuda",
    ]
    assert found["torch"] == Availability("torch", True, torch.__version__.split("+")[0], "")
    assert found["onnxruntime"].usable
    assert all(entry.usable != bool(entry.fix) for entry in found.values())
    assert all(entry.detail for entry in found.values())
    assert found["torch_cuda"].usable == torch.cuda.is_available()


def test_available_survives_a_check_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Availability:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(runners, "_check_torch_cuda", broken)
    entry = {entry.name: entry for entry in available()}["torch_cuda"]
    assert entry == Availability(
        "torch_cuda",
        False,
        "OSError: libnvinfer.so.11: cannot open shared object file",
        "reinstall torch_cuda",
    )


def test_a_package_that_kills_its_process_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").write_text("")
    (tmp_path / "pycuda" / "driver.py").write_text("raise ImportError('libcuda.so.1: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    found = {entry.name: entry for entry in available()}
    assert "killed by signal 11" in found["tensorrt"].detail
    assert found["tensorrt"].fix == "reinstall 'compress-release[tensorrt]'"
    assert "ImportError: libcuda.so.1: cannot open" in found["pycuda"].detail
    assert not found["pycuda"].usable


def test_an_import_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert runners._import_failure("sleeper", timeout_s=0.5) == "no answer within 0.5 s"


def test_the_module_imports_without_torch_and_onnxruntime() -> None:
    code = "import sys, deploy.runners; print({'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
