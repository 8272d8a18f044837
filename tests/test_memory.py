"""The memory of activations: predicted against what lives when the cut network runs, and as a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Mlp, SmallNet, cut_at, images, random_keep, randomise, small_cifar
from random_networks import build, example_of, seeded_network
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from torchvision.models.densenet import _DenseBlock
from torchvision.models.mobilenetv3 import MobileNetV3, _mobilenet_v3_conf

import compress
from compress import config, files, pipeline
from compress.budget import narrow
from compress.channelmap import ChannelMap, channel_map
from compress.cli import main
from compress.cost import class_counts
from compress.errors import ModelError
from compress.folding import folded
from compress.gates import with_gates
from compress.labels import Granularity
from compress.memory import Points, points
from compress.select import Space, Target
from compress.trace import GraphNet, Traced, trace
from deploy import budget_view
from tests.pipelines import CONFIG, LOOKED_AT, Silent, start
from tests.test_budget import all_of, scores_of, space_of
from tests.test_budget_view import plain, shown


class Lived(fx.Interpreter):
    """Bytes of all activations that are there after each op, before what it read is let go."""

    def __init__(self, net: GraphNet) -> None:
        super().__init__(net)
        self.totals: list[int] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function":
            there = {**self.env, n: value}
            values = [x for node, x in there.items() if node.op != "get_attr" and (node.users or node is n)]
            tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
            self.totals.append(sum({s.data_ptr(): s.nbytes() for s in map(_storage, tensors)}.values()))
        return value


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


def lived(net: GraphNet, example: tuple[Tensor, ...]) -> int:
    """What one more example adds to the most that lives at once; so constants and parameters drop out."""
    found = []
    for inputs in (example, [torch.cat([x, x[:1]]) for x in example]):
        run = Lived(net)
        with torch.no_grad():
            run.run(*inputs, enable_io_processing=False)
        found.append(run.totals)
    return max(more - less for less, more in zip(*found, strict=True))


class Vit(nn.Module):
    """Patches, a token of its own, positions, one block, and the token's class."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.patches, self.heads = nn.Conv2d(3, width, 4, 4), heads
        self.token, self.places = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.zeros(1, 5, width)),
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


def mobilenet() -> nn.Module:
    settings, last = _mobilenet_v3_conf("mobilenet_v3_small")
    return MobileNetV3(settings[:3], last)


def densenet() -> nn.Module:
    block = _DenseBlock(4, 8, bn_size=2, growth_rate=6, drop_rate=0.0)
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block, *head)


def vit() -> nn.Module:
    return Vit()


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": small_cifar, "mobilenet": mobilenet, "densenet": densenet, "vit": vit, "dropout": SmallNet,
}  # fmt: skip


@cache
def traced_map(name: str) -> tuple[Traced, ChannelMap, Points]:
    traced = trace(randomise(NETS[name]()), images(size=32 if name == "mobilenet" else 8))
    cmap = channel_map(traced)
    return traced, cmap, points(traced.net, cmap, traced.example)


def wide_keep(cmap: ChannelMap, seed: int) -> np.ndarray:
    """Two or more units of every class: axes of length 1 can make a view of what is otherwise a copy."""
    keep = random_keep(cmap, seed)
    for own in cmap.members():
        keep[own[:2]] = True
    return keep


