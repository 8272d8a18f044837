"""Channel labels: for every element of every tensor, the channel it belongs to.

A label is a positive integer; 0 means "belongs to no channel that could be removed". Labels are issued
for parameter axes: index i of dimension d of a parameter has a label of its own. A value of the graph
is a stack of int64 *layers* of the value's shape (an activation has one; a parameter has one per
dimension), with stride 0 wherever labels do not vary, so that they cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Value:
    """The labels of one tensor. layers: int64 tensors of the tensor's shape. meta: its shape and dtype.

    name: the parameter or buffer it is, untouched ("" otherwise). weight: it was computed from
    parameters alone. computed: by ops after which a zeroed slice need not be zero. real: the numbers
    themselves, for constants.
    """

    layers: tuple[Tensor, ...]
    meta: Tensor
    name: str = ""
    weight: bool = False
    real: Tensor | None = None
    computed: bool = False

    @property
    def labels(self) -> Tensor:
        """The single layer of an activation."""
        return self.layers[0]


def fixed(meta: Tensor, real: Tensor | None = None) -> Value:
    """A value no channel of which can be removed."""
    return Value((torch.zeros((), dtype=torch.int64).expand(meta.shape),), meta, real=real)


def core(labels: Tensor) -> Tensor:
    """`labels` with every stride-0 dimension narrowed to size 1."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def collapse(labels: Tensor) -> Tensor:
    """The same labels with stride 0 along every dimension in which they do not vary."""
    shape, small = labels.shape, core(labels)
    for dim in range(small.dim()):
        if small.shape[dim] > 1 and bool((small == small.narrow(dim, 0, 1)).all()):
            small = small.narrow(dim, 0, 1)
    return small.contiguous().expand(shape) if small.numel() else labels


def varying(labels: Tensor) -> list[int]:
    """The dimensions along which the labels vary."""
    return [dim for dim, size in enumerate(core(labels).shape) if size > 1]


def vector(labels: Tensor, dim: int) -> Tensor | None:
    """Labels along `dim`, shape (size,), or None when they vary along another dimension too."""
    dim %= labels.dim()
    if any(other != dim for other in varying(labels)):
        return None
    index = [slice(None) if d == dim else 0 for d in range(labels.dim())]
    return labels[tuple(index)]


def along(vec: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """A layer of `shape` whose labels are `vec` along `dim`."""
    view = [1] * len(shape)
    view[dim] = -1
    return collapse(vec.reshape(view).expand(shape))


def axis(value: Value, dim: int) -> Tensor:
    """Labels of a weight's dimension `dim`, shape (size,); zeros when it has none of its own."""
    if value.name:
        found = vector(value.layers[dim], dim)
        if found is not None:
            return found
    for layer in value.layers:
        if varying(layer) == [dim]:
            found = vector(layer, dim)
            if found is not None:
                return found
    return torch.zeros(value.meta.shape[dim], dtype=torch.int64)


@dataclass(frozen=True)
class Pin:
    """Channels that stay, and why. labels: int64 (k,), the labels first hit."""

    labels: np.ndarray
    reason: str
    op: str
    source: str


@dataclass(frozen=True)
class Term:
    """The MACs of one node: macs = factor * product of the kept counts of each label vector."""

    node: str
    kind: str
    weight: str
    factor: float
    counts: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Writer:
    """Parameters that write channels: a contraction's rows and bias, and the batch norm right behind it.

    weight: (name, row dimension). The other names are "" where there is none.
    """

    weight: tuple[str, int]
    bias: str = ""
    gamma: str = ""
    beta: str = ""


@dataclass
class Ledger:
    """What running a graph on labels found out: issued labels, ties, pins, reads, costs."""

    batch: int
    issued: int = 1
    axes: dict[tuple[str, int], range] = field(default_factory=dict)
    edges: list[np.ndarray] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    produced: list[np.ndarray] = field(default_factory=list)
    read: list[np.ndarray] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    writers: dict[fx.Node, Writer] = field(default_factory=dict)
    node: fx.Node | None = None

    def issue(self, count: int) -> Tensor:
        """`count` new labels."""
        start = self.issued
        self.issued += count
        return torch.arange(start, self.issued)

    def parameter(self, name: str, tensor: Tensor) -> Value:
        """The value of a parameter or buffer: one layer of fresh labels per dimension."""
        layers = []
        for dim, size in enumerate(tensor.shape):
            labels = self.issue(size)
            self.axes[name, dim] = range(self.issued - size, self.issued)
            layers.append(along(labels, dim, tensor.shape))
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if not layers:
            layers = [torch.zeros((), dtype=torch.int64)]
        real = None if tensor.is_floating_point() else tensor.detach().cpu()
        return Value(tuple(layers), meta, name=name, weight=True, real=real)

    def tie(self, a: Tensor, b: Tensor, why: str = "meets channels that stay") -> None:
        """Channels `a` and `b` (same shape) leave together; one that meets 0 stays."""
        pairs = np.stack([a.reshape(-1).numpy(), b.reshape(-1).numpy()], axis=1)
        pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
        loose = (pairs == 0).any(axis=1)
        if loose.any():
            self.pin(torch.from_numpy(pairs[loose].reshape(-1)), why)
        self.edges.append(pairs[~loose])

    def pin(self, labels: Tensor, reason: str) -> None:
        """The channels behind `labels` stay; remember the op and its source line."""
        found = np.unique(core(labels).numpy())
        found = found[found != 0]
        if found.size:
            op = short_name(self.node) if self.node else ""
            self.pins.append(Pin(found, reason, op, self.node.meta.get("source", "") if self.node else ""))

    def pin_value(self, value: Value, reason: str) -> None:
        """Pin every channel of a value, in all its layers."""
        for layer in value.layers:
            self.pin(layer, reason)

    def produce(self, labels: Tensor) -> None:
        """These labels are output channels of a contraction: candidates for removal."""
        self.produced.append(labels.numpy())

    def reading(self, labels: Tensor) -> None:
        """These labels are a contraction's input columns: zeroing them removes the channel."""
        self.read.append(labels.numpy())

    def cost(self, kind: str, weight: str, macs: float, *counts: Tensor) -> None:
        """Record the MACs of the present node, for the whole traced batch."""
        assert self.node is not None
        whole = float(np.prod([len(c) for c in counts])) if counts else 1.0
        vectors = tuple(c.numpy() for c in counts)
        self.terms.append(Term(self.node.name, kind, weight, macs / self.batch / whole, vectors))


def short_name(node: fx.Node) -> str:
    """`conv2d` for `aten.conv2d.default`, `relu` for `aten.relu_.default`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].rstrip("_") or str(target)
    return getattr(target, "__name__", str(target))


Rule = Callable[[Ledger, fx.Node, Sequence[Any], dict[str, Any], Any], Any]
"""(ledger, node, args, kwargs, result on the meta device) -> Value or list of Values.

In args, every tensor stands as its Value and every symbolic size as its int.
"""
