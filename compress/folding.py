"""Weights that a model computes from its parameters become plain parameters.

Weight norm, spectral norm, weight standardisation, low-rank factors: zeroing a column of such a parameter
does not remove a channel, and cutting one changes the statistics of a whole row. The computed weight itself
can be scored, zeroed and cut like any other, and the network computes the same numbers with it. It then
trains as a plain weight, without what computed it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.labels import short_name
from compress.ports import before
from compress.rules import MOVEMENT, ZERO_STAYS_ZERO
from compress.trace import GraphNet, Traced, get_tensor, put_tensor

READS_WEIGHT = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), 1),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1),
    "embedding": 0,
}
"""Op -> position of its weight."""


def folded(traced: Traced) -> Traced:
    """The traced model with computed weights as parameters, which its `folded` names.

    A weight is called `MODULE.weight`, or `MODULE.folded_weight` where the model has a tensor of that name.
    Weights with dropout, or other switches between training and evaluation, stay computed. All other
    parameters are shared with `traced`, which is left as it is.
    """
    graph = copy.deepcopy(traced.net.graph)
    net = GraphNet(traced.net, graph)
    net.eval()
    still = from_parameters(graph)
    made: dict[Any, str] = {}  # how it is computed -> its name: a module used twice keeps one weight
    origins: dict[str, tuple[str, ...]] = {}
    for node in list(graph.nodes):
        position = READS_WEIGHT.get(short_name(node)) if node.op == "call_function" else None
        if position is None or node in still or not isinstance(node.args[position], fx.Node):
            continue
        weight: Any = node.args[position]
        recipe = _recipe(weight) if weight in still else None
        if recipe is None:
            continue
        if recipe not in made:
            names = tuple(dict.fromkeys(str(n.target) for n in upstream(weight) if n.op == "get_attr"))
            name = made[recipe] = _free_name(traced.net, node.meta["module"])
            trains = any(get_tensor(net, n).requires_grad for n in names)
            put_tensor(net, name, nn.Parameter(_value(net, weight, {}), requires_grad=trains))
            origins[name] = names
        with graph.inserting_before(node):
            plain = graph.get_attr(made[recipe])
        plain.meta = dict(node.meta, switch=False)
        node.update_arg(position, plain)
    if not made:
        return traced
    for node in reversed(list(graph.nodes)):
        if node in still and not node.users:
            graph.erase_node(node)
    slim = GraphNet(net, graph)  # with only the tensors that are still read
    slim.eval()
    return replace(traced, net=slim, folded=tuple(origins.items()))


def from_parameters(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values no input of the model reaches, and that are the same in both modes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op == "call_function" and not node.meta.get("switch")
        if node.op == "get_attr" or (computed and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def upstream(node: fx.Node) -> list[fx.Node]:
    """The node and all that it is computed from, in the order of the graph."""
    found = before([node])
    return [n for n in node.graph.nodes if n in found]


def _recipe(weight: fx.Node) -> Any:
    """How a weight is computed, equal for equal computations; None where that is only moved or scaled."""
    steps = [n for n in upstream(weight) if n.op == "call_function"]
    plain = MOVEMENT | ZERO_STAYS_ZERO | {"getitem"}
    changes_others = any(getattr(getattr(s.target, "_schema", None), "is_mutable", False) for s in steps)
    if changes_others or all(short_name(step) in plain for step in steps):
        return None

    told: dict[fx.Node, Any] = {}
    for number, node in enumerate(upstream(weight)):
        given = fx.map_arg((node.args, dict(node.kwargs)), lambda n: str(told[n][0]))
        told[node] = (number, str(node.target), str(given))
    return tuple(told.values())


def _value(net: nn.Module, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What a node computes from the parameters as they are, detached."""
    if node not in known:
        if node.op == "get_attr":
            known[node] = get_tensor(net, str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _value(net, n, known))
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    found = known[node]
    return found.detach().clone() if isinstance(found, Tensor) else found


def _free_name(net: nn.Module, module: str) -> str:
    """MODULE.weight, or the first of MODULE.folded_weight, folded_weight_2, ... that is not taken."""
    prefix, number = f"{module}." if module else "", 1
    name = f"{prefix}weight"
    taken = {key for key, _ in (*net.named_parameters(), *net.named_buffers())}
    while name in taken:
        name = f"{prefix}folded_weight" + (f"_{number}" if number > 1 else "")
        number += 1
    return name


def is_computed(model: nn.Module, name: str) -> bool:
    """Whether the user's model computes the weight that a folded graph calls `name`."""
    path, _, last = name.rpartition(".")
    if last.startswith("folded_weight"):
        return True
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return False
    by_hook = bool(owner._forward_pre_hooks) and last not in owner._parameters and last not in owner._buffers
    return parametrize.is_parametrized(owner, last) or (by_hook and hasattr(owner, last))
