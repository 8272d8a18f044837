"""Attention over tokens, shape (batch, tokens, channels), the ways people write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from random_parts import Op, Table, fixed_numbers, param
from torch import Tensor, nn
from torch.nn import functional

Body = Callable[[Any, Tensor], Tensor]
HEADS = {4: (2, 2), 6: (3, 2), 8: (4, 2), 12: (3, 4), 16: (4, 4)}  # width -> heads, their size


def heads_for(width: int) -> tuple[int, int]:
    return HEADS.get(width, (2, 2))


def attention(
    body: Body,
    *,
    v_size: int = 0,
    groups: int = 1,
    parts: Callable[[int, int, int], dict[str, Any]] | None = None,
) -> Callable[[Tensor, int], nn.Module]:
    """Separate q, k, v and out layers around `body`. groups: query heads per key head. parts(heads, size,
    tokens): what else the body needs."""

    def make(x: Tensor, width: int) -> nn.Module:
        heads, size = heads_for(width)
        if groups > 1:
            heads = 4
        few, channels = heads // groups, x.shape[-1]
        more = parts(heads, size, x.shape[1]) if parts else {}
        layers = {
            "q": nn.Linear(channels, heads * size),
            "k": nn.Linear(channels, few * size, bias=False),
            "v": nn.Linear(channels, few * (v_size or size)),
            "out": nn.Linear(heads * (v_size or size), channels),
        }
        return Op(body, heads=heads, few=few, size=size, scale=size**-0.5, **{**layers, **more})

    return make


def fused(
    body: Body, *, parts: Callable[[int, int, int], dict[str, Any]] | None = None
) -> Callable[[Tensor, int], nn.Module]:
    """One qkv layer and an out layer around `body`."""

    def make(x: Tensor, width: int) -> nn.Module:
        heads, size = heads_for(width)
        more = parts(heads, size, x.shape[1]) if parts else {}
        qkv, out = nn.Linear(x.shape[-1], 3 * heads * size), nn.Linear(heads * size, x.shape[-1])
        return Op(body, heads=heads, size=size, scale=size**-0.5, **{"qkv": qkv, "out": out, **more})

    return make


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def qkv_of(m: Op, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    few = getattr(m, "few", m.heads)
    return split_heads(m.q(x), m.heads), split_heads(m.k(x), few), split_heads(m.v(x), few)


def unbound(m: Op, x: Tensor) -> tuple[Tensor, ...]:
    batch, tokens, _ = x.shape
    return m.qkv(x).reshape(batch, tokens, 3, m.heads, m.size).permute(2, 0, 3, 1, 4).unbind(0)


def weights(m: Op, q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * m.scale


# -- bodies -------------------------------------------------------------------------------------------------


def plain(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    return m.out(merged(weights(m, q, k).softmax(-1) @ v))


def plain_fused(m: Op, x: Tensor) -> Tensor:
    q, k, v = unbound(m, x)
    y = ((q * m.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    return m.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], m.heads * m.size))


def chunked(m: Op, x: Tensor) -> Tensor:
    q, k, v = (split_heads(t, m.heads) for t in m.qkv(x).chunk(3, -1))
    return m.out(merged(functional.scaled_dot_product_attention(q, k, v)))


def interleaved(m: Op, x: Tensor) -> Tensor:
    """q, k and v of each head next to each other (GPT-NeoX)."""
    q, k, v = split_heads(m.qkv(x), m.heads).chunk(3, -1)
    return m.out(merged(weights(m, q, k).softmax(-1) @ v))


def sdpa(m: Op, x: Tensor) -> Tensor:
    q, k, v = unbound(m, x)
    return m.out(merged(functional.scaled_dot_product_attention(q, k, v)))


def sdpa_causal(m: Op, x: Tensor) -> Tensor:
    q, k, v = unbound(m, x)
    return m.out(merged(functional.scaled_dot_product_attention(q, k, v, is_causal=True)))


def sdpa_masked(m: Op, x: Tensor) -> Tensor:
    return m.out(merged(functional.scaled_dot_product_attention(*qkv_of(m, x), attn_mask=m.mask)))


def sdpa_grouped(m: Op, x: Tensor) -> Tensor:
    return m.out(merged(functional.scaled_dot_product_attention(*qkv_of(m, x), enable_gqa=True)))


def causal(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    scores = weights(m, q, k).masked_fill(m.mask.logical_not(), float("-inf"))
    return m.out(merged(scores.softmax(-1) @ v))


def biased(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    return m.out(merged((weights(m, q, k) + m.bias).softmax(-1) @ v))


def relative(m: Op, x: Tensor) -> Tensor:
    """Swin: a table of relative positions, one column per head."""
    tokens = x.shape[1]
    bias = m.table[m.index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
    q, k, v = unbound(m, x)
    y = (weights(m, q, k) + bias.unsqueeze(0)).softmax(-1) @ v
    return m.out(merged(y))


def relative_sdpa(m: Op, x: Tensor) -> Tensor:
    bias = m.table[:, m.index].unsqueeze(0)
    return m.out(merged(functional.scaled_dot_product_attention(*unbound(m, x), attn_mask=bias)))


def relative_mlp(m: Op, x: Tensor) -> Tensor:
    """Swin v2: positions through an MLP, one output per head; cosine attention with a learned scale."""
    bias = m.f(m.places).permute(2, 0, 1).sigmoid() * 4
    q, k, v = unbound(m, x)
    scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * m.sharpness.clamp(max=2.0).exp() + bias
    return m.out(merged(scores.softmax(-1) @ v))


def normed(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    return m.out(merged(weights(m, m.q_norm(q), m.k_norm(k)).softmax(-1) @ v))


def grouped(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    k, v = (t.repeat_interleave(m.heads // m.few, dim=1) for t in (k, v))
    return m.out(merged(weights(m, q, k).softmax(-1) @ v))


def grouped_expanded(m: Op, x: Tensor) -> Tensor:
    """Llama: keys and values expanded over the query heads of their group."""
    q, k, v = qkv_of(m, x)
    times = m.heads // m.few
    k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for t in (k, v))
    return m.out(merged(weights(m, q, k).softmax(-1) @ v))


def multi_query(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)  # one key head meets all query heads by broadcasting
    return m.out(merged(weights(m, q, k).softmax(-1) @ v))


def talking(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    scores = m.before(weights(m, q, k).permute(0, 2, 3, 1)).softmax(2)
    return m.out(merged(m.after(scores).permute(0, 3, 1, 2) @ v))


def talking_conv(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    return m.out(merged(m.after(m.before(weights(m, q, k)).softmax(-1)) @ v))


def linear_attention(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    context = k.softmax(-2).transpose(-2, -1) @ v
    return m.out(merged(q.softmax(-1) @ context))


def linear_relu(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    q, k = q.relu(), k.relu()
    total = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    return m.out(merged(q @ (k.transpose(-2, -1) @ v) / (total + 1)))


def cross_covariance(m: Op, x: Tensor) -> Tensor:
    """XCiT: attention between the channels of a head."""
    q, k, v = (t.transpose(-2, -1) for t in unbound(m, x))
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    scores = (q @ k.transpose(-2, -1) * m.sharpness).softmax(-1)
    return m.out((scores @ v).permute(0, 3, 1, 2).flatten(2))


def einsum(m: Op, x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (m.heads, m.size)) for t in m.qkv(x).split(m.heads * m.size, -1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * m.scale
    return m.out(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))


def batched(m: Op, x: Tensor) -> Tensor:
    """Heads merged into the batch, torch.bmm (fairseq, nn.MultiheadAttention's slow path)."""
    q, k, v = (t.reshape(-1, x.shape[1], m.size) for t in qkv_of(m, x))
    y = torch.bmm(torch.bmm(q * m.scale, k.transpose(1, 2)).softmax(-1), v)
    return m.out(y.view(-1, m.heads, x.shape[1], m.size).transpose(1, 2).flatten(2))


def gated(m: Op, x: Tensor) -> Tensor:
    """Each head has a gate of its own, computed from the token."""
    q, k, v = qkv_of(m, x)
    y = weights(m, q, k).softmax(-1) @ v
    return m.out(merged(y * m.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1)))


