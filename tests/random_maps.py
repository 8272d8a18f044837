"""Blocks that work on maps, shape (batch, channels, *sizes) with one to three spatial dimensions."""

from __future__ import annotations

import torch
from random_parts import (
    CONV_FUNCTIONS,
    TRANSPOSED,
    TRANSPOSED_FUNCTIONS,
    Op,
    Table,
    conv,
    doubling,
    even,
    evened,
    fixed_numbers,
    groups_of,
    halving,
    large,
    norm,
    param,
    per_channel,
    pooled,
    rank,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

# -- convolutions ---------------------------------------------------------------------------------------


def computed_conv(x: Tensor, width: int, weigh: object, **parts: object) -> nn.Module:
    """A convolution whose weight is a function of its parameters."""
    function = CONV_FUNCTIONS[rank(x) - 1]
    return Op(lambda m, x: function(x, weigh(m), m.bias, padding=1), bias=param(width), **parts)  # type: ignore[operator]


def standardised(m: Op) -> Tensor:
    dims = tuple(range(1, m.weight.dim()))
    centred = m.weight - m.weight.mean(dims, keepdim=True)
    return (
        centred / (centred.var(dims, keepdim=True) + 1e-5).sqrt() * per_channel(m.weight, m.gain)[..., None]
    )


def kernel3(x: Tensor, width: int) -> nn.Parameter:
    return param(width, x.shape[1], *[3] * rank(x))


def pointwise_weight(x: Tensor, width: int) -> nn.Parameter:
    return param(width, x.shape[1])


CONV: Table = {
    "conv": {
        "plain": lambda x, w: conv(x, w),
        "pointwise": lambda x, w: conv(x, w, 1),
        "strided": halving(lambda x, w: conv(x, w, stride=2)),
        "dilated": lambda x, w: conv(x, w, dilation=2),
        "bare": lambda x, w: conv(x, w, bias=False),
        "same": lambda x, w: conv(x, w, padding="same"),
        "reflect": lambda x, w: conv(x, w, padding_mode="reflect"),
        "circular": lambda x, w: conv(x, w, padding_mode="circular"),
        "weight_norm": lambda x, w: weight_norm(conv(x, w)),
        "standardised": lambda x, w: computed_conv(x, w, standardised, weight=kernel3(x, w), gain=param(w)),
        "summed": lambda x, w: computed_conv(
            x, w, lambda m: m.a + m.b * 0.5, a=kernel3(x, w), b=kernel3(x, w)
        ),
        "scaled": lambda x, w: computed_conv(
            x,
            w,
            lambda m: m.a * m.gain.view(-1, *[1] * (m.a.dim() - 1)),
            a=kernel3(x, w),
            gain=param(w),
        ),
        "turned": lambda x, w: computed_conv(
            x, w, lambda m: m.a.transpose(0, 1), a=param(x.shape[1], w, *[3] * rank(x))
        ),
        "matmul": lambda x, w: Op(
            lambda m, x: torch.matmul(m.a, x.flatten(2)).unflatten(2, x.shape[2:]), a=pointwise_weight(x, w)
        ),
        "einsum": lambda x, w: Op(
            lambda m, x: torch.einsum("bcn,oc->bon", x.flatten(2), m.a).unflatten(2, x.shape[2:]),
            a=pointwise_weight(x, w),
        ),
        "channels_last": lambda x, w: Op(
            lambda m, x: m.f(x.movedim(1, -1)).movedim(-1, 1), f=nn.Linear(x.shape[1], w)
        ),
        "bottleneck": lambda x, w: nn.Sequential(conv(x, 4, 1), nn.SiLU(), conv(x, w, channels=4)),
    },
    "grouped": {
        "two": evened(lambda x, w: conv(x, even(w), groups=2)),
        "four": evened(lambda x, w: conv(x, even(w, 4), groups=4), 4),
        "depthwise": lambda x, w: conv(x, x.shape[1], groups=x.shape[1]),
        "multiplier": lambda x, w: conv(x, 2 * x.shape[1], groups=x.shape[1]),
        "narrow": lambda x, w: conv(x, groups_of(x, 4), groups=groups_of(x, 4)),
        "funnel": evened(lambda x, w: conv(x, x.shape[1] // 2, groups=x.shape[1] // 2)),
        "separable": lambda x, w: nn.Sequential(
            conv(x, x.shape[1], groups=x.shape[1], bias=False), conv(x, w, 1)
        ),
        "resnext": lambda x, w: nn.Sequential(
            conv(x, 8, 1), nn.ReLU(), conv(x, 8, channels=8, groups=4), nn.ReLU(), conv(x, w, 1, channels=8)
        ),
        "stacked": lambda x, w: nn.Sequential(
            conv(x, 8, 1),
            conv(x, 8, channels=8, groups=2),
            nn.ReLU(),
            conv(x, 16, channels=8, groups=4),
            conv(x, w, 1, channels=16),
        ),
        "shuffled": lambda x, w: nn.Sequential(
            conv(x, 8, 1),
            conv(x, 8, channels=8, groups=2),
            nn.ChannelShuffle(2),
            conv(x, 8, channels=8, groups=2),
        ),
        "mixed": evened(
            lambda x, w: Op(
                lambda m, x: torch.cat([f(p) for f, p in zip(m.f, x.chunk(2, 1), strict=True)], 1),
                f=nn.ModuleList(
                    conv(x, x.shape[1] // 2, k, channels=x.shape[1] // 2, groups=x.shape[1] // 2)
                    for k in (3, 5)
                ),
            )
        ),
    },
    "transposed": {
        "double": doubling(lambda x, w: TRANSPOSED[rank(x) - 1](x.shape[1], w, 2, stride=2)),
        "plain": lambda x, w: TRANSPOSED[rank(x) - 1](x.shape[1], w, 3, padding=1),
        "bare": lambda x, w: TRANSPOSED[rank(x) - 1](x.shape[1], w, 3, padding=1, bias=False),
        "output_padding": doubling(
            lambda x, w: TRANSPOSED[rank(x) - 1](x.shape[1], w, 3, stride=2, padding=1, output_padding=1)
        ),
        "grouped": evened(lambda x, w: TRANSPOSED[rank(x) - 1](x.shape[1], even(w), 3, padding=1, groups=2)),
        "depthwise": lambda x, w: TRANSPOSED[rank(x) - 1](
            x.shape[1], x.shape[1], 3, padding=1, groups=x.shape[1]
        ),
    },
}

# -- per channel ----------------------------------------------------------------------------------------


def norm_layer2d(m: Op, x: Tensor) -> Tensor:
    """ConvNeXt's channels-first layer norm, written out."""
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    return per_channel(x, m.gain) * scaled + per_channel(x, m.shift)


def frozen(x: Tensor, width: int) -> nn.Module:
    if rank(x) == 2:
        return FrozenBatchNorm2d(x.shape[1])
    return Op(
        lambda m, x: x * per_channel(x, m.gain) + per_channel(x, m.shift),
        gain=fixed_numbers(x.shape[1]),
        shift=-fixed_numbers(x.shape[1]),
    )


NORM: Table = {
    "norm": {
        "batch": lambda x, w: norm(x, "batch"),
        "batch_bare": lambda x, w: norm(x, "batch", affine=False),
        "instance": lambda x, w: norm(x, "instance"),
        "instance_affine": lambda x, w: norm(x, "instance", affine=True),
        "frozen": frozen,
        "affine": lambda x, w: Op(
            lambda m, x: x * per_channel(x, m.gain) + per_channel(x, m.shift),
            gain=param(x.shape[1]),
            shift=param(x.shape[1]),
        ),
        "filter_response": lambda x, w: Op(
            lambda m, x: torch.maximum(
                x * (x.pow(2).mean(tuple(range(2, x.dim())), keepdim=True) + 1e-5).rsqrt() * m.gain, m.floor
            ),
            gain=param(1, x.shape[1], *[1] * rank(x)),
            floor=param(1, x.shape[1], *[1] * rank(x)),
        ),
        "group": evened(lambda x, w: nn.GroupNorm(2, x.shape[1])),
        "group_each": lambda x, w: nn.GroupNorm(x.shape[1], x.shape[1]),
        "group_single": lambda x, w: nn.GroupNorm(1, x.shape[1]),
        "layer": lambda x, w: Op(
            lambda m, x: m.f(x.movedim(1, -1)).movedim(-1, 1), f=nn.LayerNorm(x.shape[1])
        ),
        "layer2d": lambda x, w: Op(norm_layer2d, gain=param(x.shape[1]), shift=param(x.shape[1])),
        "unit_length": lambda x, w: Op(lambda m, x: functional.normalize(x, dim=1)),
        "local_response": lambda x, w: nn.LocalResponseNorm(3),
    },
    "act": {
        "relu": lambda x, w: nn.ReLU(inplace=True),
        "silu": lambda x, w: nn.SiLU(),
        "gelu": lambda x, w: nn.GELU(),
        "hardswish": lambda x, w: nn.Hardswish(),
        "softplus": lambda x, w: nn.Softplus(),
        "tanh_shrink": lambda x, w: nn.Tanhshrink(),
        "mish": lambda x, w: nn.Mish(),
        "prelu": lambda x, w: nn.PReLU(x.shape[1]),
        "prelu_single": lambda x, w: nn.PReLU(),
        "snake": lambda x, w: Op(
            lambda m, x: x + torch.sin(m.a * x).pow(2) / (m.a.abs() + 1), a=param(x.shape[1], *[1] * rank(x))
        ),
        "crelu": lambda x, w: Op(lambda m, x: torch.cat([x.relu(), (-x).relu()], 1)),
        "glu": evened(lambda x, w: nn.GLU(1)),
        "chunk_gate": evened(lambda x, w: Op(lambda m, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid())),
        "maxout": evened(lambda x, w: Op(lambda m, x: x.unflatten(1, (-1, 2)).amax(2))),
        "maxout_split": evened(lambda x, w: Op(lambda m, x: torch.max(*x.split(x.shape[1] // 2, 1)))),
        "softmax_channels": lambda x, w: Op(lambda m, x: x * x.softmax(1)),
        "softmax_places": lambda x, w: Op(lambda m, x: x * x.flatten(2).softmax(2).view(x.shape)),
        "dropout": lambda x, w: nn.Dropout(0.1),
        "where": lambda x, w: Op(lambda m, x: torch.where(x > 0, x, 0.1 * x.exp())),
    },
    "pool": {
        "max": halving(lambda x, w: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank(x) - 1](2)),
        "average": halving(lambda x, w: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[rank(x) - 1](2)),
        "adaptive": lambda x, w: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[
            rank(x) - 1
        ](2),
        "centre": lambda x, w: Op(lambda m, x: x - pooled(x)),
        "spread": lambda x, w: Op(lambda m, x: x + pooled(x).expand_as(x)),
        "blur": halving(
            lambda x, w: Op(
                lambda m, x: CONV_FUNCTIONS[x.dim() - 3](x, m.kernel, stride=2, padding=1, groups=x.shape[1]),
                kernel=fixed_numbers(1, 1, *[3] * rank(x)).repeat(x.shape[1], *[1] * (1 + rank(x))) / 9,
            )
        ),
        "pyramid": lambda x, w: Op(
            lambda m, x: (
                torch.cat(
                    [x, functional.interpolate(functional.adaptive_avg_pool2d(x, 2), size=x.shape[2:])], 1
                )
                if x.dim() == 4
                else torch.cat([x, pooled(x).expand_as(x)], 1)
            )
        ),
        "up_nearest": doubling(lambda x, w: nn.Upsample(scale_factor=2)),
        "up_linear": doubling(
            lambda x, w: nn.Upsample(
                scale_factor=2, mode=("linear", "bilinear", "trilinear")[rank(x) - 1], align_corners=False
            )
        ),
        "over_channels": lambda x, w: Op(lambda m, x: x + x.amax(1, keepdim=True)),
    },
}

# -- modules and weights used more than once -------------------------------------------------------------


def autoencoder(x: Tensor, width: int) -> nn.Module:
    there, back = CONV_FUNCTIONS[rank(x) - 1], TRANSPOSED_FUNCTIONS[rank(x) - 1]
    weight = param(width, x.shape[1], *[3] * rank(x))
    return Op(lambda m, x: back(there(x, m.a, padding=1).relu(), m.a, padding=1), a=weight)


def shared_head(x: Tensor, width: int) -> nn.Module:
    """One convolution over two scales, as detection heads have it."""
    if not large(x):
        return conv(x, width)
    return Op(
        lambda m, x: m.f(x) + functional.interpolate(m.f(m.down(x)).relu(), scale_factor=2.0, mode="nearest"),
        f=conv(x, width),
        down=conv(x, x.shape[1], stride=2),
    )


SHARED: Table = {
    "shared": {
        "twice": lambda x, w: Op(lambda m, x: m.f(m.f(x).relu()), f=conv(x, x.shape[1])),
        "recurrent": lambda x, w: Op(
            lambda m, x: m.f(m.f(m.start(x)).relu() + x).relu() + x,
            start=conv(x, x.shape[1], 1),
            f=conv(x, x.shape[1]),
        ),
        "branches": lambda x, w: Op(lambda m, x: torch.cat([m.f(x), m.f(x.flip(-1))], 1), f=conv(x, w)),
        "own_norms": lambda x, w: Op(
            lambda m, x: m.a(m.f(x)).relu() + m.b(m.f(2 * x)).relu(),
            f=conv(x, w, bias=False),
            a=norm(x.new_empty(1, w, *x.shape[2:]), "batch"),
            b=norm(x.new_empty(1, w, *x.shape[2:]), "batch"),
        ),
        "scales": shared_head,
        "autoencoder": autoencoder,
        "halved_weight": evened(
            lambda x, w: Op(
                lambda m, x: m.f(x) + CONV_FUNCTIONS[x.dim() - 3](x, m.f.weight * 0.5, None, padding=1),
                f=conv(x, w),
            )
        ),
        "same_vector": lambda x, w: Op(
            lambda m, x: m.f(x * per_channel(x, m.a)) + m.f(per_channel(x, m.a) + x),
            a=param(x.shape[1]),
            f=conv(x, w, 1),
        ),
    }
}
