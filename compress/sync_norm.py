"""Batch norm over a minibatch that lies in several processes.

nn.SyncBatchNorm is a module, and traced graphs call an op: so the calls of both are caught (`Together`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from compress.distributed import answering, size
from compress.norm_calls import NormCalls


class Together(NormCalls):
    """Inside, batch norms in train mode take the statistics of all processes' examples."""

    def normed(self, func: Any, given: dict[str, Any]) -> Any:
        return batch_norm(
            given["input"],
            given.get("weight"),
            given.get("bias"),
            given.get("running_mean"),
            given.get("running_var"),
            given.get("momentum", 0.1),
            given.get("eps", 1e-5),
        )


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm in train mode of x (n, channels, ...), whose n examples are this process's of a minibatch.

    Ioffe and Szegedy 2015, algorithm 1, over the examples of all processes; running_var takes the unbiased
    variance. Gradients are those of the sum of the processes' losses.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    mean, var, count = _statistics(wide.detach())
    with torch.no_grad():
        for running, now in ((running_mean, mean), (running_var, var * count / (count - 1))):
            if running is not None:
                running.mul_(1 - momentum).add_(now, alpha=momentum)
    scale = wide.new_ones(x.shape[1]) if weight is None else weight.to(wide.dtype)
    shift = wide.new_zeros(x.shape[1]) if bias is None else bias.to(wide.dtype)
    out: Tensor = _Normalised.apply(wide, scale, shift, mean, var, count, eps)
    return out.to(x.dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over all processes, and the count of numbers of a channel.

    Means and squared deviations are put together as Chan et al. 1979 do, which does not cancel.
    """
    others = [d for d in range(x.dim()) if d != 1]
    own_var, own_mean = torch.var_mean(x, others, correction=0)
    count = x.numel() // x.shape[1]
    own = torch.cat(
        [own_mean.double(), own_var.double() * count, own_mean.new_full((1,), count, dtype=torch.float64)]
    )
    found = [torch.empty_like(own) for _ in range(size())]
    with answering():
        dist.all_gather(found, own)
    means, squares, counts = torch.split(torch.stack(found), [x.shape[1], x.shape[1], 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    var = (squares + counts * (means - mean).square()).sum(0) / total
    return mean.to(x.dtype), var.to(x.dtype), total.to(x.dtype)


class _Normalised(Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var are of all processes' x.

    Backward is that of fixed statistics, less what x does to them, for which two sums per channel travel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([dbias, dweight])
        with answering():
            dist.all_reduce(sums)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        inverse = (var + ctx.eps).rsqrt()
        constant, slope = sums * (weight * inverse / count)
        dx -= constant.view(shape) + (x - mean.view(shape)) * (slope * inverse).view(shape)
        return dx, dweight, dbias, None, None, None, None
