"""fp16 and bf16 as types in the graph: what strongly typed builders (TensorRT 11, TensorRT-RTX) want.

Weights and values become half where nothing speaks against it; inputs and outputs stay fp32. A value that is
needed in both types gets one Cast. What stays in fp32 stays for a reason, and the reason is in the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploy.errors import ExportError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

# Values beyond the first do not exist in IEEE half precision, those below the second lose digits.
LARGEST_FP16 = 65504.0
SMALLEST_FP16 = 2.0**-14
# A value seen in calibration may be exceeded in use: half of what fp16 can hold is let through.
_MARGIN = 0.5
# bfloat16 came to convolutions, poolings and most activations with opset 22.
_BF16_OPSET = 22
# op -> why it computes in fp32: range in fp16, digits in bf16.
_EXACT = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Exp", "ReduceLogSumExp", "Softplus"), "exponentials"),
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
        "sums of squares",
    ),
    **dict.fromkeys(("LpNormalization", "ReduceL2", "ReduceSumSquare", "Pow"), "sums of squares"),
    **dict.fromkeys(("Sqrt", "Reciprocal", "Log"), "digits near zero"),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceL1", "CumSum", "GlobalAveragePool"), "long sums"),
    **dict.fromkeys(("Resize", "GridSample", "RoiAlign", "Range", "AffineGrid"), "coordinates"),
    "BatchNormalization": "running statistics",
    **dict.fromkeys(("TopK", "NonMaxSuppression", "ArgMax", "ArgMin"), "order of near values"),
}
# These read no values, so they take them as they are.
_BLIND = ("Shape", "Size")
# TensorRT's parser refuses it in bf16 (tensorrt_rtx 1.7: "Only FLOAT, HALF or INT8 input is supported").
_NOT_IN_BF16 = {"HardSwish": "HardSwish: not in bf16 in TensorRT"}


@dataclass(frozen=True)
class Halved:
    """`model` is typed; `low` nodes compute in half; `why` counts the others by reason."""

    model: ModelProto
    low: int
    why: dict[str, int]


def halved(model: ModelProto, kind: str, keep: Collection[str], peaks: Mapping[str, float]) -> Halved:
    """`model` (fp32) with half types; `kind` is fp16 or bf16. The argument is changed.

    `keep`: names of nodes to leave in fp32. `peaks`: largest |value| by value name, of a run on real data, or
    empty. The opset becomes 22 for bf16, where it is lower. Raises ExportError where a type is missing.
    """
    import onnx

    if kind == "bf16":
        model = at_opset(model, _BF16_OPSET, kind)
    _constants_become_initializers(model.graph)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    rewrite = _Rewrite(model.graph, kind, _float_values(model))
    reasons = [
        (node, _reason(node, rewrite, opset, keep, peaks))
        for node in model.graph.node
        if node.op_type not in _BLIND and (rewrite.floats(node.input) or rewrite.floats(node.output))
    ]
    rewrite.run({id(node) for node, why in reasons if not why})
    del model.graph.value_info[:]
    typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    why = Counter(why for _, why in reasons if why)
    return Halved(typed, sum(not why for _, why in reasons), dict(sorted(why.items())))


def at_opset(model: ModelProto, least: int, kind: str) -> ModelProto:
    """`model` at opset `least` or its own, if that is higher. Raises ExportError where that fails."""
    import onnx.version_converter

    have = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if have >= least:
        return model
    try:
        return onnx.version_converter.convert_version(model, least)
    except Exception as error:  # the converter raises RuntimeError or a class of its own C++ module
        raise ExportError(
            f"{kind} needs opset {least}, and the model cannot be raised to it: {error}",
            fix=f"export with opset {least} or more",
        ) from error


def _constants_become_initializers(graph: GraphProto) -> None:
    """Constant nodes that hold a tensor or floats as initializers, so that a constant is one thing below."""
    from onnx import helper, numpy_helper

    rest = []
    for node in graph.node:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Constant" or not given.keys() & {"value", "value_float", "value_floats"}:
            rest.append(node)
            continue
        ((_, value),) = given.items()
        if "value" not in given:
            value = numpy_helper.from_array(_float32(value))
        tensor = graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    del graph.node[:]
    graph.node.extend(rest)


def _float32(value: Any) -> Any:
    import numpy as np

    return np.asarray(value, dtype=np.float32)


def _float_values(model: ModelProto) -> set[str]:
    """The names of all fp32 tensors: inputs, initializers, results of nodes."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, data_prop=True).graph
    found = {t.name for t in inferred.initializer if t.data_type == onnx.TensorProto.FLOAT}
    known = set()
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        known.add(value.name)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            found.add(value.name)
    for node in inferred.node:
        for name in node.output:
            if name and name not in known:
                raise ExportError(f"the type of {name} is not known", node.name, "use fp32")
    return found


def _reason(
    node: NodeProto, rewrite: _Rewrite, opset: int, keep: Collection[str], peaks: Mapping[str, float]
) -> str:
    """Why `node` stays in fp32, "" if it does not."""
    if node.name in keep:
        return "kept as asked"
    if node.domain not in ("", "ai.onnx"):
        return f"{node.op_type}: not an operator of ONNX"
    if node.op_type in _EXACT:
        return f"{node.op_type}: {_EXACT[node.op_type]}"
    if not _takes(node, rewrite, opset):
        return f"{node.op_type}: ONNX has it in fp32 only"
    if rewrite.kind == "fp16":
        return _out_of_range(node, rewrite, peaks)
    return _NOT_IN_BF16.get(node.op_type, "")


