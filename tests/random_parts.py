"""What the random networks are made of: block descriptions, the table of kinds, and small building parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONV_FUNCTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED_FUNCTIONS = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
NORMS = {
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "instance": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}


class Plain:
    """A frozen dataclass whose repr leaves the defaults out: short enough to paste into a list."""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Block(Plain):
    """One block as data. kind and option: its place in the tables. width: the channels (or inner width) it
    aims at. inside, other: blocks it wraps."""

    kind: str
    option: str
    width: int = 8
    inside: tuple[Block, ...] = ()
    other: tuple[Block, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.option}"


Maker = Callable[[Tensor, int], nn.Module]
Table = dict[str, dict[str, Maker]]


class Op(nn.Module):
    """A forward function with the parameters, buffers, modules and numbers that it uses."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def fixed_numbers(*shape: int) -> Tensor:
    """A buffer's values: the same for the same shape."""
    return torch.linspace(0.5, 1.5, math.prod(shape)).reshape(shape)


def rank(x: Tensor) -> int:
    """Spatial dimensions of a map (batch, channels, ...)."""
    return x.dim() - 2


def conv(x: Tensor, width: int, kernel: int = 3, **given: Any) -> nn.Module:
    """A size-keeping convolution on `x` (or on a tensor of its shape)."""
    given.setdefault("padding", given.get("dilation", 1) * (kernel // 2))
    return CONVS[rank(x) - 1](given.pop("channels", x.shape[1]), width, kernel, **given)


def norm(x: Tensor, kind: str, **given: Any) -> nn.Module:
    return NORMS[kind][rank(x) - 1](x.shape[1], **given)


def even(width: int, by: int = 2) -> int:
    """The nearest multiple of `by` that is not smaller."""
    return -(-width // by) * by


def groups_of(x: Tensor, at_most: int) -> int:
    return math.gcd(x.shape[1], at_most)


def large(x: Tensor, least: int = 4) -> bool:
    """Whether every spatial size can be halved."""
    return min(x.shape[2:]) >= least and all(size % 2 == 0 for size in x.shape[2:])


def small(x: Tensor) -> bool:
    return max(x.shape[2:]) <= 8


def evened(maker: Maker, by: int = 2) -> Maker:
    """Give a maker a channel count that it can divide, by a 1x1 conv in front where needed."""

    def make(x: Tensor, width: int) -> nn.Module:
        if x.shape[1] % by == 0:
            return maker(x, width)
        first = conv(x, even(x.shape[1], by), 1)
        return nn.Sequential(first, maker(first(x), width))

    return make


def flat_only(maker: Maker) -> Maker:
    """Makers for two spatial dimensions; elsewhere nothing happens."""
    return lambda x, width: maker(x, width) if rank(x) == 2 else nn.Identity()


def halving(maker: Maker) -> Maker:
    """Makers that halve every spatial size; maps too small for that are left alone."""
    return lambda x, width: maker(x, width) if large(x) else nn.Identity()


def doubling(maker: Maker) -> Maker:
    return lambda x, width: maker(x, width) if small(x) else nn.Identity()


def pooled(y: Tensor) -> Tensor:
    """The mean of each channel, with spatial dimensions of size 1."""
    return y.mean(tuple(range(2, y.dim())), keepdim=True)


def per_channel(y: Tensor, values: Tensor) -> Tensor:
    """Values (channels,) shaped to meet the channels of a map."""
    return values.view(-1, *[1] * (y.dim() - 2))


def sequence(makers: Sequence[Callable[[Tensor], nn.Module]], x: Tensor) -> nn.Sequential:
    """Modules in a row, each made for what the one before gives."""
    steps = []
    for make in makers:
        steps.append(make(x))
        x = steps[-1].eval()(x)
    return nn.Sequential(*steps)
