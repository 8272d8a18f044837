"""Attention inside windows: tokens cut into pieces that become part of the batch."""

from __future__ import annotations

from collections.abc import Callable

from random_attention import (
    Body,
    attention,
    fused,
    merged,
    plain,
    plain_fused,
    relative,
    sdpa,
    tables,
    unbound,
    weights,
)
from random_parts import Op, Table, fixed_numbers
from torch import Tensor, nn
from torch.nn import functional


def in_windows(m: Op, x: Tensor) -> Tensor:
    """Rows cut into windows of two, merged into the batch, and back."""
    batch, tokens, channels = x.shape
    windows = x.view(batch, tokens // 2, 2, channels).reshape(-1, 2, channels)
    return m.f(windows).view(batch, tokens, -1)


def in_windows_padded(m: Op, x: Tensor) -> Tensor:
    tokens = x.shape[1]
    return in_windows(m, functional.pad(x, (0, 0, 0, tokens % 2)))[:, :tokens]


def in_shifted_windows(m: Op, x: Tensor) -> Tensor:
    return in_windows_padded(m, x.roll(1, 1)).roll(-1, 1)


def window_mask(m: Op, x: Tensor) -> Tensor:
    """A mask per window, added to the scores of every head (Swin)."""
    windows, tokens = m.mask.shape[0], x.shape[1]
    q, k, v = unbound(m, x)
    scores = weights(m, q, k).view(-1, windows, m.heads, tokens, tokens) + m.mask[None, :, None]
    return m.out(merged(scores.view(-1, m.heads, tokens, tokens).softmax(-1) @ v))


def windowed(body: Body, inner: Callable[[Tensor, int], nn.Module]) -> Callable[[Tensor, int], nn.Module]:
    return lambda x, w: Op(body, f=inner(x[:1, :1].repeat(1, 2, 1), w))


WINDOW: Table = {
    "window": {
        "fused": windowed(in_windows_padded, fused(plain_fused)),
        "sdpa": windowed(in_windows_padded, fused(sdpa)),
        "shifted": windowed(in_shifted_windows, fused(relative, parts=tables)),
        "masked": lambda x, w: windowed(
            in_windows_padded,
            fused(window_mask, parts=lambda h, d, t: {"mask": fixed_numbers((x.shape[1] + 1) // 2, t, t)}),
        )(x, w),
        "grid": lambda x, w: Op(
            lambda m, x: (
                m.f(x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1))
                .unflatten(0, (-1, 2))
                .transpose(1, 2)
                .flatten(1, 2)
                if x.shape[1] % 2 == 0
                else x
            ),
            f=attention(plain)(x, w),
        ),
    }
}
