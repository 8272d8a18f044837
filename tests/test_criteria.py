"""Criteria against what they stand for: autograd, finite differences, and units that are really left out."""

from __future__ import annotations

import copy
from functools import cache
from math import comb

import numpy as np
import pytest
import torch
import torchvision
from helpers import randomise
from torch import Tensor, nn
from torch.nn import functional

from compress import criteria
from compress.channelmap import ChannelMap, channel_map
from compress.errors import ModelError
from compress.gated import Gated
from compress.importance import magnitude, read_gates, write_gates
from compress.surgery import mask
from compress.trace import GraphNet, trace
from compress.zoo import cifar_resnet

N = 6


class Smooth(nn.Module):
    """Two convolutions with a SiLU in between, small enough for exact Hessians."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.norm(self.a(x)))
        out: Tensor = self.fc(functional.silu(self.b(x)).mean((2, 3)))
        return out


MODELS = {
    "resnet": lambda: cifar_resnet(8, width=4, classes=5),
    "smooth": Smooth,
    "shuffle": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
    "swin": lambda: torchvision.models.SwinTransformer(
        [4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5, stochastic_depth_prob=0.0
    ),
    "dense": lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5),
}


@cache
def prepared(name: str) -> tuple[GraphNet, ChannelMap, Tensor, Tensor]:
    side = 32 if name in ("shuffle", "swin", "dense") else 10
    x = torch.randn(N, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = randomise(MODELS[name]()).eval()
    traced = trace(model, (x.float(),))
    labels = torch.arange(N) % 3
    cmap = channel_map(traced)
    return traced.net.double(), cmap, x, labels


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(net(batch[0]), batch[1])


@pytest.mark.parametrize("name", MODELS)
def test_gates_of_one_change_nothing_and_sum_to_what_the_parameters_say(name: str) -> None:
    net, cmap, x, y = prepared(name)
    gated = Gated(net, cmap)
    torch.testing.assert_close(gated(x), net(x), rtol=1e-12, atol=1e-12)
    found = criteria.example_gradients(gated, (x, y), loss)
    assert found.shape == (N, cmap.units)
    net.zero_grad()
    loss(net, (x, y)).backward()
    torch.testing.assert_close(found.sum(0).float(), read_gates(net, cmap), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(criteria.taylor(gated, (x, y), loss), found.sum(0).square())


@pytest.mark.parametrize("name", ["resnet", "smooth", "dense"])
def test_gates_behind_what_writes_a_unit(name: str) -> None:
    net, cmap, x, y = prepared(name)
    gated = Gated(net, cmap, "write")
    torch.testing.assert_close(gated(x), net(x), rtol=1e-12, atol=1e-12)
    net.zero_grad()
    loss(net, (x, y)).backward()
    found = criteria.example_gradients(gated, (x, y), loss).sum(0)
    torch.testing.assert_close(found.float(), write_gates(net, cmap), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "shuffle" else name for name in MODELS]
)
def test_the_oracle_leaves_units_out_as_the_mask_does(name: str) -> None:
    net, cmap, x, y = prepared(name)
    chosen = np.random.default_rng(0).choice(cmap.units, 6, replace=False)
    before = functional.cross_entropy(net(x), y, reduction="none")
    for size, together in ((1, 4), (2, 3), (4, 1)):
        sets = criteria.subsets(chosen, size)
        assert len({frozenset(own) for own in sets.tolist()}) == len(sets) == comb(6, size)
        found = criteria.leave_out(Gated(net, cmap), x, y, sets, together=together)
        for column, own in zip(found.T, sets, strict=True):
            masked = copy.deepcopy(net)
            keep = np.ones(cmap.units, dtype=bool)
            keep[own] = False
            mask(masked, cmap, keep)
            change = functional.cross_entropy(masked(x), y, reduction="none") - before
            torch.testing.assert_close(column, change.detach(), rtol=1e-9, atol=1e-12)
        assert float(found.abs().max()) > 1e-6


def test_single_examples_are_batches_of_one() -> None:
    net, cmap, x, y = prepared("resnet")
    gated = Gated(net, cmap)
    alone = torch.stack([criteria.taylor(gated, (x[i : i + 1], y[i : i + 1]), loss) for i in range(N)])
    torch.testing.assert_close(criteria.taylor_examples(gated, (x, y), loss), alone.mean(0))


def test_the_output_criterion_is_normalised_in_each_layer() -> None:
    net, cmap, x, y = prepared("resnet")
    classes = torch.from_numpy(cmap.classes)
    found = criteria.taylor_output(Gated(net, cmap), (x, y), loss, classes)
    for layer in range(int(classes.max()) + 1):
        assert float(found[classes == layer].square().sum()) == pytest.approx(1)
    plain = criteria.example_gradients(Gated(net, cmap), (x, y), loss).abs().sum(0)
    one = classes == 0
    torch.testing.assert_close(found[one] / found[one].sum(), plain[one] / plain[one].sum())


def test_second_order_against_finite_differences() -> None:
    net, cmap, x, y = prepared("smooth")
    gated = Gated(net, cmap)
    gradient, diagonal = criteria.hessian_diagonal(gated, (x, y), loss)
    step, values = 1e-4, {}
    for unit in range(cmap.units):
        for sign in (-1, 0, 1):
            gates = torch.ones(N, cmap.units, dtype=x.dtype)
            gates[:, unit] += sign * step
            with gated.at(gates), torch.no_grad():
                values[sign] = loss(gated, (x, y))
        slope = (values[1] - values[-1]) / (2 * step)
        bend = (values[1] - 2 * values[0] + values[-1]) / step**2
        assert gradient[unit].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-8)
        assert diagonal[unit].item() == pytest.approx(bend.item(), rel=1e-3, abs=1e-5)
    second = criteria.taylor_second(gradient, diagonal)
    truth = criteria.leave_out(gated, x, y).mean(0).square()
    first = gradient.square()
    assert float((second - truth).abs().sum()) < float((first - truth).abs().sum())
    torch.testing.assert_close(criteria.brain_damage(diagonal), diagonal / 2)


def test_hutchinson_comes_to_the_diagonal() -> None:
    net, cmap, x, y = prepared("smooth")
    gated, generator = Gated(net, cmap), torch.Generator().manual_seed(0)
    _, exact = criteria.hessian_diagonal(gated, (x, y), loss)
    errors = [
        float(
            (criteria.hessian_diagonal(gated, (x, y), loss, samples=k, generator=generator)[1] - exact).norm()
            / exact.norm()
        )
        for k in (4, 1024)
    ]
    assert errors[1] < 0.2 < errors[0] or errors[1] < errors[0] / 3


def test_logits_that_are_linear_in_the_gates_are_followed_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    x, y = torch.randn(N, 6, dtype=torch.float64), torch.arange(N) % 4
    traced = trace(model, (x,))
    gated = Gated(traced.net, channel_map(traced))
    log_p, shifts = criteria.logit_shifts(gated, x, y)
    assert log_p.shape == (N, 4)
    assert shifts.shape == (N, 3, 8)
    changes = criteria.loss_changes(log_p, shifts)
    truth = criteria.leave_out(gated, x, y, together=3)
    torch.testing.assert_close(changes, truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(criteria.squared_mean(changes), truth.mean(0).square())


def test_the_expanded_logits_come_closer_than_the_expanded_loss() -> None:
    net, cmap, x, y = prepared("smooth")
    gated = Gated(net, cmap)
    truth = criteria.squared_mean(criteria.leave_out(gated, x, y))
    estimate = criteria.squared_mean(criteria.loss_changes(*criteria.logit_shifts(gated, x, y)))
    first = criteria.taylor(gated, (x, y), loss)
    assert float((estimate - truth).abs().sum()) < float((first - truth).abs().sum())


def test_criteria_of_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    traced = trace(randomise(model), (torch.randn(2, 3, 8, 8),))
    net, cmap = traced.net, channel_map(traced)
    net(torch.randn(3, 3, 8, 8)).square().mean().backward()
    rows, gamma = net.get_parameter("0.weight"), net.get_parameter("1.weight")
    assert rows.grad is not None
    assert gamma.grad is not None
    flat = rows.detach().flatten(1)
    assert np.allclose(magnitude(net, cmap, 1), flat.abs().sum(1), rtol=1e-6)
    assert np.allclose(magnitude(net, cmap), flat.norm(dim=1), rtol=1e-6)
    torch.testing.assert_close(
        criteria.taylor_weights(net, cmap), (flat * rows.grad.flatten(1)).square().sum(1)
    )
    torch.testing.assert_close(criteria.norm_scale(net, cmap), gamma.detach().abs())
    torch.testing.assert_close(
        criteria.norm_scale(net, cmap, gradient=True), (gamma.detach() * gamma.grad).square()
    )


def test_channels_along_the_batch_have_no_gates() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.pool, self.out = nn.Linear(8, 8), nn.Conv1d(2, 2, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            n, t = x.shape[0], x.shape[1]
            q = self.q(x).reshape(n, t, 4, 2).permute(0, 2, 3, 1).reshape(n * 4, 2, t)
            q = self.pool(q).reshape(n, 4, 2, t).permute(0, 3, 1, 2).reshape(n, t, 8)
            out: Tensor = self.out(q)
            return out

    traced = trace(Heads(), (torch.randn(2, 5, 8),))
    cmap = channel_map(traced)
    assert cmap.units == 4
    x, y = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.int64)
    gated = Gated(traced.net, cmap)  # the weight that heads share reads none of them
    torch.testing.assert_close(gated(x), traced.net(x))
    found = criteria.example_gradients(gated, (x, y), lambda m, b: functional.cross_entropy(m(b[0]).mT, b[1]))
    assert found.shape == (3, 4)


def test_a_loss_that_does_not_call_the_model() -> None:
    net, cmap, x, y = prepared("smooth")
    with pytest.raises(ModelError, match="does not call the model"):
        criteria.taylor(Gated(net, cmap), (x, y), lambda model, batch: x.sum())
