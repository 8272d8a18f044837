"""What must hold for every random network, and what a check of it saw."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from helpers import (
    Cut,
    assert_costs,
    assert_exact,
    counted_macs,
    cut_at,
    outputs,
    parameter_count,
    random_keep,
    randomise,
)
from random_networks import Network, build, example_of
from torch import Tensor, fx, nn

from compress.channelmap import ChannelMap, channel_map
from compress.cost import class_counts, cost_model
from compress.folding import folded
from compress.gates import with_gates
from compress.labels import Granularity, core, short_name
from compress.plan import from_json
from compress.surgery import apply_plan, cut, relative_error
from compress.trace import Traced, trace

SHARES = (0.6, 0.3, 0.1, 0.85)
"""How much stays, by the network's seed: with a tenth, most layers keep one channel."""


@dataclass(frozen=True)
class Outcome:
    """What one check did. channels: (removable, removed, all) output channels of contractions. passed:
    the blocks that removed units went through; seen: all blocks. passed_ops: (block, op) likewise.
    reasons: why channels stay."""

    removed_units: int
    channels: tuple[int, int, int]
    seen: frozenset[str]
    passed: frozenset[str]
    ops_seen: frozenset[str]
    passed_ops: frozenset[tuple[str, str]]
    reasons: frozenset[str]


def check(network: Network) -> Outcome:
    """Build, cut at a random mask, and require every law. Raises whatever breaks first."""
    model = randomise(build(network), network.seed)
    unfolded = trace(model, (example_of(network),))
    traced = folded(unfolded)
    _same_numbers(unfolded, traced)
    cmap = channel_map(traced)
    done = _moving_cut(traced, cmap, network.seed)
    _costs(done)
    _identity(done)
    assert from_json(json.loads(json.dumps(done.plan.to_json()))) == done.plan
    _trains(done)
    _other_units(traced, network.seed)
    return outcome(model, done)


