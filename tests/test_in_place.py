"""Sizes that a graph does not show to be the code's: the user's own module follows a cut, or is told why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn
from torch.nn import functional

import compress
from compress.errors import ModelError
from compress.plan import from_json

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(EXAMPLE, torch.tensor([0, 1]))] * 4
Step = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


class Net(nn.Module):
    """Two convolutions and a head, with what the user wrote between them."""

    def __init__(self, between: Step = same, end: Step = pooled) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.between, self.end = between, end
        self.head = nn.Linear(end(torch.zeros(2, 16, 8, 8)).shape[1], 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.first(x))
        x = self.between(x)
        x = functional.silu(self.second(x))
        x = self.end(x)
        return self.head(x)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def prune(model: nn.Module, **options: Any) -> tuple[nn.Module, compress.Result]:
    return compress.prune(
        model, EXAMPLE, BATCHES, loss, units_ratio=0.7, minibatches_per_step=1, units_per_step=4, **options
    )


def fits(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3]).view(x.shape)


LITERAL: dict[str, tuple[str, Step]] = {
    "view": ("first", lambda x: x.view(-1, 16, 8, 8)),
    "reshape": ("first", lambda x: x.reshape(x.shape[0], 16, 64).view(x.shape[0], 16, 8, 8)),
    "expand": ("first", lambda x: x.expand(x.shape[0], 16, 8, 8)),
    "flat": ("second", lambda x: x.mean((2, 3)).view(-1, 16)),
    "all": ("second", lambda x: x.view(-1, 16 * 64)),
    "fixed": ("second", lambda x: x.view(x.shape[0], 1024)),
    "unflatten": ("second", lambda x: x.flatten(1).unflatten(1, (16, 64)).mean(2)),
}


def literal(name: str) -> Net:
    layer, step = LITERAL[name]
    return randomise(Net(between=step) if layer == "first" else Net(end=step))  # type: ignore[return-value]


@pytest.mark.parametrize("name", LITERAL)
def test_a_size_written_into_the_code_stays_and_the_rest_is_pruned(name: str) -> None:
    model = literal(name)
    stays, leaves = (model.first, model.second)[:: 1 if LITERAL[name][0] == "first" else -1]
    found, result = prune(model, in_place=True)
    assert found is model
    assert stays.out_channels == 16
    assert leaves.out_channels < 16
    assert any("written into the model's code" in pin.reason for pin in result.pinned)
    assert model(EXAMPLE).shape == (2, 4)
    loss(model, BATCHES[0]).backward()


@pytest.mark.parametrize("name", LITERAL)
def test_a_plan_for_the_graph_is_refused_by_such_a_module(name: str) -> None:
    """Or it would run with another batch, or fail at its first call."""
    dense, result = prune(literal(name))
    assert dense(EXAMPLE).shape == (2, 4)
    fresh = literal(name)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ModelError, match="written into the model's code") as caught:
        compress.apply_plan(from_json(result.plan.to_json()), fresh)
    assert "test_in_place.py:" in caught.value.where
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


def test_a_computed_size_is_pruned_and_gives_the_graphs_numbers() -> None:
    model = randomise(Net(between=fits, end=lambda x: x.view(x.shape[0], -1)))
    twin = copy.deepcopy(model)
    dense, first = prune(model)
    sliced, second = prune(twin, in_place=True)
    assert first.plan == second.plan
    assert not second.plan.hard_coded
    torch.testing.assert_close(sliced.eval()(EXAMPLE), dense(EXAMPLE))
    fresh = compress.apply_plan(first.plan, randomise(Net(fits, lambda x: x.view(x.shape[0], -1))))
    assert fresh(EXAMPLE).shape == (2, 4)


def test_a_decision_on_a_size_is_refused_before_training_and_nothing_is_changed() -> None:
    def only(x: Tensor) -> Tensor:
        if x.shape[1] != 16:
            raise ValueError("wants 16 channels")
        return x

    model = randomise(Net(between=only))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="wants 16 channels") as caught:
        prune(model, in_place=True)
    assert "test_in_place.py:" in caught.value.where
    assert "in_place" in caught.value.fix
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model(EXAMPLE).shape == (2, 4)


def test_numbers_that_follow_a_size_silently_are_found() -> None:
    """The channels' number scales them: the shapes fit whatever leaves."""

    def scaled(x: Tensor) -> Tensor:
        return x * (16 / x.shape[1])

    model = randomise(Net(between=scaled))
    with pytest.raises(ModelError, match="computes something else"):
        prune(model, in_place=True)
    assert model.first.out_channels == 16
    assert model(EXAMPLE).shape == (2, 4)


class Standardised(nn.Conv2d):
    """A convolution that computes its weight, as NFNets do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, padding=1, groups=self.groups)


@pytest.mark.parametrize("options", [{"in_place": True}, {"fold_weights": False}])
def test_grouped_convolutions_with_computed_weights(options: dict[str, bool]) -> None:
    model = randomise(Net(between=Standardised(16, 16, 3, groups=4)))
    found, result = prune(model, **options)
    assert result.verification.passed
    assert found(EXAMPLE).shape == (2, 4)
