"""Run a traced graph on channel labels; the result is the ChannelMap.

Everything later is a short consequence of it: importance sums over a unit's slices, masks zero a
unit's reading slices, surgery selects every axis by the kept units, cost counts labels.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from compress import layer_rules  # noqa: F401  # importing it registers its rules
from compress.errors import ModelError
from compress.labels import Ledger, Pin, Term, Value, Writer, collapse, core, fixed, short_name, varying
from compress.rules import MOVEMENT, find, values_in
from compress.trace import Traced, get_tensor, placeholders

INTEGER_FUNCTIONS = frozenset(
    {
        operator.mul,
        operator.add,
        operator.sub,
        operator.floordiv,
        operator.mod,
        operator.truediv,
        operator.neg,
    }
)
SIZED = frozenset(
    (
        *(
            "slice",
            "narrow",
            "select",
            "constant_pad_nd",
            "pad",
            "tensor_split",
            "index_select",
            "index",
            "roll",
        ),
        *("chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "channel_shuffle"),
    )
)
"""Ops whose arguments count channels in a way that the user's Python code fixes."""
_CREATORS = frozenset(("zeros", "ones", "full", "empty", "arange", "eye", "linspace", "scalar_tensor"))


@dataclass(frozen=True)
class PinnedChannels:
    """A group of channels that stays: how many, in which parameters, why, at which op and line."""

    reason: str
    op: str
    source: str
    channels: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class ChannelMap:
    """Which removable unit every index of every axis belongs to.

    axes: (name, dim) -> int64 (size,): unit of each index, -1 where the index stays.
    reads: the axes whose slices read a unit (a contraction's input columns).
    nodes: node name -> labels of its output (a list for ops with several outputs).
    unit_of_label: int64: label -> unit, -1 for none; label 0 is "stays".
    classes: int64 (units,): units of one class appear in exactly the same axes, so they are
    interchangeable for cost and alignment: a layer's channels, or a residual stream's.
    multiplicity: int64 (units,): indices a unit takes on the axis where it takes fewest.
    """

    units: int
    axes: dict[tuple[str, int], np.ndarray]
    reads: frozenset[tuple[str, int]]
    nodes: dict[str, Any]
    unit_of_label: np.ndarray
    classes: np.ndarray
    multiplicity: np.ndarray
    terms: tuple[Term, ...]
    pinned: tuple[PinnedChannels, ...]
    writers: tuple[Writer, ...]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]


def channel_map(traced: Traced, keep: Sequence[str] = (), *, in_place: bool = False) -> ChannelMap:
    """Label every axis of a traced model.

    keep: names of parameters none of whose channels may be removed. in_place: also pin channels whose
    number is written into the model's Python code, so that a plan fits the user's own module.
    Raises ModelError when an op cannot even be shaped (data-dependent output sizes).
    """
    net = traced.net
    ledger = Ledger(batch=traced.example[0].shape[0])
    metas = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in traced.example]
    known = dict(zip(placeholders(net), (fixed(m) for m in metas), strict=True))
    tensors: dict[str, Value] = {}
    env: dict[fx.Node, Any] = {}
    for node in net.graph.nodes:
        ledger.node = node
        if node.op == "placeholder":
            env[node] = known[node]
        elif node.op == "get_attr":
            name = str(node.target)
            if name not in tensors:
                tensors[name] = ledger.parameter(name, get_tensor(net, name))
            env[node] = tensors[name]
        elif node.op == "output":
            for value in values_in(fx.map_arg(node.args, lambda n: env[n])):
                ledger.pin_value(value, "it is an output of the model")
        else:
            env[node] = _call(ledger, node, env)
    _pin_kept(ledger, keep)
    if in_place:
        _pin_sized(ledger, env)
    return _finish(ledger, env, {name: get_tensor(net, name) for name in tensors})


