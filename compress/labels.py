"""Channel labels: for every element of every tensor, the channel it belongs to.

A label is a positive integer; 0 means "belongs to no channel that could be removed", -1 "to be told in a
later round". Labels are issued
for parameter axes: index i of dimension d of a parameter has a label of its own. A value of the graph
is a stack of int64 *layers* of the value's shape (an activation has one; a parameter has one per
dimension), with stride 0 wherever labels do not vary, so that they cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Granularity:
    """What leaves as one where a network leaves the choice.

    attention: whole heads, or the same query/key and value dimensions of every head. grouped_convs: the
    same offset of every group, or whole groups. inexact_norms: whether channels may leave through a
    LayerNorm or RMSNorm, whose statistics then change: the result is no longer the masked network.
    """

    attention: Literal["heads", "dims"] = "heads"
    grouped_convs: Literal["offsets", "groups"] = "offsets"
    inexact_norms: bool = False


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


def untold(meta: Tensor) -> Value:
    """A value whose channels only a later round can tell."""
    return Value((torch.full((), -1).expand(meta.shape),), meta)


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
    """What running a graph on labels found out: issued labels, ties, pins, reads, costs.

    The graph is run in rounds, for some ops can only be judged once it is known what leaves together.
    In a later round every label is replaced by the first of those tied to it, and by 0 if they stay.
    Ties and pins add up over the rounds; doubts, which a later round may dispel, terms and writers do not.
    """

    batch: int
    granularity: Granularity = Granularity()
    issued: int = 1
    axes: dict[tuple[str, int], range] = field(default_factory=dict)
    fresh: dict[tuple[str, str], range] = field(default_factory=dict)
    stands_for: Tensor | None = None
    alive: Tensor | None = None
    seen: dict[tuple[fx.Node, str], Any] = field(default_factory=dict)
    edges: list[np.ndarray] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    doubts: list[Pin] = field(default_factory=list)
    rows: list[tuple[int, np.ndarray]] = field(default_factory=list)
    inexact: list[Pin] = field(default_factory=list)
    produced: list[np.ndarray] = field(default_factory=list)
    read: list[np.ndarray] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    writers: dict[fx.Node, Writer] = field(default_factory=dict)
    node: fx.Node | None = None

    def begin(self, stands_for: Tensor, alive: Tensor) -> None:
        """Start another round, in which label i is called stands_for[i]; alive: is tied to a produced one."""
        self.stands_for, self.alive = stands_for, alive
        self.doubts, self.rows, self.inexact, self.terms, self.writers = [], [], [], [], {}

    def issue(self, count: int, tag: str = "") -> Tensor:
        """`count` labels that the present node makes; the same ones in every round."""
        key = (self.node.name if self.node else "", tag)
        if key not in self.fresh or len(self.fresh[key]) != count:
            self.fresh[key] = self._next(count)
        return self._called(self.fresh[key])

    def _next(self, count: int) -> range:
        self.issued += count
        return range(self.issued - count, self.issued)

    def _called(self, labels: range) -> Tensor:
        raw = torch.arange(labels.start, labels.stop)
        if self.stands_for is None or labels.stop > len(self.stands_for):
            return raw
        return self.stands_for[labels.start : labels.stop]

    def parameter(self, name: str, tensor: Tensor) -> Value:
        """The value of a parameter or buffer: one layer of labels per dimension."""
        layers = []
        for dim, size in enumerate(tensor.shape):
            if (name, dim) not in self.axes:
                self.axes[name, dim] = self._next(size)
            layers.append(along(self._called(self.axes[name, dim]), dim, tensor.shape))
        meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if not layers:
            layers = [torch.zeros((), dtype=torch.int64)]
        real = None if tensor.is_floating_point() else tensor.detach().cpu()
        return Value(tuple(layers), meta, name=name, weight=True, real=real)

    def tie(self, a: Tensor, b: Tensor, why: str = "meets channels that stay") -> None:
        """Channels `a` and `b` (same shape) leave together; one that meets 0 stays."""
        doubtful = len(varying(a)) > 1 or len(varying(b)) > 1
        pairs = np.stack([a.reshape(-1).numpy(), b.reshape(-1).numpy()], axis=1)
        pairs = _distinct(pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs >= 0).all(axis=1)])
        loose = (pairs == 0).any(axis=1)
        if loose.any():
            self.pin(torch.from_numpy(pairs[loose].reshape(-1)), why, doubtful=doubtful)
        self.edges.append(pairs[~loose])

    def pin(self, labels: Tensor, reason: str, *, doubtful: bool | None = None) -> None:
        """The channels behind `labels` stay; remember the op and its source line.

        Doubtful, and if it is not said whenever the labels vary along two axes: they stay only if no later
        round finds that they leave in whole rows, or that what they conflict with stays anyway.
        """
        found = np.unique(core(labels).numpy())
        found = found[found > 0]
        if found.size:
            doubtful = len(varying(labels)) > 1 if doubtful is None else doubtful
            book = self.doubts if doubtful else self.pins
            book.append(self._note(found, reason))

    def whole_rows(self, labels: Tensor, dim: int, resort: int = 0) -> None:
        """If nothing else is found, all channels at one coordinate of `dim` leave together.

        resort: what is tried first (0) and later (1, 2); each settles before the next.
        """
        rows = core(labels).movedim(dim, 0).flatten(1)
        pairs = torch.stack([rows[:, :1].expand_as(rows).reshape(-1), rows.reshape(-1)], 1).numpy()
        self.rows.append((resort, _distinct(pairs[(pairs > 0).all(axis=1)])))

    def _note(self, labels: np.ndarray, reason: str) -> Pin:
        op = short_name(self.node) if self.node else ""
        return Pin(labels, reason, op, self.node.meta.get("source", "") if self.node else "")

    def pin_value(self, value: Value, reason: str) -> None:
        """Pin every channel of a value, in all its layers, for good."""
        for layer in value.layers:
            self.pin(layer, reason, doubtful=False)

    def once(self, what: str, make: Callable[[], Any]) -> Any:
        """What is the same in every round, such as the present node's MACs: made in the first one."""
        assert self.node is not None
        if (self.node, what) not in self.seen:
            self.seen[self.node, what] = make()
        return self.seen[self.node, what]

    def living(self, labels: Tensor) -> bool:
        """Whether these labels may be channels that a contraction writes."""
        if self.alive is None:
            return True
        known = core(labels)
        return bool(self.alive[known[(known > 0) & (known < len(self.alive))]].any())

    def bend(self, labels: Tensor, reason: str) -> None:
        """Removing these channels changes others too: allowed on request, and reported."""
        found = np.unique(core(labels).numpy())
        self.inexact.append(self._note(found[found > 0], reason))

    def produce(self, labels: Tensor) -> None:
        """These labels are output channels of a contraction: candidates for removal."""
        self.produced.append(labels.numpy())

    def reading(self, labels: Tensor) -> None:
        """These labels are a contraction's input columns: zeroing them removes the channel."""
        if self.stands_for is None:  # the axis is known by its own labels, those of the first round
            self.read.append(labels.numpy())

    def cost(self, kind: str, weight: str, macs: float, *counts: Tensor) -> None:
        """Record the MACs of the present node, for the whole traced batch."""
        assert self.node is not None
        whole = float(np.prod([len(c) for c in counts])) if counts else 1.0
        vectors = tuple(c.numpy() for c in counts)
        self.terms.append(Term(self.node.name, kind, weight, macs / self.batch / whole, vectors))


def _distinct(pairs: np.ndarray) -> np.ndarray:
    """Every pair of labels once, in order; int64 (n, 2). One number for each sorts faster than rows do."""
    codes = np.unique(pairs[:, 0] << 32 | pairs[:, 1])
    return np.stack([codes >> 32, codes & 0xFFFFFFFF], axis=1)


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
