"""The rules of layers: normalisation, pooling, reductions, contractions (see `compress.rules`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from compress.labels import Ledger, Rule, Value, Writer, along, axis, fixed, short_name, varying, vector
from compress.rules import fixed_like, multiply_adds, pointwise, result, rule, unknown, values_in

# -- per channel --------------------------------------------------------------------------------------


@rule("batch_norm", "instance_norm")
def _batch_norm(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Value:
    """Statistics and affine parameters follow their channel."""
    value: Value = args[0]
    own = vector(value.labels, 1)
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
    """Removing a channel changes the statistics of the others: not exact, so it stays."""
    value: Value = args[0]
    last = range(meta.dim() - len(args[1]), meta.dim())
    if any(d in last for d in varying(value.labels)):
        ledger.pin(value.labels, f"{short_name(node)} takes its statistics over the channels")
    return result(value.labels, meta)


@rule("group_norm")
def _group_norm(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Value:
    ledger.pin(args[0].labels, "group_norm takes its statistics over the channels of a group")
    return result(args[0].labels, meta)


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
            layer = torch.zeros((), dtype=torch.int64).expand(layer.shape)
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


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "glu")
def _along_dim(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Value:
    value: Value = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    if dim % value.meta.dim() in varying(value.labels):
        ledger.pin(value.labels, f"{short_name(node)} runs over the channels")
    return result(value.labels, meta) if value.meta.shape == meta.shape else fixed(meta)


# -- contractions -------------------------------------------------------------------------------------


@rule("linear")
def _linear(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return _dense(ledger, node, args, args[0], args[1], (1, 0), bias, meta)


@rule("matmul", "mm")
def _matmul(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    """Activation times weight is a linear layer; two activations are attention's business."""
    a, b = args[0], args[1]
    if b.weight and not a.weight and b.meta.dim() == 2:
        return _dense(ledger, node, args, a, b, (0, 1), None, meta)
    return unknown(ledger, node, args, kwargs, meta)


@rule("addmm")
def _addmm(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    bias, a, b = args[0], args[1], args[2]
    if b.weight and not a.weight and bias.weight and bias.meta.dim() == 1:
        return _dense(ledger, node, args, a, b, (0, 1), bias, meta)
    return unknown(ledger, node, args, kwargs, meta)


def _dense(
    ledger: Ledger,
    node: fx.Node,
    args: Sequence[Any],
    x: Value,
    weight: Value,
    dims: tuple[int, int],
    bias: Value | None,
    meta: Tensor,
) -> Value:
    """out[..., o] = sum_i x[..., i] weight[i, o]; dims: the weight's (input, output) dimensions."""
    macs = multiply_adds(node, args, {})
    if not weight.weight or x.weight:
        ledger.pin_value(x, "its weight is computed from activations")
        ledger.pin_value(weight, "its weight is computed from activations")
        ledger.cost("linear", "", macs)
        return fixed(meta)
    columns, rows = axis(weight, dims[0]), axis(weight, dims[1])
    _read(ledger, vector(x.labels, -1), x, columns, weight)
    _write(ledger, rows, bias, weight, dims[1])
    ledger.cost("linear", weight.name, macs, rows, columns)
    return result(along(rows, meta.dim() - 1, meta.shape), meta)


def _read(ledger: Ledger, own: Tensor | None, x: Value, columns: Tensor, weight: Value) -> None:
    if weight.computed:
        ledger.pin(
            x.labels, "read by columns that are computed: zeroing their parameter would not remove them"
        )
        ledger.pin(columns, "its columns are computed: zeroing their parameter would not remove them")
    elif own is None:
        ledger.pin(x.labels, "read along two axes of channels")
        ledger.pin(columns, "read along two axes of channels")
    else:
        ledger.tie(own, columns)
        ledger.reading(columns)


def _write(ledger: Ledger, rows: Tensor, bias: Value | None, weight: Value, dim: int) -> None:
    ledger.produce(rows)
    if weight.name and ledger.node is not None:
        ledger.writers[ledger.node] = Writer((weight.name, dim), bias.name if bias is not None else "")
    if bias is not None:
        ledger.tie(rows, axis(bias, bias.meta.dim() - 1))


@rule("conv1d", "conv2d", "conv3d")
def _conv(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Value:
    full = [*args, *[None] * (7 - len(args))]
    bias = kwargs.get("bias", full[2])
    groups = kwargs.get("groups", full[6] or 1)
    macs = multiply_adds(node, args, kwargs)
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
    if not weight.weight or x.weight:
        ledger.pin_value(x, "its weight is computed from activations")
        ledger.pin_value(weight, "its weight is computed from activations")
        ledger.cost(kind, "", macs)
        return fixed(meta)
    own, rows, columns = vector(x.labels, 1), axis(weight, 0), axis(weight, 1)
    if groups > 1 and own is None:
        ledger.pin(x.labels, "read along two axes of channels")
        own = torch.zeros(x.meta.shape[1], dtype=torch.int64)
    if groups == 1:
        _read(ledger, own, x, columns, weight)
        _write(ledger, rows, bias, weight, 0)
    elif len(columns) == 1:
        assert own is not None
        ledger.tie(own.repeat_interleave(len(rows) // groups), rows)
        if bias is not None:
            ledger.tie(rows, axis(bias, 0))
    else:
        # The same offset leaves every group, so that the groups stay equal and the conv stays dense.
        assert own is not None
        _read(ledger, own.reshape(groups, -1), x, columns.expand(groups, -1), weight)
        _write(ledger, rows, bias, weight, 0)
        by_group = rows.reshape(groups, -1)
        ledger.tie(by_group[:1].expand_as(by_group), by_group)
    ledger.cost(kind if groups == 1 else f"{kind} groups", weight.name, macs, rows, columns)
    return result(along(rows, 1, meta.shape), meta)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any
) -> Any:
    full = [*args, *[None] * (8 - len(args))]
    x, weight, bias = full[0], full[1], kwargs.get("bias", full[2])
    if kwargs.get("groups", full[6] or 1) != 1 or not weight.weight:
        return unknown(ledger, node, args, kwargs, meta)
    columns, rows = axis(weight, 0), axis(weight, 1)
    _read(ledger, vector(x.labels, 1), x, columns, weight)
    _write(ledger, rows, bias, weight, 1)
    ledger.cost(short_name(node), weight.name, multiply_adds(node, args, kwargs), rows, columns)
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
