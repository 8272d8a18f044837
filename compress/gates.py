"""Gates: factors of one where an activation, not a weight, reads the channels of another.

A query's dimensions are read by the key's: no weight has columns for them. A gate, a tensor of ones that
multiplies one factor of such a product, takes the place of those columns: zeroing its slices removes the
dimension, and its gradient is the importance (Molchanov et al., CVPR 2019, section 3.1).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from compress.labels import short_name
from compress.ports import behind
from compress.product_rules import GATE, letters
from compress.rounds import shapes
from compress.trace import GraphNet, Traced, placeholders

PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "einsum")


def with_gates(traced: Traced) -> Traced:
    """The traced model with a gate on the first factor of every product of activations.

    The parameters are shared with `traced`; the gates are buffers, scored but never trained.
    """
    known = shapes(traced)
    graph = copy.deepcopy(traced.net.graph)
    net = GraphNet(traced.net, graph)
    net.eval()
    moving = behind(graph, placeholders(net))
    for node in [n for n in graph.nodes if n.op == "call_function" and short_name(n) in PRODUCTS]:
        first, second, dim = _summed(node, known)
        if first in moving and second in moving and dim is not None:
            _insert(
                net, node, first, torch.ones((known[first.name][dim], *[1] * (-1 - dim)), requires_grad=True)
            )
    net.recompile()
    return replace(traced, net=net)


def _summed(node: fx.Node, known: dict[str, tuple[int, ...]]) -> tuple[fx.Node, Any, int | None]:
    """The two factors, and the dimension of the first that is summed over (from the end; None: several)."""
    arguments: Any = node.args
    if short_name(node) != "einsum":
        return arguments[0], arguments[1], -1
    factors = arguments[1]
    terms = letters(arguments[0], [len(known[f.name]) for f in factors], len(known[node.name]))
    if terms is None:
        return factors[0], factors[-1], None
    summed = [i for i, x in enumerate(terms[0]) if x in terms[1] and x not in terms[2]]
    return factors[0], factors[1], summed[0] - len(terms[0]) if len(summed) == 1 else None


def _insert(net: GraphNet, node: fx.Node, factor: fx.Node, ones: torch.Tensor) -> None:
    name = f"{GATE}{node.name}"
    net.register_buffer(name, ones)
    with net.graph.inserting_before(node):
        product = net.graph.call_function(torch.ops.aten.mul.Tensor, (factor, net.graph.get_attr(name)))
    product.meta = dict(node.meta, switch=False)
    arguments: Any = node.args
    if short_name(node) == "einsum":
        node.update_arg(1, [product, *arguments[1][1:]])
    else:
        node.update_arg(0, product)
