"""Engines of TensorRT and TensorRT-RTX behind the Runner protocol.

Memory, stream and CUDA graph are torch's; memory and stream can be pycuda's instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deploy import nvinfer
from deploy.engines import read, this_machine
from deploy.errors import RunnerError
from deploy.runners import Array

if TYPE_CHECKING:
    import torch

BUFFERS = ("torch", "pycuda")
# TensorRT's names for types -> torch's, which are numpy's too but for the last.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "BF16": "bfloat16",
}
_DEVICE = "cuda"
_POISON = 255  # the byte that makes NaN of every floating-point type


def open_tensorrt(
    path: Path, library: str, threads: int = 1, *, buffers: str = "torch", cuda_graph: bool = False
) -> TensorRTRunner:
    """A runner of an engine that deploy.to_tensorrt built, on the GPU that PyTorch takes.

    `buffers` is one of BUFFERS. With `cuda_graph` a call replays the graph that `prepare` captured.
    Raises ArtifactError for an engine of unknown origin, RunnerError for one that does not run here.
    """
    if buffers not in BUFFERS:
        raise RunnerError(f"unknown buffers {buffers}", library, f"use one of {', '.join(BUFFERS)}")
    if cuda_graph and buffers == "pycuda":
        raise RunnerError("pycuda has no CUDA graphs", library, 'use buffers "torch"')
    plan, sidecar = read(path, here=this_machine(library))
    code = bool(sidecar["options"]["version_compatible"])
    opened = nvinfer.open_engine(nvinfer.load(library), plan, trusts_host_code=code)
    memory = TorchBuffers() if buffers == "torch" else PycudaBuffers()
    return TensorRTRunner(opened, sidecar, memory, threads, cuda_graph=cuda_graph)


class Buffers(Protocol):
    """Device memory for tensors, and the stream on which everything happens in order.

    `stream` is a torch stream in any case, so that events can be recorded on it.
    """

    @property
    def name(self) -> str: ...
    @property
    def stream(self) -> torch.cuda.Stream: ...
    def put(self, array: Array) -> Any: ...
    def empty(self, shape: tuple[int, ...], dtype: str) -> Any: ...
    def poison(self, buffer: Any) -> None: ...
    def address(self, buffer: Any) -> int: ...
    def host(self, buffer: Any) -> Array: ...


class TorchBuffers:
    """torch tensors on the current CUDA device."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types here

    def put(self, array: Array) -> torch.Tensor:
        """A copy on the device."""
        import torch

        with torch.cuda.stream(self.stream):
            return torch.from_numpy(np.ascontiguousarray(array)).to(_DEVICE)

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Memory that holds anything."""
        import torch

        with torch.cuda.stream(self.stream):
            return torch.empty(shape, dtype=getattr(torch, dtype), device=_DEVICE)

    def poison(self, buffer: torch.Tensor) -> None:
        """Fill with bytes that are NaN."""
        import torch

        with torch.cuda.stream(self.stream):
            buffer.flatten().view(torch.uint8).fill_(_POISON)

    def address(self, buffer: torch.Tensor) -> int:
        """Where the device finds it."""
        return buffer.data_ptr()

    def host(self, buffer: torch.Tensor) -> Array:
        """A copy on the host; bfloat16, which numpy lacks, as float32."""
        import torch

        with torch.cuda.stream(self.stream):
            buffer = buffer.float() if buffer.dtype == torch.bfloat16 else buffer
            return buffer.cpu().numpy()


class PycudaBuffers:
    """pycuda's memory and stream in the context that torch uses (autoprimaryctx; autoinit makes a second)."""

    name = "pycuda"

    def __init__(self) -> None:
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no types here
        try:
            import pycuda.autoprimaryctx
            import pycuda.driver
        except ImportError as error:
            fix = "pip install 'compress-release[pycuda]', which needs a compiler and the CUDA toolkit"
            raise RunnerError(f"does not import: {error}", "pycuda", fix) from error
        self._cuda = pycuda.driver
        self._own = self._cuda.Stream()  # one that keeps its order with the copies of the default stream
        handle = self._own.handle
        self.stream = torch.cuda.ExternalStream(handle)  # type: ignore[no-untyped-call]  # torch has no types here

    def put(self, array: Array) -> _Allocation:
        """A copy on the device."""
        array = np.ascontiguousarray(array)
        buffer = self.empty(array.shape, str(array.dtype))
        self._cuda.memcpy_htod(buffer.memory, array)
        return buffer

    def empty(self, shape: tuple[int, ...], dtype: str) -> _Allocation:
        """Memory that holds anything."""
        if dtype == "bfloat16":
            raise RunnerError("numpy has no bfloat16", "pycuda", 'use buffers "torch"')
        size = max(math.prod(shape) * np.dtype(dtype).itemsize, 1)
        return _Allocation(self._cuda.mem_alloc(size), size, shape, dtype)

    def poison(self, buffer: _Allocation) -> None:
        """Fill with bytes that are NaN."""
        self._cuda.memset_d8(buffer.memory, _POISON, buffer.size)

    def address(self, buffer: _Allocation) -> int:
        """Where the device finds it."""
        return int(buffer.memory)

    def host(self, buffer: _Allocation) -> Array:
        """A copy on the host."""
        array = np.empty(buffer.shape, buffer.dtype)
        self._own.synchronize()
        self._cuda.memcpy_dtoh(array, buffer.memory)
        return array


