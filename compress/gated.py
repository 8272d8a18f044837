"""Explicit gates: a factor of one on every unit, for each example its own.

`compress.importance` finds the sum of a gate's gradients over a minibatch from the parameters alone, which
is all that pruning needs. What asks for more than that sum (gradients of single examples, second
derivatives, logits, the loss with a unit switched off) needs the gates themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compress.channelmap import ChannelMap
from compress.errors import ModelError
from compress.folding import from_parameters, upstream
from compress.importance import Side
from compress.labels import core, short_name, varying
from compress.ports import behind
from compress.trace import GraphNet, get_tensor, placeholders


class Gated(nn.Module):
    """A traced network in which the gates of a call, (examples, units), multiply the units' channels.

    side "read": where a contraction reads them, so that a gate of 0 is exactly what `mask` and surgery do.
    side "write": behind the contraction that writes them, or the batch norm right behind it (the paper's
    place). It shares its parameters with the net, and is called like it: the gates are `gates`, or ones that
    take gradients; `used` are those of the last call.

    Raises ModelError (exit 4) where channels lie along the batch.
    """

    def __init__(self, net: GraphNet, cmap: ChannelMap, side: Side = "read") -> None:
        super().__init__()
        graph = copy.deepcopy(net.graph)
        self.units, self.structure = cmap.units, net.graph._codegen.pytree_info  # type: ignore[attr-defined]
        graph.set_codegen(fx.graph.CodeGen())
        with graph.inserting_before(next(iter(graph.nodes))):
            gates = graph.placeholder("unit_gates")
        gates.meta = {"module": "", "source": "", "switch": False}
        self.net = GraphNet(net, graph)
        places = _readers(graph, cmap) if side == "read" else _writers(graph, cmap)
        for node, users in list(places):
            self._insert(gates, node, users, cmap)
        self.net.recompile()
        self.net.train(net.training)
        self.gates: Tensor | None = None
        self.used: Tensor | None = None

    def _insert(self, gates: fx.Node, node: fx.Node, users: list[fx.Node], cmap: ChannelMap) -> None:
        labels = cmap.nodes[node.name]
        if 0 in varying(labels):
            what = "channels lie along the batch, where no gate can stand"
            raise ModelError(
                what, node.meta.get("source", ""), "use a criterion that needs no explicit gates"
            )
        units = torch.from_numpy(cmap.unit_of_label[core(labels)[0].numpy()])
        name = f"_units_{node.name}"
        self.net.register_buffer(name, units, persistent=False)
        with self.net.graph.inserting_after(node):
            table = self.net.graph.get_attr(name)
        with self.net.graph.inserting_after(table):
            product = self.net.graph.call_function(_multiplied, (node, gates, table))
        for new in (table, product):
            new.meta = dict(node.meta, switch=False)
        for user in users:
            user.replace_input_with(node, product)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = pytree.tree_leaves((args, kwargs))
        like = next(p for p in self.net.parameters())
        self.used = self.gates
        if self.used is None:
            shape = (len(flat[0]), self.units)
            self.used = torch.ones(shape, dtype=like.dtype, device=like.device, requires_grad=True)
        return pytree.tree_unflatten(self.net(self.used, *flat), self.structure.out_spec)

    @contextmanager
    def at(self, gates: Tensor) -> Iterator[None]:
        """Within, calls use these gates, (examples, units)."""
        before, self.gates = self.gates, gates
        try:
            yield
        finally:
            self.gates = before


class Replay:
    """A forward pass of a gated network that is remembered, and done again with units switched off.

    Only the nodes behind a unit's gates are computed again. inputs: (n, ...), the one input of the net.
    """

    def __init__(self, gated: Gated, inputs: Tensor) -> None:
        self.graph, self.net, self.count = gated.net.graph, gated.net, len(inputs)
        self.structure = gated.structure
        gates, given = placeholders(self.net)
        ones = torch.ones((len(inputs), gated.units), dtype=inputs.dtype, device=inputs.device)
        self.gates, self.moving = gates, behind(self.graph, [given, gates])
        self.known: dict[fx.Node, Any] = {gates: ones, given: inputs}
        self.result = self._run([n for n in self.graph.nodes if n not in self.known], self.known, 1)
        self.products = {
            node: set(self.known[node.args[2]].flatten().tolist())
            for node in self.graph.nodes
            if node.target is _multiplied
        }

    def without(self, sets: Tensor) -> Any:
        """The net's result without each of these sets of units, int64 (k, units in each): (k * n, ...)."""
        k, off = len(sets), set(sets.flatten().tolist())
        gates = self.known[self.gates].repeat(k, 1).reshape(k, self.count, -1)
        gates[torch.arange(k)[:, None], :, sets] = 0
        first = {node for node, own in self.products.items() if own & off}
        again = behind(self.graph, first)
        return self._run([n for n in self.graph.nodes if n in again], {self.gates: gates.flatten(0, 1)}, k)

    def _run(self, nodes: list[fx.Node], values: dict[fx.Node, Any], k: int) -> Any:
        """Compute these nodes; what is not in `values` is as it was, k times where it has the batch."""

        def value(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            before = self.known[node]
            if k == 1 or node not in self.moving:
                return before
            return pytree.tree_map(lambda x: self._repeated(x, k), before)

        for node in nodes:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
            if node.op == "output":
                return pytree.tree_unflatten(pytree.tree_leaves(args[0]), self.structure.out_spec)
            if node.op == "get_attr":
                values[node] = get_tensor(self.net, str(node.target))
                continue
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:  # it must not write into what is remembered
                args = pytree.tree_map_only(Tensor, torch.clone, args)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return pytree.tree_map(lambda x: self._repeated(x, k), self.result)  # nothing reads these units

    def _repeated(self, x: Any, k: int) -> Any:
        """What has the batch, k times over: tensors along dimension 0, and its size as a number."""
        if isinstance(x, Tensor) and x.dim():
            return x.repeat(k, *[1] * (x.dim() - 1))
        return x * k if isinstance(x, int) else x


def _multiplied(x: Tensor, gates: Tensor, units: Tensor) -> Tensor:
    """x times the gates of its channels. units: for every channel its unit, -1 where there is none."""
    if x.shape[0] % gates.shape[0]:
        raise ModelError(f"the batch of {gates.shape[0]} is not the first dimension of {list(x.shape)}")
    product: Tensor = _Product.apply(x, gates, units)
    return product


class _Product(torch.autograd.Function):
    """The product of activations and gates; its backward pass saves what is known where all gates are one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, units: Tensor) -> Tensor:
        ctx.ones = bool((gates == 1).all())
        ctx.save_for_backward(x, gates, units)
        return x * _spread(gates, units, len(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gates, units = ctx.saved_tensors
        again = torch.is_grad_enabled()  # a second derivative is to come, by the gates too
        to_x = grad if ctx.ones and not again else grad * _spread(gates, units, len(x))
        still = [d for d in range(1, x.dim()) if units.shape[d - 1] == 1]
        sums = (x * grad).sum(still, keepdim=True) if still else x * grad
        sums = sums.reshape(len(gates), -1, units.numel()).sum(1)
        to_gates = sums.new_zeros(len(gates), gates.shape[1] + 1)
        to_gates = to_gates.index_add(1, units.flatten() % to_gates.shape[1], sums)  # -1 goes to the last
        return to_x, to_gates[:, :-1], None


def _spread(gates: Tensor, units: Tensor, rows: int) -> Tensor:
    """The gate of every channel, for `rows` of a batch, (rows, *units.shape)."""
    every = torch.cat([gates, gates.new_ones(len(gates), 1)], dim=1)[:, units]
    if rows != len(gates):  # windows or frames of one example lie behind each other
        every = every.repeat_interleave(rows // len(gates), dim=0)
    return every


def _readers(graph: fx.Graph, cmap: ChannelMap) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Every activation with units that a contraction reads, and the contractions."""
    still = from_parameters(graph)
    read = {name for name, _ in cmap.reads}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in still or node.op != "call_function":
            continue
        weights = [w for w in node.all_input_nodes if w in still]
        if not any(str(n.target) in read for w in weights for n in upstream(w) if n.op == "get_attr"):
            continue
        for source in node.all_input_nodes:
            if source not in still and _has_units(source, cmap):
                found.setdefault(source, []).append(node)
    yield from found.items()


def _writers(graph: fx.Graph, cmap: ChannelMap) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Every result with units of a contraction, or of the batch norm right behind it."""
    weights = {writer.weight[0]: writer for writer in cmap.writers}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        names = [str(i.target) for i in node.all_input_nodes if i.op == "get_attr"]
        writer = next((weights[name] for name in names if name in weights), None)
        if writer is None or writer.weight not in cmap.axes:
            continue
        last = next(iter(node.users)) if writer.gamma else node
        if short_name(last) in ("batch_norm", "instance_norm") or not writer.gamma:
            yield last, list(last.users)


def _has_units(node: fx.Node, cmap: ChannelMap) -> bool:
    labels = cmap.nodes.get(node.name)
    return isinstance(labels, Tensor) and bool((cmap.unit_of_label[core(labels).numpy()] >= 0).any())
