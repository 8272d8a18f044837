"""Surgery: identity, optimizer state, the user's own module, and a proof that cannot be fooled."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Cut,
    Mlp,
    SmallNet,
    Tied,
    assert_exact,
    check_cut,
    cut_at,
    images,
    outputs,
    random_keep,
    randomise,
    small_cifar,
)
from torch import Tensor, nn
from torch.nn import functional

from compress.channelmap import channel_map
from compress.errors import ModelError
from compress.plan import Plan
from compress.rewrites import REWRITES
from compress.surgery import (
    apply_plan,
    carry_state,
    cut,
    mask,
    relative_error,
    select_slices,
    verify,
)
from compress.trace import GraphNet, Traced, trace


class Shuffled(nn.Module):
    """Splits, slices, a shuffle, depthwise, padding: all that the graph has sizes for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.last, self.fc = nn.Conv2d(10, 6, 1), nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = functional.silu(self.first(x)).chunk(2, 1)
        x = functional.channel_shuffle(torch.cat([self.left(a), b], 1), 2)
        x = functional.pad(functional.max_pool2d(x, 2), (0, 0, 0, 0, 1, 1))
        return self.fc(functional.gelu(self.last(x)).flatten(1))


def prepared(model: nn.Module, example: tuple[Tensor, ...], seed: int = 0) -> Cut:
    traced = trace(randomise(model), example)
    cmap = channel_map(traced)
    return cut_at(traced, cmap, random_keep(cmap, seed))


class TestIdentity:
    @pytest.mark.parametrize("build", [SmallNet, Shuffled, small_cifar])
    def test_keeping_all_changes_nothing(self, build: Any) -> None:
        traced = trace(randomise(build()), images())
        cmap = channel_map(traced)
        dense, plan = cut(traced.net, cmap, np.ones(cmap.units, dtype=bool))
        assert dense.code == traced.net.code
        assert plan.axes == {}
        assert plan.groups == {}
        assert plan.hard_coded == ()
        assert list(dense.state_dict()) == list(traced.net.state_dict())
        x = images(batch=3)
        assert torch.equal(dense(*x), traced.net(*x))

    def test_the_original_is_left(self) -> None:
        traced = trace(randomise(Shuffled()), images())
        before, code = copy.deepcopy(traced.net.state_dict()), traced.net.code
        cmap = channel_map(traced)
        cut(traced.net, cmap, random_keep(cmap))
        assert traced.net.code == code
        assert all(torch.equal(before[name], value) for name, value in traced.net.state_dict().items())


