"""Run a traced graph on labels, round after round, until what leaves together and what stays is settled.

The first round finds most ties. Where channels lie along two axes (heads and their dimensions, a channel
shuffle) the next round sees what the ties made of them, and what still cannot be told then leaves in
whole rows, or stays.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from compress import product_rules  # noqa: F401  # importing it registers the rules of layers and products
from compress.errors import ModelError
from compress.labels import Granularity, Ledger, Value, collapse, core, fixed, short_name, varying
from compress.names import first_line
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
_ORDERING = ("index", "index_select", "roll", "channel_shuffle")
_CREATORS = frozenset(("zeros", "ones", "full", "empty", "arange", "eye", "linspace", "scalar_tensor"))


def run(
    traced: Traced, keep: Sequence[str], in_place: bool, counted: Collection[str], granularity: Granularity
) -> tuple[Ledger, dict[fx.Node, Any], np.ndarray]:
    """What was found out, the value of every node, and the component of every label under the ties.

    Raises ModelError when an op cannot even be shaped (data-dependent output sizes).
    """
    ledger = Ledger(traced.example[0].shape[0], granularity)
    env = _round(ledger, traced)
    _pin_kept(ledger, keep)
    if in_place:
        _pin_sized(ledger, env, counted)
    component = _components(ledger)
    settled = not ledger.doubts and not ledger.rows
    while not settled or _settle(ledger, env, component):
        component = _components(ledger)
        called = _first_of_each(ledger, component)
        known = ledger.stands_for
        settled = known is not None and torch.equal(known, called[: len(known)])
        if not settled:
            produced = torch.from_numpy(flags(component, ledger.produced)[component])
            ledger.begin(called, produced)
            env = _round(ledger, traced)
    return ledger, env, component


def _round(ledger: Ledger, traced: Traced) -> dict[fx.Node, Any]:
    """Run the graph on labels once; the value of every node."""
    net = traced.net
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
    return env


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
    meta = ledger.once("shape", lambda: _shape(node, args, kwargs))
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
    except Exception as error:  # whatever an op raises
        what, fix = (
            "the size of its result depends on the data",
            "move it behind the exported part of the model",
        )
        if not isinstance(error, NotImplementedError) and "meta tensor" not in str(error):
            what, fix = f"fails on the example: {first_line(error)}", "check its dtype and shape"
        raise ModelError(f"{short_name(node)}: {what}", node.meta.get("source", ""), fix) from error


def shapes(traced: Traced) -> dict[str, tuple[int, ...]]:
    """The shape of every node's output on the traced example, where it is a tensor."""
    env = _round(Ledger(traced.example[0].shape[0]), traced)
    return {node.name: tuple(v.meta.shape) for node, v in env.items() if isinstance(v, Value)}


