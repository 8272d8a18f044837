"""The law masked = dense, the predicted cost and the fresh module on real architectures."""

from __future__ import annotations

import copy
import re
from functools import lru_cache

import numpy as np
import pytest
import torch
from helpers import (
    Cut,
    assert_costs,
    assert_exact,
    cut_at,
    images,
    outputs,
    random_keep,
    randomise,
    small_cifar,
    torchvision_model,
)
from torch import nn
from torchvision.models import DenseNet

from compress.channelmap import channel_map
from compress.errors import ModelError
from compress.surgery import apply_plan, cut, relative_error
from compress.trace import trace

slow = pytest.mark.slow

# name -> image size, least share of the units of all layers that must be removable
FAST = {
    "resnet18": (32, 0.9),
    "cifar_resnet": (16, 0.9),
    "mobilenet_v3_small": (32, 0.9),
    "shufflenet_v2_x0_5": (32, 0.9),
    "densenet": (32, 0.9),
    "googlenet": (32, 0.9),
}
SLOW = {
    "densenet121": (32, 0.9),
    "resnext50_32x4d": (32, 0.6),
    "wide_resnet50_2": (32, 0.9),
    "regnet_x_400mf": (32, 0.6),
    "regnet_y_400mf": (32, 0.6),
    "vgg11_bn": (32, 0.9),
    "vgg11": (32, 0.9),
    "alexnet": (63, 0.9),
    "inception_v3": (75, 0.9),
    "mobilenet_v2": (32, 0.9),
    "mnasnet0_5": (32, 0.9),
    "efficientnet_b0": (32, 0.9),
    "efficientnet_v2_s": (32, 0.9),
    "squeezenet1_0": (32, 0.5),
    "convnext_tiny": (32, 0.5),
}
ATTENTION = {"vit_b_16": 32, "swin_t": 32, "swin_v2_t": 32, "maxvit_t": 224}
CUTTABLE = {**FAST, **SLOW}
# Padding and slices in their Python code count channels: a plan for the graph does not fit the module.
HARD_CODED = {"cifar_resnet", "shufflenet_v2_x0_5"}


def marked(names: dict[str, object]) -> list[object]:
    return [pytest.param(name, marks=slow) if name not in FAST else name for name in names]


def build(name: str) -> nn.Module:
    if name == "densenet":  # as densenet121, with two layers in a block
        return randomise(DenseNet(8, (2, 2, 2, 2), 16, num_classes=10))
    return small_cifar() if name == "cifar_resnet" else torchvision_model(name)


@lru_cache(maxsize=1)
def family(name: str) -> Cut:
    """Trace, label and cut a family at one random mask; the tests of one family follow each other."""
    size = CUTTABLE[name][0] if name in CUTTABLE else ATTENTION[name]
    traced = trace(build(name), images(size=size))
    cmap = channel_map(traced)
    return cut_at(traced, cmap, random_keep(cmap, seed=1, share=0.7))


