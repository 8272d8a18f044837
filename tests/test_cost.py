"""Costs from label counts against numbers worked out by hand and torch's FLOP counter."""

from __future__ import annotations

import numpy as np
import torch
from helpers import Mlp, SmallNet, counted_macs, cut_at, images, parameter_count, random_keep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.channelmap import channel_map
from compress.cost import class_counts, cost_model, layers
from compress.trace import trace

MLP = trace(Mlp((4, 8, 6, 3)), (torch.randn(2, 4),))
MLP_MAP = channel_map(MLP)


def test_a_multiply_add_is_one_mac() -> None:
    model = cost_model(MLP_MAP)
    assert model.full.tolist() == [8, 6]
    assert model.macs.total(model.full) == 4 * 8 + 8 * 6 + 6 * 3
    assert model.params.total(model.full) == parameter_count(MLP.net) == 4 * 8 + 8 + 8 * 6 + 6 + 6 * 3 + 3


@given(st.integers(1, 8), st.integers(1, 6))
def test_any_widths(first: int, second: int) -> None:
    model, counts = cost_model(MLP_MAP), np.array([first, second])
    macs = 4 * first + first * second + second * 3
    assert model.macs.total(counts) == macs
    assert model.params.total(counts) == macs + first + second + 3
    assert model.ratio("macs", counts) == macs / (32 + 48 + 18)
    assert model.ratio("units", counts) == (first + second) / 14


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000))
def test_a_conv_net_against_the_flop_counter(seed: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1))
    traced = trace(net, images())
    cmap = channel_map(traced)
    done = cut_at(traced, cmap, random_keep(cmap, seed))
    model, counts = cost_model(cmap), class_counts(cmap, done.keep)
    assert model.macs.total(counts) == counted_macs(done.dense, traced.example)
    assert model.params.total(counts) == parameter_count(done.dense)


def test_costs_do_not_depend_on_the_traced_batch() -> None:
    totals = {
        cost_model(channel_map(trace(SmallNet(), images(batch=b)))).macs.total(np.array([6])) for b in (2, 5)
    }
    assert totals == {6 * 27 * 64 + 6 * 54 * 64 + 30}


def test_class_counts() -> None:
    keep = np.ones(14, dtype=bool)
    keep[[0, 1, 9]] = False
    assert class_counts(MLP_MAP, keep).tolist() == [6, 5]
    assert class_counts(MLP_MAP, np.zeros(14, dtype=bool)).tolist() == [0, 0]


def test_the_table_of_layers() -> None:
    keep = np.ones(14, dtype=bool)
    keep[[0, 1, 9]] = False
    table = layers(MLP_MAP, keep)
    assert [(t.name, t.kind, t.before, t.after, t.pinned) for t in table] == [
        ("layers.0", "linear", 8, 6, False),
        ("layers.1", "linear", 6, 5, False),
        ("layers.2", "linear", 3, 3, True),
    ]
    assert [(t.macs_before, t.macs_after) for t in table] == [(32, 24), (48, 30), (18, 15)]