def head_scaled(m: Op, x: Tensor) -> Tensor:
    q, k, v = qkv_of(m, x)
    return m.out(merged(weights(m, q, k).softmax(-1) @ v * m.gain[:, None, None]))


def rotary(m: Op, x: Tensor) -> Tensor:
    def turned(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * m.cosine + torch.cat([-b, a], -1) * m.sine

    q, k, v = qkv_of(m, x)
    return m.out(merged(weights(m, turned(q), turned(k)).softmax(-1) @ v))


def sub_normed(m: Op, x: Tensor) -> Tensor:
    """A layer norm over the joined heads in front of the output layer (EVA-02, BEiT-3)."""
    q, k, v = qkv_of(m, x)
    return m.out(m.inner(merged(weights(m, q, k).softmax(-1) @ v)))


def pooled_keys(m: Op, x: Tensor) -> Tensor:
    """Keys and values from a shorter row (PVT)."""
    few = m.reduce(x.transpose(1, 2)).transpose(1, 2) if x.shape[1] > 1 else x
    q, k, v = split_heads(m.q(x), m.heads), split_heads(m.k(few), m.heads), split_heads(m.v(few), m.heads)
    return m.out(merged(weights(m, q, k).softmax(-1) @ v))


def learned_queries(m: Op, x: Tensor) -> Tensor:
    """Queries are parameters; the row becomes as long as there are queries (Perceiver, DETR)."""
    q = m.queries.unsqueeze(0).expand(x.shape[0], -1, -1)
    k, v = m.k(x), m.v(x)
    q, k, v = split_heads(q, m.heads), split_heads(k, m.heads), split_heads(v, m.heads)
    return m.out(merged(weights(m, q, k).softmax(-1) @ v))


def class_attention(m: Op, x: Tensor) -> Tensor:
    """Only the first token asks (CaiT)."""
    q, k, v = split_heads(m.q(x[:, :1]), m.heads), split_heads(m.k(x), m.heads), split_heads(m.v(x), m.heads)
    first = m.out(merged(weights(m, q, k).softmax(-1) @ v))
    return torch.cat([first, x[:, 1:]], 1)


def masked_out(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def distances(tokens: int) -> Tensor:
    row = torch.arange(tokens)
    return (row[:, None] - row[None]).abs()


def angles(size: int, tokens: int) -> dict[str, Tensor]:
    turns = torch.arange(tokens)[:, None] / torch.arange(1, size + 1)[None]
    return {"cosine": turns.cos(), "sine": turns.sin()}


def multihead(x: Tensor, width: int) -> nn.Module:
    heads = next(h for h in (4, 3, 2, 1) if x.shape[-1] % h == 0)
    return Op(
        lambda m, x: m.f(x, x, x, need_weights=False)[0],
        f=nn.MultiheadAttention(x.shape[-1], heads, batch_first=True),
    )


def encoder_layer(x: Tensor, width: int) -> nn.Module:
    heads = next(h for h in (4, 3, 2, 1) if x.shape[-1] % h == 0)
    return nn.TransformerEncoderLayer(x.shape[-1], heads, width, 0.1, batch_first=True, norm_first=True)


def tables(h: int, d: int, t: int) -> dict[str, Any]:
    return {"table": param(t, h), "index": distances(t)}


ATTENTION: Table = {
    "attention": {
        "plain": attention(plain),
        "fused": fused(plain_fused),
        "chunked": fused(chunked),
        "interleaved": fused(interleaved),
        "sdpa": fused(sdpa),
        "sdpa_causal": fused(sdpa_causal),
        "sdpa_masked": attention(sdpa_masked, parts=lambda h, d, t: {"mask": masked_out(t)}),
        "wide_values": attention(plain, v_size=3),
        "sdpa_wide_values": attention(
            sdpa_masked, v_size=3, parts=lambda h, d, t: {"mask": fixed_numbers(t, t)}
        ),
        "einsum": fused(einsum),
        "batched": attention(batched),
        "learned_queries": attention(
            learned_queries, parts=lambda h, d, t: {"q": None, "queries": param(3, h * d)}
        ),
        "class": attention(class_attention),
        "pooled_keys": lambda x, w: attention(
            pooled_keys, parts=lambda h, d, t: {"reduce": nn.Conv1d(x.shape[-1], x.shape[-1], 2, stride=2)}
        )(x, w),
        "module": multihead,
        "encoder_layer": encoder_layer,
    },
    "attention_bias": {
        "causal": attention(causal, parts=lambda h, d, t: {"mask": masked_out(t)}),
        "per_head": attention(biased, parts=lambda h, d, t: {"bias": param(h, t, t)}),
        "common": attention(biased, parts=lambda h, d, t: {"bias": param(1, t, t)}),
        "buffer": attention(biased, parts=lambda h, d, t: {"bias": fixed_numbers(1, h, t, t)}),
        "relative": fused(relative, parts=tables),
        "relative_rows": fused(
            relative_sdpa, parts=lambda h, d, t: {"table": param(h, t), "index": distances(t)}
        ),
        "relative_mlp": fused(
            relative_mlp,
            parts=lambda h, d, t: {
                "f": nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, h, bias=False)),
                "places": fixed_numbers(t, t, 2),
                "sharpness": param(h, 1, 1),
            },
        ),
        "rotary": attention(rotary, parts=lambda h, d, t: angles(d, t)),
    },
    "attention_norm": {
        "layer": attention(
            normed, parts=lambda h, d, t: {"q_norm": nn.LayerNorm(d), "k_norm": nn.LayerNorm(d)}
        ),
        "rms": attention(normed, parts=lambda h, d, t: {"q_norm": nn.RMSNorm(d), "k_norm": nn.RMSNorm(d)}),
        "sub": attention(sub_normed, parts=lambda h, d, t: {"inner": nn.LayerNorm(h * d)}),
        "gated": lambda x, w: attention(gated, parts=lambda h, d, t: {"gate": nn.Linear(x.shape[-1], h)})(
            x, w
        ),
        "head_scale": attention(head_scaled, parts=lambda h, d, t: {"gain": param(h)}),
        "talking": attention(
            talking, parts=lambda h, d, t: {"before": nn.Linear(h, h), "after": nn.Linear(h, h)}
        ),
        "talking_conv": attention(
            talking_conv, parts=lambda h, d, t: {"before": nn.Conv2d(h, h, 1), "after": nn.Conv2d(h, h, 1)}
        ),
    },
    "attention_group": {
        "repeated": attention(grouped, groups=2),
        "expanded": attention(grouped_expanded, groups=2),
        "sdpa": attention(sdpa_grouped, groups=2),
        "multi_query": attention(multi_query, groups=4),
        "multi_query_expanded": attention(grouped_expanded, groups=4),
    },
    "attention_linear": {
        "softmax": attention(linear_attention),
        "relu": attention(linear_relu),
        "cross_covariance": fused(cross_covariance, parts=lambda h, d, t: {"sharpness": param(h, 1, 1)}),
    },
}
