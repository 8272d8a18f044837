"""Blocks that work on tokens, shape (batch, tokens, channels): MLPs, mixers, position tables."""

from __future__ import annotations

import torch
from random_attention import ATTENTION
from random_parts import Op, Table, fixed_numbers, param
from random_windows import WINDOW
from torch import Tensor, nn
from torch.nn import functional


def linear(x: Tensor, width: int, **given: bool) -> nn.Module:
    return nn.Linear(x.shape[-1], width, **given)


def swiglu(m: Op, x: Tensor) -> Tensor:
    return m.down(functional.silu(m.gate(x)) * m.up(x))


def fused_glu(m: Op, x: Tensor) -> Tensor:
    a, b = m.up(x).chunk(2, -1)
    return m.down(a * functional.gelu(b))


def mlp(x: Tensor, width: int, out: int, act: type[nn.Module] = nn.GELU) -> nn.Module:
    return nn.Sequential(linear(x, width), act(), nn.Dropout(0.1), nn.Linear(width, out))


def conv_mlp(m: Op, x: Tensor) -> Tensor:
    """A depthwise conv over the tokens between the two layers of an MLP."""
    y = m.up(x).transpose(1, 2)
    return m.down(functional.gelu(m.middle(y).transpose(1, 2)))


def low_rank(m: Op, x: Tensor) -> Tensor:
    """A frozen layer with a trained low-rank update (LoRA), merged in the forward."""
    return functional.linear(x, m.f.weight + m.b @ m.a, m.f.bias)


def grouped_linear(m: Op, x: Tensor) -> Tensor:
    """Two experts' weights in one parameter, applied to halves of the tokens' channels."""
    return torch.einsum("btgc,gco->btgo", x.unflatten(-1, (2, -1)), m.a).flatten(-2)


def merge_pairs(m: Op, x: Tensor) -> Tensor:
    """Swin's patch merging, in one dimension."""
    if x.shape[1] % 2:
        x = functional.pad(x, (0, 0, 0, 1))
    return m.f(torch.cat([x[:, ::2], x[:, 1::2]], -1))


def with_token(m: Op, x: Tensor) -> Tensor:
    return torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)


