"""Trained CIFAR-10 networks for benchmarks: two pretrained ones, two small ones trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, data_folder, note

NETS = ("resnet20", "resnet56", "vgg", "mobilenet")
PRETRAINED = {"resnet20": (20, "resnet20-12fca82f.th"), "resnet56": (56, "resnet56-4bfd9763.th")}
EPOCHS = 6


class Inverted(nn.Sequential):
    """1x1 up, 3x3 depthwise, 1x1 down, with a skip where the shape allows it (MobileNet v2)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 4) -> None:
        inner = inputs * expand
        super().__init__(
            *_conv(inputs, inner, 1, 1, 1), *_conv(inner, inner, 3, stride, inner),
            nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return x + y if self.skips else y


def _conv(inputs: int, outputs: int, size: int, stride: int, groups: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def vgg() -> nn.Module:
    """Eight 3x3 convolutions with batch norm, four poolings."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (32, 64, 128, 128):
        layers += [*_conv(inputs, outputs, 3, 1, 1), *_conv(outputs, outputs, 3, 1, 1), nn.MaxPool2d(2)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def mobilenet() -> nn.Module:
    """Seven inverted residuals."""
    plan = [(16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 1), (96, 96, 1)]
    blocks = [Inverted(*block) for block in plan]
    return nn.Sequential(
        *_conv(3, 16, 3, 1, 1), *blocks, *_conv(96, 256, 1, 1, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def load(name: str) -> nn.Module:
    """One of NETS in eval mode; what is trained here is kept in benchmarks/cache for the next time."""
    from safetensors.torch import load_file, save_file

    if name in PRETRAINED:
        from compress.zoo import cifar_resnet

        depth, file = PRETRAINED[name]
        found = torch.load(data_folder() / "weights" / file, map_location="cpu", weights_only=True)[
            "state_dict"
        ]
        net: nn.Module = cifar_resnet(depth)
        net.load_state_dict({key.removeprefix("module."): value for key, value in found.items()})
        return net.eval()
    torch.manual_seed(0)
    net, path = {"vgg": vgg, "mobilenet": mobilenet}[name](), RESULTS.parent / "cache" / f"{name}.safetensors"
    if not path.exists():
        _train(net, name)
        path.parent.mkdir(exist_ok=True)
        save_file(net.state_dict(), str(path))
    net.load_state_dict(load_file(str(path)))
    return net.eval()


def _train(net: nn.Module, name: str) -> None:
    from compress.config import TrainConfig
    from compress.train import train

    config = TrainConfig(epochs=EPOCHS, lr=0.1, weight_decay=5e-4, warmup_epochs=0.5, amp="bf16")
    done = train(net, task(128), config)
    note(f"{name}: {EPOCHS} epochs, validation {done.best:.4f}")


def task(batch: int, seed: int = 0, **limits: Any) -> Any:
    """CIFAR-10 with flips and crops for training; seed: of their order and of what is flipped and cropped."""
    from benchmarks import cifar10
    from compress.config import DataConfig, ModelConfig
    from compress.task import build_task

    data = DataConfig(
        name="benchmarks.cifar10:splits", mean=list(cifar10.MEAN), std=list(cifar10.STD),
        augment="flip_crop", batch_size=batch, validation=0.05, **limits,
    )  # fmt: skip
    return build_task(
        data, ModelConfig(name="benchmarks.cifar_nets:vgg", input_shape=[3, 32, 32]), seed, Path()
    )
