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
        self.places = place_nodes(self._nodes())
        self._modules = {place.module for place in self.places} - {""}

    def _nodes(self) -> list[Node]:
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
        index = {node.name: i for i, node in enumerate(self._graph.node)}
        return self._of([index[name] for name in names if name in index])

    def of_optimised(self, graph: Any) -> list[tuple[Place, tuple[int, ...]]]:
        """For each node of the graph that a runtime executes: its layer, and the exported nodes inside it."""
        anchors = [self._anchors(node) for node in graph.node]
        ends = {name for found in anchors for name in found}
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

    def _anchors(self, node: Any) -> list[str]:
        blocked = _BLOCKED.match(node.name)
        names = [*node.output, *([blocked[1]] if blocked else [])]
        return [name for name in names if name in self._producer]

    def _covered(self, anchors: Sequence[str], ends: set[str], taken: set[int]) -> list[int]:
        """The exported nodes from these tensors back to the next ones that survived, each once."""
        found: list[int] = []
        waiting = [self._producer[name] for name in anchors]
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
        contracting = [i for i in covered if self._graph.node[i].op_type in CONTRACTIONS]
        with_module = [i for i in contracting or covered if self.places[i].module]
        return self.places[(with_module or contracting or covered)[-1]]

    def _beside(self, node: Any, anchors: Sequence[str], by_tensor: Mapping[str, Place]) -> Place:
        """A change of layout belongs to the layer whose result it is, or which it reads."""
        if anchors:
            return self.places[self._producer[anchors[0]]]
        read = [by_tensor[name] for name in node.input if name in by_tensor]
        return read[-1] if read else Place(node.op_type)
