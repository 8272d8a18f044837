"""The memory that activations take, as a function of kept units per class.

While a network runs one example, what lies in memory at once is, at each op of the graph, every activation
that this op or a later one reads, and what this op writes. Which values share memory (views, ops in place) is
seen by running the network once, in eval mode. An activation's size is a sum over its channels, so at each op
the sum is

    M(n) = base + weight . n

of class counts n, and the network's peak is the largest of them. Parameters, constants and what is computed
from them alone are not counted, nor what an op needs for itself while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from compress.channelmap import ChannelMap
from compress.labels import core, short_name
from compress.product_rules import is_gated
from compress.trace import GraphNet, eval_mode


@dataclass(frozen=True)
class Points:
    """Bytes per example that lie in memory at once at some ops: base + weight @ n.

    base (points,), weight (points, classes); ops: what each point is, as `module op`.
    """

    base: np.ndarray
    weight: np.ndarray
    ops: tuple[str, ...]

    def at(self, counts: np.ndarray) -> np.ndarray:
        """Bytes at every point at class counts (classes,); shape (points,)."""
        value: np.ndarray = self.base + self.weight @ counts
        return value

    def total(self, counts: np.ndarray) -> float:
        """The peak: bytes at the highest point, at class counts (classes,)."""
        return float(self.at(counts).max())

    def peak_op(self, counts: np.ndarray) -> str:
        """The op at the highest point, the first of several."""
        return self.ops[int(self.at(counts).argmax())]

    def narrowed(self, counts: np.ndarray, by: np.ndarray) -> np.ndarray:
        """The peak after narrowing one class at a time by `by` (..., classes); shape (..., classes)."""
        value: np.ndarray = (self.at(counts)[:, None] - self.weight * by[..., None, :]).max(axis=-2)
        return value

    def highest(self, low: np.ndarray, high: np.ndarray, limit: float = 0.0) -> Points:
        """The points that decide whether the peak is within limit, at counts between low and high (classes,).

        Left out is what never exceeds it, and what is never above another point; the highest always stays.
        """
        most = self.at(high)
        stays: list[int] = []
        for point in np.argsort(-most, kind="stable"):
            if stays and (most[point] <= limit or self._is_below(point, stays, low, high)):
                continue
            stays.append(int(point))
        stays.sort()
        return Points(self.base[stays], self.weight[stays], tuple(self.ops[point] for point in stays))

    def _is_below(self, point: int, others: list[int], low: np.ndarray, high: np.ndarray) -> bool:
        """Whether one of the others is at least as high as a point, at all counts between low and high."""
        more = self.weight[point] - self.weight[others]
        most = self.base[point] - self.base[others] + np.maximum(more * low, more * high).sum(axis=1)
        return bool((most <= 0).any())


def points(net: GraphNet, cmap: ChannelMap, example: Sequence[Tensor]) -> Points:
    """What lies in memory at the ops of a network, without those that are never the highest.

    example: the inputs that the map was made with; the network runs once on them.
    """
    with eval_mode(net), torch.no_grad():
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
        seen = _Storages(net)
        seen.run(*(x.to(device) for x in example), enable_io_processing=False)
    nodes = list(net.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    full = np.bincount(cmap.classes)
    change = np.zeros((len(nodes) + 1, 1 + len(full)))  # of base and weight, from one op to the next
    for one in seen.found:
        if one.is_constant:
            continue
        last = max((place[user] for node in one.nodes for user in node.users), default=None)
        if last is None and one.maker.op == "placeholder":
            continue  # never needed
        begin = 0 if one.maker.op == "placeholder" else place[one.maker]
        size = _size(one, cmap, full) / len(example[0])
        change[begin] += size
        change[(begin if last is None else last) + 1] -= size
    at = [place[node] for node in nodes if node.op == "call_function"]
    totals = np.round(change.cumsum(axis=0)[at], 6)
    ops = tuple(f"{nodes[i].meta.get('module', '')} {short_name(nodes[i])}".strip() for i in at)
    return Points(totals[:, 0], totals[:, 1:], ops).highest(np.zeros(len(full)), full)


@dataclass
class _Storage:
    """One piece of memory. maker: the node that it appears with; labels: of what lies in it then, one value
    or several; nodes: all whose values lie in it. is_constant: no input has a part in it."""

    maker: fx.Node
    bytes: int
    is_constant: bool
    outputs: list[int]
    nodes: list[fx.Node] = field(default_factory=list)


class _Storages(fx.Interpreter):
    """Runs a graph and notes which storages its values lie in. Gates are passed by: surgery removes them."""

    def __init__(self, net: GraphNet) -> None:
        super().__init__(net)
        self.found: list[_Storage] = []
        self.homes: dict[fx.Node, dict[int, int]] = {}  # by node, address -> number of the storage
        self.varies: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        gated = n.op == "call_function" and is_gated(n)
        value = self.env[n.args[0]] if gated else super().run_node(n)  # type: ignore[index]
        if n.op == "output":
            return value
        if n.op == "placeholder" or any(source in self.varies for source in n.all_input_nodes):
            self.varies.add(n)
        self._note(n, value)
        return value

    def _note(self, node: fx.Node, value: Any) -> None:
        """Addresses are told apart among the values that are still there; others may have been used again."""
        live = {at: number for other in self.env for at, number in self.homes[other].items()}
        own: dict[int, int] = {}
        for position, leaf in enumerate(tree_leaves(value)):
            if not isinstance(leaf, Tensor) or not leaf.numel():
                continue
            storage = leaf.untyped_storage()
            number = own.get(storage.data_ptr(), live.get(storage.data_ptr()))
            if number is None:
                number = len(self.found)
                self.found.append(_Storage(node, storage.nbytes(), node not in self.varies, []))
            if self.found[number].maker is node:
                self.found[number].outputs.append(position)
            own[storage.data_ptr()] = number
        for number in own.values():
            self.found[number].nodes.append(node)
        self.homes[node] = own


def _size(one: _Storage, cmap: ChannelMap, full: np.ndarray) -> np.ndarray:
    """(base, weight of each class) of a storage's bytes for the traced batch, (1 + classes,).

    Where units of one class take different amounts, each that leaves is taken to free the least of them: the
    sum is right for all units, and never too low.
    """
    units, elements = _elements(one, cmap.nodes, cmap.unit_of_label)
    whole = elements.sum()
    of_unit = np.bincount(units[units >= 0], elements[units >= 0], cmap.units)
    weight = np.full(len(full), np.inf)
    np.minimum.at(weight, cmap.classes, of_unit)
    found: np.ndarray = np.append(whole - weight @ full, weight) * (one.bytes / whole)
    return found


def _elements(
    one: _Storage, nodes: Mapping[str, Any], unit_of_label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The unit of every label of what a storage was made for, and how many elements each stands for."""
    labels = tree_leaves(nodes[one.maker.name])
    units, share = [], []
    for own in (labels[position] for position in one.outputs):
        small = core(own)
        units.append(unit_of_label[small.numpy()].reshape(-1))
        share.append(np.full(small.numel(), own.numel() / small.numel()))
    return np.concatenate(units), np.concatenate(share)
