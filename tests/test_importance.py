"""Gate gradients without gates against explicit gates; Taylor's squares and averages by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Mlp, SmallNet, images, randomise, small_cifar
from torch import Tensor, nn

from compress.channelmap import ChannelMap, channel_map
from compress.errors import ModelError
from compress.importance import (
    Taylor,
    magnitude,
    magnitude_share,
    random,
    read_gates,
    scored,
    write_gates,
)
from compress.trace import trace

WIDTH = 6


class Explicit(nn.Module):
    """A layer, an activation and a consumer, with room for a gate at both ends.

    write: factor on what the layer writes; read: factor on what the consumer reads.
    """

    def __init__(self, layer: nn.Module, consumer: nn.Module, act: nn.Module, norm: nn.Module | None = None):
        super().__init__()
        self.layer, self.consumer, self.act = layer, consumer, act
        self.norm = norm if norm is not None else nn.Identity()
        self.write: Tensor | None = None
        self.read: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.layer(x))
        h = self.act(h if self.write is None else h * self.write)
        return self.consumer(h if self.read is None else h * self.read)


class Stream(nn.Module):
    """A stem and two residual blocks on one stream of channels; every writer or every reader is gated."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.stem, self.act, self.head = nn.Linear(4, WIDTH), act, nn.Linear(WIDTH, 3)
        self.down = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(2))
        self.write: Tensor | None = None
        self.read: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        write = 1.0 if self.write is None else self.write
        read = 1.0 if self.read is None else self.read
        x = self.act(self.stem(x) * write)
        for down, up in zip(self.down, self.up, strict=True):
            x = self.act(x + up(torch.relu(down(x * read))) * write)
        return self.head(x * read)


def loss_of(y: Tensor) -> Tensor:
    return (y.flatten(1).logsumexp(1) * torch.linspace(-1, 2, len(y), dtype=y.dtype)).sum()


def explicit(model: nn.Module, x: Tensor, side: str, dims: int, train: bool) -> Tensor:
    """dL/dz of a gate of ones on one side, (WIDTH,), by autograd."""
    gate = torch.ones(WIDTH, *[1] * dims, dtype=x.dtype, requires_grad=True)
    setattr(model, side, gate)
    loss_of(model.train(train)(x)).backward()
    setattr(model, side, None)
    assert gate.grad is not None
    return gate.grad.flatten()


def formula(model: nn.Module, x: Tensor, train: bool) -> tuple[Tensor, Tensor, ChannelMap]:
    """read_gates and write_gates of the first WIDTH units, from parameter gradients alone."""
    traced = trace(model, (x,))
    cmap = channel_map(traced)
    loss_of(traced.net.train(train)(x)).backward()
    name = "stem.weight" if isinstance(model, Stream) else "layer.weight"
    transposes = isinstance(getattr(model, "layer", None), nn.ConvTranspose2d)
    units = cmap.axes[name, 1 if transposes else 0]
    return read_gates(traced.net, cmap)[units], write_gates(traced.net, cmap)[units], cmap


def linear(act: nn.Module) -> tuple[nn.Module, Tensor, int]:
    return Explicit(nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3), act), torch.randn(7, 4), 0


def conv(act: nn.Module) -> tuple[nn.Module, Tensor, int]:
    return Explicit(nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, 2, 2), act), torch.randn(5, 3, 6, 6), 2


def norm(act: nn.Module) -> tuple[nn.Module, Tensor, int]:
    layers = nn.Conv2d(3, WIDTH, 3, bias=False), nn.Conv2d(WIDTH, 2, 2)
    return Explicit(*layers, act, nn.BatchNorm2d(WIDTH)), torch.randn(5, 3, 6, 6), 2


def grouped(act: nn.Module) -> tuple[nn.Module, Tensor, int]:
    """The consumer is depthwise with a reader behind it."""
    consumer = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 2, groups=WIDTH, bias=False), nn.Conv2d(WIDTH, 2, 1))
    return Explicit(nn.Conv2d(3, WIDTH, 3), consumer, act), torch.randn(5, 3, 6, 6), 2


