"""Random small networks: a network is a list of blocks, kept as plain data, that anything can be built from.

`draw_network` asks a `Source` for every decision: hypothesis, or a seeded generator outside of it. Every
list of blocks is a network: where a block does not fit what comes before it (tokens after a map, three
channels before two groups) a small adapter is put between them, so that a failing network stays a network
while blocks are taken away.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from random_maps import CONV, NORM, SHARED
from random_moves import SHUFFLE, SPLIT
from random_parts import TRANSPOSED, Block, Op, Plain, Table, conv, large, param, pooled, rank
from random_places import GATE, PLACES
from random_tokens import TOKENS
from torch import Tensor, nn
from torch.nn import functional

MAPS: Table = {**CONV, **NORM, **GATE, **SHARED, **PLACES, **SPLIT, **SHUFFLE}
NESTED: dict[str, tuple[str, ...]] = {
    "residual": ("add", "relu_after", "multiply", "subtract", "scaled", "gated", "maximum", "dense"),
    "branches": ("cat", "add", "multiply", "weighted", "dense", "minimum", "stacked"),
    "unet": ("cat", "add"),
    "block": ("plain", "layer", "rms", "scaled", "post", "parallel"),
}
"""Blocks that wrap others: the first three on maps, `block` on tokens."""
KINDS = (*MAPS, *TOKENS, *NESTED)
WIDTHS = (8, 4, 6, 12, 16)
STEMS = {"map2": (3, 8, 8), "map1": (3, 8), "map3": (2, 4, 4, 4), "row": (6, 5), "words": (6,)}
"""What goes in -> the shape of an example."""
HEADS = ("mean", "flat", "map", "largest", "hidden", "pooled", "two", "named", "normed", "tied", "place")
WORDS = 11

Build = Callable[[Tensor], nn.Module]


@dataclass(frozen=True, repr=False)
class Network(Plain):
    """A network as data. stem: what goes in, and width channels after the first layer. seed: parameters and
    units to remove."""

    blocks: tuple[Block, ...]
    stem: str = "map2"
    width: int = 8
    head: str = "mean"
    seed: int = 0


# -- drawing ----------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where decisions come from."""

    def one(self, options: Sequence[Any]) -> Any:
        """One of the options; the first is the simplest."""

    def some(self, make: Callable[[Source], Block], least: int, most: int) -> list[Block]:
        """Between `least` and `most` blocks."""


