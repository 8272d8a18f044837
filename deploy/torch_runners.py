"""PyTorch on the CPU and on a CUDA stream: eager, compiled, and as a CUDA graph."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from deploy.errors import RunnerError
from deploy.runners import Array, Runner

if TYPE_CHECKING:
    from torch import Tensor, nn

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
WARM_UP_CALLS = 3  # before a capture: libraries choose kernels and allocate workspaces in their first calls


def open_torch(kind: str, module: nn.Module, threads: int, precision: str) -> Runner:
    """The runner of one of TORCH_KINDS; `precision` as in `open_runner`."""
    on_gpu = kind.startswith("torch_cuda")
    known = PRECISIONS if on_gpu else PRECISIONS[:1]
    if precision not in known:
        raise RunnerError(f"no precision {precision}", kind, f"use {' or '.join(known)}")
    if kind.endswith("_compile") and (lack := missing_compiler()):
        raise RunnerError(lack, kind, COMPILER_FIX)
    if not on_gpu:
        return TorchRunner(module, threads, compiled=kind == "torch_compile")
    import torch

    if not torch.cuda.is_available():
        raise RunnerError("no CUDA device that PyTorch can use", kind, torch_cuda_fix())
    runner = TorchGraphRunner if kind == "torch_cuda_graph" else TorchCudaRunner
    return runner(module, threads, precision, name=kind)


COMPILER_FIX = "install a C++ compiler (apt-get install g++), or name one in CXX"


def missing_compiler() -> str:
    """Why torch.compile's C++ code could not be built here, else "" (Windows: cl.exe)."""
    named = os.environ.get("CXX", "")
    if named and shutil.which(named.split()[0]) is None:
        return f"the C++ compiler that CXX names is not here: {named}"
    if named or any(shutil.which(name) for name in ("g++", "c++", "clang++", "cl")):
        return ""
    return "torch.compile needs a C++ compiler, none is on the PATH"


class TorchRunner:
    """PyTorch on the CPU in inference mode, eager or through torch.compile."""

    def __init__(self, module: nn.Module, threads: int, *, compiled: bool = False) -> None:
        import torch

        self.name = "torch_compile" if compiled else "torch"
        self.providers: tuple[str, ...] = ("cpu",)
        self.threads = threads
        self.timed = "host to host"
        self._threads_before = torch.get_num_threads()
        self._module = torch.compile(module, dynamic=False) if compiled else module
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Sequence[Tensor] = ()

    def prepare(self, inputs: Sequence[Array]) -> None:
        """Take the inputs and the thread count."""
        import torch

        torch.set_num_threads(self.threads)
        self._inputs = tuple(torch.from_numpy(array) for array in inputs)

    def __call__(self) -> Sequence[Tensor]:
        import torch

        with torch.inference_mode(), _told(self.name):
            self._outputs = _flat(self._module(*self._inputs))
        return self._outputs

    def poison(self) -> None:
        """Nothing: every call returns new tensors."""

    def outputs(self) -> tuple[Array, ...]:
        """The last call's outputs as host arrays, nested ones in the order of torch's pytree."""
        return tuple(output.numpy() for output in self._outputs)

    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """One run of these inputs."""
        self.prepare(inputs)
        self()
        return self.outputs()

    def close(self) -> None:
        """Give the process its thread count back. Close runners in reverse order of opening."""
        import torch

        torch.set_num_threads(self._threads_before)


