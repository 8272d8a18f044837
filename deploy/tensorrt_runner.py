"""Engines of TensorRT and TensorRT-RTX behind the Runner protocol.

Memory, stream and CUDA graph are torch's; memory and stream can be pycuda's instead.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deploy import nvinfer
from deploy.engines import read, this_machine
from deploy.errors import RunnerError
from deploy.runners import Array, check_outputs, poison_value

if TYPE_CHECKING:
    import torch

BUFFERS = ("torch", "pycuda")
# TensorRT's names for the types that numpy has too.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_DEVICE = "cuda"


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
    memory: Buffers = TorchBuffers() if buffers == "torch" else PycudaBuffers()
    return TensorRTRunner(opened, sidecar, memory, threads, cuda_graph=cuda_graph)


class Pair(Protocol):
    """A tensor on the device, found at `address`, and page-locked memory of its size on the host.

    The copies are enqueued on the stream of the Buffers it comes from.
    """

    host: Array
    device: Any
    address: int

    def copy_in(self) -> None: ...
    def copy_out(self) -> None: ...


class Buffers(Protocol):
    """Where tensors come from, and the stream on which everything happens in order.

    `stream` is a torch stream in any case, so that events can be recorded on it.
    """

    @property
    def name(self) -> str: ...
    @property
    def stream(self) -> torch.cuda.Stream: ...
    def pair(self, shape: Sequence[int], dtype: str) -> Pair: ...


class TorchBuffers:
    """torch tensors on the current CUDA device."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types here

    def pair(self, shape: Sequence[int], dtype: str) -> Pair:
        """Memory that holds anything."""
        return _TorchPair(self.stream, shape, dtype)


class _TorchPair:
    def __init__(self, stream: torch.cuda.Stream, shape: Sequence[int], dtype: str) -> None:
        import torch

        kind = getattr(torch, dtype)
        self._stream = stream
        self._pinned = torch.empty(tuple(shape), dtype=kind, pin_memory=_DEVICE == "cuda")
        with torch.cuda.stream(stream):
            self.device = torch.empty(tuple(shape), dtype=kind, device=_DEVICE)
        self.host: Array = self._pinned.numpy()
        self.address = self.device.data_ptr()

    def copy_in(self) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            self.device.copy_(self._pinned, non_blocking=True)

    def copy_out(self) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            self._pinned.copy_(self.device, non_blocking=True)


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
        self._own = self._cuda.Stream()
        handle = self._own.handle
        self.stream = torch.cuda.ExternalStream(handle)  # type: ignore[no-untyped-call]  # as above

    def pair(self, shape: Sequence[int], dtype: str) -> Pair:
        """Memory that holds anything."""
        return _PycudaPair(self._cuda, self._own, shape, dtype)


class _PycudaPair:
    def __init__(self, cuda: Any, stream: Any, shape: Sequence[int], dtype: str) -> None:
        self._cuda, self._stream = cuda, stream
        self.host: Array = cuda.pagelocked_empty(tuple(shape), np.dtype(dtype))
        self.device = cuda.mem_alloc(max(self.host.nbytes, 1))
        self.address = int(self.device)

    def copy_in(self) -> None:
        self._cuda.memcpy_htod_async(self.device, self.host, self._stream)

    def copy_out(self) -> None:
        self._cuda.memcpy_dtoh_async(self.host, self.device, self._stream)


