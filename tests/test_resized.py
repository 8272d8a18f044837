"""A network at other widths without another export: the file that an export would have given, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from compress.channelmap import channel_map
from compress.surgery import cut
from compress.trace import GraphNet, trace
from compress.zoo import cifar_resnet
from deploy.resized import resize, same_network
from deploy.to_onnx import export
from tests.helpers import random_keep, randomise
from tests.precision_nets import Block, Inverted, run_plainly


class Residual(nn.Module):
    """A stem and a residual block whose shortcut is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12))
        self.short = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (self.two(self.one(x)) + self.short(x)).relu()
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """Groups of more than one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


class Multiplied(Grouped):
    """A depthwise convolution that makes two channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.head = nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.Linear(32, 5)


def cut_by(build: Callable[[], nn.Module], seed: int) -> tuple[GraphNet, GraphNet]:
    """A net and a narrower one of it."""
    traced = trace(randomise(build()).eval(), (torch.randn(2, 3, 16, 16),))
    cmap = channel_map(traced)
    return traced.net, cut(traced.net, cmap, random_keep(cmap, seed))[0].eval()


def exported(net: nn.Module, path: Path) -> Path:
    export(net, torch.randn(2, 3, 16, 16), path)
    return path


def shapes_of(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    "build", [pytest.param(c, marks=pytest.mark.slow) for c in (Inverted, Residual, Multiplied)]
)
def test_it_is_what_an_export_gives(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    wide, narrow = cut_by(build, 0)
    source, path = exported(wide, tmp_path / "wide.onnx"), tmp_path / "narrow.onnx"
    before = source.read_bytes()
    assert resize(source, path, shapes_of(narrow))
    assert source.read_bytes() == before
    assert same_network(path, exported(narrow, tmp_path / "exported.onnx"))
    assert not same_network(path, source)
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    found = run_plainly(path, x)
    assert found.shape == (3, 5)
    assert np.isfinite(found).all()
    assert found.std() > 1e-3  # activations stay far from numbers so small that they take longer
    again = tmp_path / "again.onnx"
    assert resize(source, again, shapes_of(narrow))
    assert again.read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraphNet, GraphNet]:
    """An exported net, the net, and a narrower one."""
    wide, narrow = cut_by(Residual, 0)
    return exported(wide, tmp_path_factory.mktemp("residual") / "wide.onnx"), wide, narrow


def test_its_own_widths_give_the_same_network(
    residual: tuple[Path, GraphNet, GraphNet], tmp_path: Path
) -> None:
    source, wide, _ = residual
    assert resize(source, tmp_path / "same.onnx", shapes_of(wide))
    assert same_network(tmp_path / "same.onnx", source)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: cifar_resnet(8, 8), marks=pytest.mark.slow),
        pytest.param(Block, marks=pytest.mark.slow),
        Grouped,
    ],
)
@pytest.mark.slow
def test_where_it_is_not_sure_it_writes_nothing(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Padded shortcuts, weights that the exporter transposed, groups that may have left in two ways."""
    wide, narrow = cut_by(build, 1)
    source, path = exported(wide, tmp_path / "wide.onnx"), tmp_path / "narrow.onnx"
    if resize(source, path, shapes_of(narrow)):
        assert same_network(path, exported(narrow, tmp_path / "exported.onnx"))
        pytest.fail("it was sure, and right: then it belongs in the test above")
    assert not path.exists()


def test_shapes_that_do_not_fit_together(residual: tuple[Path, GraphNet, GraphNet], tmp_path: Path) -> None:
    source, _, narrow = residual
    path = tmp_path / "narrow.onnx"
    given = shapes_of(narrow)
    for changed in ({"head.weight": (5, 99)}, {"head.weight": (5,)}):
        assert not resize(source, path, given | changed)
    given.pop("one.0.weight")
    assert not resize(source, path, given)
    assert not path.exists()


def test_a_difference_shows(residual: tuple[Path, GraphNet, GraphNet], tmp_path: Path) -> None:
    source, _, _ = residual
    changed = onnx.load(source)
    conv = next(node for node in changed.graph.node if node.op_type == "Conv")
    next(entry for entry in conv.attribute if entry.name == "strides").ints[:] = [1, 1]
    onnx.save(changed, tmp_path / "strided.onnx")
    assert not same_network(source, tmp_path / "strided.onnx")
    assert same_network(source, source)