TOKENS: Table = {
    "linear": {
        "plain": lambda x, w: linear(x, w),
        "bare": lambda x, w: linear(x, w, bias=False),
        "matmul": lambda x, w: Op(lambda m, x: x @ m.a + m.b, a=param(x.shape[-1], w), b=param(w)),
        "einsum": lambda x, w: Op(lambda m, x: torch.einsum("btc,co->bto", x, m.a), a=param(x.shape[-1], w)),
        "einsum_heads": lambda x, w: Op(
            lambda m, x: torch.einsum("bthd,hdo->bto", torch.einsum("btc,chd->bthd", x, m.a).relu(), m.b),
            a=param(x.shape[-1], 2, 3),
            b=param(2, 3, w),
        ),
        "low_rank": lambda x, w: Op(low_rank, f=linear(x, w), a=param(2, x.shape[-1]), b=param(w, 2)),
        "grouped": lambda x, w: nn.Sequential(
            linear(x, 8), Op(grouped_linear, a=param(2, 4, max(1, w // 2)))
        ),
        "turned": lambda x, w: Op(lambda m, x: functional.linear(x, m.a.t()), a=param(x.shape[-1], w)),
        "conv": lambda x, w: Op(
            lambda m, x: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.Conv1d(x.shape[-1], w, 3, padding=1)
        ),
        "patches": lambda x, w: nn.Sequential(Op(merge_pairs, f=nn.Linear(2 * x.shape[-1], w))),
        "tied": lambda x, w: Op(
            lambda m, x: functional.linear(functional.linear(x, m.a).relu(), m.a.t()), a=param(w, x.shape[-1])
        ),
        "twice": lambda x, w: Op(lambda m, x: m.f(m.f(x).relu()), f=linear(x, x.shape[-1])),
    },
    "mlp": {
        "gelu": lambda x, w: mlp(x, w, x.shape[-1]),
        "relu_squared": lambda x, w: Op(
            lambda m, x: m.b(m.a(x).relu().square()), a=linear(x, w), b=nn.Linear(w, x.shape[-1])
        ),
        "swiglu": lambda x, w: Op(swiglu, gate=linear(x, w), up=linear(x, w), down=nn.Linear(w, x.shape[-1])),
        "fused_glu": lambda x, w: Op(fused_glu, up=linear(x, 2 * w), down=nn.Linear(w, x.shape[-1])),
        "glu": lambda x, w: nn.Sequential(linear(x, 2 * w), nn.GLU(-1), nn.Linear(w, x.shape[-1])),
        "conv": lambda x, w: Op(
            conv_mlp,
            up=linear(x, w),
            middle=nn.Conv1d(w, w, 3, padding=1, groups=w),
            down=nn.Linear(w, x.shape[-1]),
        ),
        "normed": lambda x, w: nn.Sequential(
            linear(x, w), nn.LayerNorm(w), nn.GELU(), nn.Linear(w, x.shape[-1])
        ),
        "batch_normed": lambda x, w: Op(
            lambda m, x: m.b(m.n(m.a(x).flatten(0, 1)).relu().view(-1, x.shape[1], m.n.num_features)),
            a=linear(x, w),
            n=nn.BatchNorm1d(w),
            b=nn.Linear(w, x.shape[-1]),
        ),
        "mixer": lambda x, w: Op(
            lambda m, x: x + m.f(x.transpose(1, 2)).transpose(1, 2),
            f=nn.Sequential(nn.Linear(x.shape[1], w), nn.GELU(), nn.Linear(w, x.shape[1])),
        ),
        "gated_tokens": lambda x, w: Op(
            lambda m, x: m.b((lambda u, v: u * (m.t @ v))(*functional.gelu(m.a(x)).chunk(2, -1))),
            a=linear(x, 2 * w),
            t=param(x.shape[1], x.shape[1]),
            b=nn.Linear(w, x.shape[-1]),
        ),
    },
    "token_norm": {
        "layer": lambda x, w: nn.LayerNorm(x.shape[-1]),
        "layer_bare": lambda x, w: nn.LayerNorm(x.shape[-1], elementwise_affine=False),
        "rms": lambda x, w: nn.RMSNorm(x.shape[-1]),
        "rms_written": lambda x, w: Op(
            lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.gain,
            gain=param(x.shape[-1]),
        ),
        "over_tokens": lambda x, w: Op(
            lambda m, x: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.LayerNorm(x.shape[1])
        ),
        "batch": lambda x, w: Op(
            lambda m, x: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.BatchNorm1d(x.shape[-1])
        ),
        "affine": lambda x, w: Op(
            lambda m, x: x * m.a + m.b, a=param(1, 1, x.shape[-1]), b=param(1, 1, x.shape[-1])
        ),
        "tanh": lambda x, w: Op(
            lambda m, x: torch.tanh(m.s * x) * m.a + m.b,
            s=param(1),
            a=param(x.shape[-1]),
            b=param(x.shape[-1]),
        ),
    },
    "place_in_row": {
        "full": lambda x, w: Op(lambda m, x: x + m.a, a=param(1, *x.shape[1:])),
        "buffer": lambda x, w: Op(lambda m, x: x + m.a, a=fixed_numbers(*x.shape[1:])),
        "looked_up": lambda x, w: Op(
            lambda m, x: x + m.f(torch.arange(x.shape[1])), f=nn.Embedding(x.shape[1], x.shape[-1])
        ),
        "looked_up_buffer": lambda x, w: Op(
            lambda m, x: x + m.f(m.ids),
            f=nn.Embedding(x.shape[1] + 2, x.shape[-1]),
            ids=torch.arange(x.shape[1]),
        ),
        "sliced": lambda x, w: Op(
            lambda m, x: x + m.a[:, : x.shape[1]], a=param(1, x.shape[1] + 2, x.shape[-1])
        ),
        "layer_scale": lambda x, w: Op(lambda m, x: x + m.a * x.sin(), a=param(x.shape[-1])),
    },
    "row": {
        "with_token": lambda x, w: Op(with_token, token=param(1, 1, x.shape[-1])),
        "without_first": lambda x, w: Op(lambda m, x: x[:, 1:] if x.shape[1] > 2 else x),
        "with_mean": lambda x, w: Op(lambda m, x: torch.cat([x, x.mean(1, keepdim=True)], 1)),
        "times_mean": lambda x, w: Op(lambda m, x: x * x.mean(1, keepdim=True).sigmoid()),
        "pooled_pairs": lambda x, w: Op(
            lambda m, x: functional.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2) if x.shape[1] > 3 else x
        ),
        "shifted": lambda x, w: Op(lambda m, x: x + 0.5 * x.roll(1, 1)),
        "shifted_halves": lambda x, w: Op(
            lambda m, x: torch.cat([functional.pad(x[..., :1], (0, 0, 1, 0))[:, :-1], x[..., 1:]], -1)
        ),
        "reversed": lambda x, w: Op(lambda m, x: x.flip(1)),
        "summed_up": lambda x, w: Op(lambda m, x: x.cumsum(1) / x.shape[1]),
        "chosen": lambda x, w: Op(lambda m, x: x[:, m.at], at=torch.arange(x.shape[1]).flip(0)),
        "single_gate": lambda x, w: Op(lambda m, x: x * m.f(x).sigmoid(), f=linear(x, 1)),
        "wide_gate": lambda x, w: Op(lambda m, x: x * m.f(x).sigmoid(), f=linear(x, x.shape[-1])),
        "weighted_mean": lambda x, w: Op(
            lambda m, x: x + m.f(x).softmax(1).transpose(1, 2) @ x, f=linear(x, 1)
        ),
    },
    **ATTENTION,
    **WINDOW,
}
