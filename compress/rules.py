"""One small rule per family of ATen ops: what an op does to channel labels.

A rule ties labels that must leave together, pins what cannot leave, and returns the labels of the
result. Ops that only move data need no rule of their own: they run on the labels themselves. An op
that stands in no table is never guessed at: whatever reaches it is pinned and reported.

Here: element-wise ops, data movement and joins; `compress.layer_rules` has the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from compress.labels import (
    Ledger,
    Rule,
    Value,
    collapse,
    core,
    fixed,
    short_name,
    varying,
    vector,
)

RULES: dict[str, Rule] = {}

MOVEMENT = frozenset(
    (
        *(
            "view",
            "reshape",
            "_unsafe_view",
            "view_as",
            "reshape_as",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
        ),
        *("permute", "transpose", "t", "mT", "numpy_T", "movedim", "moveaxis", "swapaxes", "swapdims"),
        *(
            "expand",
            "expand_as",
            "broadcast_to",
            "repeat",
            "tile",
            "repeat_interleave",
            "roll",
            "flip",
            "rot90",
        ),
        *("slice", "select", "narrow", "index_select", "diagonal", "unbind", "tensor_split"),
        *("chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    )
)
"""Ops that only move data: executed verbatim on the labels."""

_POINTWISE_UNTAGGED = frozenset(
    (
        *("hardswish", "hardtanh", "gelu", "log_sigmoid", "logsigmoid", "threshold", "where", "masked_fill"),
        *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
        *(
            "contiguous",
            "clone",
            "to",
            "_to_copy",
            "type_as",
            "float",
            "detach",
            "alias",
            "lift_fresh",
            "copy",
        ),
        *("lift_fresh_copy", "rsub", "fill", "zero", "nan_to_num"),
    )
)
"""Element-wise ops that PyTorch does not tag `pointwise`."""

ZERO_STAYS_ZERO = frozenset(("contiguous", "detach", "alias", "clone", "to", "_to_copy", "mul", "neg", "abs"))
"""Element-wise ops of a weight after which a column that the mask has zeroed is still zero."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops by their short names; a second registration of a name raises."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register


def find(node: fx.Node) -> Rule:
    """The rule for a node: its own, pointwise by PyTorch's tag, movement, or `unknown`."""
    name = short_name(node)
    if name in RULES:
        return RULES[name]
    if name in MOVEMENT:
        return movement
    return pointwise if _is_pointwise(name) else unknown


def _is_pointwise(name: str) -> bool:
    if name in _POINTWISE_UNTAGGED:
        return True
    packet = getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if packet is not None else []
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in overloads)


def values_in(arguments: Any) -> list[Value]:
    """Every Value among (nested) arguments."""
    if isinstance(arguments, Value):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, list | tuple):
        return [v for a in arguments for v in values_in(a)]
    return []


def result(labels: Tensor, meta: Any) -> Value:
    """An activation with these labels."""
    return Value((collapse(labels),), meta)


# -- unknown ------------------------------------------------------------------------------------------