@pytest.mark.parametrize("name", marked(CUTTABLE), scope="class")
class TestFamilies:
    """One test per law; the class is parametrised, so that a family is traced once."""

    def test_masked_equals_dense(self, name: str) -> None:
        assert_exact(family(name), dtypes=(torch.float64, torch.float32))

    def test_most_channels_are_removable(self, name: str) -> None:
        cmap = family(name).cmap
        rows = [cmap.unit_of_label[term.counts[0]] for term in cmap.terms if term.weight]
        free, total = sum((r >= 0).sum() for r in rows[:-1]), sum(len(r) for r in rows[:-1])
        assert free / total >= CUTTABLE[name][1]

    def test_predicted_costs_are_the_dense_networks(self, name: str) -> None:
        done = family(name)
        assert_costs(done)
        assert sum(p.numel() for p in done.dense.parameters()) < 0.8 * sum(
            p.numel() for p in done.traced.net.parameters()
        )

    def test_a_fresh_module_cut_by_the_plan(self, name: str) -> None:
        done = family(name)
        fresh = build(name).eval()
        if name in HARD_CODED:
            with pytest.raises(ModelError, match="written into the model's code"):
                apply_plan(done.plan, fresh)
            cmap = channel_map(done.traced, in_place=True)
            done = cut_at(done.traced, cmap, random_keep(cmap, seed=2))
        apply_plan(done.plan, fresh)
        x = images(size=done.traced.example[0].shape[-1], batch=3)
        assert relative_error(outputs(done.dense, x), outputs(fresh, x)) <= 1e-6

    def test_an_identity_plan_changes_nothing(self, name: str) -> None:
        done = family(name)
        dense, plan = cut(done.traced.net, done.cmap, np.ones(done.cmap.units, dtype=bool))
        assert dense.code == done.traced.net.code
        assert plan.axes == {}
        assert torch.equal(dense(*done.traced.example), done.traced.net(*done.traced.example))

    def test_a_training_step_after_surgery(self, name: str) -> None:
        net = copy.deepcopy(family(name).dense).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        before = [p.detach().clone() for p in net.parameters()]
        x = images(size=family(name).traced.example[0].shape[-1], batch=4)
        net(*x).logsumexp(1).sum().backward()
        optimizer.step()
        changed = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
        assert np.mean(changed) > 0.8  # a bias in front of a batch norm has no gradient


@slow
@pytest.mark.parametrize("name", ATTENTION, scope="class")
class TestAttention:
    def test_cut_exactly(self, name: str) -> None:
        done = family(name)
        assert done.cmap.units > 0
        assert_exact(done)
        assert_costs(done)

    def test_every_head_is_a_unit(self, name: str) -> None:
        cmap = family(name).cmap
        rows = {w: cmap.axes[w, 0] for w in cmap.shapes if re.search(r"(qkv|in_proj_)\.?weight", w)}
        assert rows
        for units in rows.values():
            heads, sizes = np.unique(units, return_counts=True)
            assert len(heads) > 1 or len(units) <= 3 * 32, "several heads, none of them pinned"
            assert (heads >= 0).all()
            assert set(sizes.tolist()) in ({3 * 32}, {3 * 64}), "query, key and value rows of one head"
        pins = [pin for pin in cmap.pinned if pin.op != "output"]
        assert all(pin.reason and pin.op and pin.source for pin in pins)

    def test_the_mlps_are_free(self, name: str) -> None:
        cmap = family(name).cmap
        hidden = [
            term
            for term in cmap.terms
            if term.kind == "linear" and term.weight and (cmap.unit_of_label[term.counts[0]] >= 0).all()
        ]
        assert hidden
        assert any(w in term.weight for term in hidden for w in ("mlp.0", "mlp.linear_1", "mlp_layer"))


def test_auxiliary_heads_are_named_as_unreached() -> None:
    unreached = family("googlenet").traced.unreached
    assert {name.split(".")[0] for name in unreached} == {"aux1", "aux2"}


@pytest.mark.parametrize(("name", "inner", "streams"), [
    ("resnet34", 7552, 960), ("resnet50", 7552, 3840),
    pytest.param("resnet101", 16256, 3840, marks=pytest.mark.slow),
])  # fmt: skip
def test_gates_where_the_paper_places_them(name: str, inner: int, streams: int) -> None:
    """Behind the first two batch norms of every block, and one per channel of each stage's stream: 8,512,
    11,392 and 20,096 gates (Molchanov et al., CVPR 2019, official placement)."""
    traced = trace(build(name), images(size=64))
    cmap = channel_map(traced)
    behind = [w for w in cmap.writers if w.weight[0].endswith((".conv1.weight", ".conv2.weight")) and w.gamma]
    assert sum(cmap.shapes[writer.weight[0]][0] for writer in behind) == inner
    writes: dict[int, set[str]] = {}
    for writer in cmap.writers:
        for unit in cmap.axes.get(writer.weight, []):
            writes.setdefault(int(unit), set()).add(writer.weight[0])
    assert sum(len(names) > 1 for names in writes.values()) == streams
