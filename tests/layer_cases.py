"""Tiny networks, one per layer: pooling, reductions, norms, contractions (see op_cases)."""

from __future__ import annotations

import torch
from op_cases import CHANNELS, Case, aten, each, param, pooled
from torch import nn
from torch.nn import functional

POOLS_1D = (
    (lambda n, y: functional.max_pool1d(y, 2),),
    (lambda n, y: functional.avg_pool1d(y, 2),),
    (lambda n, y: functional.adaptive_avg_pool1d(y, 2),),
    (lambda n, y: functional.adaptive_max_pool1d(y, 2),),
    (lambda n, y: aten.max_pool1d_with_indices(y, [2])[0],),
    (lambda n, y: aten.reflection_pad1d(y, [1, 1]),),
    (lambda n, y: aten.replication_pad1d(y, [1, 1]),),
    (lambda n, y: functional.interpolate(y, scale_factor=2),),
    (lambda n, y: functional.interpolate(y, scale_factor=2, mode="linear"),),
    (lambda n, y: functional.interpolate(y, scale_factor=2, mode="nearest-exact"),),
)
POOLS_2D = (
    (lambda n, y: functional.max_pool2d(y, 2),),
    (lambda n, y: functional.avg_pool2d(y, 2),),
    (lambda n, y: functional.adaptive_avg_pool2d(y, 2),),
    (lambda n, y: functional.adaptive_max_pool2d(y, 2),),
    (lambda n, y: aten.max_pool2d_with_indices(y, [2, 2])[0],),
    (lambda n, y: aten.reflection_pad2d(y, [1, 1, 1, 1]),),
    (lambda n, y: aten.replication_pad2d(y, [1, 1, 1, 1]),),
    (lambda n, y: functional.interpolate(y, scale_factor=2),),
    (lambda n, y: functional.interpolate(y, scale_factor=2, mode="bilinear"),),
    (lambda n, y: functional.interpolate(y, scale_factor=2, mode="bicubic"),),
    (lambda n, y: functional.interpolate(y, scale_factor=2, mode="nearest-exact"),),
    (lambda n, y: functional.interpolate(y, size=(9, 9), mode="bilinear", antialias=True),),
    (lambda n, y: functional.interpolate(y, size=(9, 9), mode="bicubic", antialias=True),),
)
POOLS_3D = (
    (lambda n, y: functional.max_pool3d(y, 2),),
    (lambda n, y: functional.avg_pool3d(y, 2),),
    (lambda n, y: functional.adaptive_avg_pool3d(y, 2),),
    (lambda n, y: functional.adaptive_max_pool3d(y, 2),),
    (lambda n, y: aten.max_pool3d_with_indices(y, [2, 2, 2])[0],),
    (lambda n, y: aten.reflection_pad3d(y, [1] * 6),),
    (lambda n, y: aten.replication_pad3d(y, [1] * 6),),
    (lambda n, y: functional.interpolate(y, scale_factor=2),),
    (lambda n, y: functional.interpolate(y, scale_factor=2, mode="trilinear"),),
    (lambda n, y: functional.interpolate(y, scale_factor=2, mode="nearest-exact"),),
)
SPATIAL = [
    *each(
        "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices "
        "reflection_pad1d replication_pad1d upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d",
        *POOLS_1D,
        rank=1,
    ),
    *each(
        "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices "
        "reflection_pad2d replication_pad2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
        "_upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        *POOLS_2D,
    ),
    *each(
        "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices "
        "reflection_pad3d replication_pad3d upsample_nearest3d upsample_trilinear3d "
        "_upsample_nearest_exact3d",
        *POOLS_3D,
        rank=3,
        size=4,
    ),
    Case(
        "avg_pool2d", lambda n, y: functional.avg_pool2d(y.permute(0, 2, 1, 3), 2), "over an axis of channels"
    ),
]

