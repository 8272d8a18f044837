"""One protocol for everything that can run a model.

A runner that would quietly do something else than asked (fall back to the CPU, leave its outputs unwritten)
refuses instead. The runners themselves: `torch_runners`, `ort_runners`; what works here: `availability`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deploy.errors import RunnerError

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[Any]
TORCH_KINDS = ("torch", "torch_compile", "torch_cuda", "torch_cuda_graph", "torch_cuda_compile")
ORT_KINDS = ("onnxruntime", "onnxruntime_cuda", "onnxruntime_tensorrt", "onnxruntime_nvtensorrtrtx")
ENGINE_KINDS = ("tensorrt", "tensorrt_rtx")
KINDS = (*TORCH_KINDS, *ORT_KINDS, *ENGINE_KINDS)


class Runner(Protocol):
    """Runs one model. `name` is its kind, `providers` what executes it, `timed` what one call spans.

    A call runs the prepared inputs once and returns when the outputs are complete; on a GPU they stay
    there, so that a call is compute without copies. `outputs` has those of the last call as host arrays.
    `poison` fills the memory that the next call must write its outputs to (NaN, the lowest integer); it
    does nothing where every call returns fresh memory. `infer` is `prepare`, a call and `outputs`.
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
    def poison(self) -> None: ...
    def outputs(self) -> tuple[Array, ...]: ...
    def infer(self, inputs: Sequence[Array]) -> tuple[Array, ...]: ...
    def close(self) -> None: ...


@runtime_checkable
class StagedRunner(Runner, Protocol):
    """A runner on a GPU, whose call can be taken apart: copy in, compute, copy out.

    `stream` is the torch.cuda.Stream that all three are enqueued on and return at once from; None where
    each of them returns when it is done. `enqueue` is a call that does not wait.
    """

    stream: Any

    def copy_in(self) -> None: ...
    def enqueue(self) -> None: ...
    def copy_out(self) -> None: ...


def open_runner(
    kind: str,
    artifact: nn.Module | Path,
    threads: int = 1,
    *,
    precision: str = "fp32",
    buffers: str = "torch",
) -> Runner:
    """A runner of `kind` (one of KINDS): of a module for torch, an engine for TensorRT, else an ONNX file.

    `threads` is the number of CPU threads inside one operator. The module must be in eval mode; it is
    copied for the GPU, not for the CPU. `precision`: fp32 is strict (no TF32), tf32 is for GPUs; fp16 and
    bf16 are for torch on a GPU, a file has its own. `buffers`: whose memory and stream an engine runs with,
    torch's or pycuda's. A torch runner sets the thread count of the whole
    process until `close()`. Raises RunnerError for an unknown or unusable kind, ArtifactError for a damaged
    file.
    """
    if kind not in KINDS:
        raise RunnerError("unknown runner", kind, f"use one of {', '.join(KINDS)}")
    if threads < 1:
        raise RunnerError(f"{threads} threads", kind, "use 1 or more")
    is_path = isinstance(artifact, Path)
    if is_path == (kind in TORCH_KINDS):
        wanted = "an engine" if kind in ENGINE_KINDS else "an ONNX file"
        wanted = "an nn.Module" if is_path else f"the path of {wanted}"
        raise RunnerError(f"cannot run a {type(artifact).__name__}", kind, f"give it {wanted}")
    if kind in TORCH_KINDS:
        from deploy.torch_runners import open_torch

        return open_torch(kind, cast("nn.Module", artifact), threads, precision)
    if kind in ENGINE_KINDS:
        from deploy.tensorrt_runner import open_tensorrt

        return open_tensorrt(cast("Path", artifact), kind, threads, buffers=buffers)
    from deploy.ort_runners import open_ort

    return open_ort(kind, cast("Path", artifact), threads, precision)


def check_outputs(runner: Runner) -> None:
    """One call of a prepared runner with poisoned outputs: raises RunnerError if some of it is still there.

    A runtime on hardware that it does not support may return at once, without an error and without results.
    """
    runner.poison()
    runner()
    for index, output in enumerate(runner.outputs()):
        if _is_poisoned(output):
            what = f"output {index} was not written, or the model computes NaN"
            raise RunnerError(what, runner.name, "compare it with PyTorch before timing it")


def _is_poisoned(output: Array) -> bool:
    if np.issubdtype(output.dtype, np.inexact):
        return bool(np.isnan(output).any())
    if np.issubdtype(output.dtype, np.integer) and output.size:
        return bool((output == np.iinfo(output.dtype).min).all())
    return False


def poison_value(dtype: np.dtype[Any]) -> Any:
    """What `poison` fills an array of this type with: NaN, the lowest integer, False."""
    if np.issubdtype(dtype, np.inexact):
        return np.nan
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else False