def _components(ledger: Ledger) -> np.ndarray:
    """Component of each label under the ties, by scipy; int32 (labels,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate(ledger.edges) if ledger.edges else np.empty((0, 2), dtype=np.int64)
    ones = np.ones(len(edges), dtype=np.int8)
    graph = coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(ledger.issued, ledger.issued))
    component: np.ndarray = connected_components(graph, directed=False)[1]
    return component


def flags(component: np.ndarray, groups: Iterable[np.ndarray]) -> np.ndarray:
    """Which components hold a label of the groups; bool (components,)."""
    flags = np.zeros(int(component.max(initial=0)) + 1, dtype=bool)
    for labels in groups:
        flags[component[labels.reshape(-1)]] = True
    return flags


def _first_of_each(ledger: Ledger, component: np.ndarray) -> Tensor:
    """For every label the first one tied to it, 0 where they stay; int64 (labels,)."""
    _, first = np.unique(component, return_index=True)
    called: np.ndarray = first[component]
    called[flags(component, (p.labels for p in ledger.pins))[component]] = 0
    return torch.from_numpy(called)


def labels_of(value: Any, ledger: Ledger | None = None) -> Any:
    """The labels of an activation, or the layer of a parameter that holds channels."""
    if isinstance(value, Value):
        layers = sorted(
            value.layers, key=lambda layer: not (varying(layer) and (not ledger or ledger.living(layer)))
        )
        return layers[0].clamp_min(0) if (core(layers[0]) < 0).any() else layers[0]
    return [labels_of(v, ledger) for v in value] if isinstance(value, list) else value


# -- what lies along two axes, or is counted in the code ---------------------------------------------------


def _settle(ledger: Ledger, env: dict[fx.Node, Any], component: np.ndarray) -> bool:
    """Once ties and pins are known, what is still in doubt leaves in whole rows or stays.

    Whether anything was decided; then another round has to tell what follows.
    """
    stays = flags(component, (p.labels for p in ledger.pins))
    stays[component[0]] = True
    nodes = {node.name: labels_of(value) for node, value in env.items()}
    sure, open_pins, ledger.doubts = len(ledger.pins), ledger.doubts, []
    _doubt_taken_apart(ledger, env, nodes, component)
    rows = [(n, e) for n, e in ledger.rows if (component[e[:, 0]] != component[e[:, 1]]).any()]
    rows = [(n, e) for n, e in rows if not stays[component[e]].all()]
    if rows:
        ledger.edges += [e for n, e in rows if n == min(rows, key=lambda row: row[0])[0]]
        return True
    for node in env:
        try:
            restored_by(node, nodes)
        except ValueError:
            ledger.node = node
            ledger.pin(nodes[node.name], f"{short_name(node)} merges channels in another shape")
    _pin_inseparable(ledger, env, component)
    found = open_pins + ledger.doubts + ledger.pins[sure:]
    found = [pin for pin in found if not stays[component[pin.labels]].all()]
    ledger.pins[sure:], ledger.doubts = found, []
    return bool(found)


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
            ledger.whole_rows(value.labels, _longest(value.labels), 1)


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


def _doubt_taken_apart(
    ledger: Ledger, env: dict[fx.Node, Any], nodes: dict[str, Any], component: np.ndarray
) -> None:
    """Channels split over two axes are merged again, or leave whole rows at a time, or stay."""
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
                ledger.whole_rows(nodes[suspect.name], _longest(collapse(together)), 2)


def _longest(labels: Tensor) -> int:
    return max(varying(labels), key=lambda d: (labels.shape[d], d))


def _is_split(labels: Any) -> bool:
    return isinstance(labels, Tensor) and len(varying(labels)) > 1


def _pin_inseparable(ledger: Ledger, env: dict[fx.Node, Any], component: np.ndarray) -> None:
    """Channels that leave only all at once would leave an axis empty."""
    for node in env:
        if node.op != "get_attr":
            continue
        ledger.node = next(iter(node.users), node)
        for dim in range(env[node].meta.dim()):
            labels = ledger.axes[str(node.target), dim]
            if len(labels) and (component[labels.start : labels.stop] == component[labels.start]).all():
                ledger.pin(
                    torch.arange(labels.start, labels.start + 1), "all leave together: nothing would remain"
                )


def _pin_kept(ledger: Ledger, keep: Sequence[str]) -> None:
    ledger.node = None
    for name in keep:
        for (owner, _), labels in ledger.axes.items():
            if owner == name:
                ledger.pin(torch.arange(labels.start, labels.stop), "kept on request")


def _pin_sized(ledger: Ledger, env: dict[fx.Node, Any], counted: Collection[str]) -> None:
    """Pin channels that splits, slices, padding, shuffles and the nodes `counted` count by code's numbers."""
    nodes = {node.name: labels_of(value) for node, value in env.items()}
    why = "its size is written into the model's code"
    for node in env:
        ledger.node = node
        found = nodes[node.name]
        if node.name in counted:
            ledger.pin(nodes[node.all_input_nodes[0].name], why, doubtful=False)
            ledger.pin(found, why, doubtful=False)
        shuffled = isinstance(found, Tensor) and len(varying(found)) > 1
        if short_name(node) in SIZED or (shuffled and _moves(node)):
            whole = env[node.args[0]].labels  # type: ignore[index]
            if shuffled or _cuts(whole, found) or (short_name(node) in _ORDERING and _reorders(whole, found)):
                for labels in (whole, *(found if isinstance(found, list) else [found])):
                    ledger.pin(labels, why, doubtful=False)


def _reorders(whole: Tensor, result: Any) -> bool:
    """Whether an op put channels in another order, by a table that is not cut with them."""
    return isinstance(result, Tensor) and not torch.equal(core(whole), core(result))


def _cuts(whole: Tensor, result: Any) -> bool:
    """Whether an op changed the number of channels along an axis in which they vary."""
    pieces = result if isinstance(result, list) else [result]
    return any(
        piece.dim() != whole.dim() or any(piece.shape[d] != whole.shape[d] for d in varying(whole))
        for piece in pieces
    )
