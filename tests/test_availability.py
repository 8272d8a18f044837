"""`available()`: every runner is listed, with a reason and a remedy where it cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploy import availability
from deploy.availability import Availability, available
from deploy.errors import RunnerError
from deploy.runners import ORT_KINDS, TORCH_KINDS, open_runner


def test_available_lists_everything_and_gives_a_fix_for_what_is_not_usable() -> None:
    found = {entry.name: entry for entry in available()}
    assert list(found) == [
        *TORCH_KINDS,
        *ORT_KINDS,
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

    monkeypatch.setattr(availability, "_check_torch_cuda", lambda name: broken())
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
    assert availability.import_failure("sleeper", timeout_s=0.5) == "no answer within 0.5 s"


def test_a_missing_compiler_is_named_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    lack = "torch.compile needs a C++ compiler, none is on the PATH"
    fix = "install a C++ compiler (apt-get install g++), or name one in CXX"
    assert availability._check_torch_compile() == Availability("torch_compile", False, lack, fix)
    with pytest.raises(RunnerError, match=r"^torch_compile: torch\.compile needs a C\+\+ compiler, none"):
        open_runner("torch_compile", torch.nn.Identity())
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert availability._check_torch_compile().detail.endswith("not here: no-such-compiler -O2")


def test_compiling_for_a_gpu_needs_triton_and_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    assert availability._check_torch_cuda("torch_cuda_graph").detail == "NVIDIA L4"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in availability._check_torch_cuda("torch_cuda_compile").detail
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert availability._check_torch_cuda("torch_cuda_compile").fix == "pip install triton"


def test_the_plugin_is_looked_for_by_its_package() -> None:
    entry = availability._check_provider("onnxruntime_nvtensorrtrtx")
    assert (entry.usable, entry.detail) == (False, "the plug-in is not installed")
    assert entry.fix.startswith("pip install onnxruntime-ep-nv-tensorrt-rtx")


def test_a_plugin_without_a_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = Availability("cuda driver", True, "CUDA 13.0", "")
    monkeypatch.setattr(availability, "_check_driver", lambda: usable)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    def none_found() -> list[object]:
        raise RunnerError("the plug-in finds no GPU that it supports", fix="use another")

    monkeypatch.setattr(availability, "plugin_devices", none_found)
    entry = availability._check_provider("onnxruntime_nvtensorrtrtx")
    assert entry.detail == "the plug-in finds no GPU that it supports"
    monkeypatch.setattr(availability, "plugin_devices", list)
    assert availability._check_provider("onnxruntime_nvtensorrtrtx").usable
