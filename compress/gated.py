"""Explicit gates: a factor of one on every unit, for each example its own.

`compress.importance` finds the sum of a gate's gradients over a minibatch from the parameters alone, which
is all that pruning needs. What asks for more than that sum (gradients of single examples, second
derivatives, logits, the loss with a unit switched off) needs the gates themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compress.channelmap import ChannelMap
from compress.errors import ModelError
from compress.folding import from_parameters, upstream
from compress.labels import core, short_name, varying
from compress.trace import GraphNet

Side = Literal["read", "write"]


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


def _multiplied(x: Tensor, gates: Tensor, units: Tensor) -> Tensor:
    """x times the gates of its channels. units: for every channel its unit, -1 where there is none."""
    if x.shape[0] % gates.shape[0]:
        raise ModelError(f"the batch of {gates.shape[0]} is not the first dimension of {list(x.shape)}")
    every = torch.cat([gates, gates.new_ones(len(gates), 1)], dim=1)[:, units]
    if x.shape[0] != gates.shape[0]:  # windows or frames of one example lie behind each other
        every = every.repeat_interleave(x.shape[0] // gates.shape[0], dim=0)
    return x * every


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
