"""An exported network at other widths, without another export: for measuring, where weights do not matter.

An export takes seconds and a network whose latency is wanted needs none of its weights. Where a narrower
network has the same graph, its ONNX file is the wider one's with smaller constants of random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]
BIAS = "_bias"
"""What the exporter adds to a weight's name for the bias of a batch norm folded into it."""


def resize(source: Path, path: Path, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Write the float32 network `source` to `path` with parameters of these shapes.

    False, and nothing is written, where that is not sure to be the network that an export would give: a
    constant that is no parameter of `shapes` but holds more than one number, or a result of shape inference
    that does not fit.
    """
    import onnx

    model = onnx.load(source)
    graph = model.graph
    before = {entry.name: tuple(entry.dims) for entry in graph.initializer}
    random, dims = np.random.default_rng(0), {}
    for number, entry in enumerate(graph.initializer):
        if entry.data_type != onnx.TensorProto.FLOAT or int(np.prod(entry.dims)) <= 1:
            continue
        shape = _shape(entry.name, shapes)
        if shape is None or len(shape) != len(entry.dims):
            return False
        dims[entry.name] = shape
        spread = np.sqrt(2 / max(int(np.prod(shape[1:])), 1))  # keeps activations far from denormal numbers
        values = (spread * random.standard_normal(shape)).astype(np.float32)
        graph.initializer[number].CopyFrom(onnx.numpy_helper.from_array(values, entry.name))
    for node in graph.node:
        if not _regroup(node, before, dims):
            return False
    del graph.value_info[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:  # checker and shape inference raise classes of their own C++ module
        return False
    onnx.save(model, path)
    return True


def _shape(name: str, shapes: Mapping[str, Sequence[int]]) -> Shape | None:
    if name in shapes:
        return tuple(shapes[name])
    weight = name.removesuffix(BIAS)
    return (shapes[weight][0],) if weight != name and weight in shapes else None


def _regroup(node: Any, before: Mapping[str, Shape], after: Mapping[str, Shape]) -> bool:
    """Fit the groups of a depthwise convolution to its channels. False for other groups: whether whole ones
    left or the same channels of each, the weight's shape does not always tell."""
    weight = node.input[1] if node.op_type == "Conv" else ""
    for entry in node.attribute:
        if entry.name == "group" and entry.i > 1 and before.get(weight) != after.get(weight):
            old, new = before[weight], after[weight]
            if old[1] != 1:
                return False
            entry.i = entry.i * new[0] // old[0]
    return True


def same_network(a: Path, b: Path) -> bool:
    """Whether two files differ in nothing but the values of float constants, and what shapes follow."""
    return _described(a) == _described(b)


def _described(path: Path) -> list[Any]:
    import onnx

    graph = onnx.load(path).graph
    described: list[Any] = [
        (node.op_type, list(node.input), list(node.output), [e.SerializeToString() for e in node.attribute])
        for node in graph.node
    ]
    for entry in graph.initializer:
        is_float = entry.data_type == onnx.TensorProto.FLOAT
        small = int(np.prod(entry.dims)) <= 1
        values = None if is_float and not small else onnx.numpy_helper.to_array(entry).tolist()
        described.append((entry.name, list(entry.dims), values))
    return described
