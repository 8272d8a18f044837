"""Cut the channels out: a keep mask and a traced model in, a physically smaller model out.

Two products of one plan: a dense `GraphNet` (any graph), and the user's own `nn.Module` sliced in place.
Both are compared with the masked model, in which the removed units' reading slices are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from compress.channelmap import SIZED, ChannelMap, restored_by
from compress.errors import ModelError
from compress.labels import along, collapse, core, short_name, varying, vector
from compress.plan import Plan, make_plan
from compress.trace import GraphNet, get_tensor, put_tensor, tied

aten = torch.ops.aten


def mask(net: nn.Module, cmap: ChannelMap, keep: np.ndarray) -> None:
    """Zero, in place, every slice that reads a removed unit: exact whatever the activation in between."""
    with torch.no_grad():
        for name, dim in sorted(cmap.reads):
            units = cmap.axes[name, dim]
            gone = np.flatnonzero((units >= 0) & ~keep[units])
            if gone.size:
                tensor = get_tensor(net, name)
                tensor.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)


def cut(net: GraphNet, cmap: ChannelMap, keep: np.ndarray) -> tuple[GraphNet, Plan]:
    """A dense copy of `net` without the removed units, and the plan that made it.

    keep: bool (units,). The copy has the same parameter names, mode and device. Raises ModelError
    naming op and source line where a graph would become impossible.
    """
    small = copy.deepcopy(net)
    stays = np.append(keep, True)[cmap.unit_of_label]  # -1 picks the appended True
    surgeon = _Surgeon(small, cmap, torch.from_numpy(stays))
    surgeon.rewrite()
    plan = make_plan(cmap, keep, surgeon.groups, surgeon.hard_coded)
    slice_tensors(small, plan)
    small.graph.lint()
    small.recompile()
    return small, plan


def slice_tensors(module: nn.Module, plan: Plan, aliases: Sequence[tuple[str, str]] = ()) -> None:
    """Replace every tensor of the plan by its kept slices; parameters stay parameters."""
    canonical = dict(aliases)
    names = dict.fromkeys(name for name, _ in plan.axes)
    sliced = {}
    for name in names:
        tensor = get_tensor(module, name)
        small = select_slices(tensor.detach(), name, plan).clone()
        if isinstance(tensor, nn.Parameter):
            small = nn.Parameter(small, requires_grad=tensor.requires_grad)
        sliced[name] = small
        put_tensor(module, name, small)
    for alias, name in canonical.items():
        if name in sliced:
            put_tensor(module, alias, sliced[name])


def select_slices(tensor: Tensor, name: str, plan: Plan) -> Tensor:
    """The kept slices of the tensor `name` (or of anything of its shape, such as its momentum)."""
    for (owner, dim), kept in plan.axes.items():
        if owner == name:
            tensor = tensor.index_select(dim, torch.tensor(kept, device=tensor.device))
    return tensor


def carry_state(state: Mapping[str, Mapping[str, Any]], plan: Plan) -> dict[str, dict[str, Any]]:
    """A copy of optimizer state by parameter name, sliced like the parameters; scalars stay as they are."""

    def carry(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fits = tuple(value.shape) == plan.shapes.get(name)
        return select_slices(value, name, plan).clone() if fits else value.clone()

    return {name: {k: carry(name, v) for k, v in entry.items()} for name, entry in state.items()}


# -- the graph ----------------------------------------------------------------------------------------


class _Surgeon:
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
            if node.args != before and short_name(node) in SIZED:
                self.hard_coded.append(node.meta.get("source", ""))

    def labels(self, node: Any) -> Any:
        return self.nodes[node.name]

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
        self._gather(node, origin, dim, vector(positions, dim))
        for step in reversed(stretch[:-1]):
            if not step.users:
                self.net.graph.erase_node(step)
        return True

    def _gather(self, node: fx.Node, origin: fx.Node, dim: int, positions: Tensor | None) -> None:
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


def _rewrite_sizes(position: int) -> Callable[[_Surgeon, fx.Node], None]:
    """Ops that state the sizes of their result as a list at argument `position`."""

    def apply(surgeon: _Surgeon, node: fx.Node) -> None:
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


def _rewrite_split(surgeon: _Surgeon, node: fx.Node) -> None:
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


def _along_channels(surgeon: _Surgeon, node: fx.Node, dim: int) -> Tensor | None:
    """Labels of the source along `dim`, if channels lie there and some of them go."""
    labels = surgeon.labels(node.args[0])
    if not surgeon.changed(labels) or dim % labels.dim() not in varying(labels):
        return None
    return vector(labels, dim)


def _rewrite_slice(surgeon: _Surgeon, node: fx.Node) -> None:
    arguments: Any = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
    source, dim, start, end, step = arguments
    before = _along_channels(surgeon, node, dim)
    if before is None:
        return
    if step != 1:
        rank = surgeon.labels(node).dim()
        surgeon._gather(node, source, dim % rank, torch.arange(len(before))[slice(start, end, step)])
        return
    first, last, _ = slice(start, end).indices(len(before))
    node.args = (
        source,
        dim,
        int(surgeon.stays[before[:first]].sum()),
        int(surgeon.stays[before[:last]].sum()),
    )


def _rewrite_narrow(surgeon: _Surgeon, node: fx.Node) -> None:
    arguments: Any = node.args
    source, dim, start, length = arguments
    before = _along_channels(surgeon, node, dim)
    if before is not None:
        kept = int(surgeon.stays[before[start : start + length]].sum())
        node.args = (source, dim, int(surgeon.stays[before[:start]].sum()), kept)


def _rewrite_select(surgeon: _Surgeon, node: fx.Node) -> None:
    arguments: Any = node.args
    before = _along_channels(surgeon, node, arguments[1])
    if before is not None:
        node.update_arg(2, int(surgeon.stays[before[: arguments[2] % len(before)]].sum()))


def _rewrite_pad(surgeon: _Surgeon, node: fx.Node) -> None:
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


def _rewrite_conv(surgeon: _Surgeon, node: fx.Node) -> None:
    """A depthwise conv has as many groups as channels."""
    groups = node.args[6] if len(node.args) > 6 else 1
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    channels = surgeon.labels(node.args[0])
    if groups == 1 or groups != channels.shape[1] or not surgeon.changed(channels):
        return
    kept = surgeon.kept(channels, 1)
    surgeon.groups[str(weight.target)] = kept
    node.update_arg(6, kept)


def _rewrite_moved(surgeon: _Surgeon, node: fx.Node) -> None:
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
        surgeon._gather(node, source, dim, vector(positions, dim))


def _moves_along(node: fx.Node, dim: int, rank: int) -> bool:
    """Whether one of the ops of `_rewrite_moved` moves data along `dim`."""
    arguments: Any = node.args
    name = short_name(node)
    if name == "index":
        return dim < len(arguments[1]) and arguments[1][dim] is not None
    if name == "roll":
        return dim in [d % rank for d in arguments[2]]
    return dim == (arguments[1] % rank if name == "index_select" else 1)


def _number(surgeon: _Surgeon, node: fx.Node) -> Any:
    """What a node that depends on no input computes; sizes as traced."""
    if node.op == "get_attr":
        return get_tensor(surgeon.net, str(node.target))
    if not isinstance(surgeon.nodes[node.name], Tensor | list):
        return surgeon.nodes[node.name]
    arguments, named = fx.map_arg((surgeon.arguments[node], node.kwargs), lambda n: _number(surgeon, n))
    return node.target(*arguments, **named)  # type: ignore[operator]


def _rewrite_squeeze(surgeon: _Surgeon, node: fx.Node) -> None:
    """Only the axes that had size 1 in the traced model go, not one that is cut to size 1."""
    arguments: Any = [*node.args, None]
    if not surgeon.changed(surgeon.labels(arguments[0])):
        return
    shape = surgeon.labels(arguments[0]).shape
    given = range(len(shape)) if arguments[1] is None else arguments[1]
    dims = [d % len(shape) for d in ([given] if isinstance(given, int) else given)]
    node.target, node.kwargs = aten.squeeze.dims, {}
    node.args = (arguments[0], [d for d in dims if shape[d] == 1])


REWRITES: dict[str, Callable[[_Surgeon, fx.Node], None]] = {
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
    **dict.fromkeys(("index_select", "index", "roll", "channel_shuffle"), _rewrite_moved),
}
"""What each op's integer arguments become; every other op carries no sizes of channels."""


