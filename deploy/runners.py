"""One protocol for everything that can run a model, and what can run on this machine.

A runner that would quietly do something else than asked (fall back to the CPU) refuses instead.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from deploy.errors import ArtifactError, RunnerError

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = NDArray[Any]
KINDS = ("torch", "torch_cuda", "onnxruntime", "onnxruntime_cuda")


class Runner(Protocol):
    """Runs one model. `name` is its kind, `providers` what executes it, `timed` what one call spans.

    A call runs the prepared inputs once and returns when the outputs are complete; on a GPU they stay
    there, so that a call is compute without copies. `infer` returns them as host arrays.
    """

    @property
    def name(self) -> str: ...
    @property
    def providers(self) -> tuple[str, ...]: ...
    @property
    def threads(self) -> int: ...
    @property
    def timed(self) -> str: ...
    def prepare(self, inputs: Sequence[Array]) -> None: ...
    def __call__(self) -> Sequence[Any]: ...
    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]: ...
    def close(self) -> None: ...


def open_runner(kind: str, artifact: nn.Module | Path, threads: int = 1) -> Runner:
    """A runner of `kind` (one of KINDS): a module for the torch kinds, an ONNX file for the others.

    `threads` is the number of CPU threads inside one operator. The module must be in eval mode; it is
    copied for the GPU, not for the CPU. A torch runner sets the thread count of the whole process until
    `close()`. Raises RunnerError for an unknown or unusable kind, ArtifactError for a damaged file.
    """
    if kind not in KINDS:
        raise RunnerError("unknown runner", kind, f"use one of {', '.join(KINDS)}")
    if threads < 1:
        raise RunnerError(f"{threads} threads", kind, "use 1 or more")
    is_path = isinstance(artifact, Path)
    if is_path == kind.startswith("torch"):
        wanted = "an nn.Module" if is_path else "the path of an ONNX file"
        raise RunnerError(f"cannot run a {type(artifact).__name__}", kind, f"give it {wanted}")
    if kind.startswith("torch"):
        return TorchRunner(cast("nn.Module", artifact), threads, cuda=kind == "torch_cuda")
    return OrtRunner(cast("Path", artifact), threads, cuda=kind == "onnxruntime_cuda")


class TorchRunner:
    """PyTorch, eager, in inference mode and strict fp32 (no TF32)."""

    def __init__(self, module: nn.Module, threads: int, *, cuda: bool = False) -> None:
        import torch

        if cuda and not torch.cuda.is_available():
            raise RunnerError("no CUDA device that PyTorch can use", "torch_cuda", _torch_cuda_fix())
        self.name = "torch_cuda" if cuda else "torch"
        self.providers: tuple[str, ...] = ("cuda" if cuda else "cpu",)
        self.threads = threads
        self.timed = "compute, inputs and outputs on the GPU" if cuda else "host to host"
        self._threads_before = torch.get_num_threads()
        self._module = copy.deepcopy(module).to("cuda") if cuda else module
        self._inputs: tuple[Tensor, ...] = ()

    def prepare(self, inputs: Sequence[Array]) -> None:
        """Put the inputs where the model is, and take the thread count."""
        import torch

        torch.set_num_threads(self.threads)
        self._inputs = tuple(torch.from_numpy(array).to(self.providers[0]) for array in inputs)

    def __call__(self) -> Sequence[Tensor]:
        import torch
        from torch.backends import cudnn

        with torch.inference_mode(), cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
            outputs = self._module(*self._inputs)
            if self._inputs[0].is_cuda:
                torch.cuda.synchronize()
        return _flat(outputs)

    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """One run; outputs as host arrays, nested ones in the order of torch's pytree."""
        self.prepare(inputs)
        return tuple(output.cpu().numpy() for output in self())

    def close(self) -> None:
        """Give the process its thread count back. Close runners in reverse order of opening."""
        import torch

        torch.set_num_threads(self._threads_before)


