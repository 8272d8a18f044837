"""Tiny networks, one per op that moves, joins or combines data: the table behind test_rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import randomise
from torch import Tensor, nn
from torch.nn import functional

aten = torch.ops.aten
CHANNELS = 8
Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """conv(3 -> 8), SiLU, the op under test, and a layer that reads its channels."""

    def __init__(self, body: Body, rank: int, size: int, reader: str, parts: dict[str, Any]) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.first = conv[rank - 1](3, CHANNELS, 3, padding=1)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.body = body
        self.last: nn.Module | None = None
        with torch.no_grad():
            y = body(self, self.first(torch.randn(2, 3, *[size] * rank)))
        if reader == "conv" and y.dim() > 2:
            self.last = conv[y.dim() - 3](y.shape[1], 4, 1)
        elif reader != "none":
            self.last = nn.Linear(y.shape[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self, functional.silu(self.first(x)))
        return y if self.last is None else self.last(y)


@dataclass(frozen=True)
class Case:
    """op: a short name that must stand in the graph. pinned: why the first layer's channels stay ("": they
    are free). reader: conv (dimension 1), linear (the last) or none. parts: parameters and modules."""

    op: str
    body: Body
    pinned: str = ""
    reader: str = "conv"
    rank: int = 2
    parts: Callable[[], dict[str, Any]] = dict
    size: int = 6
    free: int = -1

    @property
    def expected(self) -> int:
        """Removable units among the first layer's channels."""
        return self.free if self.free >= 0 else 0 if self.pinned else CHANNELS

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return randomise(Net(self.body, self.rank, self.size, self.reader, self.parts()))


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def pooled(y: Tensor) -> Tensor:
    return y.mean(tuple(range(2, y.dim())), keepdim=True)


def each(names: str, *cases: tuple[Any, ...], **common: Any) -> list[Case]:
    """Cases that differ in op and body only."""
    return [Case(name, *case, **common) for name, case in zip(names.split(), cases, strict=True)]


