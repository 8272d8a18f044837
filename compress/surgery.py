"""Cut the channels out: a keep mask and a traced model in, a physically smaller model out.

Two products of one plan: a dense `GraphNet` (any graph), and the user's own `nn.Module` sliced in place.
Both are compared with the masked model, in which the removed units' reading slices are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.channelmap import ChannelMap
from compress.errors import ModelError
from compress.folding import is_computed
from compress.plan import Plan, make_plan
from compress.product_rules import is_gated
from compress.proof import Verification, relative_error, verify
from compress.rewrites import Surgeon
from compress.trace import GraphNet, get_tensor, put_tensor, tied


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
    small = _without_gates(copy.deepcopy(net))
    stays = np.append(keep, True)[cmap.unit_of_label]  # -1 picks the appended True
    surgeon = Surgeon(small, cmap, torch.from_numpy(stays))
    surgeon.rewrite()
    plan = make_plan(cmap, keep, surgeon.groups, surgeon.hard_coded)
    slice_tensors(small, plan)
    small.graph.lint()
    small.recompile()
    return small, plan


def _without_gates(net: GraphNet) -> GraphNet:
    """A dense network needs none: the gates that stay are ones."""
    for node in [n for n in net.graph.nodes if n.op == "call_function" and is_gated(n)]:
        node.replace_all_uses_with(node.args[0])
        gate = node.args[1]
        net.graph.erase_node(node)
        net.graph.erase_node(gate)
        delattr(net, str(gate.target))
    return net


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
        if is_computed(module, name):
            raise ModelError(
                f"{name} is a plain weight in the plan, and the model computes it",
                fix="use the dense graph, or take the computation off first "
                "(torch.nn.utils.parametrize.remove_parametrizations)",
            )
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
        module.groups = groups or module.groups
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.groups = groups or module.groups
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = groups or module.num_groups, weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


__all__ = [
    "Verification",
    "apply_plan",
    "carry_state",
    "cut",
    "mask",
    "relative_error",
    "select_slices",
    "slice_tensors",
    "verify",
]