def _flat(outputs: Any) -> Sequence[Tensor]:
    import torch

    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    return cast("list[Tensor]", torch.utils._pytree.tree_leaves(outputs))  # the order the exporter uses


class OrtRunner:
    """ONNX Runtime on one provider, with no other to fall back to."""

    def __init__(self, path: Path, threads: int, *, cuda: bool = False) -> None:
        provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
        self.name = "onnxruntime_cuda" if cuda else "onnxruntime"
        self.threads = threads
        self.timed = "compute, inputs and outputs on the GPU" if cuda else "host to host"
        self._device = "cuda" if cuda else "cpu"
        self._session = _session(path, provider, threads, self.name)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if self.providers[0] != provider:
            raise RunnerError(f"{provider} was asked for, {self.providers[0]} came", str(path), _ORT_FIX)
        self._names = [port.name for port in self._session.get_inputs()]
        self._binding: Any = None

    def prepare(self, inputs: Sequence[Array]) -> None:
        """Bind the inputs, and fresh outputs for each run, on the device that computes."""
        import onnxruntime

        if len(inputs) != len(self._names):
            raise RunnerError(f"{len(inputs)} inputs given, the model has {len(self._names)}", self.name)
        self._binding = self._session.io_binding()
        try:
            for name, array in zip(self._names, inputs, strict=True):
                value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
                self._binding.bind_ortvalue_input(name, value)
            for port in self._session.get_outputs():
                self._binding.bind_output(port.name, self._device)
        except Exception as error:  # onnxruntime's classes live in a private module
            raise RunnerError(f"input refused: {error}", self.name) from error

    def __call__(self) -> Sequence[Any]:
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:  # onnxruntime's classes live in a private module
            raise RunnerError(f"the run failed: {error}", self.name) from error
        return cast("Sequence[Any]", self._binding.get_outputs())

    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """One run; outputs as host arrays, in the order of the graph's outputs."""
        self.prepare(inputs)
        return tuple(output.numpy() for output in self())

    def close(self) -> None:
        """Drop the session and its memory."""
        self._binding = self._session = None


_ORT_FIX = "pip uninstall onnxruntime && pip install onnxruntime-gpu, with an NVIDIA driver"


def _session(path: Path, provider: str, threads: int, name: str) -> Any:
    import onnxruntime

    if not path.is_file():
        raise ArtifactError("no such file", str(path), "export the model first")
    if provider not in onnxruntime.get_available_providers():
        raise RunnerError(f"this onnxruntime was built without {provider}", name, _ORT_FIX)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal only: what it logs, it also raises
    wanted: list[Any] = [provider]
    if provider == "CUDAExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        wanted = [(provider, {"use_tf32": "0"})]
    # onnxruntime announces fallbacks with print(): stdout is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:  # onnxruntime's classes live in a private module
            raise _load_error(error, path, provider) from error
    session.disable_fallback()
    return session


def _load_error(error: Exception, path: Path, provider: str) -> ArtifactError | RunnerError:
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from PATH failed:Protobuf parsing failed."
    text = str(error).replace(f"Load model from {path} failed:", "").rsplit(" : ", 1)[-1]
    if provider == "CUDAExecutionProvider":
        return RunnerError(
            f"does not run on CUDA alone: {text}", str(path), "bench it on onnxruntime instead"
        )
    if "NOT_IMPLEMENTED" in str(error):
        return RunnerError(f"onnxruntime lacks an operator: {text}", str(path), "try another export.opset")
    return ArtifactError(f"onnxruntime cannot load it: {text}", str(path), "export the model again")


@dataclass(frozen=True)
class Availability:
    """Whether something works here. `detail`: the version, or what is missing; `fix`: empty if usable."""

    name: str
    usable: bool
    detail: str
    fix: str


