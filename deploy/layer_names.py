"""Which layer of the model each node of a graph belongs to, so that two graphs can be compared by layer.

A layer is a module with parameters (the path in front of its parameters' names) and what follows it without
parameters of its own: activation, addition, change of layout. What is expensive without parameters (pooling,
softmax, a product of two activations) is a layer named after the one in front: "conv1 > MaxPool".
Runtimes rename, merge and reorder nodes; the tensors that survive say where they came from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONTRACTIONS = frozenset(
    (
        *("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
        *("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger"),
        *("MatMulIntegerToFloat", "Einsum", "Attention", "MultiHeadAttention", "conv1d", "conv2d"),
        *("conv3d", "convolution", "linear", "matmul", "mm", "bmm", "addmm", "einsum"),
        "scaled_dot_product_attention",
    )
)
# Rows of their own although they have no parameters, by ONNX's and ATen's names.
OWN_ROWS = CONTRACTIONS.union(
    (
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "ReduceMean"),
        *("ReduceSum", "Softmax", "Concat", "Split", "Gather", "Resize", "TopK", "CumSum"),
        *("ArgMax", "NonMaxSuppression", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
        *("mean", "softmax", "cat", "index_select", "upsample_nearest2d", "upsample_bilinear2d"),
    )
)
_BEHIND = frozenset(("DequantizeLinear", "Cast"))  # a weight may be stored in another type
_STORED = re.compile(r"_(quantized|scale|zero_point|quantized_scale|quantized_zero_point)$")
# onnxruntime's blocked layout: nodes are named after the tensor that they make, tensors get new names.
_BLOCKED = re.compile(r"^(.+)_nchwc(_token_\d+)?$")
_NUMBERED = re.compile(r"_token_\d+$")
_CAST = "InsertedPrecisionFreeCast_"  # and this in front of one that it computes in fp32


@dataclass(frozen=True)
class Place:
    """A node's layer: the row's `name`, and the `module` whose parameters it has ("" for none)."""

    name: str
    module: str = ""


@dataclass(frozen=True)
class Node:
    """One node: its operator, the nodes it reads from (by index), the module its parameters belong to."""

    op: str
    producers: tuple[int, ...]
    module: str = ""


def place_nodes(nodes: Sequence[Node]) -> list[Place]:
    """The layer of each node, nodes in the order they are computed in."""
    places: list[Place] = []
    seen: Counter[str] = Counter()
    for node in nodes:
        before = places[max(node.producers)] if node.producers else Place("")
        if node.module:
            places.append(Place(node.module, node.module))
        elif node.op in OWN_ROWS or not before.name:
            anchor = before.name.split(" > ")[0]
            name = f"{anchor} > {node.op}" if anchor else node.op
            seen[name] += 1
            places.append(Place(name if seen[name] == 1 else f"{name} {seen[name]}"))
        else:
            places.append(before)
    return places


class OnnxLayers:
    """The layers of an exported ONNX graph, and of what a runtime made of it."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self.weights = {entry.name: tuple(entry.dims) for entry in graph.initializer}
        self._producer = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
        self._index = {node.name: i for i, node in enumerate(graph.node) if node.name}
        self._nodes = self._read_nodes()
        self.places = place_nodes(self._nodes)
        self._modules = {place.module for place in self.places} - {""}

    def _read_nodes(self) -> list[Node]:
        readers: dict[str, list[Any]] = {}
        for node in self._graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        return [self._node(node, readers) for node in self._graph.node]

    def _node(self, node: Any, readers: Mapping[str, list[Any]]) -> Node:
        producers = tuple(self._producer[name] for name in node.input if name in self._producer)
        module = self._module(node)
        if not module and node.op_type in CONTRACTIONS:
            stored = [self._graph.node[i] for i in producers if self._graph.node[i].op_type in _BEHIND]
            module = next(filter(None, map(self._module, stored)), "")
            after = [r for name in node.output for r in readers.get(name, ())]
            # A transposed weight has lost its name to constant folding; the bias added next has its own.
            constant = any(name in self.weights for name in node.input)
            if not module and constant and len(after) == 1 and after[0].op_type == "Add":
                module = self._module(after[0])
        return Node(node.op_type, producers, module)

    def _module(self, node: Any) -> str:
        owned = (_STORED.sub("", name) for name in node.input if name in self.weights)
        return next((name.rpartition(".")[0] for name in owned if "." in name), "")

    def of_names(self, names: Sequence[str]) -> Place | None:
        """The layer of a kernel made of these nodes of the exported graph; None if it knows none of them."""
        return self._of([self._index[name] for name in names if name in self._index])

    def of_optimised(self, graph: Any) -> list[tuple[Place, tuple[int, ...]]]:
        """For each node of the graph that a runtime executes: its layer, and the exported nodes inside it."""
        anchors = [self._anchors(node) for node in graph.node]
        ends = {name for found in anchors for i in found for name in self._graph.node[i].output}
        taken: set[int] = set()
        by_tensor: dict[str, Place] = {}
        found: list[tuple[Place, tuple[int, ...]]] = []
        for node, own in zip(graph.node, anchors, strict=True):
            covered = self._covered(own, ends, taken)
            known = self._named(node) if node.op_type in CONTRACTIONS else None
            place = known or self._of(covered) or self._beside(node, own, by_tensor)
            by_tensor.update(dict.fromkeys(node.output, place))
            found.append((place, tuple(covered)))
        return found

    def _anchors(self, node: Any) -> list[int]:
        """The exported nodes whose results this one makes: by its tensors, else by its own name or theirs."""
        blocked = _BLOCKED.match(node.name)
        names = [name.removeprefix(_CAST) for name in (*node.output, *([blocked[1]] if blocked else []))]
        found = [self._producer[name] for name in names if name in self._producer]
        own = (_NUMBERED.sub("", name) for name in (node.name, *names))
        return found or [self._index[name] for name in own if name in self._index][:1]

    def weight(self, index: int) -> tuple[tuple[int, ...], bool] | None:
        """The constant factor of a contraction: its dims, and whether output channels come first."""
        node = self._graph.node[index]
        if node.op_type not in CONTRACTIONS:
            return None
        # QLinearConv and its kind have scale and zero point of the input in between.
        name = next(iter(node.input[3:4] if node.op_type.startswith("QLinear") else node.input[1:2]), "")
        while name not in self.weights and name in self._producer:
            before = self._graph.node[self._producer[name]]
            name = before.input[0] if before.op_type in _BEHIND else ""
        turned = any(entry.name == "transB" and entry.i for entry in node.attribute)
        if name not in self.weights:
            return None
        return self.weights[name], turned or ("Conv" in node.op_type and node.op_type != "ConvTranspose")

    def _covered(self, anchors: Sequence[int], ends: set[str], taken: set[int]) -> list[int]:
        """The exported nodes from these back to the next results that survived, each once."""
        found: list[int] = []
        waiting = list(anchors)
        while waiting:
            index = waiting.pop()
            if index in taken:
                continue
            taken.add(index)
            found.append(index)
            inputs = [name for name in self._graph.node[index].input if name not in ends]
            waiting += [self._producer[name] for name in inputs if name in self._producer]
        return sorted(found)

    def _named(self, node: Any) -> Place | None:
        modules = (_STORED.sub("", name).rpartition(".")[0] for name in node.input)
        return next((Place(name, name) for name in modules if name in self._modules), None)

    def _of(self, covered: Sequence[int]) -> Place | None:
        if not covered:
            return None
        heads = [i for i in covered if self._nodes[i].module or self._nodes[i].op in OWN_ROWS]
        contracting = [i for i in heads if self.places[i].module and self._nodes[i].op in CONTRACTIONS]
        return self.places[(contracting or heads or covered)[-1]]

    def _beside(self, node: Any, anchors: Sequence[int], by_tensor: Mapping[str, Place]) -> Place:
        """A change of layout belongs to the layer whose result it is, or which it reads."""
        if anchors:
            return self.places[anchors[0]]
        read = [by_tensor[name] for name in node.input if name in by_tensor]
        return read[-1] if read else Place(node.op_type)
