"""The integers that a graph carries for sizes, rewritten for the channels that stay.

View sizes, split sizes, slices, pads, groups and normalized shapes follow from the labels of each node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from compress.channelmap import ChannelMap
from compress.errors import ModelError
from compress.labels import along, collapse, core, short_name, varying, vector
from compress.rounds import SIZED, restored_by
from compress.trace import GraphNet, get_tensor

aten = torch.ops.aten


class Surgeon:
    """Rewrites the integers that a graph carries for sizes, from the labels that stay."""

    def __init__(self, net: GraphNet, cmap: ChannelMap, stays: Tensor) -> None:
        self.net, self.stays = net, stays
        self.nodes = dict(cmap.nodes)
        self.groups: dict[str, int] = {}
        self.hard_coded: list[str] = []
        self.arguments = {node: node.args for node in net.graph.nodes}  # as traced, for replaying

    def rewrite(self) -> None:
        for node in list(self.net.graph.nodes):
            if node.op != "call_function" or node.name not in self.nodes:
                continue
            if self._restored(node):
                continue
            handler = REWRITES.get(short_name(node))
            before = node.args
            if handler is not None:
                handler(self, node)
            if node.args != before and (short_name(node) in SIZED or self._splits(node)):
                self.hard_coded.append(node.meta.get("source", ""))

    def labels(self, node: Any) -> Any:
        return self.nodes[node.name]

    def _splits(self, node: fx.Node) -> bool:
        """Whether a view lays the channels of one dimension out over several."""
        if short_name(node) not in ("view", "reshape", "_unsafe_view", "unflatten"):
            return False
        before, after = (self.labels(n) for n in (node.args[0], node))
        if not isinstance(after, Tensor) or not isinstance(before, Tensor) or before.dim() >= after.dim():
            return False
        along_before, along_after = varying(before), varying(after)
        return [before.shape[d] for d in along_before] != [after.shape[d] for d in along_after]

    def kept(self, labels: Tensor, dim: int) -> int:
        """How many indices of `dim` stay; the labels must form a rectangle."""
        small = self.stays[core(labels)]
        if dim not in varying(labels):
            return labels.shape[dim]
        others = [d for d in range(small.dim()) if d != dim]
        return int(small.amax(dim=others).sum()) if others else int(small.sum())

    def rectangular(self, labels: Tensor) -> bool:
        small = self.stays[core(labels)]
        sizes = [self.kept(labels, d) if d in varying(labels) else 1 for d in range(labels.dim())]
        return int(small.sum()) == int(np.prod(sizes))

    def changed(self, labels: Any) -> bool:
        return isinstance(labels, Tensor) and not bool(self.stays[core(labels)].all())

    def _restored(self, node: fx.Node) -> bool:
        """Replace a channel shuffle whose blocks became unequal by one index_select."""
        found = restored_by(node, self.nodes) if self.changed(self.labels(node)) else None
        if found is None:
            return False
        origin, dim = found
        stretch = _stretch(node, origin)
        if all(self.rectangular(self.labels(n)) for n in stretch):
            return False
        positions = along(torch.arange(self.labels(origin).shape[dim]), dim, self.labels(origin).shape)
        for step in stretch:
            positions = _replay(step, self.arguments[step], positions, self.nodes)
        self.gather(node, origin, dim, vector(positions, dim))
        for step in reversed(stretch[:-1]):
            if not step.users:
                self.net.graph.erase_node(step)
        return True

    def gather(self, node: fx.Node, origin: fx.Node, dim: int, positions: Tensor | None) -> None:
        """node[..., j, ...] = origin[..., positions[j], ...] after the cut, for the j that stay."""
        before, after = vector(self.labels(origin), dim), vector(self.labels(node), dim)
        if positions is None or before is None or after is None:
            raise ModelError(f"{short_name(node)} cannot be cut", where=node.meta.get("source", ""))
        rank = self.stays[before].cumsum(0) - 1
        index = rank[positions[self.stays[after]]]
        name = f"_index_{node.name}"
        self.net.register_buffer(name, index)
        graph = self.net.graph
        with graph.inserting_before(node):
            table = graph.get_attr(name)
            chosen = graph.call_function(aten.index_select.default, (origin, dim, table))
        chosen.meta = dict(node.meta)
        self.nodes[chosen.name] = self.labels(node)
        node.replace_all_uses_with(chosen)
        graph.erase_node(node)
        self.hard_coded.append(node.meta.get("source", ""))


def _stretch(node: fx.Node, origin: fx.Node) -> list[fx.Node]:
    """The nodes after `origin` up to `node`, in order."""
    steps = [node]
    while steps[0].args[0] is not origin:
        before = steps[0].args[0]
        assert isinstance(before, fx.Node)
        steps.insert(0, before)
    return steps


def _replay(step: fx.Node, traced: Sequence[Any], positions: Tensor, nodes: Mapping[str, Any]) -> Tensor:
    """Run one data-moving node, with its traced arguments, on positions instead of numbers."""
    arguments = fx.map_arg(tuple(traced[1:]), lambda n: nodes[n.name])
    if short_name(step) in ("view", "_unsafe_view"):
        return collapse(positions.reshape(arguments[0]))
    return collapse(step.target(positions, *arguments, **step.kwargs))  # type: ignore[operator]


def _rewrite_sizes(position: int) -> Callable[[Surgeon, fx.Node], None]:
    """Ops that state the sizes of their result as a list at argument `position`."""

    def apply(surgeon: Surgeon, node: fx.Node) -> None:
        labels = surgeon.labels(node)
        if not surgeon.changed(labels):
            return
        sizes = list(node.args[position])  # type: ignore[arg-type]
        first = (
            labels.dim() - len(sizes)
            if short_name(node) != "unflatten"
            else _unflatten_dim(node, labels, sizes)
        )
        for i, size in enumerate(sizes):
            new = surgeon.kept(labels, first + i)
            if new != labels.shape[first + i]:
                sizes[i] = new if isinstance(size, int) and size != -1 else -1
        opened = sum(isinstance(size, int) and size == -1 for size in sizes)
        if opened > 1 and short_name(node) not in ("expand", "broadcast_to"):
            # Only one size may be left open: the symbolic one that changed, so the other one is told.
            given: Any = node.args[position]
            open_before = given.index(-1)
            sizes[open_before] = surgeon.kept(labels, first + open_before)
        node.update_arg(position, sizes)

    return apply


def _unflatten_dim(node: fx.Node, labels: Tensor, sizes: Sequence[Any]) -> int:
    dim = node.args[1]
    assert isinstance(dim, int)
    return dim if dim >= 0 else labels.dim() - len(sizes) + 1 + dim


def _rewrite_split(surgeon: Surgeon, node: fx.Node) -> None:
    pieces = surgeon.labels(node)
    if not any(surgeon.changed(p) for p in pieces):
        return
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    sizes = [surgeon.kept(p, dim % p.dim()) for p in pieces]
    if 0 in sizes:
        raise ModelError(f"{short_name(node)} would return an empty part", where=node.meta.get("source", ""))
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _along_channels(surgeon: Surgeon, node: fx.Node, dim: int) -> Tensor | None:
    """Labels of the source along `dim`, if channels lie there and some of them go."""
    labels = surgeon.labels(node.args[0])
    if not surgeon.changed(labels) or dim % labels.dim() not in varying(labels):
        return None
    return vector(labels, dim)


def _rewrite_slice(surgeon: Surgeon, node: fx.Node) -> None:
    arguments: Any = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
    source, dim, start, end, step = arguments
    before = _along_channels(surgeon, node, dim)
    if before is None:
        return
    if step != 1:
        rank = surgeon.labels(node).dim()
        surgeon.gather(node, source, dim % rank, torch.arange(len(before))[slice(start, end, step)])
        return
    first, last, _ = slice(start, end).indices(len(before))
    node.args = (
        source,
        dim,
        int(surgeon.stays[before[:first]].sum()),
        int(surgeon.stays[before[:last]].sum()),
    )


def _rewrite_narrow(surgeon: Surgeon, node: fx.Node) -> None:
    arguments: Any = node.args
    source, dim, start, length = arguments
    before = _along_channels(surgeon, node, dim)
    if before is not None:
        kept = int(surgeon.stays[before[start : start + length]].sum())
        node.args = (source, dim, int(surgeon.stays[before[:start]].sum()), kept)


def _rewrite_select(surgeon: Surgeon, node: fx.Node) -> None:
    arguments: Any = node.args
    before = _along_channels(surgeon, node, arguments[1])
    if before is not None:
        node.update_arg(2, int(surgeon.stays[before[: arguments[2] % len(before)]].sum()))


def _rewrite_pad(surgeon: Surgeon, node: fx.Node) -> None:
    labels = surgeon.labels(node)
    if not surgeon.changed(labels):
        return
    arguments: Any = node.args
    amounts = list(arguments[1])
    for back in range(len(amounts) // 2):
        dim = labels.dim() - 1 - back
        left, right = amounts[2 * back : 2 * back + 2]
        after = vector(labels, dim)
        if dim in varying(labels) and after is not None:
            amounts[2 * back] = int(surgeon.stays[after[:left]].sum())
            amounts[2 * back + 1] = int(surgeon.stays[after[len(after) - right :]].sum()) if right else 0
    node.update_arg(1, amounts)


def _rewrite_conv(surgeon: Surgeon, node: fx.Node) -> None:
    """A depthwise conv has as many groups as channels; of others, whole groups may have left."""
    arguments: Any = node.args
    groups = arguments[6] if len(arguments) > 6 else 1
    rows = surgeon.labels(node)
    vec = vector(rows, 1)
    if groups == 1 or vec is None or not surgeon.changed(rows):  # None: heads along the batch share it
        return
    kept = int(surgeon.stays[vec].reshape(groups, -1).any(1).sum())
    if kept != groups:
        surgeon.groups[str(arguments[1].target)] = kept
        node.update_arg(6, kept)


def _rewrite_cat(surgeon: Surgeon, node: fx.Node) -> None:
    """An empty piece adds nothing, but its other sizes would have to fit."""
    pieces: Any = node.args[0]
    node.update_arg(0, [piece for piece in pieces if surgeon.labels(piece).numel()])


def _rewrite_group_norm(surgeon: Surgeon, node: fx.Node) -> None:
    vec = vector(surgeon.labels(node), 1)
    groups: Any = node.args[1]
    if vec is None or not surgeon.changed(surgeon.labels(node)):
        return
    kept = int(surgeon.stays[vec].reshape(groups, -1).any(1).sum())
    parameters = [n for n in node.all_input_nodes if n.op == "get_attr"]
    surgeon.groups |= {str(n.target): kept for n in parameters[:1]}
    node.update_arg(1, kept)


def _rewrite_normalized_shape(surgeon: Surgeon, node: fx.Node) -> None:
    labels = surgeon.labels(node)
    if surgeon.changed(labels):
        shape: Any = node.args[1]
        node.update_arg(1, [surgeon.kept(labels, labels.dim() - len(shape) + i) for i in range(len(shape))])


def _rewrite_attention(surgeon: Surgeon, node: fx.Node) -> None:
    """Its scale follows from the width of a head: state the original one where that width changes."""
    query: Any = node.args[0]
    labels = surgeon.labels(query)
    if node.kwargs.get("scale") is None and surgeon.kept(labels, labels.dim() - 1) != labels.shape[-1]:
        node.update_kwarg("scale", labels.shape[-1] ** -0.5)


def _rewrite_moved(surgeon: Surgeon, node: fx.Node) -> None:
    """Constant indices along the channels become one index_select."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    labels = surgeon.labels(source)
    if not surgeon.changed(labels) or len(varying(labels)) != 1:
        return
    dim = varying(labels)[0]
    if not _moves_along(node, dim, labels.dim()):
        return
    straight = along(torch.arange(labels.shape[dim]), dim, labels.shape)
    constants = {n.name: _number(surgeon, n) for n in node.all_input_nodes if n is not source}
    positions = _replay(node, node.args, straight, constants)
    if positions.dim() != labels.dim() or vector(positions, dim) is None:
        raise ModelError(
            f"{short_name(node)} moves channels to another axis", where=node.meta.get("source", "")
        )
    if varying(positions) == [dim]:
        surgeon.gather(node, source, dim, vector(positions, dim))


