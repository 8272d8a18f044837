"""Blocks that move channels: splits, shuffles, padding, slices (see `random_maps`)."""

from __future__ import annotations

import torch
from random_parts import (
    Op,
    Table,
    conv,
    even,
    evened,
    flat_only,
    halving,
    large,
    rank,
)
from torch import Tensor, nn
from torch.nn import functional


def at_least(x: Tensor, share: int) -> int:
    return max(1, x.shape[1] // share)


def half(x: Tensor) -> int:
    return x.shape[1] // 2


# -- splits -----------------------------------------------------------------------------------------------


def c2f(m: Op, x: Tensor) -> Tensor:
    """YOLO's C2f by chunk; every bottleneck's output joins."""
    parts = list(m.first(x).chunk(2, 1))
    for f in m.steps:
        parts.append(f(parts[-1]))
    return m.last(torch.cat(parts, 1))


def c2f_sized(m: Op, x: Tensor) -> Tensor:
    parts = list(m.first(x).split((m.part, m.part), 1))
    parts.extend(f(parts[-1]) + parts[-1] for f in m.steps)
    return m.last(torch.cat(parts, 1))


def c2f_parts(x: Tensor, width: int) -> dict[str, object]:
    part = even(width) // 2
    steps = [nn.Sequential(conv(x, part, channels=part), nn.SiLU()) for _ in range(2)]
    return {
        "part": part,
        "first": conv(x, 2 * part, 1),
        "steps": nn.ModuleList(steps),
        "last": conv(x, width, 1, channels=4 * part),
    }


def shuffle_unit(m: Op, x: Tensor) -> Tensor:
    """ShuffleNet v2: half passes, half is convolved, then a shuffle of the two."""
    kept, worked = x.chunk(2, 1)
    y = torch.cat([kept, m.f(worked)], 1)
    return y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def res2net(m: Op, x: Tensor) -> Tensor:
    parts = torch.split(m.first(x), 3, 1)
    found = [parts[0]]
    for f, part in zip(m.steps, parts[1:], strict=True):
        found.append(f(part if len(found) == 1 else part + found[-1]).relu())
    return m.last(torch.cat(found, 1))


SPLIT: Table = {
    "split": {
        "c2f": lambda x, w: Op(c2f, **c2f_parts(x, w)),
        "c2f_sized": lambda x, w: Op(c2f_sized, **c2f_parts(x, w)),
        "shuffle_unit": evened(lambda x, w: Op(shuffle_unit, f=conv(x, half(x), channels=half(x)))),
        "res2net": lambda x, w: Op(
            res2net,
            first=conv(x, 9, 1),
            steps=nn.ModuleList(conv(x, 3, channels=3) for _ in range(2)),
            last=conv(x, w, 1, channels=9),
        ),
        "uneven": lambda x, w: Op(
            lambda m, x: torch.cat([m.f(x[:, : m.at]), x[:, m.at :]], 1),
            at=at_least(x, 3),
            f=conv(x, w, channels=at_least(x, 3)),
        ),
        "three": evened(
            lambda x, w: Op(lambda m, x: (lambda a, b, c: a * b.sigmoid() + c)(*x.chunk(3, 1))), 3
        ),
        "unbound": evened(lambda x, w: Op(lambda m, x: sum(x.unflatten(1, (2, -1)).unbind(1)))),
        "tensor_split": lambda x, w: Op(
            lambda m, x: torch.cat(list(reversed(torch.tensor_split(x, 3, 1))), 1)
        ),
        "ghost": lambda x, w: Op(
            lambda m, x: (lambda y: torch.cat([y, m.cheap(y)], 1)[:, : m.width])(m.first(x).relu()),
            width=even(w) - 1,
            first=conv(x, even(w) // 2, 1),
            cheap=conv(x, even(w) // 2, channels=even(w) // 2, groups=even(w) // 2),
        ),
        "partial": lambda x, w: Op(
            lambda m, x: torch.cat([m.f(x[:, : m.at]), x[:, m.at :]], 1),
            at=at_least(x, 4),
            f=conv(x, at_least(x, 4), channels=at_least(x, 4)),
        ),
    },
    "slice": {
        "head": lambda x, w: Op(lambda m, x: x[:, : m.stop], stop=at_least(x, 2)),
        "tail": lambda x, w: Op(lambda m, x: x[:, 1:] if x.shape[1] > 1 else x),
        "middle": lambda x, w: Op(lambda m, x: x[:, 1:-1] if x.shape[1] > 2 else x),
        "every_second": lambda x, w: Op(lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1)),
        "narrow": lambda x, w: Op(lambda m, x: x.narrow(1, 0, m.size) * 2, size=at_least(x, 2)),
        "table": lambda x, w: Op(
            lambda m, x: x.index_select(1, m.table), table=torch.arange(x.shape[1] - 1, -1, -1)
        ),
        "list": lambda x, w: Op(lambda m, x: x[:, m.table], table=torch.arange(x.shape[1]).roll(1)),
        "repeated_table": lambda x, w: Op(
            lambda m, x: x[:, m.table], table=torch.arange(2 * x.shape[1]) % x.shape[1]
        ),
        "one": lambda x, w: Op(lambda m, x: x + x[:, 0].unsqueeze(1)),
        "overlap": lambda x, w: Op(
            lambda m, x: torch.cat([x[:, : m.at + 1], x[:, m.at :]], 1), at=at_least(x, 2)
        ),
    },
}

# -- shuffles ---------------------------------------------------------------------------------------------


def shuffled(groups: int) -> object:
    def body(m: Op, x: Tensor) -> Tensor:
        batch, channels, *sizes = x.shape
        y = x.view(batch, groups, channels // groups, *sizes).transpose(1, 2).contiguous()
        return y.view(batch, channels, *sizes)

    return body


def to_depth(m: Op, x: Tensor) -> Tensor:
    """Space to depth by view and permute."""
    batch, channels, height, width = x.shape
    y = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(batch, 4 * channels, height // 2, width // 2)


def to_space(m: Op, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    y = x.view(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(batch, channels // 4, 2 * height, 2 * width)


def focus(m: Op, x: Tensor) -> Tensor:
    return torch.cat([x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)


SHUFFLE: Table = {
    "shuffle": {
        "two": evened(lambda x, w: Op(shuffled(2))),
        "three": evened(lambda x, w: Op(shuffled(3)), 3),
        "module": evened(lambda x, w: nn.ChannelShuffle(2)),
        "twice": evened(lambda x, w: Op(lambda m, x: shuffled(2)(m, shuffled(4)(m, x))), 4),  # type: ignore[operator]
        "pixel": evened(
            flat_only(lambda x, w: nn.PixelShuffle(2) if max(x.shape[2:]) <= 8 else nn.Identity()), 4
        ),
        "unpixel": flat_only(halving(lambda x, w: nn.PixelUnshuffle(2))),
        "there_and_back": flat_only(
            halving(lambda x, w: nn.Sequential(nn.PixelUnshuffle(2), nn.SiLU(), nn.PixelShuffle(2)))
        ),
        "to_depth": flat_only(halving(lambda x, w: Op(to_depth))),
        "to_space": evened(
            flat_only(lambda x, w: Op(to_space) if max(x.shape[2:]) <= 8 else nn.Identity()), 4
        ),
        "focus": flat_only(halving(lambda x, w: Op(focus))),
        "super_resolution": flat_only(
            lambda x, w: (
                nn.Sequential(conv(x, 4 * w, 1), nn.PixelShuffle(2))
                if max(x.shape[2:]) <= 8
                else nn.Identity()
            )
        ),
        "interleaved": lambda x, w: Op(lambda m, x: torch.stack([x, x.relu()], 2).flatten(1, 2)),
        "shuffled_work": evened(
            lambda x, w: Op(
                lambda m, x: shuffled(2)(m, m.f(shuffled(2)(m, x))),  # type: ignore[operator]
                f=nn.Sequential(conv(x, x.shape[1], groups=x.shape[1]), nn.ReLU()),
            )
        ),
    },
    "move": {
        "flip": lambda x, w: Op(lambda m, x: x.flip(-1)),
        "flip_channels": lambda x, w: Op(lambda m, x: x + 0.5 * x.flip(1)),
        "roll": lambda x, w: Op(lambda m, x: x.roll(1, -1)),
        "roll_channels": lambda x, w: Op(lambda m, x: x.roll(1, 1)),
        "roll_both": lambda x, w: Op(lambda m, x: x.roll((1, 1), (1, -1))),
        "shift_parts": evened(
            lambda x, w: Op(
                lambda m, x: torch.cat([x.chunk(2, 1)[0].roll(1, 2), x.chunk(2, 1)[1].roll(-1, 2)], 1)
            )
        ),
        "turn": lambda x, w: Op(lambda m, x: x.transpose(-1, -2) if x.dim() > 3 else x.flip(-1)),
        "last_and_back": lambda x, w: Op(lambda m, x: x.movedim(1, -1).contiguous().sigmoid().movedim(-1, 1)),
        "permute": lambda x, w: Op(
            lambda m, x: m.f(x.permute(0, *range(2, x.dim()), 1)).permute(
                0, x.dim() - 1, *range(1, x.dim() - 1)
            ),
            f=nn.Linear(x.shape[1], w),
        ),
        "repeat": lambda x, w: Op(lambda m, x: x.repeat(1, 2, *[1] * (x.dim() - 2))),
        "repeat_interleave": lambda x, w: Op(lambda m, x: x.repeat_interleave(2, 1)),
        "flatten_places": lambda x, w: Op(lambda m, x: x.flatten(2).relu().view(x.shape)),
        "reshape_across": evened(
            lambda x, w: Op(
                lambda m, x: x.reshape(x.shape[0], x.shape[1] // 2, -1).softmax(2).reshape(x.shape)
            )
        ),
        "batch_fold": evened(
            lambda x, w: Op(
                lambda m, x: m.f(x.reshape(-1, x.shape[1] // 2, *x.shape[2:])).reshape(x.shape),
                f=conv(x, half(x), channels=half(x)),
            )
        ),
    },
    "pad": {
        "channels": lambda x, w: Op(lambda m, x: functional.pad(x, [0, 0] * (x.dim() - 2) + [1, 2])),
        "tail": lambda x, w: Op(lambda m, x: functional.pad(x, [0, 0] * (x.dim() - 2) + [0, 3])),
        "value": lambda x, w: Op(lambda m, x: functional.pad(x, [0, 0] * (x.dim() - 2) + [2, 0], value=0.5)),
        "places": lambda x, w: nn.ConstantPad1d(1, 0.0) if rank(x) == 1 else nn.ZeroPad2d(1),
        "reflect": lambda x, w: Op(lambda m, x: functional.pad(x, [1, 1] * (x.dim() - 2), mode="reflect")),
        "replicate": lambda x, w: Op(
            lambda m, x: functional.pad(x, [1, 0] * (x.dim() - 2), mode="replicate")
        ),
        "crop": lambda x, w: Op(lambda m, x: x[..., :-1] if x.shape[-1] > 2 else x),
        "crop_channels": lambda x, w: Op(
            lambda m, x: functional.pad(x, [0, 0] * (x.dim() - 2) + [-1, 0]) if x.shape[1] > 1 else x
        ),
        "zeros": lambda x, w: Op(lambda m, x: torch.cat([x, torch.zeros_like(x)], 1)),
        "shortcut": lambda x, w: Op(
            lambda m, x: (
                m.f(x)
                + functional.pad(
                    x[(..., *[slice(None, None, m.step)] * (x.dim() - 2))], [0, 0] * (x.dim() - 2) + [1, 1]
                )
            ),
            step=2 if large(x) else 1,
            f=conv(x, x.shape[1] + 2, stride=2 if large(x) else 1),
        ),
    },
}