def _same_numbers(unfolded: Traced, traced: Traced) -> None:
    """Folding weights changes no bit."""
    results = [torch.utils._pytree.tree_leaves(t.net(*t.example)) for t in (unfolded, traced)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _moving_cut(traced: Traced, cmap: ChannelMap, seed: int) -> Cut:
    """An exact cut that moves the output, wherever it removes what something reads.

    A unit behind a ReLU can be silent by chance: a cut that moves nothing has two more tries, in which
    more is removed.
    """
    for attempt in range(3):
        share = SHARES[seed % len(SHARES)] if attempt == 0 else min(SHARES)
        done = cut_at(traced, cmap, random_keep(cmap, seed + 1000 * attempt, share))
        assert_exact(done, moves=False)
        before, masked = (_wide_leaves(net, done) for net in (done.traced.net, done.masked))
        if not _reads_less(done) or relative_error(before, masked) > 1e-9:
            break
    assert_exact(done, moves=_reads_less(done))
    return done


def _reads_less(done: Cut) -> bool:
    """Whether a slice that reads a removed unit was zeroed; channels that nothing reads may go unnoticed."""
    axes = (done.cmap.axes[key] for key in done.cmap.reads)
    return any(not done.keep[units[units >= 0]].all() for units in axes)


def _other_units(traced: Traced, seed: int) -> None:
    """Every second network also by other units: dimensions inside heads and whole groups, which are exact
    too, or channels behind norms, which are not, but cost what is predicted."""
    if seed % 4 == 0:
        gated = with_gates(traced)
        inner = Granularity(attention="dims", grouped_convs="groups")
        _costs(_moving_cut(gated, channel_map(gated, granularity=inner), seed // 4))
    elif seed % 4 == 2:
        cmap = channel_map(traced, granularity=Granularity(inexact_norms=True))
        _costs(cut_at(traced, cmap, random_keep(cmap, seed // 4)))


def _costs(done: Cut) -> None:
    """Predicted costs are counted ones. torch.einsum multiplies, uncounted, along an axis cut to 1."""
    if not any(short_name(node) == "einsum" for node in done.dense.graph.nodes):
        assert_costs(done)
        return
    model, counts = cost_model(done.cmap), class_counts(done.cmap, done.keep)
    assert model.macs.total(counts) >= counted_macs(done.dense, done.traced.example)
    assert model.params.total(counts) == parameter_count(done.dense)


def _identity(done: Cut) -> None:
    """A plan that keeps everything changes nothing."""
    same, plan = cut(done.traced.net, done.cmap, np.ones(done.cmap.units, dtype=bool))
    assert plan.axes == {}
    assert same.code == done.traced.net.code
    pairs = zip(_leaves(same, done), _leaves(done.traced.net, done), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def _leaves(net: nn.Module, done: Cut) -> list[Tensor]:
    found: list[Tensor] = torch.utils._pytree.tree_leaves(net(*done.traced.example))
    return found


def _wide_leaves(net: nn.Module, done: Cut) -> list[Tensor]:
    inputs = [x.double() if x.is_floating_point() else x for x in done.traced.example]
    return outputs(copy.deepcopy(net).double(), inputs)


def _takes_gradients(net: nn.Module, done: Cut) -> bool:
    """Whether autograd follows the network: one in-place ReLU right behind another is beyond it."""
    leaves = _leaves(net.train(), done)
    try:
        torch.autograd.backward([leaf.square().sum() for leaf in leaves])
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return False
    return True


def _trains(done: Cut) -> None:
    """A step of SGD on the dense network changes most of what the loss depends on."""
    if not _takes_gradients(copy.deepcopy(done.traced.net), done):
        return
    net = copy.deepcopy(done.dense).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    loss = sum(leaf.square().sum() for leaf in _leaves(net, done))
    assert isinstance(loss, Tensor)
    loss.backward()
    reached = [p for p in net.parameters() if p.grad is not None and bool(p.grad.any())]
    before = [p.detach().clone() for p in reached]
    optimizer.step()
    assert reached
    assert any(not torch.equal(a, b) for a, b in zip(before, reached, strict=True))


def check_in_place(network: Network) -> None:
    """The same model, sliced in place by a plan that fits its Python code, equals the dense graph."""
    model = randomise(build(network), network.seed)
    traced = trace(model, (example_of(network),))
    cmap = channel_map(traced, in_place=True)
    done = cut_at(traced, cmap, random_keep(cmap, network.seed))
    fresh = apply_plan(done.plan, randomise(build(network), network.seed))
    with torch.no_grad():
        a, b = _leaves(done.dense, done), _leaves(fresh, done)
    assert relative_error(a, b) <= 1e-5


# -- what removed units went through ------------------------------------------------------------------------


def outcome(model: nn.Module, done: Cut) -> Outcome:
    stays = np.append(done.keep, True)[done.cmap.unit_of_label]
    drawn = {name: module.drawn for name, module in model.named_modules() if hasattr(module, "drawn")}
    seen, passed, ops = set(), set(), set()
    for node in done.traced.net.graph.nodes:
        if node.op != "call_function":
            continue
        names = {drawn[path] for path in _paths(node) if path in drawn}
        seen |= names
        ops.add(short_name(node))
        if any(not stays[labels].all() for labels in _labels(done, node)):
            passed |= {(name, short_name(node)) for name in names or {""}}
    return Outcome(
        removed_units=int((~done.keep).sum()),
        channels=_channels(done, stays),
        seen=frozenset(seen),
        passed=frozenset(name for name, _ in passed),
        ops_seen=frozenset(ops),
        passed_ops=frozenset(passed),
        reasons=frozenset(pin.reason for pin in done.cmap.pinned),
    )


def _channels(done: Cut, stays: np.ndarray) -> tuple[int, int, int]:
    """Removable, removed and all output channels of contractions."""
    rows = [term.counts[0] for term in done.cmap.terms if term.weight and term.counts]
    free = sum(int((done.cmap.unit_of_label[row] >= 0).sum()) for row in rows)
    return free, sum(int((~stays[row]).sum()) for row in rows), sum(len(row) for row in rows)


def _paths(node: fx.Node) -> Iterator[str]:
    """The module path of a node and of the modules around it."""
    parts = node.meta["module"].split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _labels(done: Cut, node: fx.Node) -> Iterator[np.ndarray]:
    found = done.cmap.nodes.get(node.name)
    for labels in found if isinstance(found, list) else [found]:
        if isinstance(labels, Tensor):
            yield core(labels).numpy()