class _Allocation:
    """pycuda's memory does not know what lies in it."""

    def __init__(self, memory: Any, size: int, shape: tuple[int, ...], dtype: str) -> None:
        self.memory, self.size, self.shape, self.dtype = memory, size, shape, dtype


class TensorRTRunner:
    """Runs one engine; `buffers` names whose memory it uses, `stream` is where it runs."""

    def __init__(
        self,
        opened: nvinfer.Opened,
        sidecar: Mapping[str, Any],
        memory: Buffers,
        threads: int = 1,
        *,
        cuda_graph: bool = False,
    ) -> None:
        self.name = str(sidecar["library"])
        self.providers: tuple[str, ...] = (f"{self.name} {sidecar['library_version']}",)
        self.threads = threads
        self.timed = "compute, inputs and outputs on the GPU"
        self.buffers, self.stream, self.cuda_graph = memory.name, memory.stream, cuda_graph
        self._opened, self._memory = opened, memory
        self._inputs, self._outputs = sidecar["inputs"], sidecar["outputs"]
        self._held: list[Any] = []
        self._results: list[Any] = []
        self._graph: Any = None

    def prepare(self, inputs: Sequence[Array]) -> None:
        """Copy the inputs to the device, make room for the outputs, capture the graph if asked for."""
        if len(inputs) != len(self._inputs):
            raise RunnerError(f"{len(inputs)} inputs given, the engine has {len(self._inputs)}", self.name)
        self._graph = None
        self._held = [self._give(*pair) for pair in zip(self._inputs, inputs, strict=True)]
        try:
            open_names = self._opened.context.infer_shapes()
        except RuntimeError as error:
            raise RunnerError(f"input refused: {error}", self.name) from error
        if open_names:
            raise RunnerError(f"the shape of {', '.join(open_names)} stays open", self.name)
        self._results = [self._take(port["name"]) for port in self._outputs]
        self.stream.synchronize()
        if self.cuda_graph:
            self._capture()

    def _give(self, port: Mapping[str, Any], array: Array) -> Any:
        name, dtype = port["name"], _DTYPES.get(port["dtype"], port["dtype"])
        if str(array.dtype) != dtype:
            raise RunnerError(f"input {name} is {array.dtype}, the engine takes {dtype}", self.name)
        if not _within(array.shape, port):
            fits = f"{port['least']} to {port['most']}"
            raise RunnerError(
                f"input {name} has shape {list(array.shape)}, the engine takes {fits}",
                self.name,
                "build it for that range of batches",
            )
        buffer = self._memory.put(array)
        self._must(self._opened.context.set_input_shape(name, tuple(array.shape)), f"the shape of {name}")
        self._bind(name, buffer)
        return buffer

    def _take(self, name: str) -> Any:
        shape = tuple(self._opened.context.get_tensor_shape(name))
        if -1 in shape:
            raise RunnerError(f"the shape of output {name} depends on the data", self.name)
        dtype = self._opened.engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise RunnerError(f"output {name} is {dtype}", self.name, "export it with float32 outputs")
        buffer = self._memory.empty(shape, _DTYPES[dtype])
        self._bind(name, buffer)
        return buffer

    def _bind(self, name: str, buffer: Any) -> None:
        address = self._memory.address(buffer)
        self._must(self._opened.context.set_tensor_address(name, address), f"the memory of {name}")

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise RunnerError(f"{what} was refused: {nvinfer.quote(self._opened.log.errors)}", self.name)

    def _execute(self, handle: int) -> None:
        self._must(self._opened.context.execute_async_v3(handle), "the run")

    def _capture(self) -> None:
        """One run before, in which the library sets up what must not be part of a graph."""
        import torch

        self._execute(self.stream.cuda_stream)
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._execute(self.stream.cuda_stream)
        except RuntimeError as error:
            raise RunnerError(f"no CUDA graph: {error}", self.name, "run it without cuda_graph") from error
        self._graph = graph

    def enqueue(self) -> None:
        """Start one run of the prepared inputs on `stream` without waiting for it."""
        if self._graph is None:
            self._execute(self.stream.cuda_stream)
            return
        import torch

        with torch.cuda.stream(self.stream):
            self._graph.replay()

    def __call__(self) -> Sequence[Any]:
        self.enqueue()
        self.stream.synchronize()
        return self._results

    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """One run into memory full of NaN; outputs as host arrays, in the order of the graph's outputs.

        Raises RunnerError if an output is as it was: libraries on GPUs that they do not fit are known to run
        without an error and without a result.
        """
        self.prepare(inputs)
        for buffer in self._results:
            self._memory.poison(buffer)
        outputs = tuple(self._memory.host(buffer) for buffer in self())
        for port, output in zip(self._outputs, outputs, strict=True):
            if output.size and output.dtype.kind == "f" and np.isnan(output).all():
                what = f"output {port['name']} is all NaN, as the memory was before the run"
                raise RunnerError(what, self.name, "do not use this engine on this GPU")
        return outputs

    def layer_times(self, calls: int) -> dict[str, list[float]]:
        """Milliseconds of each of `calls` runs of the prepared inputs, by layer in order of execution.

        In a context of its own, without a CUDA graph: being watched costs time.
        """
        opened, profiler = self._opened, nvinfer.make_profiler(self._opened.trt)
        context = nvinfer.new_context(opened.trt, opened.engine)
        self._must(context is not None, "a context for profiling")
        for port, buffer in zip((*self._inputs, *self._outputs), (*self._held, *self._results), strict=True):
            name = port["name"]
            if port in self._inputs:
                context.set_input_shape(name, tuple(opened.context.get_tensor_shape(name)))
            context.set_tensor_address(name, self._memory.address(buffer))
        context.profiler = profiler
        for _ in range(calls):
            self._must(context.execute_async_v3(self.stream.cuda_stream), "the run")
            self.stream.synchronize()
        times: dict[str, list[float]] = profiler.times
        return times

    def close(self) -> None:
        """Drop graph and memory; the engine's goes with the runner."""
        self._graph, self._held, self._results = None, [], []


def _within(shape: Sequence[int], port: Mapping[str, Any]) -> bool:
    if len(shape) != len(port["least"]):
        return False
    limits = zip(port["least"], shape, port["most"], strict=True)
    return all(least <= size <= most for least, size, most in limits)
