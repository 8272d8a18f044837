"""Blocks on maps that weigh channels or places: gates, position tables, attention over places."""

from __future__ import annotations

import torch
from random_parts import CONVS, Op, Table, conv, evened, fixed_numbers, param, pooled, rank
from torch import Tensor, nn
from torch.nn import functional

# -- gates ----------------------------------------------------------------------------------------------


def squeeze(x: Tensor, width: int) -> nn.Module:
    f = nn.Sequential(conv(x, 4, 1), nn.ReLU(), conv(x, x.shape[1], 1, channels=4), nn.Sigmoid())
    return Op(lambda m, x: x * m.f(pooled(x)), f=f)


def squeeze_linear(x: Tensor, width: int) -> nn.Module:
    f = nn.Sequential(nn.Linear(x.shape[1], 6), nn.SiLU(), nn.Linear(6, x.shape[1]), nn.Sigmoid())
    return Op(lambda m, x: x * m.f(x.flatten(2).mean(2)).view(-1, x.shape[1], *[1] * (x.dim() - 2)), f=f)


def squeeze_gather(m: Op, x: Tensor) -> Tensor:
    """Global context: one softmax map pools every channel."""
    places = m.at(x).flatten(2).softmax(2)
    context = torch.matmul(x.flatten(2), places.transpose(1, 2))
    return x + m.f(context.view(-1, x.shape[1], *[1] * (x.dim() - 2)))


GATE: Table = {
    "gate": {
        "squeeze": squeeze,
        "squeeze_linear": squeeze_linear,
        "single": lambda x, w: Op(lambda m, x: x * m.f(x).sigmoid(), f=conv(x, 1, 1)),
        "single_wide": lambda x, w: Op(
            lambda m, x: x * m.f(x).sigmoid(), f=nn.Sequential(conv(x, w), nn.SiLU(), conv(x, 1, channels=w))
        ),
        "self": lambda x, w: Op(lambda m, x: x * m.f(x).sigmoid(), f=conv(x, x.shape[1], 1)),
        "places": lambda x, w: Op(
            lambda m, x: x * m.f(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid(),
            f=conv(x, 1, channels=2),
        ),
        "neighbours": lambda x, w: Op(
            lambda m, x: (
                x * m.f(x.flatten(2).mean(2)[:, None]).sigmoid().view(-1, x.shape[1], *[1] * (x.dim() - 2))
            ),
            f=nn.Conv1d(1, 1, 3, padding=1, bias=False),
        ),
        "context": lambda x, w: Op(
            squeeze_gather,
            at=conv(x, 1, 1),
            f=nn.Sequential(conv(x, 4, 1), nn.ReLU(), conv(x, x.shape[1], 1, channels=4)),
        ),
        "halves": evened(lambda x, w: Op(lambda m, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1])),
        "first_channel": lambda x, w: Op(lambda m, x: x * x[:, :1].sigmoid()),
        "strength": lambda x, w: Op(lambda m, x: x * m.a, a=param(1)),
    },
    "position": {
        "full": lambda x, w: Op(lambda m, x: x + m.a, a=param(1, *x.shape[1:])),
        "channel": lambda x, w: Op(lambda m, x: x + m.a, a=param(1, x.shape[1], *[1] * rank(x))),
        "places": lambda x, w: Op(lambda m, x: x + m.a, a=param(1, 1, *x.shape[2:])),
        "buffer": lambda x, w: Op(lambda m, x: x + m.a, a=fixed_numbers(*x.shape[1:])),
        "mask": lambda x, w: Op(lambda m, x: x * m.a, a=(2 - fixed_numbers(*x.shape[2:])).round()),
        "coordinates": lambda x, w: Op(
            lambda m, x: torch.cat([x, m.a.expand(x.shape[0], *m.a.shape[1:])], 1),
            a=fixed_numbers(1, 2, *x.shape[2:]),
        ),
        "ones": lambda x, w: Op(lambda m, x: torch.cat([x, torch.ones_like(x[:, :1])], 1)),
        "token_channels": lambda x, w: Op(
            lambda m, x: torch.cat([m.a.expand(x.shape[0], -1, *x.shape[2:]), x], 1),
            a=param(1, 2, *[1] * rank(x)),
        ),
    },
}

# -- attention over places ------------------------------------------------------------------------------