class TorchCudaRunner:
    """PyTorch on a CUDA stream of its own, eager or compiled; a StagedRunner.

    `cuda` stands in for torch.cuda and `device` for "cuda" where the logic is tested without a GPU.
    """

    def __init__(
        self,
        module: nn.Module,
        threads: int,
        precision: str = "fp32",
        *,
        name: str = "torch_cuda",
        cuda: Any = None,
        device: str = "cuda",
    ) -> None:
        import torch

        self.name = name
        self.providers: tuple[str, ...] = ("cuda",)
        self.threads, self.precision = threads, precision
        self.timed = "compute, inputs and outputs on the GPU"
        self._cuda, self._device = cuda or torch.cuda, device
        self.stream: Any = self._cuda.Stream()
        self._dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        self._threads_before = torch.get_num_threads()
        net = copy.deepcopy(module).to(device, self._dtype)
        self._module: Any = torch.compile(net, dynamic=False) if name == "torch_cuda_compile" else net
        self._host: tuple[Tensor, ...] = ()
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Sequence[Tensor] = ()
        self._host_outputs: tuple[Tensor, ...] = ()

    def prepare(self, inputs: Sequence[Array]) -> None:
        """Put the inputs into page-locked host memory and onto the GPU, and take the thread count."""
        import torch

        torch.set_num_threads(self.threads)
        self._host = tuple(self._pinned(torch.from_numpy(array)) for array in inputs)
        self._inputs = tuple(tensor.to(self._device) for tensor in self._host)
        self._outputs = self._host_outputs = ()
        # The copies above ran on another stream.
        self._cuda.synchronize()

    def _pinned(self, tensor: Tensor) -> Tensor:
        if self._dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return tensor.pin_memory() if self._device == "cuda" else tensor

    def copy_in(self) -> None:
        """Enqueue the copies of the inputs to the GPU."""
        with self._cuda.stream(self.stream):
            for there, here in zip(self._inputs, self._host, strict=True):
                there.copy_(here, non_blocking=True)

    def enqueue(self) -> None:
        """Enqueue the model."""
        with self._cuda.stream(self.stream):
            self._outputs = self._run()

    def _run(self) -> Sequence[Tensor]:
        import torch

        with torch.inference_mode(), _tf32(self.precision == "tf32"), _told(self.name):
            return _flat(self._module(*self._inputs))

    def copy_out(self) -> None:
        """Enqueue the copies of the outputs to page-locked host memory."""
        import torch

        if not self._host_outputs:
            pin = self._device == "cuda"
            self._host_outputs = tuple(
                torch.empty(output.shape, dtype=output.dtype, pin_memory=pin) for output in self._outputs
            )
        with self._cuda.stream(self.stream):
            for here, there in zip(self._host_outputs, self._outputs, strict=True):
                here.copy_(there, non_blocking=True)

    def __call__(self) -> Sequence[Tensor]:
        self.enqueue()
        self.stream.synchronize()
        return self._outputs

    def poison(self) -> None:
        """Nothing: every call returns new tensors."""

    def outputs(self) -> tuple[Array, ...]:
        """The last call's outputs as host arrays; bfloat16, which numpy lacks, as float32."""
        import torch

        self.stream.synchronize()
        found = (output.cpu() for output in self._outputs)
        return tuple((x.float() if x.dtype == torch.bfloat16 else x).numpy() for x in found)

    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """One run of these inputs."""
        self.prepare(inputs)
        self()
        return self.outputs()

    def close(self) -> None:
        """Drop the copy on the GPU and give the process its thread count back."""
        import torch

        self._inputs = self._outputs = self._host_outputs = ()
        self._module = None
        torch.set_num_threads(self._threads_before)


class TorchGraphRunner(TorchCudaRunner):
    """The same, captured once as a CUDA graph for each set of inputs and replayed: one launch a call."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **{"name": "torch_cuda_graph"} | named)
        self._graph: Any = None

    def prepare(self, inputs: Sequence[Array]) -> None:
        """As above, then capture: the graph reads these inputs and writes its own outputs."""
        self._graph = None
        super().prepare(inputs)
        with self._cuda.stream(self.stream):
            for _ in range(WARM_UP_CALLS):
                self._run()
        self.stream.synchronize()
        self._graph = self._cuda.CUDAGraph()
        try:
            with self._cuda.graph(self._graph, stream=self.stream):
                self._outputs = self._run()
        except RuntimeError as error:
            raise RunnerError(
                f"cannot be captured as a CUDA graph: {_first_line(error)}",
                self.name,
                "take out what makes the CPU wait (.item(), shapes that depend on data), or use torch_cuda",
            ) from error

    def enqueue(self) -> None:
        """Enqueue the whole graph."""
        with self._cuda.stream(self.stream):
            self._graph.replay()

    def poison(self) -> None:
        """Overwrite the graph's own outputs."""
        import torch

        with self._cuda.stream(self.stream), torch.inference_mode():
            for output in self._outputs:
                output.fill_(_poison_value(output))

    def close(self) -> None:
        """Drop the graph before the memory it uses."""
        self._graph = None
        super().close()


def _poison_value(tensor: Tensor) -> float | int:
    import torch

    if tensor.is_floating_point() or tensor.is_complex():
        return float("nan")
    return 0 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """TF32 in convolutions and matrix products, or strict fp32 whatever the process has set."""
    import torch
    from torch.backends import cudnn

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = allowed
    try:
        with cudnn.flags(enabled=cudnn.enabled, allow_tf32=allowed):
            yield
    finally:
        matmul.allow_tf32 = before


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """What a compiler raises, as one line; what the model itself raises passes."""
    try:
        yield
    except Exception as error:
        if not name.endswith("_compile"):
            raise
        raise RunnerError(f"torch.compile failed: {_first_line(error)}", name, COMPILER_FIX) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _flat(outputs: Any) -> Sequence[Tensor]:
    import torch

    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    return cast("list[Tensor]", torch.utils._pytree.tree_leaves(outputs))  # the order the exporter uses


def torch_cuda_fix() -> str:
    """What to install so that PyTorch sees a GPU."""
    import torch

    if torch.version.cuda is None:
        return "install a CUDA build of torch (pytorch.org/get-started)"
    return f"install an NVIDIA driver for CUDA {torch.version.cuda}, on a machine with a GPU"