class TestTruth:
    @pytest.mark.parametrize("name", NETS)
    def test_what_is_predicted_lives_at_once(self, name: str) -> None:
        traced, cmap, found = traced_map(name)
        assert cmap.units
        assert found.total(np.bincount(cmap.classes)) == lived(traced.net, traced.example)
        for seed in range(3):
            keep = wide_keep(cmap, seed)
            dense = cut_at(traced, cmap, keep).dense
            assert found.total(class_counts(cmap, keep)) == lived(dense, traced.example)

    @pytest.mark.parametrize("seed", range(6))
    def test_random_networks_and_gates(self, seed: int) -> None:
        network = seeded_network(seed)
        plain_net = folded(trace(randomise(build(network), seed), (example_of(network),)))
        gated, inner = with_gates(plain_net), Granularity(attention="dims", grouped_convs="groups")
        for traced, granularity in ((plain_net, Granularity()), (gated, inner)):
            cmap = channel_map(traced, granularity=granularity)
            found = points(traced.net, cmap, traced.example)
            keep = wide_keep(cmap, seed)
            dense = cut_at(traced, cmap, keep).dense
            assert found.total(class_counts(cmap, keep)) == lived(dense, traced.example)

    def test_by_hand(self) -> None:
        traced = trace(Mlp((4, 8, 6, 3), nn.ReLU), (torch.randn(2, 4),))
        cmap = channel_map(traced)
        found = points(traced.net, cmap, traced.example)
        for a, b in ((8, 6), (3, 6), (1, 1)):
            counts = np.array([a, b])
            # the first layer beside its input, beside its activation, and so on
            assert found.total(counts) == 4 * max(4 + a, a + a, a + b, b + b, b + 3)
        assert found.peak_op(np.array([8, 6])) == "act relu"
        assert found.peak_op(np.array([1, 6])) == "act relu"
        assert found.peak_op(np.array([1, 1])) == "layers.0 linear"

    def test_in_place_and_views_take_nothing(self) -> None:
        class Reused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.first(x).relu_().view(-1, 2, 4).flatten(1))

        traced = trace(Reused(), (torch.randn(2, 4),))
        cmap = channel_map(traced)
        assert points(traced.net, cmap, traced.example).total(np.bincount(cmap.classes)) == 4 * (4 + 8)

    def test_units_that_take_different_amounts_are_never_too_few(self) -> None:
        class Uneven(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                x = self.first(x)
                return self.last(torch.cat([x[:, :3].tanh(), x[:, 3:].exp().sigmoid()], 1))

        traced = trace(randomise(Uneven()), images(size=4))
        cmap = channel_map(traced)
        found = points(traced.net, cmap, traced.example)
        assert found.total(np.bincount(cmap.classes)) == lived(traced.net, traced.example)
        for seed in range(4):
            keep = random_keep(cmap, seed)
            keep[:4] = True
            true = lived(cut_at(traced, cmap, keep).dense, traced.example)
            assert found.total(class_counts(cmap, keep)) >= true

    def test_a_network_in_train_mode_is_looked_at_in_eval_mode(self) -> None:
        traced, cmap, found = traced_map("dropout")
        traced.net.train()
        try:
            again = points(traced.net, cmap, traced.example)
            assert traced.net.training
        finally:
            traced.net.eval()
        np.testing.assert_array_equal(again.base, found.base)
        np.testing.assert_array_equal(again.weight, found.weight)


def budgets_of(name: str, *targets: Target, align: int = 1) -> Space:
    _, cmap, found = traced_map(name)
    where = space_of(cmap, *targets, align=align)
    return replace(where, cost=replace(where.cost, memory=found))


def to_the_end(where: Space, pace: float) -> tuple[np.ndarray, bool]:
    keep, scores = all_of(where.cmap), scores_of(where.cmap, 0)
    while True:
        done = narrow(scores, keep, where, pace)
        keep = done.keep
        if done.reached or not done.removed:
            return class_counts(where.cmap, keep), done.reached


class TestNarrow:
    @pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "vit"])
    @pytest.mark.parametrize("ratio", [0.8, 0.65])
    def test_memory_alone(self, name: str, ratio: float) -> None:
        where = budgets_of(name, Target("memory", ratio))
        found = traced_map(name)[2]
        counts, reached = to_the_end(where, 0.1)
        limit = ratio * found.total(where.cost.full)
        assert reached
        assert (found.at(counts) <= limit * (1 + 1e-9)).all()
        assert all(n in own for n, own in zip(counts, where.levels, strict=True))
        once, _ = to_the_end(where, 1.0)
        wider = [once + (np.arange(len(once)) == g) for g in np.flatnonzero(once < where.cost.full)]
        assert wider
        assert all(found.total(more) > limit for more in wider)  # nothing is left that a unit could use

    @pytest.mark.parametrize("name", ["resnet", "densenet"])
    def test_with_macs_and_latency(self, name: str) -> None:
        targets = (Target("latency", 0.8), Target("macs", 0.7), Target("memory", 0.7))
        where = budgets_of(name, *targets, align=2)
        counts, reached = to_the_end(where, 0.2)
        assert reached
        assert all(where.cost.ratio(t.kind, counts) <= t.ratio + 1e-9 for t in targets)
        assert max(where.cost.ratio(t.kind, counts) - t.ratio for t in targets) > -0.05

    def test_a_step_goes_as_far_as_its_pace(self) -> None:
        where = budgets_of("resnet", Target("memory", 0.5))
        done = narrow(scores_of(where.cmap, 0), all_of(where.cmap), where, 0.1)
        left = where.cost.ratio("memory", class_counts(where.cmap, done.keep))
        assert 0.8 < left <= 0.9 + 1e-9
        assert not done.reached

    def test_out_of_reach_is_the_narrowest(self) -> None:
        where = budgets_of("resnet", Target("memory", 0.01))
        counts, reached = to_the_end(where, 1.0)
        assert not reached
        assert counts.tolist() == where.narrowest.tolist()

    @pytest.mark.parametrize("name", NETS)
    def test_few_points_say_what_all_do(self, name: str) -> None:
        where, found = budgets_of(name, Target("memory", 0.5)), traced_map(name)[2]
        low, high = where.narrowest, where.cost.full
        limit = 0.5 * found.total(high)
        some = found.highest(low, high, limit)
        assert len(some.ops) <= len(found.ops)
        draw = np.random.default_rng(0)
        for _ in range(50):
            counts = draw.integers(low, high + 1)
            assert max(some.total(counts), limit) == pytest.approx(max(found.total(counts), limit))
            by = draw.integers(0, counts + 1)
            each = [found.total(counts - by * (np.arange(len(by)) == g)) for g in range(len(by))]
            np.testing.assert_allclose(found.narrowed(counts, by), each)