class TestCut:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("build", [SmallNet, Shuffled, small_cifar])
    def test_masked_equals_dense(self, build: Any, seed: int) -> None:
        done = check_cut(randomise(build()), images(), seed, share=(0.2, 0.5, 0.8, 0.95)[seed])
        assert done.keep.sum() < done.cmap.units

    def test_one_channel_left_everywhere(self) -> None:
        done = check_cut(randomise(Shuffled()), images(), share=0.0)
        assert done.dense.get_parameter("first.weight").shape[0] <= 4

    @pytest.mark.parametrize("dims", [(), ((1, 2, 3),), (3,)], ids=["all", "several", "one"])
    def test_an_axis_cut_to_one_channel_is_not_squeezed_away(self, dims: tuple[Any, ...]) -> None:
        class Squeezed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

            def forward(self, x: Tensor) -> Tensor:
                x = self.first(x).mean((2, 3), keepdim=True).squeeze(*dims)
                return self.last(x.flatten(1))

        done = check_cut(randomise(Squeezed()), images(), share=0.0)
        assert done.keep.sum() == 1

    def test_a_cut_can_be_cut_again(self) -> None:
        first = prepared(Shuffled(), images())
        again = Traced(first.dense, first.traced.example)
        cmap = channel_map(again)
        second = cut_at(again, cmap, random_keep(cmap, 1, 0.7))
        assert_exact(second)
        assert second.keep.sum() < cmap.units <= first.keep.sum()

    def test_masking_reads_zeroes_only_columns(self) -> None:
        done = prepared(Mlp((4, 8, 6, 3)), (torch.randn(2, 4),))
        changed = {
            name
            for name, value in done.masked.state_dict().items()
            if not torch.equal(value, done.traced.net.state_dict()[name])
        }
        assert changed == {"layers.1.weight", "layers.2.weight"}
        gone = np.flatnonzero(~done.keep[:8])
        assert (done.masked.get_parameter("layers.1.weight")[:, gone] == 0).all()

    def test_training_goes_on_after_surgery(self) -> None:
        dense = prepared(SmallNet(), images()).dense.train()
        before = copy.deepcopy(dense.state_dict())
        optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
        losses = []
        x, y = images(batch=8)[0], torch.arange(8) % 5
        for _ in range(10):
            torch.manual_seed(0)
            loss = functional.cross_entropy(dense(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert all(p.grad is not None and p.grad.shape == p.shape for p in dense.parameters())
        assert not torch.equal(before["bn1.running_mean"], dense.get_buffer("bn1.running_mean"))
        assert isinstance(dense, GraphNet)
        dense.eval()
        assert torch.equal(dense(x), dense(x))

    def test_frozen_parameters_stay_frozen(self) -> None:
        traced = trace(randomise(SmallNet()), images())
        traced.net.get_parameter("conv1.weight").requires_grad_(False)
        cmap = channel_map(traced)
        dense, _ = cut(traced.net, cmap, random_keep(cmap))
        assert [n for n, p in dense.named_parameters() if not p.requires_grad] == ["conv1.weight"]


class TestOptimizerState:
    def step(self, net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        loss = net(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_it_continues_like_the_masked_networks_kept_slices(self, kind: str) -> None:
        """Masked columns get gradients again, so they are zeroed after each step, as the loop does."""

        def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
            if kind == "adamw":
                return torch.optim.AdamW(net.parameters(), lr=0.01)
            return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

        model = randomise(Mlp((4, 8, 6, 3))).double()
        traced = trace(model, (torch.randn(2, 4, dtype=torch.float64),))
        cmap = channel_map(traced)
        keep = random_keep(cmap)
        masked = copy.deepcopy(traced.net).train()
        ours = optimizer_of(masked)
        for seed in range(3):
            self.step(masked, ours, seed)
        mask(masked, cmap, keep)
        dense, plan = cut(masked, cmap, keep)
        theirs = optimizer_of(dense)
        names = dict(masked.named_parameters())
        carried = carry_state({name: ours.state[p] for name, p in names.items()}, plan)
        for name, parameter in dense.named_parameters():
            theirs.state[parameter] = carried[name]
        for seed in range(3, 7):
            self.step(masked, ours, seed)
            mask(masked, cmap, keep)
            self.step(dense, theirs, seed)
        for name, parameter in dense.named_parameters():
            expected = select_slices(names[name].detach(), name, plan)
            assert torch.allclose(parameter, expected, rtol=1e-11, atol=1e-13), name

    def test_only_tensors_of_the_parameters_shape_are_cut(self) -> None:
        plan = Plan({"w": (4, 3)}, {("w", 0): (0, 2)}, {})
        state = {"w": {"momentum": torch.arange(12).reshape(4, 3), "step": torch.tensor(5.0), "n": 3}}
        found = carry_state(state, plan)["w"]
        assert found["momentum"].tolist() == [[0, 1, 2], [6, 7, 8]]
        assert found["step"] == 5
        assert found["n"] == 3


class Depthwise(nn.Module):
    """Layers that remember their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.up = nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 6, 2)
        self.act, self.fc = nn.PReLU(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.up(self.b(self.bn(self.a(x))))).mean((2, 3)))


class TestOwnModule:
    @pytest.mark.parametrize(
        ("build", "example"),
        [
            (SmallNet, images()),
            (Depthwise, images()),
            (Mlp, (torch.randn(2, 4),)),
            (Tied, (torch.arange(6).reshape(2, 3),)),
        ],
    )
    def test_a_fresh_module_gives_the_same_outputs(self, build: Any, example: tuple[Tensor, ...]) -> None:
        done = prepared(build(), example)
        fresh = randomise(build()).eval()
        assert apply_plan(done.plan, fresh) is fresh
        inputs = tuple(torch.cat([x, x[:1]]) for x in example)
        assert all(map(torch.equal, outputs(fresh, inputs), outputs(done.dense, inputs)))

    def test_layers_know_their_new_sizes(self) -> None:
        done = prepared(Depthwise(), images())
        module = apply_plan(done.plan, randomise(Depthwise()))
        a, up = int(done.keep[:8].sum()), int(done.keep[8:14].sum())
        assert (module.a.out_channels, module.bn.num_features) == (a, a)
        assert (module.b.in_channels, module.b.out_channels, module.b.groups) == (a, a, a)
        assert (module.up.in_channels, module.up.out_channels) == (a, up)
        assert (module.fc.in_features, module.fc.out_features) == (up, 3)

    def test_the_dense_weights_load_into_it(self) -> None:
        done = prepared(SmallNet(), images())
        module = apply_plan(done.plan, SmallNet()).eval()
        module.load_state_dict(done.dense.state_dict())
        assert torch.equal(module(*images(batch=3)), done.dense(*images(batch=3)))

    def test_tied_parameters_stay_tied(self) -> None:
        done = prepared(Tied(), (torch.arange(6).reshape(2, 3),))
        module = apply_plan(done.plan, randomise(Tied()))
        assert module.head.weight is module.embedding.weight
        assert module.embedding.embedding_dim == module.head.in_features == int(done.keep.sum()) < 8

    def refused(self, plan: Plan, module: nn.Module, *texts: str) -> None:
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ModelError) as caught:
            apply_plan(plan, module)
        line = str(caught.value)
        assert caught.value.exit_code == 4
        assert len(line.splitlines()) == 1
        for text in texts:
            assert text in line
        after = module.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_a_wrong_model_is_refused(self) -> None:
        plan = prepared(SmallNet(), images()).plan
        self.refused(plan, Mlp(), "another model", "Mlp has no conv1.weight")
        self.refused(
            plan, SmallNet(7), "another model", "conv1.weight has shape [7, 3, 3, 3], not [6, 3, 3, 3]"
        )
        late = SmallNet()
        late.fc = nn.Linear(6, 9)  # the last tensor of all
        self.refused(plan, late, "fc.weight has shape [9, 6], not [5, 6]")

    def test_a_second_time_is_refused(self) -> None:
        plan = prepared(SmallNet(), images()).plan
        module = apply_plan(plan, SmallNet())
        self.refused(plan, module, "another model", "apply a plan once, to a fresh instance")

    def test_sizes_written_into_the_code_are_refused_with_their_line(self) -> None:
        plan = prepared(Shuffled(), images()).plan
        self.refused(plan, Shuffled(), "test_surgery.py:", "written into the model's code", "in_place=True")

    def test_in_place_plans_fit_such_code(self) -> None:
        traced = trace(randomise(Shuffled()), images())
        cmap = channel_map(traced, in_place=True)
        done = cut_at(traced, cmap, random_keep(cmap))
        assert_exact(done)
        module = apply_plan(done.plan, randomise(Shuffled())).eval()
        assert torch.equal(module(*images(batch=3)), done.dense(*images(batch=3)))


class TestProof:
    def test_a_good_cut_passes(self) -> None:
        done = prepared(SmallNet(), images())
        proof = verify(done.traced.net, done.masked, done.dense, images(batch=3))
        assert proof.passed
        assert proof.relative_error <= 1e-12
        assert proof.movement > 1e-3
        assert proof.dtype == "float64"
        assert next(done.dense.parameters()).dtype == torch.float32

    def test_a_wrong_weight_fails(self) -> None:
        done = prepared(SmallNet(), images())
        with torch.no_grad():
            done.dense.get_parameter("fc.bias")[0] += 1e-3
        proof = verify(done.traced.net, done.masked, done.dense, images(batch=3))
        assert not proof.passed
        assert proof.relative_error > 1e-5

    def test_keeping_all_passes_with_error_0(self) -> None:
        net = trace(randomise(SmallNet()), images()).net
        proof = verify(net, net, net, images(batch=3))
        assert (proof.passed, proof.relative_error, proof.movement) == (True, 0, 0)

    def test_a_mask_that_moves_nothing_proves_nothing(self) -> None:
        model = randomise(SmallNet())
        nn.init.zeros_(model.fc.weight)
        traced = trace(model, images())
        cmap = channel_map(traced)
        done = cut_at(traced, cmap, random_keep(cmap))
        proof = verify(traced.net, done.masked, done.dense, images(batch=3))
        assert (proof.relative_error, proof.movement) == (0, 0)
        assert not proof.passed

    def test_numbers_that_are_not_finite_fail(self) -> None:
        done = prepared(SmallNet(), images())
        with torch.no_grad():
            done.masked.get_parameter("fc.bias")[0] = float("nan")
        assert not verify(done.traced.net, done.masked, done.dense, images()).passed

    def test_relative_error(self) -> None:
        a = torch.tensor([1.0, -4.0])
        assert relative_error([a], [a]) == 0
        assert relative_error([a], [torch.tensor([1.0, -3.0])]) == 0.25
        assert relative_error([a, 10 * a], [a + 1, 10 * a]) == 0.25
        for other in (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")]), a[:1]):
            assert relative_error([a], [other]) == float("inf")
            assert relative_error([other], [a]) == float("inf")
        with pytest.raises(ValueError, match="zip"):
            relative_error([a], [a, a])


def test_every_rewritten_op_can_be_labelled() -> None:
    from compress import rules

    assert set(REWRITES) <= set(rules.RULES) | rules.MOVEMENT


class Computed(nn.Module):
    """The second layer's weight is computed: its columns are 0.5 where the parameter is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x).relu(), self.weight.sigmoid())


def test_channels_read_by_computed_columns_stay() -> None:
    cmap = channel_map(trace(Computed(), (torch.randn(2, 6),)))
    assert cmap.units == 0
    assert any("columns that are computed" in pin.reason for pin in cmap.pinned)


def test_a_batch_norm_without_momentum_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    with pytest.raises(ModelError, match="1: a batch norm with momentum=None"):
        trace(model, (torch.randn(2, 4),))


class Ordered(nn.Module):
    """A constant puts channels in another order; a transposed convolution has groups."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.up = nn.ConvTranspose2d(8, 8, 3, groups=8 if kind == "depthwise" else 2)
        self.shuffle, self.kind = nn.ChannelShuffle(2), kind
        self.register_buffer("order", torch.arange(8).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.kind == "index":
            x = x[:, self.order]
        elif self.kind == "roll":
            x = x.roll(1, 1)
        elif self.kind == "shuffle":
            x = self.shuffle(x)
        else:
            x = self.up(x)
        return self.last(x)


@pytest.mark.parametrize("kind", ["index", "roll", "shuffle", "grouped", "depthwise"])
def test_a_module_sliced_in_place_computes_what_the_graph_does(kind: str) -> None:
    traced = trace(randomise(Ordered(kind)), images())
    cmap = channel_map(traced, in_place=True)
    done = cut_at(traced, cmap, random_keep(cmap, share=0.4))
    sliced = apply_plan(done.plan, randomise(Ordered(kind)).eval())
    assert relative_error(outputs(done.dense, images()), outputs(sliced, images())) <= 1e-6
    assert (cmap.units == 0) == (kind in ("index", "roll", "shuffle"))