REDUCTIONS = [
    *each(
        "mean sum amax amin prod var std logsumexp nansum linalg_vector_norm",
        (lambda n, y: y.mean(2),),
        (lambda n, y: y.sum((2, 3)),),
        (lambda n, y: y.amax(2),),
        (lambda n, y: y.amin((2, 3), keepdim=True),),
        (lambda n, y: y.prod(3),),
        (lambda n, y: y.var(2),),
        (lambda n, y: y.std((2, 3), correction=0),),
        (lambda n, y: y.logsumexp(2),),
        (lambda n, y: y.nansum(2),),
        (lambda n, y: functional.normalize(y, dim=2),),
    ),
    *each(
        "max max min min any all argmax argmin cumsum softmax log_softmax _softmax _log_softmax glu",
        (lambda n, y: y.max(2)[0],),
        (lambda n, y: torch.max(y, y.roll(1, 2)),),
        (lambda n, y: y.min(2, keepdim=True)[0],),
        (lambda n, y: torch.min(y, y.roll(1, 2)),),
        (lambda n, y: (y > 1).any(2) * y.mean(2),),
        (lambda n, y: (y > 0).all(2) + y.mean(2),),
        (lambda n, y: y.argmax(2) * y.mean(2),),
        (lambda n, y: y.argmin(2) * y.mean(2),),
        (lambda n, y: y.cumsum(2),),
        (lambda n, y: y.softmax(2),),
        (lambda n, y: y.log_softmax(3),),
        (lambda n, y: aten._softmax(y, 2, False),),
        (lambda n, y: aten._log_softmax(y, 2, False),),
        (lambda n, y: functional.glu(y, 1), "", "conv", 2, dict, 6, 4),
    ),
    *each(
        "mean sum softmax log_softmax cumsum argmax linalg_vector_norm std max",
        (lambda n, y: y.mean(1, keepdim=True) * n.scale,),
        (lambda n, y: y.sum(1, keepdim=True) * n.scale,),
        (lambda n, y: y.softmax(1),),
        (lambda n, y: y.log_softmax(1),),
        (lambda n, y: y.cumsum(1),),
        (lambda n, y: y.argmax(1, keepdim=True) * n.scale,),
        (lambda n, y: functional.normalize(y, dim=1),),
        (lambda n, y: y.std((1, 2, 3), keepdim=True) * n.scale,),
        (lambda n, y: y.max(1, keepdim=True)[0] * n.scale,),
        pinned="runs over the channels",
        parts=lambda: {"scale": param(1, 2, 1, 1)},
    ),
]

NORMS = [
    Case("batch_norm", lambda n, y: n.bn(y), parts=lambda: {"bn": nn.BatchNorm2d(CHANNELS)}),
    Case("batch_norm", lambda n, y: n.bn(y), parts=lambda: {"bn": nn.BatchNorm2d(CHANNELS, affine=False)}),
    Case(
        "batch_norm",
        lambda n, y: n.bn(y.transpose(1, 2)),
        "normalised over",
        parts=lambda: {"bn": nn.BatchNorm2d(6)},
    ),
    Case(
        "instance_norm",
        lambda n, y: n.norm(y),
        parts=lambda: {"norm": nn.InstanceNorm2d(CHANNELS, affine=True)},
    ),
    Case("prelu", lambda n, y: n.prelu(y), parts=lambda: {"prelu": nn.PReLU(CHANNELS)}),
    Case("prelu", lambda n, y: n.prelu(y), parts=lambda: {"prelu": nn.PReLU()}),
    Case(
        "_prelu_kernel",
        lambda n, y: aten._prelu_kernel(y, n.slope),
        parts=lambda: {"slope": param(1, CHANNELS, 1, 1)},
    ),
    Case(
        "layer_norm",
        lambda n, y: n.norm(y),
        "statistics over the channels",
        parts=lambda: {"norm": nn.LayerNorm((CHANNELS, 6, 6))},
    ),
    Case("layer_norm", lambda n, y: n.norm(y), parts=lambda: {"norm": nn.LayerNorm((6, 6))}),
    Case(
        "rms_norm",
        lambda n, y: n.norm(y.permute(0, 2, 3, 1)),
        "statistics over the channels",
        "linear",
        parts=lambda: {"norm": nn.RMSNorm(CHANNELS)},
    ),
    Case("rms_norm", lambda n, y: n.norm(y), parts=lambda: {"norm": nn.RMSNorm(6)}),
    Case(
        "group_norm",
        lambda n, y: n.norm(y),
        "statistics over the channels of a group",
        parts=lambda: {"norm": nn.GroupNorm(1, CHANNELS)},
    ),
    Case("group_norm", lambda n, y: n.norm(y), free=4, parts=lambda: {"norm": nn.GroupNorm(4, CHANNELS)}),
]