def transposed(act: nn.Module) -> tuple[nn.Module, Tensor, int]:
    layers = nn.ConvTranspose2d(3, WIDTH, 3), nn.ConvTranspose2d(WIDTH, 2, 2)
    return Explicit(*layers, act), torch.randn(5, 3, 4, 4), 2


def stream(act: nn.Module) -> tuple[nn.Module, Tensor, int]:
    return Stream(act), torch.randn(7, 4), 0


Build = Callable[[nn.Module], tuple[nn.Module, Tensor, int]]
BUILDS: list[Build] = [linear, conv, norm, grouped, transposed, stream]


def built(build: Build, act: nn.Module) -> tuple[nn.Module, Tensor, int]:
    torch.manual_seed(0)
    model, x, dims = build(act)
    return randomise(model).double(), x.double(), dims


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("build", BUILDS)
class TestGates:
    def test_both_sides_equal_the_gate_under_relu(self, build: Build, train: bool) -> None:
        model, x, dims = built(build, nn.ReLU())
        read, write, _ = formula(model, x, train)
        expected = explicit(model, x, "write", dims, train)
        assert float(expected.abs().max()) > 1e-3
        assert close(write, expected)
        assert close(read, expected)

    def test_the_sides_differ_under_silu(self, build: Build, train: bool) -> None:
        model, x, dims = built(build, nn.SiLU())
        read, write, _ = formula(model, x, train)
        at_reader = explicit(model, x, "read", dims, train)
        assert close(read, at_reader)
        assert not close(write, at_reader)
        if build is not stream:  # there, a write gate also scales what later activations see
            assert close(write, explicit(model, x, "write", dims, train))


def test_write_gates_of_a_stream_are_the_sum_of_its_writers() -> None:
    model, x, _ = built(stream, nn.SiLU())
    _, write, cmap = formula(model, x, False)
    model.zero_grad()  # the traced network holds the same parameters
    loss_of(model.eval()(x)).backward()
    writers = [model.stem, *model.up]
    sums = [(w.weight * w.weight.grad).sum(1) + w.bias * w.bias.grad for w in writers]
    assert cmap.units == WIDTH + 10
    assert close(write, torch.stack(sums).sum(0))


def test_a_conv_in_front_of_a_training_batch_norm_has_no_gate_of_its_own() -> None:
    model, x, _ = built(norm, nn.ReLU())
    loss_of(model.train()(x)).backward()
    rows = (model.layer.weight * model.layer.weight.grad).sum((1, 2, 3))
    gates = model.norm.weight * model.norm.weight.grad + model.norm.bias * model.norm.bias.grad
    assert rows.detach().abs().max() < 1e-3 * gates.detach().abs().max()


def test_parameters_without_gradients_count_as_0() -> None:
    traced = trace(randomise(SmallNet()), images())
    cmap = channel_map(traced)
    assert read_gates(traced.net, cmap).tolist() == [0] * 6
    assert write_gates(traced.net, cmap).tolist() == [0] * 6


class TestTaylor:
    def gradients(self, net: nn.Module, seed: int) -> None:
        net.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        loss_of(net(torch.randn(5, 4, generator=generator))).backward()

    def test_square_per_minibatch_mean_then_moving_average(self) -> None:
        traced = trace(randomise(Mlp((4, 8, 3), nn.ReLU)), (torch.randn(2, 4),))
        cmap = channel_map(traced)
        taylor = Taylor(cmap, ema=0.9)
        expected: np.ndarray | None = None
        for step in range(3):
            squares = []
            for minibatch in range(2 + step):
                self.gradients(traced.net, 10 * step + minibatch)
                weight = traced.net.get_parameter("layers.1.weight")
                squares.append(((weight * weight.grad).sum(0) ** 2).detach().numpy())
                taylor.accumulate(traced.net)
            mean = np.mean(squares, axis=0)
            expected = mean if expected is None else 0.9 * expected + 0.1 * mean
            found = taylor.scores()
            assert found.dtype == np.float64
            assert np.allclose(found, expected, rtol=1e-4)
        assert float(np.min(found)) >= 0

    def test_it_is_not_the_square_of_the_mean(self) -> None:
        traced = trace(randomise(Mlp((4, 8, 3), nn.ReLU)), (torch.randn(2, 4),))
        cmap = channel_map(traced)
        taylor, gates = Taylor(cmap), []
        for minibatch in range(2):
            self.gradients(traced.net, minibatch)
            gates.append(read_gates(traced.net, cmap))
            taylor.accumulate(traced.net)
        mean_of_squares = torch.stack(gates).square().mean(0)
        assert np.allclose(taylor.scores(), mean_of_squares, rtol=1e-5)
        assert not np.allclose(mean_of_squares, torch.stack(gates).mean(0).square(), rtol=1e-2)

    def test_scores_without_gradients_are_an_error(self) -> None:
        cmap = channel_map(trace(Mlp(), (torch.randn(2, 4),)))
        with pytest.raises(ModelError, match="no gradient was accumulated"):
            Taylor(cmap).scores()