def _moves_along(node: fx.Node, dim: int, rank: int) -> bool:
    """Whether one of the ops of `_rewrite_moved` moves data along `dim`."""
    arguments: Any = node.args
    name = short_name(node)
    if name == "index":
        return dim < len(arguments[1]) and arguments[1][dim] is not None
    if name == "roll":
        return dim in [d % rank for d in arguments[2]]
    return dim == (arguments[1] % rank if name == "index_select" else 1)


def _number(surgeon: Surgeon, node: fx.Node) -> Any:
    """What a node that depends on no input computes; sizes as traced."""
    if node.op == "get_attr":
        return get_tensor(surgeon.net, str(node.target))
    if not isinstance(surgeon.nodes[node.name], Tensor | list):
        return surgeon.nodes[node.name]
    arguments, named = fx.map_arg((surgeon.arguments[node], node.kwargs), lambda n: _number(surgeon, n))
    return node.target(*arguments, **named)  # type: ignore[operator]


def _rewrite_squeeze(surgeon: Surgeon, node: fx.Node) -> None:
    """Only the axes that had size 1 in the traced model go, not one that is cut to size 1."""
    arguments: Any = [*node.args, None]
    if not surgeon.changed(surgeon.labels(arguments[0])):
        return
    shape = surgeon.labels(arguments[0]).shape
    given = range(len(shape)) if arguments[1] is None else arguments[1]
    dims = [d % len(shape) for d in ([given] if isinstance(given, int) else given)]
    node.target, node.kwargs = aten.squeeze.dims, {}
    node.args = (arguments[0], [d for d in dims if shape[d] == 1])


REWRITES: dict[str, Callable[[Surgeon, fx.Node], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _rewrite_sizes(1)),
    "unflatten": _rewrite_sizes(2),
    "squeeze": _rewrite_squeeze,
    **dict.fromkeys(
        ("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split"), _rewrite_split
    ),
    "slice": _rewrite_slice,
    "narrow": _rewrite_narrow,
    "select": _rewrite_select,
    **dict.fromkeys(("constant_pad_nd", "pad"), _rewrite_pad),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _rewrite_conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _rewrite_conv),
    **dict.fromkeys(("cat", "concat", "concatenate"), _rewrite_cat),
    "group_norm": _rewrite_group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _rewrite_normalized_shape),
    "scaled_dot_product_attention": _rewrite_attention,
    **dict.fromkeys(("index_select", "index", "roll", "channel_shuffle"), _rewrite_moved),
}
"""What each op's integer arguments become; every other op carries no sizes of channels."""
