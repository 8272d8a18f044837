"""The rules of products of two activations: matmul, einsum, attention (see `compress.rules`).

A dimension that both factors and the product share, and along which channels lie, holds attention
heads: everything at one head's coordinate leaves together, however the model counts its heads. Or, by
`Granularity.attention`, the same dimensions leave every head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from compress.labels import Ledger, Value, collapse, core, short_name, varying, vector
from compress.layer_rules import dense
from compress.rules import as_activation, combine, result, rule, unknown, values_in

GATE = "_gate_"
"""Name of the tensors of ones that stand where one activation reads the channels of another."""


@dataclass(frozen=True)
class _Factor:
    """An operand: its labels, one letter per dimension, and whether it has been multiplied by a gate."""

    labels: Tensor
    letters: str
    gated: bool = False

    @property
    def moving(self) -> set[str]:
        """The letters along which the labels vary."""
        return {self.letters[d] for d in varying(self.labels)}

    def size(self, letter: str) -> int:
        return self.labels.shape[self.letters.index(letter)] if letter in self.letters else 1

    def along(self, letter: str) -> Tensor:
        """Labels along one letter, where they vary along no other."""
        found = vector(self.labels, self.letters.index(letter))
        assert found is not None
        return found

    def by(self, letters: str) -> Tensor:
        """The labels as a matrix: `letters` along its rows, the other varying dimensions along columns."""
        small = core(self.labels)
        first = [self.letters.index(x) for x in letters if x in self.letters]
        rest = [d for d in range(small.dim()) if d not in first]
        rows = prod(small.shape[d] for d in first)
        return small.permute(*first, *rest).reshape(rows, -1)


def contract(ledger: Ledger, a: _Factor, b: _Factor, out: str, meta: Tensor) -> Value:
    """The labels of sum(a * b) over the letters that are not in `out`."""
    shared = [x for x in out if x in a.letters and x in b.letters]
    heads = "".join(x for x in shared if x in a.moving | b.moving)
    sizes = {x: max(a.size(x), b.size(x)) for x in dict.fromkeys(a.letters + b.letters)}
    counts: list[Tensor] = []
    if heads and ledger.granularity.attention == "dims":
        a, b, heads = _every_head_alike(ledger, a, heads), _every_head_alike(ledger, b, heads), ""
    if heads:
        head = _whole_heads(ledger, a, b, heads)
        labels = head.reshape([sizes[x] if x in heads else 1 for x in out]).expand(meta.shape)
        counts = [head]
    else:
        counts += _contracted(ledger, a, b, out)
        labels, free = _free(ledger, a, b, out, meta)
        counts += free
    ledger.cost(_kind(ledger), "", float(prod(sizes.values())), *counts)
    return result(labels, meta)


def _kind(ledger: Ledger) -> str:
    assert ledger.node is not None
    return short_name(ledger.node)


def _whole_heads(ledger: Ledger, a: _Factor, b: _Factor, heads: str) -> Tensor:
    """Tie everything at one head's coordinate; one label per head, flat."""
    found: list[Tensor] = []
    count = prod(max(a.size(x), b.size(x)) for x in heads)
    for factor in (a, b):
        if not factor.moving & set(heads) and all(factor.size(x) == 1 for x in heads):
            ledger.pin(factor.labels, "all heads share it")
            continue
        matrix = factor.by(heads)
        matrix = matrix.expand(count, -1) if matrix.shape[0] == 1 else matrix
        if matrix.shape[0] != count:  # heads on two axes, along one of which a factor does not vary
            ledger.pin(factor.labels, "heads on two axes", doubtful=True)
            continue
        ledger.tie(matrix[:, :1].expand_as(matrix).reshape(-1), matrix.reshape(-1))
        found.append(matrix[:, 0])
    if len(found) == 2:
        ledger.tie(found[0], found[1])
    return found[0] if found else torch.zeros(count, dtype=torch.int64)


def _every_head_alike(ledger: Ledger, factor: _Factor, heads: str) -> _Factor:
    """Tie the same offset of all heads; the factor with labels that no longer vary over the heads."""
    if not factor.moving & set(heads):
        return factor
    if factor.moving <= set(heads):
        ledger.pin(factor.labels, "heads stay, as dimensions inside heads are pruned")
        return _Factor(torch.zeros_like(factor.labels), factor.letters, factor.gated)
    matrix = factor.by(heads)
    ledger.tie(matrix[:1].expand_as(matrix).reshape(-1), matrix.reshape(-1))
    labels = core(factor.labels)
    for letter in heads:
        labels = labels.narrow(factor.letters.index(letter), 0, 1)
    return _Factor(labels.expand(factor.labels.shape), factor.letters, factor.gated)


def _contracted(ledger: Ledger, a: _Factor, b: _Factor, out: str) -> list[Tensor]:
    """Channels that are summed over: the same index of both factors leaves together."""
    summed = {x for x in a.letters + b.letters if x not in out}
    pairs = [x for x in sorted(summed) if x in a.moving | b.moving]
    if not pairs:
        return []
    single = len(pairs) == 1 and all(f.moving <= {pairs[0]} for f in (a, b))
    if not single or not all(pairs[0] in f.letters for f in (a, b)):
        for factor in (a, b):
            if factor.moving & summed:
                ledger.pin(factor.labels, "summed over together with another axis of channels", doubtful=True)
        return []
    left, right = (vector(f.labels, f.letters.index(pairs[0])) for f in (a, b))
    assert left is not None
    assert right is not None
    ledger.tie(left, right)
    if not (a.gated or b.gated):
        ledger.pin(left, "read by another activation")
    return [left]


