"""int8 and fp8 as QuantizeLinear / DequantizeLinear pairs in the graph, calibrated on batches of real data.

ONNX Runtime's quantizer finds ranges and places the pairs. It is told to place them differently for the two
kinds of runtime, because each is several times slower, or refuses, with the other's placement:
- TensorRT: signed values without zero points, pairs in front of what has weights and nowhere else, float
  biases (it has no int32 DequantizeLinear). A residual is quantised where a convolution reads it as well.
- ONNX Runtime on a CPU: unsigned values, and pairs around element-wise ops too, so that whole chains are
  int8. Not in networks that normalise while they run (transformers): there this costs accuracy.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import ExportError
from deploy.to_onnx import quiet

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

    from deploy.runners import Array

Batches = Iterable[tuple["Array", ...]]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What ONNX Runtime's CPU kernels do in int8, or only move.
_CHAINED = (
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Add", "Mul", "MaxPool", "AveragePool", "Concat", "Split"),
    *("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Pad"),
)
# Monotone, so that they and a maximum may change places.
_RISING = ("Relu", "Clip")
_NORMALISING = {"LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"}
# The largest value of E4M3 without infinities (ONNX's FLOAT8E4M3FN), and of int8 as it is used here.
_LARGEST = {"fp8": 448.0, "int8": 127.0}


@dataclass(frozen=True)
class Quantized:
    """`model` with Q/DQ pairs; `low` layers with weights are quantised; `why` counts the others by reason."""

    model: ModelProto
    low: int
    why: dict[str, int]


def quantized(
    model: ModelProto, precision: str, batches: Batches, keep: Sequence[str] | str, *, signed: bool
) -> Quantized:
    """`model` (fp32) in int8 or fp8; weights symmetric with one scale per output channel.

    `keep`: names of nodes to leave in fp32, or "first_last". Ranges are the least and the largest value over
    all `batches`. Raises ExportError where nothing is left to quantise or a batch does not fit.
    """
    graph = model.graph
    _name_nodes(graph)
    kept = _kept(graph, first_and_last(graph) if keep == "first_last" else keep, keep == "first_last")
    layers = [node.name for node in graph.node if node.op_type in WEIGHTED]
    if not set(layers) - kept.keys():
        raise ExportError(
            f"nothing to quantise: all {len(layers)} layers with weights stay in fp32",
            fix="keep fewer layers",
        )
    if not signed:
        _pool_first(graph, kept)
    made = _run_quantizer(model, batches, list(kept), signed=signed or precision == "fp8")
    if precision == "fp8":
        _int8_to_fp8(made.graph, graph)
    why = Counter(kept[name] for name in layers if name in kept)
    return Quantized(made, len(layers) - why.total(), dict(sorted(why.items())))


def peaks(model: ModelProto, batches: Batches) -> dict[str, float]:
    """The largest |value| of every float tensor that a node makes or reads, over all batches."""
    import numpy as np
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    with tempfile.TemporaryDirectory() as folder:
        source, augmented = Path(folder, "model.onnx"), Path(folder, "augmented.onnx")
        source.write_bytes(model.SerializeToString())
        with quiet():
            calibrator = create_calibrator(
                source, None, augmented_model_path=str(augmented), calibrate_method=CalibrationMethod.MinMax
            )
            calibrator.collect_data(_Reader(model.graph, batches))
            ranges = calibrator.compute_data()
    return {name: float(np.abs(found.range_value).max()) for name, found in ranges.items()}


def first_and_last(graph: GraphProto) -> list[str]:
    """Names of the layers with weights that have no other in front of them, or none behind them."""
    layers = {node.name for node in graph.node if _weighted(node, _constants(graph))}

    def ends(nodes: Iterable[NodeProto], backwards: bool) -> set[str]:
        seen: set[str] = set()  # values that a layer lies in front of (or behind, going backwards)
        found = set()
        for node in nodes:
            sources, targets = (node.output, node.input) if backwards else (node.input, node.output)
            reached = bool(seen.intersection(sources))
            if node.name in layers and not reached:
                found.add(node.name)
            if reached or node.name in layers:
                seen.update(targets)
        return found

    at_ends = ends(graph.node, False) | ends(reversed(graph.node), True)
    return [node.name for node in graph.node if node.name in at_ends]


def _kept(graph: GraphProto, names: Iterable[str], by_policy: bool) -> dict[str, str]:
    """Layers that stay in fp32, by node name, each with its reason."""
    constants = _constants(graph)
    kept = dict.fromkeys(names, "first or last layer" if by_policy else "kept as asked")
    for node in graph.node:
        if node.op_type in WEIGHTED and not _weighted(node, constants):
            kept.setdefault(node.name, f"{node.op_type} of two computed values")
    return kept


def _pool_first(graph: GraphProto, kept: Collection[str]) -> None:
    """MaxPool(Relu(x)) behind a layer in fp32 becomes Relu(MaxPool(x)), which is the same.

    ONNX Runtime would quantise in front of the pooling, and its MaxPool of bytes, channels first, takes 24
    times as long as that of floats: a third of an int8 ResNet-18. In front of a Relu it does not.
    """
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter(value for node in graph.node for value in node.input)
    readers.update(value.name for value in graph.output)
    for pool in [node for node in graph.node if node.op_type == "MaxPool" and len(node.output) == 1]:
        rising = makers.get(pool.input[0])
        if rising is None or rising.op_type not in _RISING or readers[pool.input[0]] > 1:
            continue
        layer = makers.get(rising.input[0])
        if layer is None or layer.name not in kept:
            continue
        between, after = pool.input[0], pool.output[0]
        pool.input[0], pool.output[0] = rising.input[0], between
        rising.input[0], rising.output[0] = between, after
        stale = [value for value in graph.value_info if value.name == between]
        for value in stale:
            graph.value_info.remove(value)
        graph.node.remove(rising)
        graph.node.insert(list(graph.node).index(pool) + 1, rising)


def _constants(graph: GraphProto) -> set[str]:
    return {tensor.name for tensor in graph.initializer}


def _weighted(node: NodeProto, constants: Collection[str]) -> bool:
    return node.op_type in WEIGHTED and node.input[1] in constants


def _name_nodes(graph: GraphProto) -> None:
    """A name of its own for every node: the quantizer tells nodes apart by it."""
    taken = Counter(node.name for node in graph.node)
    for index, node in enumerate(graph.node):
        if not node.name or taken[node.name] > 1:
            node.name = f"{node.op_type}_{index}"


class _Reader:
    """onnxruntime's CalibrationDataReader: one dictionary after the other, then None."""

    def __init__(self, graph: GraphProto, batches: Batches) -> None:
        constants = _constants(graph)
        ports = [value for value in graph.input if value.name not in constants]
        self._feeds: Iterator[dict[str, Array]] = (
            _feed(ports, batch, number) for number, batch in enumerate(batches)
        )
        first = next(self._feeds, None)
        if first is None:
            raise ExportError("no batches to calibrate on", "calibration", "give at least one")
        self._feeds = itertools.chain([first], self._feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return iter(self._feeds)


def _feed(ports: Sequence[Any], batch: tuple[Array, ...], number: int) -> dict[str, Array]:
    """One batch by input name, checked against the model's inputs."""
    import numpy as np
    from onnx import helper

    where = f"calibration batch {number}"
    if len(batch) != len(ports):
        raise ExportError(f"{len(batch)} arrays for {len(ports)} inputs", where, "give one array per input")
    for port, array in zip(ports, batch, strict=True):
        shape = [dim.dim_value for dim in port.type.tensor_type.shape.dim]  # 0 where it is dynamic
        fits = len(shape) == array.ndim and all(
            want in (0, n) for want, n in zip(shape, array.shape, strict=True)
        )
        if not fits or array.size == 0:
            raise ExportError(
                f"shape {list(array.shape)} does not fit input {port.name} {[n or 'any' for n in shape]}",
                where,
                "calibrate on what the model is fed with",
            )
        wanted = helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type)
        if array.dtype != wanted:
            raise ExportError(
                f"is {array.dtype}, input {port.name} is {wanted}", where, "convert the data first"
            )
        if not np.isfinite(array).all():
            raise ExportError(f"holds NaN or infinity for input {port.name}", where, "clean the data first")
    return {port.name: array for port, array in zip(ports, batch, strict=True)}