class Seeded:
    """Decisions from a seed, outside hypothesis."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one(self, options: Sequence[Any]) -> Any:
        return self.random.choice(options)

    def some(self, make: Callable[[Source], Block], least: int, most: int) -> list[Block]:
        return [make(self) for _ in range(self.random.randint(least, most))]


def seeded_network(seed: int) -> Network:
    """The network of a seed, outside hypothesis."""
    return draw_network(Seeded(seed))


def draw_network(source: Source, kind: str = "") -> Network:
    """A network of one to three blocks. kind: a kind of block that it must contain."""
    blocks = source.some(lambda s: draw_block(s, KINDS), 0 if kind else 1, 2 if kind else 3)
    if kind:
        blocks.insert(source.one(range(len(blocks) + 1)), draw_block(source, (kind,)))
    stem = source.one(tuple(STEMS))
    heads = HEADS if stem == "words" else [head for head in HEADS if head != "tied"]
    return Network(tuple(blocks), stem, source.one(WIDTHS), source.one(heads), source.one(range(100)))


def draw_block(source: Source, kinds: Sequence[str]) -> Block:
    kind = source.one(kinds)
    if kind not in NESTED:
        return Block(kind, source.one(tuple(MAPS.get(kind) or TOKENS[kind])), source.one(WIDTHS))
    flat = (*TOKENS, *MAPS) if kind == "block" else (*MAPS, *TOKENS)
    inside = source.some(lambda s: draw_block(s, flat), 1, 2)
    other = source.some(lambda s: draw_block(s, flat), 0, 1) if kind in ("branches", "block") else []
    return Block(kind, source.one(NESTED[kind]), source.one(WIDTHS), tuple(inside), tuple(other))


def smaller(network: Network) -> Iterator[Network]:
    """Networks with one thing less: a block, a wrapper, an unusual stem or head, some width, the seed."""
    if network.head != "mean":
        yield replace(network, head="mean")
    if network.seed:
        yield replace(network, seed=0)
    if network.head != "tied":
        plainer = ("map2", "row", "map1")
        yield from (replace(network, stem=stem) for stem in plainer[: _place(plainer, network.stem)])
    for blocks in _fewer(network.blocks):
        yield replace(network, blocks=blocks)
    yield from (replace(network, width=w) for w in WIDTHS if w < network.width)


def _place(row: Sequence[str], item: str) -> int:
    return row.index(item) if item in row else len(row)


def _fewer(blocks: tuple[Block, ...]) -> Iterator[tuple[Block, ...]]:
    for i, block in enumerate(blocks):
        front, back = blocks[:i], blocks[i + 1 :]
        yield front + back
        if block.inside:
            yield front + block.inside + back
        yield from ((*front, replace(block, inside=b), *back) for b in _fewer(block.inside))
        yield from ((*front, replace(block, other=b), *back) for b in _fewer(block.other))
        yield from ((*front, replace(block, width=w), *back) for w in WIDTHS if w < block.width)


def shrink(network: Network, fails: Callable[[Network], bool], tries: int = 400) -> Network:
    """The smallest network found by greedy steps that still fails."""
    for candidate in smaller(network):
        tries -= 1
        if tries < 0:
            break
        if fails(candidate):
            return shrink(candidate, fails, tries)
    return network


# -- building ---------------------------------------------------------------------------------------------


def example_of(network: Network) -> Tensor:
    shape, generator = STEMS[network.stem], torch.Generator().manual_seed(network.seed)
    if network.stem == "words":
        return torch.randint(0, WORDS, (2, *shape), generator=generator)
    return torch.randn((2, *shape), generator=generator)


def build(network: Network) -> nn.Module:
    """The module, in eval mode; its parameters are not yet of a size that shows (see helpers.randomise)."""
    torch.manual_seed(network.seed)
    x = example_of(network)
    with torch.no_grad():
        stem = marked(_stem(network, x), f"stem.{network.stem}")
        chain = Chain(network.blocks, stem.eval()(x), network.stem.startswith("map"))
        y = chain.eval()(stem(x))
        flat = y if chain.maps else y.transpose(1, 2)
        head = marked(_head(network, flat, stem), f"head.{network.head}")
    return Whole(stem, chain, head).eval()


def marked(module: nn.Module, name: str) -> nn.Module:
    """Remember which description a module was built from."""
    module.drawn = name  # type: ignore[assignment]
    return module


class Whole(nn.Module):
    """Stem, chain and head. The SiLU between them keeps the mean of a normalised map from being a constant,
    which no removal could move."""

    def __init__(self, stem: nn.Module, chain: Chain, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.chain, self.head = stem, chain, head

    def forward(self, x: Tensor) -> Any:
        y = self.chain(self.stem(x))
        return self.head(functional.silu(y if self.chain.maps else y.transpose(1, 2)))


class Chain(nn.Module):
    """Blocks in a row, with an adapter wherever maps become tokens or tokens maps.

    maps: whether the result is a map. back: whether the result must be of the kind that came in.
    """

    def __init__(self, blocks: Sequence[Block], x: Tensor, maps: bool, back: bool = False) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        started, sizes = maps, tuple(x.shape[2:])
        for block in blocks:
            wanted = block.kind in MAPS or block.kind in ("residual", "branches", "unet")
            if wanted != maps:
                sizes = tuple(x.shape[2:]) if maps else sizes
                x = self._add(_adapter(x, wanted, sizes), x)
                maps = wanted
            x = self._add(marked(make(block, x), block.name), x)
        if back and maps != started:
            self._add(_adapter(x, started, sizes), x)
            maps = started
        self.maps = maps

    def _add(self, step: nn.Module, x: Tensor) -> Tensor:
        self.steps.append(step.eval())
        found: Tensor = step(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def _adapter(x: Tensor, to_map: bool, sizes: tuple[int, ...]) -> nn.Module:
    """Tokens to maps (of the sizes that they once had, if they still fit) or maps to tokens."""
    if not to_map:
        return marked(Op(lambda m, x: x.flatten(2).transpose(1, 2)), "adapter.tokens")
    fitting = sizes if math.prod(sizes) == x.shape[1] else (x.shape[1],)
    return marked(Op(lambda m, x: x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *fitting)), "adapter.map")


def make(block: Block, x: Tensor) -> nn.Module:
    """The module of one block, for tensors shaped like `x`."""
    if block.kind in MAPS:
        return MAPS[block.kind][block.option](x, block.width)
    if block.kind in TOKENS:
        return TOKENS[block.kind][block.option](x, block.width)
    return _NESTING[block.kind](block, x)


class Fit(nn.Module):
    """Give a tensor the channels and sizes of another one, by a 1x1 conv and resizing, where they differ."""

    def __init__(self, x: Tensor, like: Tensor, maps: bool) -> None:
        super().__init__()
        x, like = (x, like) if maps else (x.transpose(1, 2), like.transpose(1, 2))
        self.maps, self.shape = maps, tuple(like.shape[2:])
        self.resize, self.flat = x.shape[2:] != like.shape[2:], x.dim() != like.dim()
        x = x.flatten(2) if self.flat else x
        self.project = conv(x, like.shape[1], 1) if x.shape[1] != like.shape[1] else None

    def forward(self, x: Tensor) -> Tensor:
        if self.project is None and not self.resize:
            return x
        y = x if self.maps else x.transpose(1, 2)
        y = y.flatten(2) if self.flat else y
        y = y if self.project is None else self.project(y)
        if self.resize:
            y = functional.interpolate(y, size=(math.prod(self.shape),) if self.flat else self.shape)
            y = y.unflatten(2, self.shape) if self.flat and len(self.shape) > 1 else y
        return y if self.maps else y.transpose(1, 2)


def _residual(block: Block, x: Tensor) -> nn.Module:
    inside = Chain(block.inside, x, True, back=True).eval()
    y = inside(x)
    parts: dict[str, Any] = {"f": inside, "fit": Fit(x, y, maps=True)}
    joins: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "add": lambda m, x: m.fit(x) + m.f(x),
        "relu_after": lambda m, x: (m.f(x) + m.fit(x)).relu(),
        "multiply": lambda m, x: m.fit(x) * m.f(x),
        "subtract": lambda m, x: m.fit(x) - 0.5 * m.f(x),
        "scaled": lambda m, x: m.fit(x) + m.a * m.f(x),
        "gated": lambda m, x: m.fit(x) * m.f(x).sigmoid() + m.fit(x),
        "maximum": lambda m, x: torch.maximum(m.fit(x), m.f(x)),
        "dense": lambda m, x: torch.cat([m.fit(x), m.f(x)], 1),
    }
    if block.option == "scaled":
        parts["a"] = param(y.shape[1], *[1] * rank(y))
    return Op(joins[block.option], **parts)


def _branches(block: Block, x: Tensor) -> nn.Module:
    inside, other = (Chain(part, x, True, back=True).eval() for part in (block.inside, block.other))
    first, second = inside(x), other(x)
    parts: dict[str, Any] = {"f": inside, "g": other, "fit": Fit(second, first, maps=True)}
    joins: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "cat": lambda m, x: torch.cat([m.f(x), m.fit(m.g(x))], 1),
        "add": lambda m, x: m.f(x) + m.fit(m.g(x)),
        "multiply": lambda m, x: m.f(x) * m.fit(m.g(x)),
        "weighted": lambda m, x: m.a[0] * m.f(x) + m.a[1] * m.fit(m.g(x)),
        "dense": lambda m, x: torch.cat([m.f(x), m.fit(m.g(x)), m.f(x).relu()], 1),
        "minimum": lambda m, x: torch.minimum(m.f(x), m.fit(m.g(x))),
        "stacked": lambda m, x: torch.stack([m.f(x), m.fit(m.g(x))]).mean(0),
    }
    if block.option == "weighted":
        parts["a"] = param(2)
    return Op(joins[block.option], **parts)


def _unet(block: Block, x: Tensor) -> nn.Module:
    """Down, the blocks, up again by a transposed conv or by resizing, and a skip."""
    down = conv(x, block.width, stride=2 if large(x) else 1)
    low = Chain(block.inside, down(x), True, back=True).eval()
    y = low(down(x))
    doubled = tuple(2 * size for size in y.shape[2:]) == tuple(x.shape[2:])
    up = TRANSPOSED[rank(x) - 1](y.shape[1], x.shape[1], 2, stride=2) if doubled else Fit(y, x, maps=True)
    joins: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "cat": lambda m, x: torch.cat([x, m.up(m.low(m.down(x).relu()))], 1),
        "add": lambda m, x: x + m.up(m.low(m.down(x).relu())),
    }
    return Op(joins[block.option], down=down, low=low, up=up)


def _token_block(block: Block, x: Tensor) -> nn.Module:
    """Transformer blocks: the usual places for norms, layer scales and parallel branches."""
    channels = x.shape[-1]
    inside, other = (Chain(part, x, False, back=True).eval() for part in (block.inside, block.other))
    norm = nn.RMSNorm(channels) if block.option == "rms" else nn.LayerNorm(channels)
    parts: dict[str, Any] = {"f": inside, "g": other}
    parts["fit"], parts["fit_other"] = Fit(inside(x), x, maps=False), Fit(other(x), x, maps=False)
    joins: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "plain": lambda m, x: x + m.fit(m.f(x)),
        "layer": lambda m, x: x + m.fit(m.f(m.norm(x))),
        "rms": lambda m, x: x + m.fit(m.f(m.norm(x))),
        "scaled": lambda m, x: x + m.a * m.fit(m.f(x)),
        "post": lambda m, x: m.norm(x + m.fit(m.f(x))),
        "parallel": lambda m, x: x + m.fit(m.f(x)) + m.fit_other(m.g(x)),
    }
    if block.option in ("layer", "rms", "post"):
        parts["norm"] = norm
    if block.option == "scaled":
        parts["a"] = param(channels)
    return Op(joins[block.option], **parts)


_NESTING = {"residual": _residual, "branches": _branches, "unet": _unet, "block": _token_block}


def _stem(network: Network, x: Tensor) -> nn.Module:
    if network.stem == "words":
        return nn.Embedding(WORDS, network.width)
    if network.stem == "row":
        return nn.Linear(x.shape[-1], network.width)
    return nn.Sequential(conv(x, network.width), nn.SiLU())


def _head(network: Network, y: Tensor, stem: nn.Module) -> nn.Module:
    """Heads read (batch, channels, *sizes)."""
    channels, width = y.shape[1], network.width
    if network.head == "tied" and channels != width:
        return Op(
            lambda m, y: m.last(m.f(y.flatten(2).mean(2))), f=nn.Linear(channels, width), last=_tied(stem)
        )
    heads: dict[str, Build] = {
        "mean": lambda y: Op(lambda m, y: m.f(y.flatten(2).mean(2)), f=nn.Linear(channels, 3)),
        "flat": lambda y: nn.Sequential(nn.Flatten(), nn.Linear(y[0].numel(), 3)),
        "map": lambda y: conv(y, 3, 1),
        "largest": lambda y: Op(lambda m, y: m.f(y.flatten(2).amax(2)), f=nn.Linear(channels, 3)),
        "hidden": lambda y: nn.Sequential(
            Op(lambda m, y: pooled(y).flatten(1)), nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, 3)
        ),
        "pooled": lambda y: nn.Sequential(
            Op(lambda m, y: functional.adaptive_avg_pool1d(y.flatten(2), 2).reshape(y.shape[0], -1)),
            nn.Linear(2 * channels, 3),
        ),
        "two": lambda y: Op(
            lambda m, y: (m.f(pooled(y).flatten(1)), m.g(y).sigmoid()),
            f=nn.Linear(channels, 3),
            g=conv(y, 2, 1),
        ),
        "named": lambda y: Op(lambda m, y: {"out": m.f(y), "aux": m.g(y)}, f=conv(y, 3), g=conv(y, 1, 1)),
        "normed": lambda y: Op(
            lambda m, y: m.f(m.n(y.flatten(2).mean(2))), n=nn.LayerNorm(channels), f=nn.Linear(channels, 3)
        ),
        "tied": lambda y: Op(lambda m, y: m.last(y.flatten(2).mean(2)), last=_tied(stem)),
        "place": lambda y: Op(
            lambda m, y: m.f(y.flatten(2)[..., y[0, 0].numel() // 2]), f=nn.Linear(channels, 3)
        ),
    }
    return heads[network.head](y)


def _tied(stem: nn.Module) -> nn.Module:
    """An output layer whose weight is the embedding's table."""
    assert isinstance(stem, nn.Embedding)
    layer = nn.Linear(stem.embedding_dim, stem.num_embeddings, bias=False)
    layer.weight = stem.weight
    return layer