class TestSides:
    def test_the_writing_side_is_scored_where_it_is_asked_for(self) -> None:
        traced = trace(randomise(Mlp((4, 8, 3), nn.SiLU)), (torch.randn(2, 4),))
        cmap = channel_map(traced)
        for name in ("layers.0.weight", "layers.0.bias", "layers.1.weight"):
            traced.net.get_parameter(name).requires_grad_(False)
        found = {}
        for side, gates in (("read", read_gates), ("write", write_gates)):
            taylor = Taylor(cmap, side=side)
            with scored(traced.net, cmap, [], side):
                loss_of(traced.net(torch.ones(5, 4))).backward()
                expected = gates(traced.net, cmap).square()
                taylor.accumulate(traced.net)
            found[side] = taylor.scores()
            assert np.allclose(found[side], expected)
            assert float(found[side].min()) > 0
            assert all(p.grad is None for p in traced.net.parameters() if not p.requires_grad)
        assert not np.allclose(found["read"], found["write"], rtol=0.01)

    def test_units_that_no_weight_writes_are_refused(self) -> None:
        cmap = channel_map(trace(Mlp(), (torch.randn(2, 4),)))
        with pytest.raises(ModelError, match=r"prune\.gates: no weight writes \d+ of \d+ units; use read"):
            Taylor(replace(cmap, writers=()), side="write")


def test_magnitude_is_the_norm_of_the_rows_that_write_a_unit() -> None:
    traced = trace(randomise(SmallNet()), images())
    rows = [traced.net.get_parameter(f"conv{i}.weight").flatten(1) for i in (1, 2)]
    expected = torch.cat(rows, 1).norm(dim=1)
    assert np.allclose(magnitude(traced.net, channel_map(traced)), expected.detach().numpy(), rtol=1e-6)


def test_magnitude_share_is_of_each_layer_that_writes_a_unit() -> None:
    traced = trace(randomise(SmallNet()), images())
    net, cmap = traced.net, channel_map(traced)
    first, second = (net.get_parameter(f"conv{i}.weight").detach().flatten(1).square().sum(1) for i in (1, 2))
    expected = first / first.sum() + second / second.sum()
    assert np.allclose(magnitude_share(net, cmap), expected.numpy(), rtol=1e-5)
    with torch.no_grad():
        net.get_parameter("conv1.weight").mul_(100)  # the next layer may undo it
    assert np.allclose(magnitude_share(net, cmap), expected.numpy(), rtol=1e-5)
    with torch.no_grad():
        net.get_parameter("conv1.weight").zero_()
    assert np.allclose(magnitude_share(net, cmap), (second / second.sum()).numpy(), rtol=1e-5)


def test_magnitude_shares_of_a_layer_add_up_to_one_with_what_is_pinned() -> None:
    traced = trace(randomise(small_cifar()), images(size=8))
    cmap = channel_map(traced)
    found = magnitude_share(traced.net, cmap)
    layers = [w for w in cmap.writers if w.weight in cmap.axes and (cmap.axes[w.weight] >= 0).all()]
    assert found.sum() == pytest.approx(len(layers), rel=1e-5)
    assert (found > 0).all()


def test_random_scores_depend_on_the_seed_alone() -> None:
    cmap = channel_map(trace(Mlp(), (torch.randn(2, 4),)))
    assert np.array_equal(random(cmap, 1), random(cmap, 1))
    assert not np.array_equal(random(cmap, 1), random(cmap, 2))
    assert random(cmap, 1).shape == (cmap.units,)