def _run_quantizer(model: ModelProto, batches: Batches, excluded: list[str], *, signed: bool) -> ModelProto:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    reader = _Reader(model.graph, batches)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "model.onnx"), Path(folder, "quantized.onnx")
        source.write_bytes(model.SerializeToString())
        with quiet():
            quantize_static(
                source,
                target,
                reader,
                quant_format=QuantFormat.QDQ,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=_op_types(model.graph, signed),
                nodes_to_exclude=excluded,
                per_channel=True,
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
                extra_options=_options(signed),
            )
        return onnx.load(target)


def _op_types(graph: GraphProto, signed: bool) -> list[str]:
    normalises = any(node.op_type in _NORMALISING for node in graph.node)
    return list(WEIGHTED) if signed or normalises else [*WEIGHTED, *_CHAINED]


def _options(signed: bool) -> Mapping[str, Any]:
    return {
        "ActivationSymmetric": signed,
        "WeightSymmetric": True,
        # TensorRT fuses what follows a layer into it, unless a pair lies in between; so does ONNX Runtime
        # for products of matrices.
        "OpTypesToExcludeOutputQuantization": list(WEIGHTED) if signed else ["MatMul", "Gemm"],
        "QuantizeBias": False,
    }


def _int8_to_fp8(graph: GraphProto, original: GraphProto) -> None:
    """The same pairs in E4M3: scales for 448 in the place of 127, weights rounded anew from fp32.

    The quantizer's own fp8 takes one scale for a tensor from its standard deviation and cuts off what lies
    beyond 4.5 of them: on a trained CIFAR ResNet-20 that cost 5 points of top-1, this cost none.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    fp8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
    weights = {tensor.name: tensor for tensor in original.initializer}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    arrays: dict[str, Any] = {}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        value, scale, zero = node.input
        if scale not in arrays:
            arrays[scale] = numpy_helper.to_array(tensors[scale]) * np.float32(127 / _LARGEST["fp8"])
            arrays[zero] = np.zeros(arrays[scale].shape, fp8)
        if node.op_type == "DequantizeLinear" and value in tensors:
            weight = numpy_helper.to_array(weights[value.removesuffix("_quantized")])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            shape = [-1 if i == axis else 1 for i in range(weight.ndim)] if arrays[scale].ndim else []
            limit = _LARGEST["fp8"]
            arrays[value] = np.clip(weight / arrays[scale].reshape(shape), -limit, limit).astype(fp8)
    for name, array in arrays.items():
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