def available() -> tuple[Availability, ...]:
    """Every runner and runtime, in fixed order: does it work on this machine, and what to do if not.

    Never raises. Packages that can crash without a driver are imported in a process of their own.
    """
    checks: tuple[tuple[str, Callable[[], Availability]], ...] = (
        ("torch", lambda: Availability("torch", True, _version("torch"), "")),
        ("torch_cuda", _check_torch_cuda),
        ("onnxruntime", lambda: _check_provider("onnxruntime", "CPUExecutionProvider")),
        ("onnxruntime_cuda", lambda: _check_provider("onnxruntime_cuda", "CUDAExecutionProvider")),
        ("cuda driver", _check_driver),
        ("tensorrt", lambda: _check_package("tensorrt", "tensorrt", "compress-release[tensorrt]")),
        (
            "tensorrt_rtx",
            lambda: _check_package("tensorrt_rtx", "tensorrt_rtx", "compress-release[tensorrt-rtx]"),
        ),
        ("pycuda", lambda: _check_package("pycuda", "pycuda.driver", "compress-release[pycuda]")),
    )
    return tuple(_guarded(name, check) for name, check in checks)


def _guarded(name: str, check: Callable[[], Availability]) -> Availability:
    try:
        return check()
    except Exception as error:  # a broken installation can raise anything; the list must still be complete
        return Availability(name, False, f"{type(error).__name__}: {error}", f"reinstall {name}")


def _version(*packages: str) -> str:
    """The version of the first package that is installed, else ""."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return ""


def _torch_cuda_fix() -> str:
    import torch

    if torch.version.cuda is None:
        return "install a CUDA build of torch (pytorch.org/get-started)"
    return f"install an NVIDIA driver for CUDA {torch.version.cuda}, on a machine with a GPU"


def _check_torch_cuda() -> Availability:
    import torch

    if torch.cuda.is_available():
        return Availability("torch_cuda", True, torch.cuda.get_device_name(), "")
    return Availability("torch_cuda", False, "torch.cuda.is_available() is False", _torch_cuda_fix())


def _check_provider(name: str, provider: str) -> Availability:
    import onnxruntime

    version = _version("onnxruntime", "onnxruntime-gpu")
    if provider not in onnxruntime.get_available_providers():
        return Availability(name, False, f"onnxruntime {version} was built without {provider}", _ORT_FIX)
    driver = _check_driver()
    if provider == "CUDAExecutionProvider" and not driver.usable:
        return Availability(name, False, driver.detail, driver.fix)
    return Availability(name, True, f"{version} {provider}", "")


def _check_driver() -> Availability:
    """The driver library itself, as every CUDA runtime sees it (cuInit, CUDA driver API)."""
    import ctypes

    fix = "install an NVIDIA driver, on a machine with an NVIDIA GPU"
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Availability("cuda driver", False, "the driver library (libcuda) is not here", fix)
    code, number = int(library.cuInit(0)), ctypes.c_int(0)
    if code:
        return Availability("cuda driver", False, f"cuInit returned {code}", fix)
    library.cuDriverGetVersion(ctypes.byref(number))
    # The version is 1000 x major + 10 x minor (cuDriverGetVersion).
    return Availability("cuda driver", True, f"CUDA {number.value // 1000}.{number.value % 1000 // 10}", "")


def _check_package(name: str, module: str, extra: str) -> Availability:
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return Availability(name, False, "not installed", f"pip install '{extra}'")
    version = _version(name, f"{name.replace('_', '-')}-cu13", f"{name.replace('_', '-')}-cu13-bindings")
    failure = _import_failure(module)
    if failure:
        return Availability(name, False, f"{version} does not import: {failure}", f"reinstall '{extra}'")
    driver = _check_driver()
    if not driver.usable:
        return Availability(name, False, f"{version} imports, but {driver.detail}", driver.fix)
    return Availability(name, True, version, "")


def _import_failure(module: str, timeout_s: float = 60.0) -> str:
    """Why `import module` fails in a fresh process, "" if it works."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:g} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return last[0] if done.returncode else ""
