"""Module to ONNX, with a dynamic batch and the same bytes for the same model.

Only `torch.onnx.export(dynamo=True)`: the older exporter freezes data-dependent branches without a word.
The exporter writes source lines and absolute paths into the file; they are removed here.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BATCH = "batch"
# protobuf cannot serialise a message of 2 GiB or more, and the weights travel inside the file.
LARGEST_FILE_BYTES = 2**31 - 1
_EMPTIED = ("metadata_props", "doc_string")
_SOURCE_LINE = re.compile(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]+)')
_REMEDY = "rewrite that part with tensor operations, or leave it out of the exported module"


@dataclass(frozen=True)
class Port:
    """One graph input or output. `shape` holds ints and names; the first axis of an input is "batch"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxFile:
    """A written ONNX file: `bytes` is its size, `sha256` that of its content."""

    path: Path
    sha256: str
    bytes: int
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def export(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: Path,
    *,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> OnnxFile:
    """Write `model` (in eval mode) to `path` and to nowhere else; equal models give equal bytes.

    `example` holds a batch of at least 2 of each input: a batch of 1 would be taken for a constant.
    `opset` None leaves the choice to the exporter. `metadata` becomes the file's metadata_props, sorted.
    The caller makes the write atomic. Raises ExportError if the model cannot be exported, if its batch is
    fixed, or if it holds a non-finite weight; OSError if the file cannot be written.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    _refuse(model, inputs)
    program = _run_exporter(_written_plainly(model), inputs, opset)
    proto = _clean(program, metadata or {})
    _check(proto, opset)
    content: bytes = proto.SerializeToString(deterministic=True)
    path.write_bytes(content)
    return OnnxFile(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        opset=_opset(proto),
        inputs=tuple(_port(value) for value in proto.graph.input),
        outputs=tuple(_port(value) for value in proto.graph.output),
    )


def _refuse(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise ExportError for what the exporter would accept and get wrong, or find out only after minutes."""
    for index, tensor in enumerate(inputs):
        if tensor.ndim == 0 or tensor.shape[0] < 2 or tensor.shape[0] != inputs[0].shape[0]:
            shape = list(tensor.shape)
            raise ExportError(
                f"example shape {shape} has no common batch of 2 or more",
                f"input {index}",
                "give a batch of 2",
            )
    _refuse_training_mode(model)
    size = 0
    weights = dict(model.named_parameters())
    for name, tensor in (*weights.items(), *model.named_buffers()):
        size += tensor.numel() * tensor.element_size()
        # A buffer may well be infinite: a mask, or a limit that is off.
        unsound = tensor.isnan() if name not in weights else ~tensor.isfinite()
        if tensor.is_floating_point() and bool(unsound.any()):
            raise ExportError("holds NaN or infinity", name, "load or train finite weights first")
    if size > LARGEST_FILE_BYTES:
        raise ExportError(f"{size} bytes of weights do not fit in one ONNX file (2 GiB)", fix="prune further")


def _refuse_training_mode(model: nn.Module) -> None:
    # The root's own flag says nothing: the module of an exported program carries training=True always.
    # Its graph says it in the arguments of the calls instead.
    from torch import fx
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    for name, module in model.named_modules():
        if module.training and isinstance(module, (_BatchNorm, _DropoutNd)):
            raise ExportError(f"{type(module).__name__} is in training mode", name, "call model.eval() first")
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if _trains(node):
                raise ExportError(
                    f"{node.target} is in training mode", node.name, "switch the graph to eval first"
                )


def _trains(node: torch.fx.Node) -> bool:
    """Whether this call of an ATen op has its `train` or `training` argument set."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return given.get("train") is True or given.get("training") is True


def _written_plainly(model: nn.Module) -> nn.Module:
    """The model without what the exporter refuses or gets wrong: `_PLAINER` ops in its graph replaced."""
    from torch import fx

    if not isinstance(model, fx.GraphModule):
        return model
    if not any(str(node.target) in _PLAINER for node in model.graph.nodes):
        return model
    plain = fx.GraphModule(model, copy.deepcopy(model.graph))
    for node in plain.graph.nodes:
        node.target = _PLAINER.get(str(node.target), node.target)
    plain.recompile()
    return plain.eval()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    """scaled_dot_product_attention of tensors of any rank from 3 on, by tensors of rank 4."""
    import torch

    whole = torch.ops.aten.scaled_dot_product_attention.default
    if query.dim() == 4:
        found: Tensor = whole(query, key, value, attn_mask, *rest, **named)
        return found
    batch = query.shape[:-2]
    if attn_mask is not None and not _same_batch(attn_mask, query):
        attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-2:])

    def four(x: Tensor | None) -> Tensor | None:
        return x if x is None else x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)

    made: Tensor = whole(four(query), four(key), four(value), four(attn_mask), *rest, **named)
    return made.squeeze(1) if len(batch) == 1 else made.reshape(*batch, *made.shape[-2:])


def _same_batch(mask: Tensor, query: Tensor) -> bool:
    """Whether no dimension in front of the last two has to be broadcast (expand would fix a symbolic one)."""
    return mask.dim() == query.dim() and not any(isinstance(n, int) and n == 1 for n in mask.shape[:-2])


def _clamp(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """clamp with tensors as limits, without a minimum of a maximum: onnxscript 0.7 makes of these a Clip in
    the wrong place, and the graph is not sorted."""
    x = x if low is None else low.where(x < low, x)
    return x if high is None else high.where(x > high, x)


_PLAINER: dict[str, Any] = {
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.clamp.Tensor": _clamp,
}


def _run_exporter(model: nn.Module, inputs: tuple[Tensor, ...], opset: int | None) -> torch.onnx.ONNXProgram:
    """The exporter's program."""
    import torch

    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=_names("input", len(inputs)),
                dynamic_shapes=[{0: torch.export.Dim(BATCH)} for _ in inputs],
            )
    except Exception as error:  # the exporter runs the user's forward(): anything can come out
        raise _explained(error) from error
    if program is None:
        raise ExportError("the exporter returned no program", fix="report this with your torch version")
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what the exporter prints, warns and logs: stdout is for results, and on a failure it prints
    whole graphs and logs tracebacks before it raises an exception that says it all."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        sink = io.StringIO()
        with (
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{index}" for index in range(count)]


def _explained(error: Exception) -> ExportError:
    """The innermost cause's own last word, and the source line it names (file name only, no folders)."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    first = next((line for line in str(cause).splitlines() if line.strip()), "no message")
    # The line of the user's code is quoted in the outermost text too, hence the search in both.
    quoted = _SOURCE_LINE.findall(str(cause)) or _SOURCE_LINE.findall(str(error))
    where = f"{Path(quoted[-1][0]).name}:{quoted[-1][1]} `{quoted[-1][2].strip()}`" if quoted else ""
    return ExportError(f"cannot be exported to ONNX: {type(cause).__name__}: {first}", where, _REMEDY)


def _clean(program: torch.onnx.ONNXProgram, metadata: Mapping[str, str]) -> Any:
    """The ModelProto with fixed output names, no traces of the machine, and the caller's metadata."""
    outputs = program.model.graph.outputs
    for value, name in zip(outputs, _names("output", len(outputs)), strict=True):
        value.name = name
    try:
        proto = program.model_proto
    except Exception as error:  # protobuf's class for "too large" differs between its implementations
        raise ExportError(
            f"cannot be serialised: {error}", fix="one ONNX file holds at most 2 GiB"
        ) from error
    empty(proto)
    for key in sorted(metadata):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, metadata[key]
    return proto


def empty(message: Any) -> None:
    """Clear metadata_props and doc_string in a protobuf message and in everything inside it.

    A walk by field descriptors, so that subgraphs, functions, value_info and whatever ONNX adds later
    are covered. torch 2.14 stores stack traces with absolute paths there.
    """
    for field in message.DESCRIPTOR.fields:
        if field.name in _EMPTIED:
            message.ClearField(field.name)
        elif field.message_type is not None:
            value = getattr(message, field.name)
            for item in (
                value if hasattr(value, "__len__") else [value] if message.HasField(field.name) else []
            ):
                empty(item)


def _check(proto: Any, opset: int | None) -> None:
    """ONNX's full check, and that batch and opset are what was asked for."""
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # checker and shape inference raise classes of their own C++ module
        raise ExportError(
            f"the exported graph is not valid ONNX: {error}", fix="try another opset"
        ) from error
    if opset is not None and _opset(proto) != opset:
        found = _opset(proto)
        raise ExportError(
            f"opset {opset} was asked for, the exporter wrote {found}", fix=f"use opset {found}"
        )
    for value in proto.graph.input:
        shape = _port(value).shape
        if shape[0] != BATCH:
            raise ExportError(
                f"the model works for a batch of {shape[0]} only (shape {list(shape)})",
                f"input {value.name}",
                "take sizes from x.shape instead of writing the batch size into forward()",
            )


def _opset(proto: Any) -> int:
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def _port(value: Any) -> Port:
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or int(dim.dim_value) for dim in tensor.shape.dim)
    return Port(value.name, onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), shape)