def _call(ledger: Ledger, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """Labels of one node's output; plain numbers are computed as they are."""
    args = [_materialise(a, env) for a in node.args]
    kwargs = {k: _materialise(v, env) for k, v in node.kwargs.items()}
    values = values_in([args, kwargs])
    if node.target is operator.getitem:
        return args[0][args[1]]
    if not values and (node.target in INTEGER_FUNCTIONS or str(node.target).startswith("sym_")):
        return node.target(*args)  # type: ignore[operator]
    if short_name(node) == "sym_size":
        return args[0].meta.shape[args[1]]
    constant = all(v.real is not None for v in values) and (values or short_name(node) in _CREATORS)
    if constant:
        real = node.target(*_numbers(args, "real"), **_numbers(_no_device(kwargs), "real"))  # type: ignore[operator]
        return _constants(real)
    meta = _shape(node, args, kwargs)
    _pin_scrambled(ledger, node, env)
    return find(node)(ledger, node, args, kwargs, meta)


def _materialise(argument: Any, env: dict[fx.Node, Any]) -> Any:
    """Arguments with nodes replaced by what they stand for; lists become plain lists."""
    if isinstance(argument, fx.Node):
        return env[argument]
    if isinstance(argument, list | tuple):
        return [_materialise(a, env) for a in argument]
    return argument


def _numbers(argument: Any, which: str) -> Any:
    """Arguments with Values replaced by their meta tensor or their real numbers."""
    if isinstance(argument, Value):
        return getattr(argument, which)
    if isinstance(argument, dict):
        return {k: _numbers(v, which) for k, v in argument.items()}
    return [_numbers(a, which) for a in argument] if isinstance(argument, list | tuple) else argument


def _no_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}


def _constants(real: Any) -> Any:
    if isinstance(real, Tensor):
        return fixed(torch.empty(real.shape, dtype=real.dtype, device="meta"), real)
    return [_constants(r) for r in real] if isinstance(real, list | tuple) else real