def unknown(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    """Never guess: every channel that reaches the op stays."""
    for value in values_in([list(args), kwargs]):
        ledger.pin_value(value, f"{short_name(node)} has no pruning rule")
        if value.name and value.meta.dim() > 1:  # what it writes stays too, and is to be reported
            ledger.produce(core(value.layers[0]))
    macs = multiply_adds(ledger, node, args, kwargs)
    if macs:
        ledger.cost(short_name(node), "", macs)
    return fixed_like(meta)


def fixed_like(meta: Any) -> Any:
    """Fixed values in the structure of an op's result."""
    if isinstance(meta, Tensor):
        return fixed(meta)
    return [fixed_like(m) for m in meta] if isinstance(meta, list | tuple) else meta


def multiply_adds(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    """MACs of one op by torch's FLOP counter on the meta device (it counts two per multiply-add)."""

    def numbers(a: Any) -> Any:
        if isinstance(a, Value):
            return a.meta
        return [numbers(x) for x in a] if isinstance(a, list | tuple) else a

    def count() -> float:
        with FlopCounterMode(display=False) as counter:
            node.target(*[numbers(a) for a in args], **{k: numbers(v) for k, v in kwargs.items()})  # type: ignore[operator]
        return float(counter.get_total_flops()) / 2

    found: float = ledger.once("macs", count)
    return found


# -- element-wise -------------------------------------------------------------------------------------


def pointwise(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    """Element-wise ops tie what they combine; a broadcast dimension ties nothing."""
    values = values_in([list(args), kwargs])
    total = values[0]
    for value in values[1:]:
        total = combine(ledger, total, value)
    shape = meta.shape
    layers = tuple(collapse(_rank(layer, len(shape)).expand(shape)) for layer in total.layers)
    keep_name = (
        total.name if len(values) == 1 and short_name(node) in ("contiguous", "detach", "alias") else ""
    )
    computed = any(v.computed for v in values) or short_name(node) not in ZERO_STAYS_ZERO
    return Value(layers, meta, name=keep_name, weight=total.weight, computed=total.weight and computed)


def combine(ledger: Ledger, a: Value, b: Value) -> Value:
    """The labels of an element-wise function of two values."""
    shape = np.broadcast_shapes(a.meta.shape, b.meta.shape)
    meta = torch.empty(shape, device="meta")
    if a.weight and b.weight:
        return Value(_weights_meet(ledger, a, b, shape), meta, weight=True)
    if a.weight or b.weight:
        weight, activation = (a, b) if a.weight else (b, a)
        return Value((_follow(ledger, activation, weight, shape),), meta)
    return Value((_meet(ledger, a.labels, b.labels, shape),), meta)


def _rank(labels: Tensor, rank: int) -> Tensor:
    return labels[(None,) * (rank - labels.dim())]


def _broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = np.broadcast_shapes(a.shape, b.shape)
    return a.expand(shape), b.expand(shape)


def _spread(small: Tensor, big: Tensor) -> bool:
    """Whether `small` is broadcast along a dimension in which the channels of `big` vary."""
    return any(small.shape[d] == 1 and big.shape[d] > 1 for d in varying(big))


def _meet(ledger: Ledger, a: Tensor, b: Tensor, shape: Sequence[int]) -> Tensor:
    a, b = _rank(a, len(shape)), _rank(b, len(shape))
    spread_a, spread_b = _spread(a, b), _spread(b, a)
    for labels, spread in ((a, spread_a), (b, spread_b)):
        if spread:
            ledger.pin(labels, "one channel is broadcast over several")
    if spread_a or spread_b:
        return (
            b.expand(shape)
            if not spread_b
            else a.expand(shape)
            if not spread_a
            else torch.zeros_like(a).expand(shape)
        )
    ca, cb = _broadcast(core(a), core(b))
    ledger.tie(ca, cb)
    return torch.where(ca > 0, ca, cb).expand(shape)


def _follow(ledger: Ledger, activation: Value, weight: Value, shape: Sequence[int]) -> Tensor:
    """A parameter used element-wise follows the activation it meets."""
    labels = _rank(activation.labels, len(shape))
    for layer in weight.layers:
        aligned = _rank(layer, len(shape))
        shared = set(varying(aligned)) & set(varying(labels))
        if not shared:
            _lie_beside(ledger, labels, aligned)
            continue
        dim = min(shared)
        own, met = vector(aligned, dim), vector(labels, dim)
        if own is None or met is None:
            why = "one element of a parameter meets several channels"
            ledger.pin(labels, why, doubtful=met is None)
            ledger.pin(aligned, why, doubtful=met is None)
        else:
            ledger.tie(met, own)
    _meet_what_stays(ledger, labels, weight)
    return labels.expand(shape)


def _meet_what_stays(ledger: Ledger, labels: Tensor, weight: Value) -> None:
    """Channels along an axis on which a parameter is as wide but has none of its own to follow stay."""
    layers = [_rank(layer, labels.dim()) for layer in weight.layers]
    for dim in varying(labels):
        if layers[0].shape[dim] > 1 and not any(dim in varying(layer) for layer in layers):
            ledger.pin(labels, "meets a parameter that stays")


def _lie_beside(ledger: Ledger, labels: Tensor, aligned: Tensor) -> None:
    """A parameter whose axes are not the channels' own stays as it is."""
    untold = bool((core(labels) < 0).any())
    for dim in varying(aligned):
        if labels.shape[dim] == aligned.shape[dim]:
            ledger.pin(aligned, "meets channels that stay", doubtful=untold)
        else:
            ledger.pin(labels, "one channel is broadcast over several")


def _weights_meet(ledger: Ledger, a: Value, b: Value, shape: Sequence[int]) -> tuple[Tensor, ...]:
    layers = [_rank(layer, len(shape)) for layer in a.layers]
    for layer in (_rank(layer, len(shape)) for layer in b.layers):
        dims = varying(layer)
        twins = [own for own in layers if varying(own) == dims]
        if twins and dims:
            ledger.tie(core(twins[0]).expand(core(layer).shape), core(layer))
        elif dims:
            layers.append(layer)
    return tuple(layer.expand(shape) for layer in layers)


# -- moving data --------------------------------------------------------------------------------------


def movement(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    """Run the op itself on the labels."""
    value = values_in([list(args), kwargs])[0]
    runs = [_run(node, args, kwargs, layer) for layer in value.layers]
    if value.weight:
        _pin_stated(ledger, node, value, args, runs)
    if isinstance(meta, Tensor):
        _single_channel(ledger, value, runs)
        moved = tuple(collapse(run) for run in runs)
        return Value(moved, meta, weight=value.weight, computed=value.computed)
    pieces = zip(meta, zip(*runs, strict=True), strict=True)
    outputs = [
        Value(tuple(collapse(p) for p in piece), m, weight=value.weight, computed=value.computed)
        for m, piece in pieces
    ]
    for output in outputs:
        _single_channel(ledger, value, output.layers)
    return outputs


def _run(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], layer: Tensor) -> Any:
    """The op on one layer; other tensors among its arguments are constants."""

    def labels_or_number(a: Any, first: bool = False) -> Any:
        if isinstance(a, Value):
            return layer if first else a.real if a.real is not None else a.meta.new_empty(a.meta.shape)
        return [labels_or_number(x) for x in a] if isinstance(a, list | tuple) else a

    moved = [labels_or_number(a, i == 0) for i, a in enumerate(args)]
    if short_name(node) in ("view", "_unsafe_view"):  # labels have strides of their own
        return moved[0].reshape(moved[1])
    return node.target(*moved, **{k: labels_or_number(v) for k, v in kwargs.items()})  # type: ignore[operator]


def _pin_stated(
    ledger: Ledger, node: fx.Node, value: Value, args: Sequence[Any], runs: Sequence[Any]
) -> None:
    """Surgery rewrites the sizes of a moved parameter along one of its axes; the others keep theirs."""
    name = short_name(node)
    pairs = [pair for pair in zip(value.layers, runs, strict=True) if varying(pair[0])]
    pairs.sort(key=lambda pair: not ledger.living(pair[0]))
    for layer, run in pairs[1:]:
        pieces = [collapse(piece) for piece in ([run] if isinstance(run, Tensor) else run)]
        if name in ("view", "reshape", "_unsafe_view", "expand", "broadcast_to"):
            stated = any(args[1][dim] != -1 for dim in varying(pieces[0]))
        else:
            whole = core(layer).numel()
            stated = any(len(varying(piece)) != 1 or core(piece).numel() != whole for piece in pieces)
        if stated:
            ledger.pin(layer, f"{name} of a parameter states its size", doubtful=True)


def _single_channel(ledger: Ledger, value: Value, runs: Iterable[Tensor]) -> None:
    """A channel taken out by its index, or spread over a new dimension, stays."""
    if value.weight:
        return
    for run in runs:
        if varying(value.labels) and not varying(run):
            ledger.pin(run, "one channel is taken out by its index")


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _expand(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    value: Value = args[0]
    if not value.weight and not varying(value.labels):
        ledger.pin(value.labels, "one channel is broadcast over several")
    moved: Value = movement(ledger, node, args, kwargs, meta)
    return moved


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _cat(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    """Concatenation moves labels; along another axis than the channels' the pieces are tied."""
    name = short_name(node)
    pieces = [as_activation(ledger, v) for v in values_in([list(args), kwargs])]
    pieces = [p for p in pieces if p.numel()]  # an empty piece adds nothing
    dim = args[1] if len(args) > 1 else kwargs.get("dim", min(meta.dim() - 1, 1) if name == "hstack" else 0)
    dim %= meta.dim()
    if name == "stack":
        pieces = [p.unsqueeze(dim) for p in pieces]
    if any(set(varying(p)) - {dim} for p in pieces):
        if not any(dim in varying(p) for p in pieces):
            for a, b in pairwise(pieces):
                ledger.tie(*_broadcast(core(a), core(b)))
            return result(pieces[0].narrow(dim, 0, 1).expand(meta.shape), meta)
        for piece in pieces:
            ledger.pin(piece, "concatenated along two axes of channels", doubtful=True)
    common = [max(core(p).shape[d] for p in pieces) for d in range(meta.dim())]
    thin = [
        p[tuple(slice(None) if d == dim else slice(0, common[d]) for d in range(p.dim()))] for p in pieces
    ]
    return result(torch.cat(thin, dim).expand(meta.shape), meta)


def as_activation(ledger: Ledger, value: Value) -> Tensor:
    """One layer of labels for any value; a parameter has one if its channels lie along one axis."""
    if not value.weight:
        return value.labels
    layers = [layer for layer in value.layers if varying(layer)]
    if len(layers) == 1:
        return layers[0]
    ledger.pin_value(value, "a parameter is joined with activations")
    return torch.zeros((), dtype=torch.int64).expand(value.meta.shape)


@rule("constant_pad_nd", "pad")
def _pad(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    """Padding along channels makes channels that nothing writes; elsewhere it changes nothing."""
    labels = args[0].labels
    amounts = args[1]
    full = [*args, None]
    mode = kwargs.get("mode", full[2] if short_name(node) == "pad" else None) or "constant"
    for back in range(len(amounts) // 2):
        dim = labels.dim() - 1 - back
        left, right = amounts[2 * back], amounts[2 * back + 1]
        if dim not in varying(labels):
            shape = list(labels.shape)
            shape[dim] += left + right
            labels = labels.narrow(dim, 0, 1).expand(shape)
        elif mode != "constant" and (left or right):
            ledger.pin(labels, f"{mode} padding copies channels")
            return fixed(meta)
        elif min(left, right) < 0:
            ledger.pin(labels, "padding takes channels away")
            return fixed(meta)
        else:
            labels = _grow(ledger, labels, dim, left, right)
    return result(labels.expand(meta.shape), meta)


def _grow(ledger: Ledger, labels: Tensor, dim: int, left: int, right: int) -> Tensor:
    """Labels with new channels before and behind those along `dim`."""
    small = core(labels)
    parts = [small]
    for count, name in ((left, "left"), (right, "right")):
        shape = [count if d == dim else size for d, size in enumerate(small.shape)]
        numbers = ledger.issue(int(np.prod(shape)), f"{name} of {dim}").reshape(shape)
        parts = [numbers, *parts] if name == "left" else [*parts, numbers]
    shape = [size + (left + right if d == dim else 0) for d, size in enumerate(labels.shape)]
    return torch.cat(parts, dim).expand(shape)


@rule("index")
def _index(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    """Indexing with constants moves data; channels may be picked by one list of indices."""
    value: Value = args[0]
    given = [(dim, v) for dim, v in enumerate(args[1]) if v is not None]
    if any(v.real is None for _, v in given):
        return unknown(ledger, node, args, kwargs, meta)
    hit = {dim + i for dim, v in given for i in range(max(v.meta.dim(), 1))} & set(varying(value.labels))
    if hit and not value.weight and (len(given) > 1 or given[0][1].meta.dim() != 1):
        ledger.pin(value.labels, "channels are indexed together with another axis")
    return movement(ledger, node, args, kwargs, meta)


@rule("roll")
def _roll(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    """Channels may be rolled by themselves."""
    value: Value = args[0]
    dims = [dim % meta.dim() for dim in args[2]] if len(args) > 2 else []
    if len(dims) != 1 and (not dims or set(dims) & set(varying(value.labels))):
        ledger.pin(value.labels, "channels are rolled together with another axis")
    return movement(ledger, node, args, kwargs, meta)


@rule("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")
def _create(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    """A constant made in the graph: of an activation's shape, so with its channels, or of one in the code."""
    if short_name(node).endswith("_like"):
        like: Value = args[0]
        if not like.weight and varying(like.labels):
            return result(like.labels, meta)
        ledger.pin_value(like, f"{short_name(node)} makes a constant of its shape")
    numbers = [torch.empty(a.meta.shape, dtype=a.meta.dtype) if isinstance(a, Value) else a for a in args]
    real = node.target(*numbers, **{k: v for k, v in kwargs.items() if k != "device"})  # type: ignore[operator]
    return fixed(meta, real)
