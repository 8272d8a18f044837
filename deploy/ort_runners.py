"""ONNX Runtime on one provider: built in (CPU, CUDA, TensorRT) or a plug-in (TensorRT for RTX)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from deploy.errors import ArtifactError, RunnerError
from deploy.runners import Array, Runner, poison_value

PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime_cuda": "CUDAExecutionProvider",
    "onnxruntime_tensorrt": "TensorrtExecutionProvider",
    "onnxruntime_nvtensorrtrtx": "NvTensorRTRTXExecutionProvider",
}
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"  # nvidia.github.io/TensorRT-RTX-EP-ABI/installation.html
PLUGIN_FIX = "pip install onnxruntime-ep-nv-tensorrt-rtx, beside onnxruntime (not onnxruntime-gpu)"
_GPU_FIX = "pip uninstall onnxruntime && pip install onnxruntime-gpu, with an NVIDIA driver"
FIXES = {
    "onnxruntime": "pip install --force-reinstall onnxruntime",
    "onnxruntime_cuda": _GPU_FIX,
    "onnxruntime_tensorrt": f"{_GPU_FIX} and TensorRT 10",
    "onnxruntime_nvtensorrtrtx": PLUGIN_FIX,
}


def open_ort(kind: str, path: Path, threads: int, precision: str = "fp32") -> Runner:
    """The runner of one of ORT_KINDS; `precision` is fp32, or tf32 on a GPU."""
    known = ("fp32",) if kind == "onnxruntime" else ("fp32", "tf32")
    if precision not in known:
        fix = f"use {' or '.join(known)}, or a file that is {precision} itself"
        raise RunnerError(f"no precision {precision}", kind, fix)
    runner = OrtRunner if kind == "onnxruntime" else OrtGpuRunner
    return runner(path, threads, kind, tf32=precision == "tf32")


class OrtRunner:
    """ONNX Runtime on one provider, with no other to fall back to."""

    _device = "cpu"

    def __init__(self, path: Path, threads: int, name: str = "onnxruntime", *, tf32: bool = False) -> None:
        self.name = name
        self.threads = threads
        self.timed = "host to host" if self._device == "cpu" else "compute, inputs and outputs on the GPU"
        provider = PROVIDERS[name]
        self._session = _session(path, name, threads, tf32)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if self.providers[0] != provider:
            raise RunnerError(f"{provider} was asked for, {self.providers[0]} came", str(path), FIXES[name])
        self._names = [port.name for port in self._session.get_inputs()]
        self._binding: Any = None
        self._values: list[tuple[Any, Array]] = []

    def prepare(self, inputs: Sequence[Array]) -> None:
        """Bind the inputs, and fresh outputs for each run, on the device that computes."""
        if len(inputs) != len(self._names):
            raise RunnerError(f"{len(inputs)} inputs given, the model has {len(self._names)}", self.name)
        self._binding = self._session.io_binding()
        self._values = []
        try:
            for name, array in zip(self._names, inputs, strict=True):
                array = np.ascontiguousarray(array)
                value = self._value(array)
                self._values.append((value, array))
                self._binding.bind_ortvalue_input(name, value)
            for port in self._session.get_outputs():
                self._binding.bind_output(port.name, self._device)
        except Exception as error:  # onnxruntime's classes live in a private module
            raise RunnerError(f"input refused: {error}", self.name) from error

    def _value(self, array: Array) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def __call__(self) -> Sequence[Any]:
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:  # onnxruntime's classes live in a private module
            raise RunnerError(f"the run failed: {error}", self.name) from error
        return cast("Sequence[Any]", self._binding.get_outputs())

    def poison(self) -> None:
        """From here on the runs write into outputs of ours, which are full of NaN now."""
        found = self.outputs() or tuple(output.numpy() for output in self())
        for port, array in zip(self._session.get_outputs(), found, strict=True):
            value = self._value(np.full_like(array, poison_value(array.dtype)))
            self._binding.bind_ortvalue_output(port.name, value)

    def outputs(self) -> tuple[Array, ...]:
        """The last call's outputs as host arrays, in the order of the graph's outputs."""
        return tuple(output.numpy() for output in self._binding.get_outputs())

    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """One run of these inputs."""
        self.prepare(inputs)
        self()
        return self.outputs()

    def close(self) -> None:
        """Drop the session and its memory."""
        self._binding = self._session = None
        self._values = []


class OrtGpuRunner(OrtRunner):
    """The same on a GPU; a StagedRunner without a stream: ONNX Runtime waits for its own, step by step."""

    _device = "cuda"
    stream = None

    def copy_in(self) -> None:
        """Copy the inputs to the GPU, into the memory that is bound."""
        for value, array in self._values:
            value.update_inplace(array)

    def enqueue(self) -> None:
        """One run."""
        self()

    def copy_out(self) -> None:
        """Copy the outputs to the host."""
        self.outputs()


def _session(path: Path, name: str, threads: int, tf32: bool) -> Any:
    import onnxruntime

    if not path.is_file():
        raise ArtifactError("no such file", str(path), "export the model first")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal only: what it logs, it also raises
    if name != "onnxruntime":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    wanted = _providers(name, tf32, options)
    # onnxruntime announces fallbacks with print(): stdout is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:  # onnxruntime's classes live in a private module
            raise _load_error(error, path, name) from error
    session.disable_fallback()
    return session


def _providers(name: str, tf32: bool, options: Any) -> list[Any] | None:
    """What to ask the session for; None for a plug-in, which is put into the options instead."""
    import onnxruntime

    provider = PROVIDERS[name]
    if name == "onnxruntime_nvtensorrtrtx":
        options.add_provider_for_devices(plugin_devices(), {})
        return None
    if provider not in onnxruntime.get_available_providers():
        raise RunnerError(f"this onnxruntime was built without {provider}", name, FIXES[name])
    return [(provider, {"use_tf32": str(int(tf32))}) if name == "onnxruntime_cuda" else provider]


def plugin_devices() -> list[Any]:
    """The devices of the plug-in for TensorRT for RTX, which is registered with ONNX Runtime first.

    Raises RunnerError if the package or a device for it is not here.
    """
    import importlib

    import onnxruntime

    name = "onnxruntime_nvtensorrtrtx"
    try:
        plugin = importlib.import_module(PLUGIN)
    except ImportError as error:
        what = "the plug-in is not installed" if error.name == PLUGIN else f"the plug-in: {error}"
        raise RunnerError(what, name, PLUGIN_FIX) from error
    provider = plugin.get_ep_name()

    def devices() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]

    try:
        if not devices():  # a library can be registered once
            onnxruntime.register_execution_provider_library(provider, plugin.get_library_path())
    except Exception as error:  # onnxruntime's classes live in a private module
        raise RunnerError(f"the plug-in cannot be loaded: {error}", name, PLUGIN_FIX) from error
    if not (found := devices()):
        raise RunnerError("the plug-in finds no GPU that it supports", name, "bench it on onnxruntime_cuda")
    return found


def _load_error(error: Exception, path: Path, name: str) -> ArtifactError | RunnerError:
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from PATH failed:Protobuf parsing failed."
    text = str(error).replace(f"Load model from {path} failed:", "").rsplit(" : ", 1)[-1]
    if name != "onnxruntime":
        where = PROVIDERS[name].removesuffix("ExecutionProvider")
        return RunnerError(
            f"does not run on {where} alone: {text}", str(path), "bench it on onnxruntime instead"
        )
    if "NOT_IMPLEMENTED" in str(error):
        return RunnerError(f"onnxruntime lacks an operator: {text}", str(path), "try another export.opset")
    return ArtifactError(f"onnxruntime cannot load it: {text}", str(path), "export the model again")
