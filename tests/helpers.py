"""What the tests share: models, parameters that hide nothing, masks, masked = dense, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compress.channelmap import ChannelMap, channel_map
from compress.cost import class_counts, cost_model
from compress.errors import CompressError
from compress.plan import Plan
from compress.surgery import cut, mask, relative_error
from compress.trace import GraphNet, Traced, trace
from compress.zoo import cifar_resnet

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
MOVEMENT = 1000  # the mask moves the output at least this many times further than the error


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and batch norm statistic a value that shows in the output; returns the model.

    Zero-initialised heads, layer scales of 1e-6 and fresh statistics would make exactness tests vacuous.
    The values depend on the seed alone, so two instances of a model become equal.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                fresh = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(fresh + 0.5 if name.endswith("weight") else 0.4 * fresh - 0.2)
            elif parameter.dim() > 1:
                scale = (2 * parameter.shape[0] / parameter.numel()) ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def random_keep(cmap: ChannelMap, seed: int = 0, share: float = 0.6) -> np.ndarray:
    """A random keep mask, bool (units,), with at least one unit of every class and one unit gone."""
    generator = np.random.default_rng(seed)
    keep = generator.random(cmap.units) < share
    for group in range(int(cmap.classes.max(initial=-1)) + 1):
        members = np.flatnonzero(cmap.classes == group)
        if keep[members].all() and len(members) > 1:
            keep[generator.choice(members)] = False
        if not keep[members].any():
            keep[generator.choice(members)] = True
    return keep


def outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All tensors that the model returns, without gradients."""
    with torch.no_grad():
        return list(torch.utils._pytree.tree_leaves(model(*inputs)))


def counted_macs(net: nn.Module, example: Sequence[Tensor]) -> float:
    """MACs per example by torch's FLOP counter, which counts two per multiply-add.

    On the meta device, where attention is one op; the CPU's own attention would not be counted.
    """
    bare = copy.deepcopy(net).to("meta")
    if isinstance(bare, GraphNet):
        for node in bare.graph.nodes:  # tensors that the graph makes by itself
            if "device" in node.kwargs:
                node.update_kwarg("device", torch.device("meta"))
        bare.recompile()
    with FlopCounterMode(display=False) as counter:
        bare(*(x.to("meta") for x in example))
    return counter.get_total_flops() / 2 / example[0].shape[0]


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Cut:
    """One cut and its three networks."""

    traced: Traced
    cmap: ChannelMap
    keep: np.ndarray
    masked: GraphNet
    dense: GraphNet
    plan: Plan


def cut_at(traced: Traced, cmap: ChannelMap, keep: np.ndarray) -> Cut:
    masked = copy.deepcopy(traced.net)
    mask(masked, cmap, keep)
    dense, plan = cut(traced.net, cmap, keep)
    return Cut(traced, cmap, keep, masked, dense, plan)


def assert_exact(done: Cut, *, dtypes: Sequence[torch.dtype] = (torch.float64,), moves: bool = True) -> None:
    """Masked = dense on a batch other than the traced one, and the check is not vacuous.

    In float32 the error may reach twice what rounding alone does to the masked network.
    """
    wide: list[Tensor] = []
    for dtype in dtypes:
        inputs = [_another_batch(x, dtype) for x in done.traced.example]
        nets = [copy.deepcopy(net).to(dtype) for net in (done.traced.net, done.masked, done.dense)]
        before, masked, dense = (outputs(net, inputs) for net in nets)
        assert [x.shape for x in masked] == [x.shape for x in dense]
        error, movement = relative_error(masked, dense), relative_error(before, masked)
        tolerance = TOLERANCES[dtype]
        if error > tolerance and dtype == torch.float32 and wide:
            tolerance = 2 * relative_error(wide, [x.double() for x in masked])
        wide = masked if dtype == torch.float64 else wide
        assert error <= tolerance, f"relative error {error:.1e} in {dtype}"
        if moves:
            assert movement >= max(MOVEMENT * error, 1e-6), f"movement {movement:.1e}, error {error:.1e}"


def _another_batch(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.is_floating_point():
        return torch.cat([x, x[:1]])
    generator = torch.Generator().manual_seed(7)
    return torch.randn((3, *x.shape[1:]), generator=generator).to(dtype)


def assert_costs(done: Cut) -> None:
    """Predicted MACs and parameters are those of the dense network."""
    model, counts = cost_model(done.cmap), class_counts(done.cmap, done.keep)
    assert model.macs.total(counts) == counted_macs(done.dense, done.traced.example)
    assert model.params.total(counts) == parameter_count(done.dense)
    assert model.macs.total(model.full) == counted_macs(done.traced.net, done.traced.example)
    assert model.params.total(model.full) == parameter_count(done.traced.net)


def check_cut(model: nn.Module, example: Sequence[Tensor], seed: int = 0, share: float = 0.6) -> Cut:
    """Trace, label, cut at a random mask; assert exactness and costs."""
    traced = trace(model, example)
    cmap = channel_map(traced)
    done = cut_at(traced, cmap, random_keep(cmap, seed, share))
    assert_exact(done)
    assert_costs(done)
    return done


def free_units(cmap: ChannelMap, name: str, dim: int = 0) -> int:
    """How many different removable units lie on an axis."""
    units = cmap.axes.get((name, dim), np.array([-1]))
    return len(set(units[units >= 0].tolist()))


# -- refusals ------------------------------------------------------------------------------------------


def refused(kind: type[CompressError], code: int, call: Any, *texts: str) -> str:
    """``call`` raises ``kind`` with this exit code, in one line that holds every text."""
    with pytest.raises(kind) as caught:
        call()
    line = str(caught.value)
    assert caught.value.exit_code == code, line
    assert len(line.splitlines()) == 1
    for text in texts:
        assert text in line, line
    return line


class Canary:
    """Unpickling one creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# -- models --------------------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """Two convolutions with batch norm, a skip, dropout and a linear layer."""

    def __init__(self, width: int = 6, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act, self.drop = activation(), nn.Dropout(0.2)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(x + self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


class Mlp(nn.Module):
    """Linear layers and an activation; its channels are free of each other."""

    def __init__(self, widths: Sequence[int] = (4, 8, 8, 3), activation: Callable[[], nn.Module] = nn.SiLU):
        super().__init__()
        pairs = pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


class Tied(nn.Module):
    """An embedding whose table is also the weight of the output layer."""

    def __init__(self, words: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, words)
        self.head.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index)
        return self.head(x + nn.functional.silu(self.mix(x)))


def images(channels: int = 3, size: int = 8, batch: int = 2, seed: int = 1) -> tuple[Tensor]:
    """A batch of normal random images."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((batch, channels, size, size), generator=generator),)


def torchvision_model(name: str) -> nn.Module:
    """A randomised torchvision model; the slow random initialisation of two families is skipped."""
    import torchvision

    given: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name == "vit_b_16":
        given = {"image_size": 32}
    return randomise(torchvision.models.get_model(name, weights=None, **given))


def small_cifar() -> nn.Module:
    return randomise(cifar_resnet(depth=8, width=8))
