"""The rules of layers: normalisation, pooling, reductions, contractions (see `compress.rules`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from compress.labels import (
    Ledger,
    Rule,
    Value,
    Writer,
    along,
    axis,
    core,
    fixed,
    short_name,
    varying,
    vector,
)
from compress.rules import (
    as_activation,
    fixed_like,
    multiply_adds,
    pointwise,
    result,
    rule,
    unknown,
    values_in,
)

# -- per channel --------------------------------------------------------------------------------------


@rule("batch_norm", "instance_norm")
def _batch_norm(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Value:
    """Statistics and affine parameters follow their channel."""
    value: Value = args[0]
    own = vector(value.labels, 1)
    if varying(value.labels) == [0]:  # heads, laid out along the batch
        return result(value.labels, meta)
    if own is None and 0 in varying(value.labels):
        ledger.pin(value.labels, "heads are laid out along the batch")
        return result(value.labels, meta)
    if own is None and 1 in varying(value.labels):
        split_rows(ledger, value.labels, 1)
        return result(value.labels, meta)
    if own is None:
        ledger.pin(value.labels, "normalised over an axis of channels")
        return result(value.labels, meta)
    for parameter in values_in(list(args[1:5])):
        ledger.tie(own, axis(parameter, 0))
    writer = ledger.writers.get(node.args[0])  # type: ignore[arg-type]
    if writer is not None and args[1] is not None and len(node.args[0].users) == 1:  # type: ignore[union-attr]
        beta = args[2].name if args[2] is not None else ""
        ledger.writers[node.args[0]] = replace(writer, gamma=args[1].name, beta=beta)  # type: ignore[index]
    return result(value.labels, meta)


@rule("prelu", "_prelu_kernel")
def _prelu(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    value, slope = args[0], args[1]
    if slope.meta.numel() > 1:
        own = vector(value.labels, 1)
        if own is None:
            ledger.pin(value.labels, "prelu over an axis of channels")
        else:
            ledger.tie(own, axis(slope, 0) if slope.meta.dim() == 1 else axis(slope, 1))
    return result(value.labels, meta)


@rule("layer_norm", "rms_norm")
def _layer_norm(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Value:
    """Removing a channel changes the statistics of the others: not exact, so it stays unless asked for."""
    value: Value = args[0]
    labels, why = value.labels, f"{short_name(node)} takes its statistics over the channels"
    last = range(meta.dim() - len(args[1]), meta.dim())
    if not set(varying(labels)) & set(last):
        return result(labels, meta)
    own = vector(labels, -1) if len(args[1]) == 1 else None
    if own is None or not ledger.granularity.inexact_norms:
        ledger.pin(labels, why)
        return result(labels, meta)
    for parameter in values_in([*args[2:4], *kwargs.values()]):
        ledger.tie(own, axis(parameter, 0))
    ledger.bend(own, why)
    return result(labels, meta)


@rule("group_norm")
def _group_norm(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Value:
    """Statistics are taken over a group, so a whole group may leave: that changes no other."""
    value: Value = args[0]
    groups, own = args[1], vector(value.labels, 1)
    if own is None or groups == 1:
        ledger.pin(value.labels, "group_norm takes its statistics over the channels of a group")
        return result(value.labels, meta)
    by_group = own.reshape(groups, -1)
    ledger.tie(by_group[:, :1].expand_as(by_group), by_group)
    for parameter in values_in([*args[2:4], *kwargs.values()]):
        ledger.tie(own, axis(parameter, 0))
    return result(value.labels, meta)


def _spatial(dims: int) -> Rule:
    """Ops that work inside each channel over the last `dims` dimensions."""

    def apply(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
        labels = args[0].labels
        if any(d >= labels.dim() - dims for d in varying(labels)):
            ledger.pin(labels, f"{short_name(node)} runs over an axis of channels")
            return fixed_like(meta)
        front = labels[(..., *[slice(0, 1)] * dims)]
        metas = meta if isinstance(meta, list | tuple) else [meta]
        found = [result(front.expand(m.shape), m) for m in metas]
        return found if isinstance(meta, list | tuple) else found[0]

    return apply


for _dims in (1, 2, 3):
    rule(
        f"max_pool{_dims}d",
        f"avg_pool{_dims}d",
        f"adaptive_avg_pool{_dims}d",
        f"adaptive_max_pool{_dims}d",
        f"max_pool{_dims}d_with_indices",
        f"reflection_pad{_dims}d",
        f"replication_pad{_dims}d",
    )(_spatial(_dims))
rule("upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact1d")(_spatial(1))
rule(
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)(_spatial(2))
rule("upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact3d")(_spatial(3))


# -- reductions ---------------------------------------------------------------------------------------


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "prod",
    "any",
    "all",
    "var",
    "std",
    "argmax",
    "argmin",
    "logsumexp",
    "nansum",
    "linalg_vector_norm",
)
def _reduce(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    """Reducing over other axes keeps the labels; over the channels' own axis it pins them."""
    value: Value = args[0]
    if len(args) > 1 and isinstance(args[1], Value):  # max(a, b) and min(a, b) are element-wise
        return pointwise(ledger, node, args, kwargs, meta)
    position = 2 if short_name(node) == "linalg_vector_norm" else 1
    given = args[position] if len(args) > position else kwargs.get("dim")
    dims = (
        range(value.meta.dim())
        if given is None or given == []
        else [given]
        if isinstance(given, int)
        else given
    )
    reduced = {d % max(value.meta.dim(), 1) for d in dims}
    layers = []
    for layer in value.layers:
        if reduced & set(varying(layer)):
            ledger.pin(layer, f"{short_name(node)} runs over the channels")
            told = 0 if len(varying(layer)) == 1 else -1
            layer = torch.full((), told).expand(layer.shape)
        layers.append(layer)
    single = isinstance(meta, Tensor)
    first = meta if single else meta[0]
    keeps = first.dim() == value.meta.dim()
    index = tuple(
        (slice(0, 1) if keeps else 0) if d in reduced else slice(None) for d in range(value.meta.dim())
    )
    outputs = [
        Value(tuple(layer[index] for layer in layers), m, weight=value.weight, computed=value.weight)
        for m in ([meta] if single else meta)
    ]
    return outputs[0] if single else outputs


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum")
def _along_dim(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Value:
    value: Value = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    if dim % value.meta.dim() in varying(value.labels):
        ledger.pin(value.labels, f"{short_name(node)} runs over the channels")
    return result(value.labels, meta) if value.meta.shape == meta.shape else fixed(meta)


@rule("glu")
def _glu(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    """The second half of the channels gates the first: channel i leaves with channel i of the other half."""
    value: Value = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % value.meta.dim()
    first, second = value.labels.chunk(2, dim)
    ledger.tie(core(first), core(second))
    return result(first, meta)


# -- contractions -------------------------------------------------------------------------------------


@rule("linear")
def _linear(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return dense(ledger, node, args, args[0], args[1], (1, 0), bias, meta)


@rule("addmm")
def _addmm(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    bias, a, b = args[0], args[1], args[2]
    if b.weight and not a.weight and bias.weight and bias.meta.dim() == 1:
        return dense(ledger, node, args, a, b, (0, 1), bias, meta)
    return unknown(ledger, node, args, kwargs, meta)


def dense(
    ledger: Ledger,
    node: fx.Node,
    args: Sequence[Any],
    x: Value,
    weight: Value,
    dims: tuple[int, int],
    bias: Value | None,
    meta: Tensor,
    at: int = -1,
) -> Value:
    """out[..., o] = sum_i x[..., i] weight[i, o]; dims: the weight's (input, output) dimensions.

    at: the dimension of x and of the product that the weight works along.
    """
    at %= meta.dim()
    macs = multiply_adds(ledger, node, args, {})
    if not weight.weight:
        ledger.pin_value(x, "its weight is computed, not a parameter")
        ledger.pin_value(weight, "its weight is computed, not a parameter")
        ledger.cost("linear", "", macs)
        return fixed(meta)
    labels = as_activation(ledger, x)
    columns, rows = axis(weight, dims[0]), axis(weight, dims[1])
    _write(ledger, rows, bias, weight, dims[1])
    elsewhere = varying(labels)
    if elsewhere and at not in elsewhere:  # it mixes along another axis: a token mixer
        ledger.reading(columns)
        for own in (rows, columns):
            ledger.pin(own, "mixes along another axis than the channels'", doubtful=True)
        counts = [labels_of for d in elsewhere if (labels_of := vector(labels, d)) is not None]
        ledger.cost("linear", weight.name, macs, *(counts or [rows, columns]))
        return result(labels.narrow(at, 0, 1).expand(meta.shape), meta)
    _read(ledger, labels, at, columns, weight)
    ledger.cost("linear", weight.name, macs, rows, columns)
    return result(along(rows, at, meta.shape), meta)


def _read(
    ledger: Ledger, labels: Tensor, dim: int, columns: Tensor, weight: Value, own: Tensor | None = None
) -> None:
    """The weight's `columns` read the channels that lie along `dim`; own: in another order than there."""
    own = vector(labels, dim) if own is None else own
    ledger.reading(columns)
    if weight.computed:
        why = "read by columns that are computed: zeroing their parameter would not remove them"
        ledger.pin(labels, why)
        ledger.pin(columns, "its columns are computed: zeroing their parameter would not remove them")
    elif own is not None:
        ledger.tie(own, columns)
    else:
        split_rows(ledger, labels, dim)
        ledger.pin(columns, "read along two axes of channels", doubtful=True)


def split_rows(ledger: Ledger, labels: Tensor, dim: int) -> None:
    """Channels lie along `dim` and elsewhere: they can only leave `dim` in whole rows."""
    if dim % labels.dim() in varying(labels):
        ledger.whole_rows(labels, dim % labels.dim())
    ledger.pin(labels, "read along two axes of channels", doubtful=True)


def _write(
    ledger: Ledger, rows: Tensor, bias: Value | None, weight: Value, dim: int, *, follows: bool = False
) -> None:
    if not follows:
        ledger.produce(rows)
    if not follows and weight.name and ledger.node is not None:
        ledger.writers[ledger.node] = Writer((weight.name, dim), bias.name if bias is not None else "")
    if bias is not None:
        ledger.tie(rows, axis(bias, bias.meta.dim() - 1))


@rule("conv1d", "conv2d", "conv3d")
def _conv(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    full = [*args, *[None] * (7 - len(args))]
    bias = kwargs.get("bias", full[2])
    groups = kwargs.get("groups", full[6] or 1)
    macs = multiply_adds(ledger, node, args, kwargs)
    return _convolution(ledger, args[0], args[1], bias, groups, macs, meta, short_name(node))


def _convolution(
    ledger: Ledger,
    x: Value,
    weight: Value,
    bias: Value | None,
    groups: int,
    macs: float,
    meta: Tensor,
    kind: str,
) -> Value:
    if not weight.weight:
        ledger.pin_value(x, "its weight is computed, not a parameter")
        ledger.pin_value(weight, "its weight is computed, not a parameter")
        ledger.cost(kind, "", macs)
        return fixed(meta)
    labels = as_activation(ledger, x)
    own, rows, columns = vector(labels, 1), axis(weight, 0), axis(weight, 1)
    if 0 in varying(labels):
        return _shared_by_heads(ledger, labels, rows, columns, macs, meta, kind)
    whole = len(columns) == 1 or ledger.granularity.grouped_convs == "groups"
    if groups == 1:
        _read(ledger, labels, 1, columns, weight)
    elif own is None:
        split_rows(ledger, labels, 1)
        ledger.pin(rows, "read along two axes of channels", doubtful=True)
    elif whole:
        leaving = _whole_groups(ledger, own, groups)
        ledger.tie(leaving.repeat_interleave(len(rows) // groups), rows)
    else:
        # The same offset leaves every group, so that the groups stay equal and the conv stays dense.
        by_group = rows.reshape(groups, -1)
        across = own.reshape(groups, -1).T.reshape(-1)
        _read(ledger, labels, 1, columns.repeat_interleave(groups), weight, across)
        for offset in by_group[1:]:
            ledger.tie(by_group[0], offset)
    _write(ledger, rows, bias, weight, 0, follows=len(columns) == 1 < groups)
    ledger.cost(kind if groups == 1 else f"{kind} groups", weight.name, macs, rows, columns)
    return result(along(rows, 1, meta.shape), meta)


def _shared_by_heads(
    ledger: Ledger, labels: Tensor, rows: Tensor, columns: Tensor, macs: float, meta: Tensor, kind: str
) -> Value:
    """Heads are laid out along the batch: one weight works on all of them, and stays."""
    first = labels[(slice(None), *[slice(0, 1)] * (labels.dim() - 1))]
    small = core(labels)
    ledger.tie(core(first).expand(small.shape), small)
    ledger.produce(rows)
    for own in (rows, columns):
        ledger.pin(own, "all heads share it")
    heads = vector(first, 0)
    assert heads is not None
    ledger.cost(kind, "", macs, heads)
    return result(first.expand(meta.shape), meta)


def _whole_groups(ledger: Ledger, own: Tensor, groups: int) -> Tensor:
    """The channels of a group leave together; one label for each group, (groups,)."""
    by_group = own.reshape(groups, -1)
    for channel in by_group.T[1:]:
        ledger.tie(by_group[:, 0], channel)
    return by_group[:, 0]


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Any:
    """As a convolution, but the weight has (input, output / groups) as its first dimensions."""
    full = [*args, *[None] * (8 - len(args))]
    x, weight, bias, groups = (
        full[0],
        full[1],
        kwargs.get("bias", full[2]),
        kwargs.get("groups", full[6] or 1),
    )
    if not weight.weight:
        return unknown(ledger, node, args, kwargs, meta)
    labels = as_activation(ledger, x)
    own, columns, rows = vector(labels, 1), axis(weight, 0), axis(weight, 1)
    _read(ledger, labels, 1, columns, weight)
    if groups == 1:
        _write(ledger, rows, bias, weight, 1)
    elif own is None:
        return fixed(meta)
    else:
        leaving = _whole_groups(ledger, own, groups)
        rows = leaving.repeat_interleave(len(rows))
        ledger.tie(rows, axis(bias, 0) if bias is not None else rows)
    ledger.cost(
        short_name(node),
        weight.name,
        multiply_adds(ledger, node, args, kwargs),
        *((rows, columns) if groups == 1 else (rows,)),
    )
    return result(along(rows, 1, meta.shape), meta)


@rule("embedding")
def _embedding(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Value:
    """A look-up writes the table's columns as channels."""
    ledger.pin_value(args[1], "one channel looks up several")
    columns = axis(args[0], 1)
    ledger.produce(columns)
    return result(along(columns, meta.dim() - 1, meta.shape), meta)
