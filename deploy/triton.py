"""A model's folder in a Triton model repository: the ONNX file as version 1, and config.pbtxt.

Names, types and dimensions come from the ONNX file itself; batch sizes from what was measured. Fields as in
`ModelConfig` of Triton's model_config.proto.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.errors import ArtifactError, ExportError
from deploy.values import number, rows, text, whole_number

TYPES = {name: f"TYPE_{name}" for name in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32")}
TYPES |= {"UINT64": "TYPE_UINT64", "BOOL": "TYPE_BOOL", "STRING": "TYPE_STRING", "BFLOAT16": "TYPE_BF16"}
TYPES |= {"FLOAT16": "TYPE_FP16", "FLOAT": "TYPE_FP32", "DOUBLE": "TYPE_FP64"}
QUEUE_MICROSECONDS = 100
RUNNERS = ("onnxruntime_cuda", "onnxruntime")  # whose measurements Triton's ONNX Runtime resembles


@dataclass(frozen=True)
class Tensor:
    """An input or output: ``type`` as Triton names it; ``shape`` with None for an open dimension."""

    name: str
    type: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Ports:
    """What a model takes and gives."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def batched(self) -> bool:
        """Whether the first dimension of every tensor is open, so that requests can be joined."""
        return all(t.shape and t.shape[0] is None for t in (*self.inputs, *self.outputs))


def read_ports(path: Path) -> Ports:
    """Inputs and outputs of an ONNX file, weights left out.

    Raises ArtifactError for what is no ONNX file, ExportError for what Triton has no type for.
    """
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own errors, and ONNX's
        raise ArtifactError(f"cannot be read as ONNX: {error}", str(path), "export it again") from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_tensor(value) for value in graph.input if value.name not in weights)
    return Ports(inputs, tuple(_tensor(value) for value in graph.output))


def _tensor(value: Any) -> Tensor:
    import onnx

    found = value.type.tensor_type
    type_name = onnx.TensorProto.DataType.Name(found.elem_type)
    if type_name not in TYPES:
        raise ExportError(
            f"Triton has no type for {type_name}", value.name, "export float32 inputs and outputs"
        )
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in found.shape.dim)
    return Tensor(value.name, TYPES[type_name], shape)


def model_name(name: str) -> str:
    """A folder's name for a model: "torchvision:resnet18" is "torchvision_resnet18"."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:100] or "model"


def batch_sizes(results: Mapping[str, Any]) -> tuple[int, int | None]:
    """The largest batch size measured with ONNX Runtime (1 if none), and the one of most throughput."""
    for runner in RUNNERS:
        found = [
            r for r in rows(results, "latency") if r.get("runner") == runner and r.get("model") == "dense"
        ]
        measured = [(number(r.get("throughput_per_s")), whole_number(r.get("batch"))) for r in found]
        good = [
            (speed, size) for speed, size in measured if speed is not None and size is not None and size > 0
        ]
        if good:
            return max(size for _, size in good), max(good)[1]
    return 1, None


def config(name: str, ports: Ports, largest: int, best: int | None) -> str:
    """config.pbtxt: requests are joined to at most ``largest``, to ``best`` if they come in time.

    A model whose batch is fixed is served as it is, without joining.
    """
    lines = [f"name: {_quoted(name)}", 'backend: "onnxruntime"', 'default_model_filename: "model.onnx"']
    lines.append(f"max_batch_size: {largest if ports.batched else 0}")
    lines += [line for tensor in ports.inputs for line in _block("input", tensor, ports.batched)]
    lines += [line for tensor in ports.outputs for line in _block("output", tensor, ports.batched)]
    if ports.batched:
        preferred = [f"  preferred_batch_size: [ {best} ]"] if best and best > 1 else []
        queue = f"  max_queue_delay_microseconds: {QUEUE_MICROSECONDS}"
        lines += ["dynamic_batching {", *preferred, queue, "}"]
    return "\n".join(lines) + "\n"


def _block(kind: str, tensor: Tensor, batched: bool) -> Sequence[str]:
    shape = tensor.shape[1:] if batched else tensor.shape
    dims = ", ".join("-1" if size is None else str(size) for size in shape)
    # Triton knows no tensor without dimensions: such a one is a vector of one that is reshaped.
    scalar = [] if shape else ["    reshape { shape: [ ] }"]
    inside = [
        f"    name: {_quoted(tensor.name)}",
        f"    data_type: {tensor.type}",
        f"    dims: [ {dims or 1} ]",
    ]
    return [f"{kind} [", "  {", *inside, *scalar, "  }", "]"]


def _quoted(said: str) -> str:
    """A text in protobuf's text format: everything but plain ASCII as octal bytes."""
    plain = {*range(0x20, 0x7F)} - {ord('"'), ord("\\")}
    coded = (
        chr(b) if b in plain else f"\\{b:03o}" for b in text(said, "").encode("utf-8", "surrogateescape")
    )
    return f'"{"".join(coded)}"'