def nonlocal_block(m: Op, x: Tensor) -> Tensor:
    q, k, v = (f(x).flatten(2) for f in (m.q, m.k, m.v))
    weights = torch.matmul(q.transpose(1, 2), k).softmax(-1)
    seen = torch.matmul(v, weights.transpose(1, 2)).unflatten(2, x.shape[2:])
    return x + m.strength * m.out(seen)


def conv_heads(m: Op, x: Tensor) -> Tensor:
    """Heads from one 1x1 conv, channels first (FastViT, LeViT, EfficientFormer)."""
    batch, places = x.shape[0], x.flatten(2).shape[2]
    q, k, v = m.qkv(x).reshape(batch, 2, 3 * 4, places).split([4, 4, 4], 2)
    weights = (q.transpose(2, 3) @ k * 0.5).softmax(-1)
    return m.out((v @ weights.transpose(2, 3)).reshape(batch, 8, *x.shape[2:]))


def linear_heads(m: Op, x: Tensor) -> Tensor:
    """EfficientViT: relu kernels, the normaliser through a padded row of ones."""
    q, k, v = m.qkv(x).flatten(2).unflatten(1, (2, 12)).chunk(3, 2)
    v = functional.pad(v, (0, 0, 0, 1), value=1.0)
    seen = (v @ k.relu().transpose(2, 3)) @ q.relu()
    seen = seen[:, :, :-1] / (seen[:, :, -1:] + 1.0)
    return m.out(seen.flatten(1, 2).unflatten(2, x.shape[2:]))


def selective(m: Op, x: Tensor) -> Tensor:
    """Selective kernels: a softmax over branches, per channel."""
    branches = torch.stack([f(x) for f in m.f], 1)
    chosen = m.choose(pooled(branches.sum(1)).flatten(1)).unflatten(1, (2, -1)).softmax(1)
    return (branches * chosen.view(*chosen.shape, *[1] * (x.dim() - 2))).sum(1)


def axial(m: Op, x: Tensor) -> Tensor:
    """A 1-d conv along the last axis of every row, rows merged into the batch."""
    rows = x.movedim(1, -2)
    return m.f(rows.flatten(0, -3)).reshape(*rows.shape[:-2], -1, rows.shape[-1]).movedim(-2, 1)


PLACES: Table = {
    "places": {
        "nonlocal": lambda x, w: Op(
            nonlocal_block,
            **{name: conv(x, 4, 1) for name in "qk"},
            v=conv(x, w, 1),
            out=conv(x, x.shape[1], 1, channels=w),
            strength=param(1),
        ),
        "conv_heads": lambda x, w: Op(conv_heads, qkv=conv(x, 24, 1), out=conv(x, w, 1, channels=8)),
        "linear_heads": lambda x, w: Op(linear_heads, qkv=conv(x, 24, 1), out=conv(x, w, 1, channels=8)),
        "selective": lambda x, w: Op(
            selective,
            f=nn.ModuleList([conv(x, w), conv(x, w, 5)]),
            choose=nn.Sequential(nn.Linear(w, 4), nn.ReLU(), nn.Linear(4, 2 * w)),
        ),
        "selective_heads": lambda x, w: Op(
            lambda m, x: sum(f(x) * g(pooled(x)).sigmoid() for f, g in zip(m.f, m.g, strict=True)),
            f=nn.ModuleList([conv(x, w), conv(x, w, 1)]),
            g=nn.ModuleList([conv(x, w, 1), conv(x, w, 1)]),
        ),
        "axial": lambda x, w: Op(axial, f=nn.Conv1d(x.shape[1], w, 3, padding=1)),
        "mixture": lambda x, w: Op(
            lambda m, x: sum(
                f(x) * c[:, i].view(-1, *[1] * (x.dim() - 1))
                for c in [m.choose(pooled(x).flatten(1)).softmax(1)]
                for i, f in enumerate(m.f)
            ),
            f=nn.ModuleList([conv(x, w, 1), conv(x, w, 1)]),
            choose=nn.Linear(x.shape[1], 2),
        ),
        "flat_conv": lambda x, w: Op(
            lambda m, x: m.f(x.flatten(2)).unflatten(2, x.shape[2:]), f=CONVS[0](x.shape[1], w, 3, padding=1)
        ),
    }
}