def test_out_of_reach_is_told_in_one_line() -> None:
    from compress.select import check_reachable

    where = budgets_of("resnet", Target("macs", 0.5), Target("memory", 0.05))
    with pytest.raises(ModelError) as caught:
        check_reachable(where, "lower prune.min_keep (0.1)")
    said = (
        f"memory_ratio 0.05 cannot be reached: {where.cost.ratio('memory', where.narrowest):.3f} is the least"
    )
    assert str(caught.value) == f"{said}; lower prune.min_keep (0.1), or shorten prune.keep"


def test_from_python() -> None:
    x = torch.randn((8, 4), generator=torch.Generator().manual_seed(0))
    model = randomise(Mlp((4, 24, 16, 3), nn.ReLU))

    def loss(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return functional.mse_loss(net(batch[0]), batch[1])

    dense, result = compress.prune(
        model, x, [(x, x[:, :3])] * 2, loss, evaluate=lambda net: 0.0,
        align=1, latency={"memory_ratio": 0.5, "params_ratio": 0.8},
    )  # fmt: skip
    before, after = (lived(trace(net, (x,)).net, (x,)) for net in (model, dense))
    assert result.reached
    assert after <= 0.5 * before
    assert result.history[-1].memory_ratio == after / before
    assert result.params_ratio <= 0.8


def test_a_plan_under_memory(tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text(LOOKED_AT + "budget: {memory_ratio: 0.6}\n")
    found = pipeline.plan(config.load(tmp_path / "compress.yaml", ()), tmp_path, events=Silent())
    memory = found["budget"]["memory"]
    assert found["reachable"]
    assert found["target"] == {"kind": "memory_ratio", "value": 0.6}
    assert found["budget"]["asked"] == {"memory_ratio": 0.6}
    assert 0.4 * memory["before"] < memory["after"] <= 0.6 * memory["before"]
    lines = shown(found)
    assert lines[0].startswith("OK 60.0 % of the peak activation memory can be kept (the least possible is ")
    before, after = memory["before"] / 1024, memory["after"] / 1024
    assert lines[1].startswith(f"Peak activation memory: {before:.1f} → {after:.1f} KiB per example (")
    assert lines[1].endswith(f"asked for 60.0 %; it is at {memory['op_after']}.")
    json.dumps(found, allow_nan=False)


def test_a_plan_out_of_reach_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "compress.yaml"
    path.write_text(LOOKED_AT + "budget: {memory_ratio: 0.02}\n")
    assert main(["plan", str(path)]) == ModelError.exit_code
    said = [line for line in capsys.readouterr().err.splitlines() if "memory_ratio" in line]
    assert len(said) == 1
    assert "memory_ratio 0.02 cannot be reached: 0." in said[0]
    assert "lower prune.min_keep (0.1) or prune.align (2)" in said[0]


def test_what_is_said_of_memory() -> None:
    memory = {"before": 4096, "after": 2048, "op_before": "a relu", "op_after": "b relu"}
    budget = {"asked": {"memory_ratio": 0.6}, "memory": memory}
    assert [plain(one) for one in budget_view.memory_said(budget)] == [
        "Peak activation memory: 4.0 → 2.0 KiB per example (50.0 %), asked for 60.0 %; it is at b relu."
    ]
    assert budget_view.memory_said({"memory": None}) == budget_view.memory_said({"memory": "x"}) == []


@pytest.mark.slow
def test_a_run_under_memory(tmp_path: Path) -> None:
    text = CONFIG.replace("macs_ratio: 0.6, ", "") + "budget: {memory_ratio: 0.6}\n"
    (tmp_path / "compress.yaml").write_text(text)
    start(tmp_path)
    document = files.read_json(tmp_path / "run" / "prune.json")
    memory = document["budget"]["memory"]
    assert document["reached"]
    assert document["target"] == {"kind": "memory_ratio", "value": 0.6}
    assert document["budget"]["asked"] == {"memory_ratio": 0.6}
    assert memory["after"] <= 0.6 * memory["before"]
    shares = [step["memory_ratio"] for step in document["history"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(memory["after"] / memory["before"])
    for name in ("report.html", "report.md"):
        assert "Peak activation memory" in (tmp_path / "run" / name).read_text()