CONTRACTIONS = [
    Case("conv1d", lambda n, y: n.conv(y), rank=1, parts=lambda: {"conv": nn.Conv1d(CHANNELS, 6, 3)}),
    Case("conv2d", lambda n, y: n.conv(y), parts=lambda: {"conv": nn.Conv2d(CHANNELS, 6, 3, padding="same")}),
    Case("conv3d", lambda n, y: n.conv(y), rank=3, size=4, parts=lambda: {"conv": nn.Conv3d(CHANNELS, 6, 3)}),
    Case(
        "conv2d",
        lambda n, y: n.conv(n.conv(y).relu()),
        parts=lambda: {"conv": nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)},
    ),
    Case(
        "conv2d", lambda n, y: n.conv(y), parts=lambda: {"conv": nn.Conv2d(CHANNELS, 12, 3, groups=2)}, free=4
    ),
    Case(
        "conv2d", lambda n, y: n.conv(y), parts=lambda: {"conv": nn.Conv2d(CHANNELS, 4, 3, groups=4)}, free=2
    ),
    Case(
        "conv2d",
        lambda n, y: n.conv(y),
        parts=lambda: {"conv": nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS)},
    ),
    Case(
        "conv2d",
        lambda n, y: n.conv(y),
        parts=lambda: {"conv": nn.Conv2d(CHANNELS, 3 * CHANNELS, 3, groups=CHANNELS)},
    ),
    Case(
        "conv2d",
        lambda n, y: functional.conv2d(y, n.w * n.gain),
        parts=lambda: {"w": param(5, CHANNELS, 3, 3), "gain": param(5, 1, 1, 1)},
    ),
    Case(
        "view",
        lambda n, y: functional.conv2d(y, n.w.view(5, CHANNELS, 1, 1)),
        "states its size",
        parts=lambda: {"w": param(5, CHANNELS)},
    ),
    Case(
        "reshape",
        lambda n, y: functional.conv2d(y, n.w.mT.reshape(CHANNELS, 5).T[:, :, None, None]),
        "states its size",
        parts=lambda: {"w": param(5, CHANNELS)},
    ),
    Case(
        "permute",
        lambda n, y: functional.linear(y.permute(0, 2, 3, 1), n.w.permute(1, 0)),
        "",
        "linear",
        parts=lambda: {"w": param(CHANNELS, 5)},
    ),
    Case(
        "conv2d",
        lambda n, y: functional.conv2d(y, torch.cat([n.w, n.v])),
        "computed, not a parameter",
        parts=lambda: {"w": param(2, CHANNELS, 1, 1), "v": param(3, CHANNELS, 1, 1)},
    ),
    Case(
        "conv2d",
        lambda n, y: functional.conv2d(y, pooled(y)[:1].expand(4, -1, -1, -1)),
        "computed, not a parameter",
    ),
    *each(
        "conv_transpose1d conv_transpose2d conv_transpose3d",
        (
            lambda n, y: n.conv(y),
            "",
            "conv",
            1,
            lambda: {"conv": nn.ConvTranspose1d(CHANNELS, 6, 3, stride=2)},
        ),
        (
            lambda n, y: n.conv(y),
            "",
            "conv",
            2,
            lambda: {"conv": nn.ConvTranspose2d(CHANNELS, 6, 3, stride=2)},
        ),
        (lambda n, y: n.conv(y), "", "conv", 3, lambda: {"conv": nn.ConvTranspose3d(CHANNELS, 6, 3)}),
        size=4,
    ),
    Case(
        "conv_transpose2d",
        lambda n, y: n.conv(y),
        free=4,
        parts=lambda: {"conv": nn.ConvTranspose2d(CHANNELS, 12, 3, groups=4)},
    ),
    Case(
        "conv_transpose2d",
        lambda n, y: n.conv(y),
        parts=lambda: {"conv": nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, groups=CHANNELS)},
    ),
    Case(
        "linear",
        lambda n, y: n.fc(y.flatten(1)),
        reader="linear",
        parts=lambda: {"fc": nn.Linear(CHANNELS * 36, 6)},
    ),
    Case("linear", lambda n, y: n.fc(y), parts=lambda: {"fc": nn.Linear(6, 6)}),
    Case(
        "matmul",
        lambda n, y: y.permute(0, 2, 3, 1) @ n.w,
        reader="linear",
        parts=lambda: {"w": param(CHANNELS, 6)},
    ),
    Case("matmul", lambda n, y: y @ y.mT),
    Case(
        "matmul",
        lambda n, y: y.flatten(2).mT @ y.flatten(2) @ n.w,
        "read by another",
        "linear",
        parts=lambda: {"w": param(36, 6)},
    ),
    Case("matmul", lambda n, y: n.w @ y, parts=lambda: {"w": param(5, 6)}),
    Case(
        "matmul",
        lambda n, y: (n.w @ y.flatten(2)).unflatten(2, (6, 6)),
        parts=lambda: {"w": param(CHANNELS, CHANNELS)},
    ),
    Case(
        "einsum",
        lambda n, y: torch.einsum("oc,bchw->bohw", n.w, y),
        parts=lambda: {"w": param(CHANNELS, CHANNELS)},
    ),
    Case(
        "bmm",
        lambda n, y: y.flatten(2).bmm(y.flatten(2).mT.softmax(1) * 0 + n.v),
        "multiplied with",
        parts=lambda: {"v": param(36, 8)},
    ),
    Case(
        "bmm",
        lambda n, y: y.flatten(2).bmm(n.v.expand(y.shape[0], -1, -1)),
        parts=lambda: {"v": param(36, 8)},
    ),
    Case(
        "baddbmm",
        lambda n, y: torch.baddbmm(y.flatten(2), n.conv(y).flatten(2), n.v.expand(y.shape[0], -1, -1)),
        parts=lambda: {"v": param(36, 36), "conv": nn.Conv2d(CHANNELS, CHANNELS, 1)},
    ),
    Case(
        "scaled_dot_product_attention",
        lambda n, y: (
            functional.scaled_dot_product_attention(
                *n.qkv(y.flatten(2).mT).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            )
            .transpose(1, 2)
            .flatten(2)
        ),
        "",
        "linear",
        parts=lambda: {"qkv": nn.Linear(CHANNELS, 24)},
    ),
    Case(
        "mm",
        lambda n, y: pooled(y).flatten(1).mm(n.w),
        reader="linear",
        parts=lambda: {"w": param(CHANNELS, 6)},
    ),
    Case(
        "addmm",
        lambda n, y: torch.addmm(n.b, pooled(y).flatten(1), n.w),
        reader="linear",
        parts=lambda: {"w": param(CHANNELS, 6), "b": param(6)},
    ),
    Case(
        "addmm",
        lambda n, y: torch.addmm(n.b, pooled(y).flatten(1), n.w),
        "has no pruning rule",
        reader="linear",
        parts=lambda: {"w": param(CHANNELS, 6), "b": param(1, 6)},
    ),
    Case(
        "embedding",
        lambda n, y: n.table((pooled(y)[:, :, 0, 0] > 0).long()),
        "looks up",
        "linear",
        parts=lambda: {"table": nn.Embedding(2, 6)},
    ),
]
