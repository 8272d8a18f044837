"""Attention: heads and dimensions inside heads as units, without being told how many heads there are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import Cut, assert_costs, assert_exact, check_cut, cut_at, free_units, random_keep, randomise
from torch import Tensor, nn
from torch.nn import functional

from compress.channelmap import channel_map
from compress.gates import with_gates
from compress.importance import read_gates, scored
from compress.labels import Granularity
from compress.trace import get_tensor, trace

TOKENS, WIDTH, HEADS, DIM = 5, 12, 3, 4


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * DIM**-0.5 @ k.mT).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v)


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads in one dimension, as torch's own multi-head attention does with weights asked for."""
    flat = [x.reshape(-1, TOKENS, DIM) for x in (q, k, v)]
    return torch.bmm(torch.bmm(flat[0], flat[1].mT).softmax(-1), flat[2]).view(q.shape)


def over_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cross-covariance attention (XCiT): the channels of a head attend to each other."""
    q, k = functional.normalize(q, dim=-2), functional.normalize(k, dim=-2)
    return v @ (q.mT @ k).softmax(-1)


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused(functional.normalize(q, dim=-1), functional.rms_norm(k, (DIM,)), v)


def rotary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angle = torch.arange(TOKENS)[:, None] * torch.arange(1, DIM // 2 + 1)
    cos, sin = (torch.cat([f, f], -1) for f in (angle.cos(), angle.sin()))

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return plain(turn(q), turn(k), v)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = functional.pad(v, (0, 1), value=1.0)
    out = q.relu() @ (k.relu().mT @ v)
    return out[..., :-1] / (out[..., -1:] + 1e-3)


class Attention(nn.Module):
    """Residual attention over tokens, its q, k and v in one linear layer."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor] = plain) -> None:
        super().__init__()
        self.qkv, self.proj, self.attend = (
            nn.Linear(WIDTH, 3 * HEADS * DIM),
            nn.Linear(HEADS * DIM, WIDTH),
            attend,
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, TOKENS, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.proj(self.attend(q, k, v).transpose(1, 2).reshape(-1, TOKENS, HEADS * DIM))


KINDS = (plain, fused, written_out, merged, over_channels, normalised, rotary, linear_attention)
INPUT = (torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)),)


def heads_of(done: Cut, name: str = "qkv.weight") -> int:
    return free_units(done.cmap, name)


@pytest.mark.parametrize("attend", KINDS, ids=lambda f: f.__name__)
def test_a_head_is_a_unit_however_attention_is_written(attend: Callable[..., Tensor]) -> None:
    done = check_cut(randomise(Attention(attend)), INPUT)
    assert heads_of(done) == HEADS
    rows = done.cmap.axes["qkv.weight", 0].reshape(3, HEADS, DIM)
    assert (rows == rows[:1, :, :1]).all(), "q, k and v of one head leave together"
    assert (done.cmap.axes["proj.weight", 1].reshape(HEADS, DIM) == rows[0]).all()
    assert len(done.plan.axes["proj.weight", 1]) % DIM == 0


def test_heads_need_a_rewritten_size_so_the_plan_does_not_fit_the_python_code() -> None:
    done = check_cut(randomise(Attention()), INPUT)
    assert "reshape" in done.plan.hard_coded[0]
    assert channel_map(trace(Attention(), INPUT), in_place=True).units == 0