def halves(y: Tensor) -> Tensor:
    """Channels as two groups: shape (batch, 2, channels / 2, ...)."""
    return y.view(y.shape[0], 2, CHANNELS // 2, *y.shape[2:])


MOVES = [
    *each(
        "view _unsafe_view reshape view_as reshape_as unsqueeze unflatten permute transpose",
        (lambda n, y: y.view(y.shape[0], CHANNELS, 36),),
        (lambda n, y: aten._unsafe_view(y, [y.shape[0], CHANNELS, 36]),),
        (lambda n, y: y.permute(0, 1, 3, 2).reshape(y.shape[0], CHANNELS, 36),),
        (lambda n, y: y.flatten(2).view_as(y),),
        (lambda n, y: y.permute(0, 1, 3, 2).flatten(2).reshape_as(y),),
        (lambda n, y: y.unsqueeze(2),),
        (lambda n, y: y.unflatten(2, (2, 3)),),
        (lambda n, y: y.permute(0, 1, 3, 2),),
        (lambda n, y: y.transpose(2, 3),),
    ),
    *each(
        "flatten t mT numpy_T movedim moveaxis swapaxes swapdims permute transpose",
        (lambda n, y: y.flatten(1),),
        (lambda n, y: pooled(y).flatten(1).t().relu().t(),),
        (lambda n, y: y.flatten(2).mT,),
        (lambda n, y: aten.numpy_T(y).permute(3, 2, 1, 0).flatten(1),),
        (lambda n, y: y.movedim(1, 3),),
        (lambda n, y: y.moveaxis(1, 3),),
        (lambda n, y: y.swapaxes(1, 3),),
        (lambda n, y: y.swapdims(1, 3),),
        (lambda n, y: y.permute(0, 2, 3, 1),),
        (lambda n, y: y.transpose(1, 3),),
        reader="linear",
    ),
    *each(
        "flatten unflatten view",
        (lambda n, y: y.flatten(0, 1).unflatten(0, (-1, CHANNELS)),),
        (lambda n, y: y.flatten(1).unflatten(1, (CHANNELS, 6, 6)),),
        (lambda n, y: y.view(-1, CHANNELS, 4, 9),),
    ),
    *each(
        "squeeze squeeze expand expand_as broadcast_to repeat tile repeat_interleave roll roll flip rot90",
        (lambda n, y: pooled(y).squeeze(),),
        (lambda n, y: pooled(y).squeeze((1, 2, 3)),),
        (lambda n, y: pooled(y).expand(-1, -1, 3, 3),),
        (lambda n, y: pooled(y).expand_as(y),),
        (lambda n, y: pooled(y).broadcast_to(y.shape),),
        (lambda n, y: y.repeat(1, 2, 1, 1),),
        (lambda n, y: y.tile(1, 2, 1, 1),),
        (lambda n, y: y.repeat_interleave(2, 1),),
        (lambda n, y: y.roll(3, 1),),
        (lambda n, y: y.roll((1, 2), (2, 3)),),
        (lambda n, y: y.flip(1),),
        (lambda n, y: y.rot90(1, (2, 3)),),
    ),
    *each(
        "slice slice slice select narrow index_select diagonal unbind tensor_split tensor_split",
        (lambda n, y: y[:, 2:7],),
        (lambda n, y: y[:, 1::2],),
        (lambda n, y: y[:, :-3, ::2, -2:],),
        (lambda n, y: y[:, :, 2],),
        (lambda n, y: y.narrow(1, 2, 4),),
        (lambda n, y: y.index_select(1, n.order), "", "conv", 2, lambda: {"order": torch.tensor([3, 1, 6])}),
        (lambda n, y: y.diagonal(0, 2, 3),),
        (lambda n, y: y.unbind(2)[1],),
        (lambda n, y: torch.cat(y.tensor_split([3], 1)[::-1], 1),),
        (lambda n, y: y.tensor_split(3, 1)[1],),
    ),
    *each(
        "chunk split split_with_sizes unsafe_split unsafe_chunk pixel_unshuffle channel_shuffle",
        (lambda n, y: torch.add(*y.chunk(2, 1)), "", "conv", 2, dict, 6, 4),
        (lambda n, y: y.split(3, 1)[1],),
        (lambda n, y: y.split([3, 5], 1)[1],),
        (lambda n, y: y.unsafe_split(3, 1)[1],),
        (lambda n, y: torch.mul(*y.unsafe_chunk(2, 1)), "", "conv", 2, dict, 6, 4),
        (lambda n, y: functional.pixel_unshuffle(y, 2),),
        (lambda n, y: functional.channel_shuffle(y, 2),),
    ),
    *each(
        "chunk split_with_sizes",
        (lambda n, y: torch.add(*y.chunk(2, 2)),),
        (lambda n, y: y.split([2, 4], 3)[1],),
    ),
    Case("pixel_shuffle", lambda n, y: functional.pixel_shuffle(y, 2), free=2),
    Case("pixel_shuffle", lambda n, y: functional.pixel_unshuffle(functional.pixel_shuffle(y, 2), 2)),
    Case("select", lambda n, y: y * y[:, 4].unsqueeze(1), "taken out by its index", free=7),
    *each(
        "unbind unbind unbind select chunk view view view",
        (lambda n, y: torch.add(*halves(y).unbind(1)), "", "conv", 2, dict, 6, 4),
        (lambda n, y: halves(y).unbind(1)[1], "", "conv", 2, dict, 6, 4),
        (lambda n, y: torch.cat(halves(y).unbind(1)[::-1], 1), "", "conv", 2, dict, 6, 4),
        (lambda n, y: halves(y)[:, 0], "", "conv", 2, dict, 6, 4),
        (lambda n, y: torch.cat(halves(y).chunk(2, 1)[::-1], 2).squeeze(1), "", "conv", 2, dict, 6, 4),
        (lambda n, y: halves(y).mean(2), "runs over the channels"),
        (lambda n, y: y.view(y.shape[0] * CHANNELS, -1).softmax(1).view(y.shape),),
        (lambda n, y: halves(y).transpose(1, 2).flatten(1, 2).view(y.shape),),
    ),
]

JOINS = [
    *each(
        "cat concat concatenate cat cat cat",
        (lambda n, y: torch.cat([y, y.relu()], 1),),
        (lambda n, y: torch.concat([y, n.conv(y)], 1),),
        (lambda n, y: torch.concatenate([y, n.conv(y)], 1),),
        (lambda n, y: torch.cat([y, n.conv(y)], 2),),
        (lambda n, y: torch.cat([n.token.expand(y.shape[0], -1, -1, 6), y], 2),),
        (lambda n, y: torch.cat([y.flatten(1), n.conv(y).flatten(1)], 1), "", "linear"),
        parts=lambda: {
            "conv": nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            "token": param(1, CHANNELS, 1, 1),
        },
    ),
    *each(
        "stack hstack vstack",
        (lambda n, y: torch.stack([y, y.relu()], 2).flatten(2, 3),),
        (lambda n, y: torch.hstack([y, y.relu()]),),
        (lambda n, y: torch.vstack([y, y.relu()]),),
    ),
    Case(
        "stack",
        lambda n, y: torch.stack([y, n.conv(y)], 1).mean(1),
        parts=lambda: {"conv": nn.Conv2d(8, 8, 1)},
    ),
    Case(
        "cat",
        lambda n, y: torch.cat([y[:, :, :0], y, n.conv(y)[:, :, :0]], 2),
        parts=lambda: {"conv": nn.Conv2d(8, 8, 1)},
    ),
    Case("cat", lambda n, y: torch.cat([y, y.transpose(1, 2)], 1), "nothing would remain", size=8),
    *each(
        "constant_pad_nd pad pad pad pad",
        (lambda n, y: aten.constant_pad_nd(y, [0, 0, 0, 0, 1, 2]),),
        (
            lambda n, y: (
                functional.pad(y, (0, 0, 1, 1, 1, 2), value=2.0) + n.conv(functional.pad(y, (0, 0, 1, 1)))
            ),
        ),
        (lambda n, y: functional.pad(y, (0, 0, 0, 0, -1, -2)), "padding takes channels away"),
        (lambda n, y: functional.pad(y, (1, 1, 1, 1), mode="reflect"),),
        (lambda n, y: functional.pad(y.flatten(2).mT, (1, 1), mode="circular").mT, "padding copies channels"),
        parts=lambda: {"conv": nn.Conv2d(CHANNELS, CHANNELS + 3, 1)},
    ),
    *each(
        "index index index",
        (lambda n, y: y[:, n.order],),
        (lambda n, y: y[:, torch.arange(CHANNELS - 1, -1, -1)],),
        (lambda n, y: y[:, [5, 1, 6, 3]],),
        parts=lambda: {"order": torch.tensor([3, 1, 6, 0])},
    ),
    Case("index", lambda n, y: y[:, :, [4, 1, 0]]),
    Case("index", lambda n, y: y[:, [[0], [1], [2]], [0, 3, 5]], "together with another axis"),
    Case("roll", lambda n, y: y.roll((1, 2), (1, 2)), "together with another axis"),
    Case("index", lambda n, y: y[:, :, pooled(y)[:, 0, 0, 0].argsort() % 2], "has no pruning rule"),
    *each(
        "new_zeros new_ones new_full new_empty",
        (lambda n, y: y + y.new_zeros(6) + 1,),
        (lambda n, y: y + y.new_ones((6, 1)),),
        (lambda n, y: y + y.new_full((6,), 2.0),),
        (lambda n, y: y + y.new_empty(6).fill_(1.5),),
    ),
    *each(
        "zeros_like ones_like full_like empty_like",
        (lambda n, y: y + torch.zeros_like(y),),
        (lambda n, y: y + torch.ones_like(y),),
        (lambda n, y: y + torch.full_like(y, 2.0),),
        (lambda n, y: y + torch.empty_like(y).fill_(1.5),),
    ),
    Case("zeros_like", lambda n, y: torch.cat([y, torch.zeros_like(y)], 1)),
    Case(
        "ones_like",
        lambda n, y: y + torch.ones_like(n.w) + n.w,
        "makes a constant of its shape",
        parts=lambda: {"w": param(CHANNELS, 1, 1)},
    ),
]

POINTWISE = [
    Case("mul", lambda n, y: y * n.scale, parts=lambda: {"scale": param(CHANNELS, 1, 1)}),
    Case("mul", lambda n, y: y * n.mask, parts=lambda: {"mask": torch.rand(1, CHANNELS, 1, 1) + 0.5}),
    Case("add", lambda n, y: y + n.position, parts=lambda: {"position": param(1, CHANNELS, 6, 6)}),
    Case(
        "mul",
        lambda n, y: y * n.gate(y).sigmoid(),
        parts=lambda: {"gate": nn.Conv2d(CHANNELS, 1, 3, padding=1)},
    ),
    Case(
        "mul",
        lambda n, y: y * n.up(n.down(pooled(y)).relu()).sigmoid(),
        parts=lambda: {"down": nn.Conv2d(CHANNELS, 3, 1), "up": nn.Conv2d(3, CHANNELS, 1)},
    ),
    Case(
        "where",
        lambda n, y: torch.where(y > 0, y, n.conv(y)),
        parts=lambda: {"conv": nn.Conv2d(CHANNELS, CHANNELS, 1)},
    ),
    Case("where", lambda n, y: torch.where(y > 0, y, 0.5)),
    Case("masked_fill", lambda n, y: y.masked_fill(y > 0.2, 0.3)),
    Case("to", lambda n, y: y.half().float() + y),
    Case("dropout", lambda n, y: functional.dropout(y, training=n.training)),
    Case("add", lambda n, y: y + y[:, :1], "one channel is taken out", free=7),
    Case(
        "add",
        lambda n, y: y + n.steps.reshape(CHANNELS, 1, 1),
        "meets channels that stay",
        parts=lambda: {"steps": torch.arange(CHANNELS)},
    ),
    Case("add", lambda n, y: y + torch.arange(CHANNELS).reshape(CHANNELS, 1, 1), "meets channels that stay"),
    Case(
        "mul",
        lambda n, y: pooled(y).flatten(1).unsqueeze(2) * pooled(y).flatten(1).unsqueeze(1),
        "broadcast over several",
    ),
    Case("sort", lambda n, y: y.sort(2)[0], "sort has no pruning rule"),
    Case(
        "einsum",
        lambda n, y: torch.einsum("bchw,oc->bohw", y, n.w),
        parts=lambda: {"w": param(5, CHANNELS)},
    ),
]
