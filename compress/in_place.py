"""The user's own module cut in place: tried on a narrow cut before training, run once more afterwards.

A traced graph holds the same number for `x.view(-1, 16 * 5 * 5)` as for `x.view(-1, c * h * w)`, and only
the second follows a cut. So the module itself runs with sliced tensors, beside the graph that is cut alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compress.channelmap import ChannelMap
from compress.errors import ModelError
from compress.labels import short_name
from compress.part_trace import Arguments, buffers_kept, run, same
from compress.parts import Whole
from compress.plan import Plan
from compress.surgery import apply_plan, cut
from compress.trace import GraphNet

TOLERANCE = 1e-3
"""Of the largest output: the module and the graph differ in the order of float32 sums, nothing else."""
_FIX = "prune without in_place=True and use the dense graph, or compute that size from a tensor's shape"
_RESTATED = frozenset(
    (
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("group_norm", "layer_norm", "rms_norm"),
    )
)
"""Ops whose sizes the layers of torch.nn remember, and are told anew when they are sliced."""


def pinned_by_code(
    cmap: ChannelMap, label: Callable[[Collection[str]], ChannelMap], whole: Whole, net: GraphNet
) -> ChannelMap:
    """The labels under which the user's module follows every cut.

    cmap: the labels of `net` so far; label: the same with the channels that the named nodes count pinned. One
    narrow cut is tried after the other; where the module fails, or computes something else, the sizes at that
    line stay. Raises ModelError (exit 4) naming the line where nothing at it can be kept.
    """
    counted: set[str] = set()
    example = of_three(whole)
    while cmap.units:
        dense, plan = cut(net, cmap, _narrow(cmap))
        fault = misfit(whole.model, plan, whole.built(dense), example)
        if fault is None:
            break
        found = _counting(net, dense, fault.where, counted)
        if not found:
            raise fault
        counted |= found
        cmap = label(counted)
    return cmap


def misfit(module: nn.Module, plan: Plan, dense: nn.Module, example: Arguments) -> ModelError | None:
    """Why the module, sliced by the plan, does not compute what the dense model does; None where it does.

    The module's tensors and sizes are as before afterwards.
    """
    with _restored(module):
        try:
            expected = run(dense, example)
            found = run(apply_plan(plan, module), example)
        except ModelError as error:
            return ModelError(f"does not follow the cut: {error.what}", error.where, _FIX)
    if same(expected, found, _close):
        return None
    return ModelError("does not follow the cut: it computes something else", type(module).__name__, _FIX)


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Inside, tensors and attributes may be replaced; afterwards the module has its own again."""
    before = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    try:
        with buffers_kept(module):
            yield
    finally:
        for owner, attributes, parameters, buffers in before:
            vars(owner).clear()
            vars(owner).update(attributes)
            owner._parameters.clear()
            owner._parameters.update(parameters)
            owner._buffers.clear()
            owner._buffers.update(buffers)


def of_three(whole: Whole) -> Arguments:
    """The example with a batch of three where the model takes it.

    Sizes are mostly powers of two: three times two channels does not fill a `view(-1, 400)`, which then
    fails at its own line, not behind it.
    """
    tensors = [x for x in pytree.tree_leaves(whole.example) if isinstance(x, Tensor)]
    sizes = {x.shape[0] if x.dim() else 0 for x in tensors}
    if len(sizes) != 1 or 0 in sizes:
        return whole.example
    rows = torch.arange(3) % sizes.pop()
    three: Arguments = pytree.tree_map_only(
        Tensor, lambda x: x.index_select(0, rows.to(x.device)), whole.example
    )
    try:
        with buffers_kept(whole.model):
            run(whole.model, three)
    except ModelError:
        return whole.example
    return three


def _narrow(cmap: ChannelMap) -> np.ndarray:
    """A keep mask, bool (units,): two to four units of every class, so that equal widths become unequal.

    Not one, where there are more: a `squeeze` that never met a single channel is no fault of the code.
    """
    keep = np.zeros(cmap.units, dtype=bool)
    for index, members in enumerate(cmap.members()):
        keep[members[: max(1, min(len(members) - 1, 2 + index % 3))]] = True
    return keep


def _counting(net: GraphNet, dense: GraphNet, where: str, known: Collection[str]) -> set[str]:
    """The nodes whose sizes the failing line counts: those rewritten at it, or last before it."""
    nodes = list(net.graph.nodes)
    line = where.partition(" in module ")[0]
    at = [i for i, node in enumerate(nodes) if line and node.meta.get("source") == line]
    end = at[-1] if at else len(nodes)
    small = {node.name: _numbers(node) for node in dense.graph.nodes}
    rewritten = [
        (node.meta.get("source") == line, short_name(node) not in _RESTATED, i)
        for i, node in enumerate(nodes)
        if i <= end and node.name not in known and small.get(node.name) != _numbers(node)
        and node.op == "call_function"
    ]  # fmt: skip
    if not rewritten:
        return set()
    blamed = nodes[max(rewritten)[2]]
    source = blamed.meta.get("source")
    alike = [n for n in nodes if n.op == "call_function" and short_name(n) == short_name(blamed)]
    return {n.name for n in alike if n is blamed or (source and n.meta.get("source") == source)}


def _numbers(node: fx.Node) -> tuple[Any, ...]:
    """The op and its plain arguments, without the tensors it works on."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return node.target, *(leaf for leaf in leaves if not isinstance(leaf, fx.Node))


def _close(a: Tensor, b: Tensor) -> bool:
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    finite = a[a.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)
