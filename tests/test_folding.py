"""Weights that a model computes from its parameters: folded into plain ones, then pruned like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_costs, assert_exact, cut_at, random_keep, randomise
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import compress
from compress.errors import ModelError
from compress.folding import folded
from compress.inspection import labelled
from compress.schema import PruneConfig
from compress.trace import trace

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Standardised(nn.Conv2d):
    """Weight standardisation, by a batch norm over each row."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, padding=1)


class LowRank(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.zeros(outputs, 3)), nn.Parameter(torch.zeros(3, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.left @ self.right)


def old_weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


def convolution(kind: str) -> nn.Module:
    if kind == "standardised":
        return Standardised(8, 12, 3, padding=1)
    norm: Callable[[nn.Module], nn.Module] = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "old weight_norm": old_weight_norm,
    }[kind]
    return norm(nn.Conv2d(8, 12, 3, padding=1))


KINDS = ("standardised", "weight_norm", "spectral_norm", "old weight_norm")


class Model(nn.Module):
    """A convolution whose weight is computed, between plain layers, and one that is used twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), convolution(kind)
        self.twice = parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1))
        self.head = LowRank(12, 5)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu()).sigmoid()
        return self.head(self.twice(self.twice(x).relu()).mean((2, 3)))


def model(kind: str) -> nn.Module:
    return Model(kind).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_folding_changes_no_bit_and_every_channel_can_leave(kind: str) -> None:
    before = trace(model(kind), (X,))
    after = folded(before)
    assert torch.equal(before.net(X), after.net(X))
    traced, cmap = labelled(before, (), PruneConfig())
    assert cmap.units == 8 + 12
    done = cut_at(traced, cmap, random_keep(cmap))
    assert_exact(done)
    assert_costs(done)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_folded_weights(kind: str) -> None:
    found = dict(folded(trace(model(kind), (X,))).folded)
    own = "conv.folded_weight" if kind == "standardised" else "conv.weight"
    assert sorted(found) == sorted((own, "twice.weight", "head.weight"))
    assert found["head.weight"] == ("head.left", "head.right")
    assert set(found["twice.weight"]) == {
        "twice.parametrizations.weight.original0",
        "twice.parametrizations.weight.original1",
    }


def test_a_weight_that_is_used_twice_stays_one_and_trains() -> None:
    traced = folded(trace(model("weight_norm"), (X,)))
    names = [str(node.target) for node in traced.net.graph.nodes if node.op == "get_attr"]
    assert names.count("twice.weight") == 2
    weight = traced.net.get_parameter("twice.weight")
    traced.net(X).square().sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


def test_the_given_model_and_its_trace_keep_their_tensors() -> None:
    given = model("standardised")
    numbers = copy.deepcopy(given.state_dict())
    before = trace(given, (X,))
    code, expected = before.net.code, before.net(X)
    after = folded(before)
    with torch.no_grad():
        after.net.get_parameter("conv.folded_weight").zero_()
    assert before.net.code == code
    assert torch.equal(before.net(X), expected)
    assert all(torch.equal(given.state_dict()[name], value) for name, value in numbers.items())


def test_plain_weights_are_not_folded() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.scale = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x.mean((2, 3)), (self.w.T * self.scale).T.contiguous())

    traced = trace(Moved(), (X,))
    assert folded(traced) is traced


def test_dropout_of_weights_stays() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            weight = functional.dropout(self.w.sigmoid(), 0.5, self.training)
            return functional.linear(x.mean((2, 3)), weight)

    traced = trace(Dropped(), (X,))
    assert folded(traced) is traced
    assert not torch.equal(traced.net.train()(X), traced.net.eval()(X))


def test_frozen_parameters_give_a_frozen_weight() -> None:
    given = model("standardised")
    for parameter in given.get_submodule("conv").parameters():
        parameter.requires_grad_(False)
    net = folded(trace(given, (X,))).net
    assert not net.get_parameter("conv.folded_weight").requires_grad
    assert net.get_parameter("twice.weight").requires_grad


def test_on_request_computed_weights_stay_computed() -> None:
    traced, cmap = labelled(trace(model("weight_norm"), (X,)), (), PruneConfig(fold_weights=False))
    assert traced.folded == ()
    assert cmap.units == 0
    assert any("has no pruning rule" in pin.reason or "computed" in pin.reason for pin in cmap.pinned)


def test_what_is_kept_stays_kept_when_it_is_folded() -> None:
    kept = ["conv.parametrizations.weight.original1", "conv.parametrizations.weight.original0"]
    _, cmap = labelled(trace(model("weight_norm"), (X,)), kept, PruneConfig())
    assert ("conv.weight", 0) not in cmap.axes
    assert any(pin.reason == "kept on request" for pin in cmap.pinned)


def pruned(given: nn.Module, **options: Any) -> tuple[nn.Module, compress.Result]:
    batches = [(X, torch.tensor([0, 3]))] * 4
    options = {"macs_ratio": 0.6, "minibatches_per_step": 1, "units_per_step": 4, "lr": 1e-4} | options
    return compress.prune(given, X, batches, lambda m, b: functional.cross_entropy(m(b[0]), b[1]), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_prune_says_what_it_folded(kind: str) -> None:
    given = model(kind)
    expected = given(X)
    dense, result = pruned(given)
    assert result.verification.passed
    assert set(result.folded) == dict(folded(trace(model(kind), (X,))).folded).keys()
    assert set(result.folded) <= dict(dense.named_parameters()).keys()
    assert torch.equal(given(X), expected)


def test_a_plan_for_plain_weights_is_refused_where_they_are_computed() -> None:
    for kind, name in (("weight_norm", "conv.weight"), ("standardised", "conv.folded_weight")):
        fresh, (_, result) = model(kind), pruned(model(kind))
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(ModelError, match="is a plain weight in the plan, and the model computes it"):
            compress.apply_plan(result.plan, fresh)
        assert name in result.plan.shapes
        assert all(torch.equal(fresh.state_dict()[key], value) for key, value in before.items())
    old, (_, result) = model("old weight_norm"), pruned(model("old weight_norm"))
    with pytest.raises(ModelError, match="the model computes it"):
        compress.apply_plan(result.plan, old)


def test_a_plan_fits_once_the_parametrization_is_taken_off() -> None:
    def plain() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), parametrizations.weight_norm(nn.Conv2d(8, 6, 3)), nn.ReLU())
        net = randomise(nn.Sequential(*net, nn.Conv2d(6, 2, 1), nn.Flatten(), nn.Linear(72, 4)))
        return net.eval()

    dense, result = pruned(plain(), lr=1e-12)
    fresh = plain()
    parametrize.remove_parametrizations(fresh[1], "weight")  # type: ignore[index, arg-type]
    small = compress.apply_plan(result.plan, fresh)
    torch.testing.assert_close(small(X), dense(X), rtol=1e-4, atol=1e-5)