def _shape(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The op's result on the meta device: shapes and dtypes without numbers."""
    kwargs = {k: (torch.device("meta") if isinstance(v, torch.device) else v) for k, v in kwargs.items()}
    try:
        return node.target(*_numbers(args, "meta"), **_numbers(kwargs, "meta"))  # type: ignore[operator]
    except Exception as error:
        raise ModelError(
            f"{short_name(node)}: the size of its result depends on the data",
            where=node.meta.get("source", ""),
            fix="move it behind the exported part of the model",
        ) from error


def _pin_scrambled(ledger: Ledger, node: fx.Node, env: dict[fx.Node, Any]) -> None:
    """Channels split over two axes may only be moved and merged again (a channel shuffle).

    Removing some would leave blocks of unequal size, which no other op could work on.
    """
    name = short_name(node)
    for source in node.all_input_nodes:
        value = env[source]
        if not isinstance(value, Value) or value.weight or len(varying(value.labels)) < 2:
            continue
        if name not in MOVEMENT and name not in ("contiguous", "clone"):
            ledger.pin(value.labels, f"{name} works on channels split over two axes")


def restored_by(node: fx.Node, nodes: dict[str, Any]) -> tuple[fx.Node, int] | None:
    """The (node, dim) before channels were split over two axes, where `node` merges them again.

    None when `node` does not end such a stretch; ValueError when it ends in another shape.
    """
    labels = nodes.get(node.name)
    if not isinstance(labels, Tensor) or len(varying(labels)) != 1 or not _moves(node):
        return None
    origin = node.args[0]
    if not isinstance(origin, fx.Node) or len(varying(nodes[origin.name])) < 2:
        return None
    while len(varying(nodes[origin.name])) > 1:
        if not _moves(origin) or not isinstance(origin.args[0], fx.Node):
            raise ValueError(origin.name)
        origin = origin.args[0]
        if not isinstance(nodes.get(origin.name), Tensor):
            raise ValueError(origin.name)
    before, after = nodes[origin.name], labels
    if before.shape != after.shape or varying(before) != varying(after):
        raise ValueError(origin.name)
    return origin, varying(after)[0]


def _moves(node: fx.Node) -> bool:
    return node.op == "call_function" and short_name(node) in MOVEMENT | {"contiguous", "clone"}


def _pin_kept(ledger: Ledger, keep: Sequence[str]) -> None:
    ledger.node = None
    for name in keep:
        for (owner, _), labels in ledger.axes.items():
            if owner == name:
                ledger.pin(torch.arange(labels.start, labels.stop), "kept on request")


def _pin_sized(ledger: Ledger, env: dict[fx.Node, Any]) -> None:
    """Pin channels that splits, slices, padding and shuffles count by numbers in the model's code."""
    nodes = {node.name: _labels_of(value) for node, value in env.items()}
    for node in env:
        ledger.node = node
        shuffled = len(varying(nodes[node.name])) > 1 if isinstance(nodes[node.name], Tensor) else False
        if short_name(node) in SIZED or (shuffled and _moves(node)):
            whole = env[node.args[0]].labels  # type: ignore[index]
            if _cuts(whole, nodes[node.name]) or shuffled:
                ledger.pin(whole, "its size is written into the model's code")
                for piece in nodes[node.name] if isinstance(nodes[node.name], list) else [nodes[node.name]]:
                    ledger.pin(piece, "its size is written into the model's code")


def _cuts(whole: Tensor, result: Any) -> bool:
    """Whether an op changed the number of channels along an axis in which they vary."""
    pieces = result if isinstance(result, list) else [result]
    return any(
        piece.dim() != whole.dim() or any(piece.shape[d] != whole.shape[d] for d in varying(whole))
        for piece in pieces
    )


def _finish(ledger: Ledger, env: dict[fx.Node, Any], tensors: dict[str, Tensor]) -> ChannelMap:
    nodes = {node.name: _labels_of(value) for node, value in env.items()}
    ledger_nodes = {node.name: node for node in env}
    for name, node in ledger_nodes.items():
        try:
            restored_by(node, nodes)
        except ValueError:
            ledger.node = node
            ledger.pin(nodes[name], f"{short_name(node)} merges channels in another shape")
    component = _components(ledger)
    _pin_taken_apart(ledger, env, nodes, component)
    unit_of_label = _units(ledger, component)
    axes = {key: unit_of_label[labels.start : labels.stop] for key, labels in ledger.axes.items()}
    axes = {key: units for key, units in axes.items() if (units >= 0).any()}
    read = np.zeros(ledger.issued, dtype=bool)
    for labels in ledger.read:
        read[labels.reshape(-1)] = True
    reads = frozenset(key for key in axes if read[ledger.axes[key].start : ledger.axes[key].stop].any())
    units = int(unit_of_label.max(initial=-1)) + 1
    classes, multiplicity = _classes(axes, units, _pieces(nodes, unit_of_label))
    return ChannelMap(
        units,
        axes,
        reads,
        nodes,
        unit_of_label,
        classes,
        multiplicity,
        tuple(ledger.terms),
        _pinned(ledger, component),
        tuple(ledger.writers.values()),
        {name: tuple(t.shape) for name, t in tensors.items()},
        frozenset(name for name, t in tensors.items() if isinstance(t, torch.nn.Parameter)),
    )


def _pin_taken_apart(
    ledger: Ledger, env: dict[fx.Node, Any], nodes: dict[str, Any], component: np.ndarray
) -> None:
    """Channels split over two axes stay, unless they are merged again or leave whole rows at a time."""
    merging: set[fx.Node] = set()
    inside: set[fx.Node] = set()
    for node in env:
        with contextlib.suppress(ValueError):
            found = restored_by(node, nodes)
            if found is not None:
                merging.add(node)
                step: Any = node.args[0]
                while step is not found[0]:
                    inside.add(step)
                    step = step.args[0]
    for node in env:
        ledger.node = node
        split = _is_split(nodes[node.name])
        suspects = [node] if split and node not in inside else []
        if not split and node not in merging:
            suspects = [source for source in node.all_input_nodes if _is_split(nodes[source.name])]
        for suspect in suspects:
            together = torch.from_numpy(component)[core(nodes[suspect.name])]
            if len(varying(collapse(together))) > 1:
                ledger.pin(nodes[suspect.name], f"{short_name(node)} takes channels on two axes apart")


def _is_split(labels: Any) -> bool:
    return isinstance(labels, Tensor) and len(varying(labels)) > 1


def _pieces(nodes: dict[str, Any], unit_of_label: np.ndarray) -> list[np.ndarray]:
    """The units in each part of every split, so that no part of it is ever emptied."""
    parts = [piece for labels in nodes.values() if isinstance(labels, list) for piece in labels]
    units = [np.unique(unit_of_label[core(part).numpy()]) for part in parts if isinstance(part, Tensor)]
    return [found[found >= 0] for found in units]


def _labels_of(value: Any) -> Any:
    if isinstance(value, Value):
        return next((layer for layer in value.layers if varying(layer)), value.labels)
    return [_labels_of(v) for v in value] if isinstance(value, list) else value


def _components(ledger: Ledger) -> np.ndarray:
    """Component of each label under the ties, by scipy; int32 (labels,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate(ledger.edges) if ledger.edges else np.empty((0, 2), dtype=np.int64)
    ones = np.ones(len(edges), dtype=np.int8)
    graph = coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(ledger.issued, ledger.issued))
    component: np.ndarray = connected_components(graph, directed=False)[1]
    return component


def _flags(component: np.ndarray, groups: Iterable[np.ndarray]) -> np.ndarray:
    """Which components hold a label of the groups; bool (components,)."""
    flags = np.zeros(int(component.max(initial=0)) + 1, dtype=bool)
    for labels in groups:
        flags[component[labels.reshape(-1)]] = True
    return flags


def _units(ledger: Ledger, component: np.ndarray) -> np.ndarray:
    """Number the components that are produced and not pinned, in the order of the graph."""
    removable = _flags(component, ledger.produced) & ~_flags(component, (p.labels for p in ledger.pins))
    removable[component[0]] = False
    chosen = np.where(removable[component])[0]
    _, first, inverse = np.unique(component[chosen], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    units = np.full(ledger.issued, -1, dtype=np.int64)
    units[chosen] = rank[inverse]
    return units


def _classes(
    axes: dict[tuple[str, int], np.ndarray], units: int, pieces: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Classes of units with equal axes (and equal pieces), and each unit's least count on an axis."""
    signature = np.zeros(units, dtype=np.uint64)
    least = np.full(units, np.iinfo(np.int64).max)
    codes = np.random.default_rng(0).integers(1, 2**63, size=len(axes) + len(pieces), dtype=np.uint64)
    for code, members in zip(codes[len(axes) :], pieces, strict=True):
        signature[members] += code
    for code, members in zip(codes[: len(axes)], axes.values(), strict=True):
        counts = np.bincount(members[members >= 0], minlength=units)
        signature += code * counts.astype(np.uint64)
        least = np.where(counts > 0, np.minimum(least, counts), least)
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return rank[inverse].astype(np.int64), least


def _pinned(ledger: Ledger, component: np.ndarray) -> tuple[PinnedChannels, ...]:
    """Every pinned group of produced channels once, under the first reason that hit it."""
    produced = _flags(component, ledger.produced)
    owner = np.full(ledger.issued, -1, dtype=np.int64)
    names = list(ledger.axes)
    for index, labels in enumerate(ledger.axes.values()):
        owner[labels.start : labels.stop] = index
    seen = np.zeros_like(produced)
    found: dict[tuple[str, str, str], list[int]] = {}
    for pin in ledger.pins:
        fresh = np.unique(component[pin.labels])
        fresh = fresh[produced[fresh] & ~seen[fresh]]
        seen[fresh] = True
        if fresh.size:
            found.setdefault((pin.reason, pin.op, pin.source), []).extend(fresh.tolist())
    report = []
    for (reason, op, source), components in found.items():
        members = np.isin(component, components)
        parameters = dict.fromkeys(names[i][0] for i in np.unique(owner[members]) if i >= 0)
        report.append(PinnedChannels(reason, op, source, len(components), tuple(parameters)))
    return tuple(report)


__all__ = ["ChannelMap", "Pin", "PinnedChannels", "channel_map", "core", "restored_by"]