def _takes(node: NodeProto, rewrite: _Rewrite, opset: int) -> bool:
    """Whether every float input and output may have the half type, which the inputs alone decide."""
    import onnx

    if not rewrite.floats(node.input) or node.op_type == "Cast":  # makes its floats by an attribute
        return False
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    wanted = "tensor(float16)" if rewrite.kind == "fp16" else "tensor(bfloat16)"
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            declared = formal[min(index, len(formal) - 1)].type_str
            if name in rewrite.is_float and wanted not in allowed.get(declared, ()):
                return False
    return True


def _out_of_range(node: NodeProto, rewrite: _Rewrite, peaks: Mapping[str, float]) -> str:
    import numpy as np

    for name in node.input:
        constant = rewrite.constant(name)
        if constant is None:
            continue
        sizes = np.abs(constant[np.isfinite(constant)])
        if sizes.max(initial=0.0) > LARGEST_FP16:
            return f"a constant is beyond {LARGEST_FP16:g}"
        if sizes.size == 1 and 0 < sizes.max() < SMALLEST_FP16:
            return f"a constant is below {SMALLEST_FP16:.2g}"
    limit = LARGEST_FP16 * _MARGIN
    found = [peaks[name] for name in (*node.input, *node.output) if name in peaks]
    if max(found, default=0.0) > limit:
        return f"values beyond {limit:g} in calibration"
    if any(0 < peak < SMALLEST_FP16 for peak in found):
        return f"values below {SMALLEST_FP16:.2g} in calibration"
    return ""


@dataclass
class _Rewrite:
    """The graph while its nodes are written anew. `homes`: the type in which a value is made."""

    graph: GraphProto
    kind: str
    is_float: set[str]
    homes: dict[str, str] = field(default_factory=dict)
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.constants = {t.name: t for t in self.graph.initializer if t.name in self.is_float}
        self.taken = {name for node in self.graph.node for name in (*node.input, *node.output)}
        self.taken |= {value.name for value in (*self.graph.input, *self.graph.output)}

    def floats(self, names: Collection[str]) -> list[str]:
        return [name for name in names if name in self.is_float]

    def constant(self, name: str) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def run(self, low: set[int]) -> None:
        """Write nodes and initializers anew; `low` holds the ids of the nodes that compute in half."""
        outputs = {value.name for value in self.graph.output}
        in_fp32 = {name for node in self.graph.node if id(node) not in low for name in node.input} | outputs
        for name in self.constants:  # a weight keeps its name in the type that most want: half
            self.homes[name] = "fp32"
            self.names[name, "fp32"] = name
            self.names[name, self.kind] = self._fresh(name) if name in in_fp32 else name
        nodes: list[NodeProto] = []
        used = set()
        for node in self.graph.node:
            kind = self.kind if id(node) in low else "fp32"
            if node.op_type in _BLIND:
                kind = self.homes.get(node.input[0], "fp32")
            made = self._made(node, kind, outputs)
            for index, name in enumerate(node.input):
                if name in self.constants:
                    used.add((name, kind))
                elif name in self.is_float:
                    nodes.extend(self._cast(name, kind))
                if name in self.is_float:
                    node.input[index] = self.names[name, kind]
            nodes.append(node)
            nodes.extend(made)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        self._write_constants(used | {(name, "fp32") for name in self.constants.keys() & outputs})

    def _made(self, node: NodeProto, kind: str, outputs: set[str]) -> list[NodeProto]:
        """Name the node's results in their type; the Casts that make graph outputs of them."""
        casts = []
        for index, name in enumerate(node.output):
            if name not in self.is_float:
                continue
            self.homes[name] = kind
            self.names[name, kind] = name
            if kind != "fp32" and name in outputs:
                node.output[index] = self.names[name, kind] = self._fresh(name)
                self.names[name, "fp32"] = name
                casts.append(self._cast_node(node.output[index], name, "fp32"))
        return casts

    def _cast(self, name: str, kind: str) -> Iterator[NodeProto]:
        """The Cast that makes `name` in `kind`, unless it is there already."""
        home = self.homes.setdefault(name, "fp32")  # a graph input
        self.names.setdefault((name, home), name)
        if (name, kind) not in self.names:
            self.names[name, kind] = self._fresh(name, kind)
            yield self._cast_node(self.names[name, home], self.names[name, kind], kind)

    def _cast_node(self, source: str, target: str, kind: str) -> NodeProto:
        from onnx import helper

        return helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=_element_type(kind))

    def _fresh(self, name: str, kind: str = "") -> str:
        found = f"{name}_{kind or self.kind}"
        while found in self.taken:
            found += "_"
        self.taken.add(found)
        return found

    def _write_constants(self, used: set[tuple[str, str]]) -> None:
        """The initializers in the types that are used, in their old order."""
        from onnx import helper, numpy_helper

        written = []
        for tensor in self.graph.initializer:
            if tensor.name not in self.constants:
                written.append(tensor)
                continue
            for kind in ("fp32", self.kind):
                if (tensor.name, kind) in used:
                    dtype = helper.tensor_dtype_to_np_dtype(_element_type(kind))
                    array = numpy_helper.to_array(tensor).astype(dtype)
                    written.append(numpy_helper.from_array(array, self.names[tensor.name, kind]))
        del self.graph.initializer[:]
        self.graph.initializer.extend(written)


def _element_type(kind: str) -> Any:
    from onnx import TensorProto

    return {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[kind]
