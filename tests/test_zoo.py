"""The CIFAR ResNets: sizes of He et al. and names of their parts."""

from __future__ import annotations

import pytest
import torch
from helpers import counted_macs, parameter_count

from compress.zoo import cifar_resnet


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameters_are_those_of_table_6(depth: int, millions: float) -> None:
    assert parameter_count(cifar_resnet(depth)) / 1e6 == pytest.approx(millions, rel=0.03)


def test_resnet_20_has_41_million_macs() -> None:
    assert counted_macs(cifar_resnet().eval(), (torch.zeros(1, 3, 32, 32),)) == pytest.approx(
        40.6e6, rel=0.01
    )


@pytest.mark.parametrize("depth", [2, 7, 9, 21, 0, -4])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth {depth} is not 6 n \+ 2"):
        cifar_resnet(depth)


def test_shapes_and_names() -> None:
    model = cifar_resnet(8, width=4, channels=1, classes=7)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 7)
    names = {name for name, _ in model.named_parameters()}
    assert {"conv1.weight", "bn1.bias", "layer3.0.conv2.weight", "linear.weight"} <= names
    assert not any("shortcut" in name or "downsample" in name for name in names)
    assert model.layer3[0].conv1.stride == (2, 2)
    assert model.layer3[0].bn2.num_features == 16