# -- the user's own module ------------------------------------------------------------------------------


def apply_plan(plan: Plan, module: nn.Module) -> nn.Module:
    """Slice a fresh instance of the user's model in place, and return it.

    Raises ModelError, before anything is changed, when a tensor of the plan is missing or has another
    shape, or when the plan changes a size that is written into the model's Python code (the line is
    named): make the plan with `in_place=True` then, or use the dense graph.
    """
    if plan.hard_coded:
        raise ModelError(
            "the plan changes a size that is written into the model's code",
            where=plan.hard_coded[0],
            fix="prune with in_place=True, or use the dense graph instead of the module",
        )
    for name, shape in plan.shapes.items():
        try:
            found = tuple(get_tensor(module, name).shape)
        except AttributeError:
            if name.rpartition(".")[2].startswith(("lifted_tensor", "_tensor_constant")):
                continue  # a constant of the trace; no plan cuts it
            raise ModelError(
                f"the plan is for another model: {type(module).__name__} has no {name}",
                fix="give the model it was made for",
            ) from None
        if found != shape:
            raise ModelError(
                f"the plan is for another model: {name} has shape {list(found)}, not {list(shape)}",
                fix="apply a plan once, to a fresh instance",
            )
    slice_tensors(module, plan, tied(module))
    for path, child in module.named_modules():
        _restate_sizes(child, plan.groups.get(f"{path}.weight"))
    return module


def _restate_sizes(module: nn.Module, groups: int | None) -> None:
    """The sizes that a layer remembers, from its weight's shape."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.groups = groups or module.groups
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


# -- proof ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """The dense model against the masked one, and how far the mask moved the output.

    relative_error: max |masked - dense| / max |masked|. movement: max |unmasked - masked| / max |unmasked|.

    passed: the error is within tolerance and the mask moved the output at least 1,000 times as far
    (or nothing was removed, and the error is 0).
    """

    relative_error: float
    movement: float
    dtype: str
    tolerance: float
    passed: bool


def verify(
    original: nn.Module,
    masked: nn.Module,
    dense: nn.Module,
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-5,
) -> Verification:
    """Compare the dense model with the masked one in eval mode, and the masked with the unmasked.

    The models are copied, cast to `dtype` and left as they were.
    """
    cast = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    a, b, c = (_outputs(model, cast, dtype) for model in (original, masked, dense))
    movement, error = relative_error(a, b), relative_error(b, c)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (original, dense)]
    vacuous = movement == 0 and sizes[1] < sizes[0]
    exact = error <= tolerance and movement >= 1000 * error and not vacuous
    return Verification(error, movement, str(dtype).removeprefix("torch."), tolerance, exact)


def relative_error(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """max |a - b| / max |a| over all outputs; infinite where shapes differ or a number is not finite."""
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            return float("inf")
        if a.is_floating_point() and a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst


def _outputs(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    ready = copy.deepcopy(model).to(dtype).eval()
    with torch.no_grad():
        found = ready(*inputs)
    leaves = torch.utils._pytree.tree_leaves(found)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
