"""Every rule and every data-moving op on a tiny network: exact where channels leave, pinned where not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch
from helpers import Cut, assert_costs, cut_at, free_units, outputs, random_keep
from layer_cases import CONTRACTIONS, NORMS, REDUCTIONS, SPATIAL
from op_cases import JOINS, MOVES, POINTWISE, Case
from torch import Tensor, fx, nn

from compress import rules
from compress.channelmap import channel_map
from compress.labels import short_name
from compress.surgery import relative_error
from compress.trace import trace

CASES = [*MOVES, *SPATIAL, *REDUCTIONS, *NORMS, *CONTRACTIONS, *JOINS, *POINTWISE]


class Branches(nn.Module):
    """Several cases side by side: one export for all."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(case.net() for case in cases)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [net(x) for net in self.nets]


def _groups() -> list[tuple[Case, ...]]:
    alike: dict[tuple[int, int], list[Case]] = {}
    for case in CASES:
        alike.setdefault((case.rank, case.size), []).append(case)
    return [tuple(cases[i : i + 24]) for cases in alike.values() for i in range(0, len(cases), 24)]


GROUPS = _groups()
PLACES = [(group, i) for group, cases in enumerate(GROUPS) for i in range(len(cases))]
NAMES = [f"{case.op}-{i}" for cases in GROUPS for i, case in enumerate(cases)]


@lru_cache
def cut_group(group: int, seed: int = 0) -> Cut:
    """All cases of a group in one network, cut at one random mask."""
    size, rank = GROUPS[group][0].size, GROUPS[group][0].rank
    traced = trace(Branches(GROUPS[group]), (torch.randn(2, 3, *[size] * rank),))
    cmap = channel_map(traced)
    return cut_at(traced, cmap, random_keep(cmap, seed))


@lru_cache
def results(group: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs of the original, masked and dense network in float64, per case, on a batch of 3."""
    done = cut_group(group)
    torch.manual_seed(3)
    inputs = [torch.randn(3, *done.traced.example[0].shape[1:], dtype=torch.float64)]
    nets = (copy.deepcopy(net).double() for net in (done.traced.net, done.masked, done.dense))
    before, masked, dense = (outputs(net, inputs) for net in nets)
    return before, masked, dense


def upstream(node: fx.Node) -> set[fx.Node]:
    """Every call that a node's value comes from, itself included."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        last = waiting.pop()
        if last not in found and last.op == "call_function":
            found.add(last)
            waiting += last.all_input_nodes
    return found


@pytest.mark.parametrize(("group", "index"), PLACES, ids=NAMES)
def test_the_op_stands_in_the_graph(group: int, index: int) -> None:
    graph = cut_group(group).traced.net.graph
    result = next(node for node in graph.nodes if node.op == "output").args[0][index]
    assert GROUPS[group][index].op in {short_name(node) for node in upstream(result)}


@pytest.mark.parametrize(("group", "index"), PLACES, ids=NAMES)
def test_free_and_pinned_channels(group: int, index: int) -> None:
    case, cmap = GROUPS[group][index], cut_group(group).cmap
    weight = f"nets.{index}.first.weight"
    assert free_units(cmap, weight) == case.expected
    reasons = [pin for pin in cmap.pinned if weight in pin.parameters]
    if not case.pinned:
        assert not reasons
        return
    assert any(case.pinned in pin.reason for pin in reasons), reasons
    assert all(pin.op and "_cases.py:" in pin.source for pin in reasons)


@pytest.mark.parametrize(("group", "index"), PLACES, ids=NAMES)
def test_masked_equals_dense(group: int, index: int) -> None:
    before, masked, dense = (tensors[index] for tensors in results(group))
    error, movement = relative_error([masked], [dense]), relative_error([before], [masked])
    assert error <= 1e-12
    if not GROUPS[group][index].pinned:
        assert movement >= max(1000 * error, 1e-6)


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_costs_are_those_of_the_flop_counter(group: int) -> None:
    assert_costs(cut_group(group))


def test_every_rule_and_every_moving_op_has_a_case() -> None:
    assert set(rules.RULES) | rules.MOVEMENT <= {case.op for case in CASES}


def test_a_second_rule_for_an_op_is_refused() -> None:
    with pytest.raises(ValueError, match="two rules for linear"):
        rules.rule("linear")(rules.unknown)