def _free(ledger: Ledger, a: _Factor, b: _Factor, out: str, meta: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The product's labels are those of the one factor whose channels are not summed over."""
    carriers = [f for f in (a, b) if f.moving & set(out)]
    if len(carriers) == 1 and len(carriers[0].moving) == 1:
        (letter,) = carriers[0].moving
        vec = carriers[0].along(letter)
        return vec.reshape([-1 if x == letter else 1 for x in out]).expand(meta.shape), [vec]
    for factor in carriers:
        ledger.pin(factor.labels, "multiplied with another axis of channels", doubtful=True)
    return torch.full((), -1 if carriers else 0).expand(meta.shape), []


# -- the ops ----------------------------------------------------------------------------------------------


def _factor(ledger: Ledger, value: Value, letters: str, node: Any) -> _Factor:
    return _Factor(as_activation(ledger, value), letters, isinstance(node, fx.Node) and is_gated(node))


def is_gated(node: fx.Node) -> bool:
    """Whether a node multiplies its input with a gate."""
    return any(i.op == "get_attr" and str(i.target).startswith(GATE) for i in node.all_input_nodes)


@rule("matmul", "mm", "bmm")
def _matmul(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    """A weight on either side makes a linear layer; two activations are contracted."""
    a, b = args[0], args[1]
    if b.weight and not a.weight and b.meta.dim() == 2:
        return dense(ledger, node, args, a, b, (0, 1), None, meta)
    if a.weight and not b.weight and a.meta.dim() == 2 and b.meta.dim() > 1:
        return dense(ledger, node, args, b, a, (1, 0), None, meta, at=-2)
    if min(a.meta.dim(), b.meta.dim()) < 2:
        return unknown(ledger, node, args, kwargs, meta)
    batch = "abcdefgh"[: meta.dim() - 2]
    left = _factor(ledger, a, batch[len(batch) + 2 - a.meta.dim() :] + "mk", node.args[0])
    right = _factor(ledger, b, batch[len(batch) + 2 - b.meta.dim() :] + "kn", node.args[1])
    return contract(ledger, left, right, batch + "mn", meta)


@rule("baddbmm")
def _baddbmm(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    left = _factor(ledger, args[1], "bmk", node.args[1])
    right = _factor(ledger, args[2], "bkn", node.args[2])
    return combine(ledger, contract(ledger, left, right, "bmn", meta), args[0])


@rule("einsum")
def _einsum(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    """Two factors, every letter once in each; anything else is left alone."""
    values = values_in([list(args)])
    terms = letters(args[0], [v.meta.dim() for v in values], meta.dim())
    if terms is None or len(values) != 2:
        return unknown(ledger, node, args, kwargs, meta)
    first, second, out = terms
    a, b = values
    nodes: Any = node.args[1]
    if a.weight and not b.weight:
        a, b, first, second, nodes = b, a, second, first, nodes[::-1]
    at = [d for d, (x, y) in enumerate(zip(first, out, strict=False)) if x != y]
    if b.weight and not a.weight and len(first) == len(out) and len(at) == 1:
        columns, rows = first[at[0]], out[at[0]]
        if sorted(second) == sorted(columns + rows):
            order = (second.index(columns), second.index(rows))
            return dense(ledger, node, args, a, b, order, None, meta, at[0])
    return contract(
        ledger, _factor(ledger, a, first, nodes[0]), _factor(ledger, b, second, nodes[1]), out, meta
    )


def letters(equation: str, ranks: Sequence[int], rank: int) -> tuple[str, ...] | None:
    """The letters of each factor and of the product; None for what `contract` does not know."""
    left, _, out = equation.replace(" ", "").partition("->")
    terms = [*left.split(","), out]
    spare = [x for x in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if x not in equation]
    found = []
    for term, size in zip(terms, [*ranks, rank], strict=True):
        dots = size - len(term.replace("...", ""))
        found.append(term.replace("...", "".join(spare[:dots][::-1])))
    repeated = any(len(set(term)) != len(term) for term in found)
    return None if repeated or "->" not in equation or len(found) != 3 else tuple(found)


def _repeated(labels: Tensor, times: int) -> Tensor:
    """Each head `times` times in a row."""
    shape = (*labels.shape[:-3], labels.shape[-3] * times, *labels.shape[-2:])
    small = core(labels)
    return (small.repeat_interleave(times, -3) if small.shape[-3] > 1 else small).expand(shape)


@rule("scaled_dot_product_attention")
def _attention(ledger: Ledger, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], meta: Any) -> Any:
    """softmax(q k^T + mask) v; with enable_gqa a group of query heads leaves with its key and value."""
    query, key, value = args[:3]
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    q, k, v = (as_activation(ledger, x) for x in (query, key, value))
    shared = k.shape[-3] if k.dim() > 2 else 1
    if kwargs.get("enable_gqa") and shared > 1:
        k, v = (_repeated(x, q.shape[-3] // shared) for x in (k, v))
    batch = "abcdefgh"[: meta.dim() - 2]
    named = {rank: batch[len(batch) + 2 - rank :] for rank in range(2, meta.dim() + 1)}
    left = _Factor(q, named[q.dim()] + "le", is_gated(node.args[0]))  # type: ignore[arg-type]
    right = _Factor(k, named[k.dim()] + "se")
    shape = torch.empty((*meta.shape[:-1], k.shape[-2]), device="meta")
    scores = contract(ledger, left, right, batch + "ls", shape)
    if isinstance(mask, Value):
        scores = combine(ledger, scores, mask)
    weights = _Factor(collapse(scores.labels), batch + "ls")
    return contract(ledger, weights, _Factor(v, named[v.dim()] + "sv"), batch + "lv", meta)