class TensorRTRunner:
    """Runs one engine; a StagedRunner. `buffers` names whose memory it uses."""

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
        self.buffers, self.cuda_graph = memory.name, cuda_graph
        self.stream: Any = memory.stream
        self._opened, self._memory = opened, memory
        self._ports = sidecar["inputs"], sidecar["outputs"]
        self._inputs: dict[str, Pair] = {}
        self._outputs: dict[str, Pair] = {}
        self._graph: Any = None

    def prepare(self, inputs: Sequence[Array]) -> None:
        """Copy the inputs to the device, make room for the outputs, capture the graph if asked for."""
        ports = self._ports[0]
        if len(inputs) != len(ports):
            raise RunnerError(f"{len(inputs)} inputs given, the engine has {len(ports)}", self.name)
        self._graph = None
        self._inputs = {
            port["name"]: self._give(port, array) for port, array in zip(ports, inputs, strict=True)
        }
        try:
            unknown = self._opened.context.infer_shapes()
        except RuntimeError as error:
            raise RunnerError(f"input refused: {error}", self.name) from error
        if unknown:
            raise RunnerError(f"the shape of {', '.join(unknown)} stays open", self.name)
        self._outputs = {port["name"]: self._take(port["name"]) for port in self._ports[1]}
        self.copy_in()
        self.stream.synchronize()
        if self.cuda_graph:
            self._capture()

    def _give(self, port: Mapping[str, Any], array: Array) -> Pair:
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
        pair = self._memory.pair(array.shape, dtype)
        pair.host[...] = array
        self._must(self._opened.context.set_input_shape(name, tuple(array.shape)), f"the shape of {name}")
        self._must(self._opened.context.set_tensor_address(name, pair.address), f"the memory of {name}")
        return pair

    def _take(self, name: str) -> Pair:
        shape = tuple(self._opened.context.get_tensor_shape(name))
        if -1 in shape:
            raise RunnerError(f"the shape of output {name} depends on the data", self.name)
        dtype = self._opened.engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise RunnerError(f"output {name} is {dtype}", self.name, "export it with float32 outputs")
        pair = self._memory.pair(shape, _DTYPES[dtype])
        self._must(self._opened.context.set_tensor_address(name, pair.address), f"the memory of {name}")
        return pair

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise RunnerError(f"{what} was refused: {nvinfer.quote(self._opened.log.errors)}", self.name)

    def _execute(self) -> None:
        self._must(self._opened.context.execute_async_v3(self.stream.cuda_stream), "the run")

    def _capture(self) -> None:
        """One run before, in which the library sets up what must not be part of a graph."""
        import torch

        self._execute()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._execute()
        except RuntimeError as error:
            raise RunnerError(f"no CUDA graph: {error}", self.name, "run it without cuda_graph") from error
        self._graph = graph

    def copy_in(self) -> None:
        """Enqueue the copies of the inputs to the GPU."""
        for pair in self._inputs.values():
            pair.copy_in()

    def enqueue(self) -> None:
        """Enqueue one run of the inputs, or the whole graph."""
        if self._graph is None:
            self._execute()
            return
        import torch

        with torch.cuda.stream(self.stream):
            self._graph.replay()

    def copy_out(self) -> None:
        """Enqueue the copies of the outputs to page-locked host memory."""
        for pair in self._outputs.values():
            pair.copy_out()

    def __call__(self) -> Sequence[Any]:
        self.enqueue()
        self.stream.synchronize()
        return [pair.device for pair in self._outputs.values()]

    def poison(self) -> None:
        """Overwrite the outputs' memory."""
        self.stream.synchronize()
        for pair in self._outputs.values():
            pair.host[...] = poison_value(pair.host.dtype)
            pair.copy_in()

    def outputs(self) -> tuple[Array, ...]:
        """The last call's outputs as host arrays, in the order of the graph's outputs."""
        self.copy_out()
        self.stream.synchronize()
        return tuple(pair.host.copy() for pair in self._outputs.values())

    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """One run of these inputs into poisoned memory: what was not written is an error, not a result."""
        self.prepare(inputs)
        check_outputs(self)
        return self.outputs()

    def layer_times(self, calls: int) -> tuple[list[dict[str, float]], list[float]]:
        """Of each of `calls` runs of the prepared inputs: ms by layer in order of execution, and ms in all.

        In a context of its own, without a CUDA graph: being watched costs time.
        """
        opened, profiler = self._opened, nvinfer.make_profiler(self._opened.trt)
        context = nvinfer.new_context(opened.trt, opened.engine)
        self._must(context is not None, "a context for the profile")
        for name, pair in self._inputs.items():
            self._must(context.set_input_shape(name, tuple(pair.host.shape)), f"the shape of {name}")
        for name, pair in (self._inputs | self._outputs).items():
            self._must(context.set_tensor_address(name, pair.address), f"the memory of {name}")
        context.profiler = profiler
        layers, whole = [], []
        for _ in range(calls):
            profiler.times = {}
            started = time.perf_counter()
            self._must(context.execute_async_v3(self.stream.cuda_stream), "the run")
            self.stream.synchronize()
            whole.append(1000 * (time.perf_counter() - started))
            layers.append(profiler.times)
        return layers, whole

    def layers(self) -> list[Any]:
        """What the engine's inspector says about its layers."""
        return nvinfer.layers(self._opened)

    def close(self) -> None:
        """Drop graph and memory; the engine's goes with the runner."""
        self._graph = None
        self._inputs, self._outputs = {}, {}


def _within(shape: Sequence[int], port: Mapping[str, Any]) -> bool:
    if len(shape) != len(port["least"]):
        return False
    limits = zip(port["least"], shape, port["most"], strict=True)
    return all(least <= size <= most for least, size, most in limits)