class Bias(nn.Module):
    """Relative position bias from a table, learned temperature per head, and a mask, as Swin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.table, self.heat = (
            nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS)),
            nn.Parameter(torch.rand(HEADS, 1, 1)),
        )
        steps = torch.arange(TOKENS)
        self.register_buffer("index", (steps[:, None] - steps + TOKENS - 1).reshape(-1))
        self.register_buffer("mask", torch.randn(TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, TOKENS, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].view(TOKENS, TOKENS, -1).permute(2, 0, 1).unsqueeze(0)
        scores = q @ k.mT * self.heat.exp() + bias + self.mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_tables_and_temperatures_follow_their_heads_and_masks_stay() -> None:
    done = check_cut(randomise(Bias()), INPUT)
    assert heads_of(done) == HEADS
    assert free_units(done.cmap, "table", 1) == free_units(done.cmap, "heat", 0) == HEADS
    assert ("table", 0) not in done.cmap.axes
    assert not any(name == "mask" for name, _ in done.cmap.axes)


class TalkingHeads(nn.Module):
    """Linear layers mix the heads before and after the softmax (CaiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, TOKENS, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.before((q @ k.mT).permute(0, 2, 3, 1)).softmax(1)
        scores = self.after(scores).permute(0, 3, 1, 2)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


def test_mixed_heads_leave_one_by_one_on_each_side_of_the_mixing() -> None:
    done = check_cut(randomise(TalkingHeads()), INPUT)
    assert heads_of(done) == HEADS, "one reshape makes q, k and v, so they keep equally many heads"
    assert done.cmap.units == 2 * HEADS


class Grouped(nn.Module):
    """Several query heads share a key and a value head."""

    def __init__(self, queries: int, keys: int, shape: str) -> None:
        super().__init__()
        self.queries, self.keys, self.shape = queries, keys, shape
        self.q, self.k = nn.Linear(WIDTH, queries * DIM), nn.Linear(WIDTH, keys * DIM)
        self.v, self.proj = nn.Linear(WIDTH, keys * DIM), nn.Linear(queries * DIM, WIDTH)

    def heads(self, x: Tensor, count: int) -> Tensor:
        return x.unflatten(2, (count, DIM)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.heads(self.q(x), self.queries),
            self.heads(self.k(x), self.keys),
            self.heads(self.v(x), self.keys),
        )
        if self.shape == "repeated":
            k, v = (y.repeat_interleave(self.queries // self.keys, 1) for y in (k, v))
        if self.shape == "broadcast":
            out = (q @ k.mT).softmax(-1) @ v
        else:
            out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.shape == "native")
        return self.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("queries", "keys", "shape", "units"),
    [(6, 3, "repeated", 3), (6, 3, "native", 3), (4, 1, "native", 4), (4, 1, "broadcast", 4)],
)
def test_query_heads_leave_with_the_key_and_value_they_share(
    queries: int, keys: int, shape: str, units: int
) -> None:
    done = check_cut(randomise(Grouped(queries, keys, shape)), INPUT)
    assert free_units(done.cmap, "q.weight") == units
    assert free_units(done.cmap, "k.weight") == (0 if keys == 1 else units)


def test_windows_do_not_hide_heads() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            parts = x.view(-1, 2, TOKENS, 2, WIDTH).permute(0, 1, 3, 2, 4).reshape(-1, TOKENS, WIDTH)
            return self.inner(parts).view(-1, 2, 2, TOKENS, WIDTH).roll(1, 2).flatten(1, 3)

    x = torch.randn(2, 4 * TOKENS, WIDTH)
    assert heads_of(check_cut(randomise(Windows()), (x,)), "inner.qkv.weight") == HEADS


def test_a_depthwise_conv_over_heads_in_the_batch_is_shared_by_them() -> None:
    """As MViT pools queries and keys: (batch * heads, dim, tokens)."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.pool = Attention(self.attend), nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM)

        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = k.mT.reshape(-1, DIM, TOKENS)
            return plain(q, self.pool(rows).reshape(-1, HEADS, DIM, TOKENS).mT, v)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    done = check_cut(randomise(Pooled()), INPUT)
    assert heads_of(done, "inner.qkv.weight") == HEADS
    assert any("share" in pin.reason and "pool.weight" in pin.parameters for pin in done.cmap.pinned)


@pytest.mark.parametrize("attend", [plain, fused, written_out, merged], ids=lambda f: f.__name__)
def test_dimensions_inside_heads_on_request(attend: Callable[..., Tensor]) -> None:
    traced = with_gates(trace(randomise(Attention(attend)), INPUT))
    cmap = channel_map(traced, granularity=Granularity(attention="dims"))
    assert free_units(cmap, "qkv.weight") == DIM, "one reshape makes q, k and v, so they stay equally wide"
    for seed in range(3):
        done = cut_at(traced, cmap, random_keep(cmap, seed))
        assert_exact(done)
        assert_costs(done)
        assert not any(str(n.target).startswith("_gate_") for n in done.dense.graph.nodes)


def test_the_scale_of_fused_attention_stays_that_of_the_full_width() -> None:
    traced = with_gates(trace(randomise(Attention(fused)), INPUT))
    cmap = channel_map(traced, granularity=Granularity(attention="dims"))
    done = cut_at(traced, cmap, random_keep(cmap))
    node = next(n for n in done.dense.graph.nodes if "attention" in n.name)
    assert node.kwargs["scale"] == DIM**-0.5


def test_gates_are_the_importance_of_dimensions() -> None:
    """A query's dimension counts by its rows of weight times gradient, a value's by its readers' columns."""
    model = randomise(Attention(plain)).double()
    traced = with_gates(trace(model, (INPUT[0].double(),)))
    cmap = channel_map(traced, granularity=Granularity(attention="dims"))
    traced.net.get_buffer("_gate_matmul").requires_grad_(True)
    traced.net(INPUT[0].double()).square().sum().backward()
    gates = read_gates(traced.net, cmap).numpy()
    qkv, proj = model.qkv, model.proj.weight
    rows = ((qkv.weight * qkv.weight.grad).sum(1) + qkv.bias * qkv.bias.grad).reshape(3, HEADS, DIM)[0]
    columns = (proj * proj.grad).sum(0).reshape(HEADS, DIM)
    units = cmap.axes["qkv.weight", 0].reshape(3, HEADS, DIM)[0, 0]
    assert np.allclose(gates[units], (rows + columns).sum(0).detach().numpy(), rtol=1e-5)


def test_norms_over_channels_on_request_are_marked_inexact() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.inner = nn.Linear(7, WIDTH), nn.LayerNorm(WIDTH), Attention(fused)
            self.last, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.last(self.inner(self.norm(self.embed(x)))))

    traced = trace(randomise(Block()), (torch.randn(2, TOKENS, 7),))
    assert free_units(channel_map(traced), "embed.weight") == 0
    cmap = channel_map(traced, granularity=Granularity(inexact_norms=True))
    assert free_units(cmap, "embed.weight") == WIDTH
    assert {pin.op for pin in cmap.inexact} >= {"layer_norm"}
    done = cut_at(traced, cmap, random_keep(cmap))
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact(done)
    assert_costs(done)


def test_gates_and_frozen_readers_are_scored_and_left_as_they_were() -> None:
    model = randomise(Attention(plain))
    model.proj.requires_grad_(False)
    traced = with_gates(trace(model, INPUT))
    cmap = channel_map(traced, granularity=Granularity(attention="dims"))
    with scored(traced.net, cmap, [p for p in traced.net.parameters() if p.requires_grad]):
        traced.net(*INPUT).square().sum().backward()
        assert (read_gates(traced.net, cmap) != 0).all()
    for name in ("proj.weight", "_gate_matmul"):
        tensor = get_tensor(traced.net, name)
        assert tensor.grad is None
        assert not tensor.requires_grad


def test_what_is_summed_over_stays_where_the_other_factor_has_channels_elsewhere() -> None:
    class Mixed(nn.Module):
        """A token mixer whose weights are activations: its own channels are the other factor's tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.mix, self.value, self.out = nn.Linear(8, TOKENS), nn.Linear(8, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.mix(x) @ self.value(x))
            return out

    done = check_cut(randomise(Mixed()), (torch.randn(2, TOKENS, 8),))
    assert free_units(done.cmap, "value.weight") == 7
    assert free_units(done.cmap, "mix.weight") == 0
    assert any("summed over together with another axis" in pin.reason for pin in done.cmap.pinned)
