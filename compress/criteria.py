"""What a minibatch says about every unit: criteria, and the truth that they estimate.

Each criterion is a function of one minibatch that gives (units,); scores are means over minibatches. L is the
minibatch's mean loss, L_n the loss of example n, z_u the gate of unit u, g_u = dL/dz_u; equation numbers are
those of Molchanov et al., CVPR 2019. A unit's gate stands on its reading side unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.channelmap import ChannelMap
from compress.errors import ModelError
from compress.gated import Gated, Replay
from compress.importance import add_by_unit, slice_sums, unit_zeros
from compress.task import Batch, logits_of
from compress.trace import get_tensor

Loss = Callable[[nn.Module, Batch], Tensor]
"""The mean loss of a batch, a scalar."""


# -- first order --------------------------------------------------------------------------------------


def example_gradients(gated: Gated, batch: Batch, loss: Loss, *, graph: bool = False) -> Tensor:
    """dL/dz_u as each example has its part in it, (examples, units); the sum over examples is g."""
    value = loss(gated, batch)
    used = gated.used
    if used is None:
        raise ModelError("the loss does not call the model", fix="call it on the batch")
    found = torch.autograd.grad(value, used, create_graph=graph)[0]
    return found if graph else found.detach()


def taylor(gated: Gated, batch: Batch, loss: Loss) -> Tensor:
    """g_u^2: Eq. 8, the group contribution of Eq. 6."""
    return example_gradients(gated, batch, loss).sum(0).square()


def taylor_examples(gated: Gated, batch: Batch, loss: Loss) -> Tensor:
    """mean_n (dL_n/dz_u)^2: the paper's "full gradient", the diagonal of the empirical Fisher information."""
    found = example_gradients(gated, batch, loss)
    return (len(found) * found).square().mean(0)


def taylor_output(gated: Gated, batch: Batch, loss: Loss, classes: Tensor) -> Tensor:
    """mean_n |dL_n/dz_u| over the L2 norm of its layer's (Molchanov et al., ICLR 2017, Eq. 8).

    classes: the layer of each unit, int64 (units,): `ChannelMap.classes`.
    """
    found = example_gradients(gated, batch, loss)
    change = (len(found) * found).abs().mean(0)
    squares = change.new_zeros(int(classes.max()) + 1).index_add_(0, classes, change.square())
    return change / squares.sqrt()[classes].clamp_min(torch.finfo(change.dtype).tiny)


def taylor_weights(net: nn.Module, cmap: ChannelMap) -> Tensor:
    """sum over a unit's weights of (w dL/dw)^2: Eq. 7, the sum of individuals, on what writes the unit.

    Call after `loss.backward()`.
    """
    found = unit_zeros(net, cmap)
    for writer in cmap.writers:
        units = cmap.axes.get(writer.weight)
        if units is not None:
            weight = get_tensor(net, writer.weight[0])
            if weight.grad is not None:
                product = weight.detach() * weight.grad
                add_by_unit(found, slice_sums(product, product, writer.weight[1]), units)
    return found[:-1]


# -- second order -------------------------------------------------------------------------------------


def hessian_diagonal(
    gated: Gated, batch: Batch, loss: Loss, *, samples: int = 0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """(g, H_uu): gradient and Hessian diagonal of L by the gates, (units,) each.

    samples 0: exact, one backward pass per unit. Else Hutchinson's estimate from that many random signs v,
    the mean of v * Hv (Bekas et al., 2007).
    """
    rows = example_gradients(gated, batch, loss, graph=True)
    gates, gradient = gated.used, rows.sum(0)
    assert gates is not None

    def times(v: Tensor) -> Tensor:
        found = torch.autograd.grad(gradient, gates, v, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(gradient) if found is None else found.sum(0)

    if samples:
        signs = torch.randint(0, 2, (samples, gated.units), generator=generator)
        vectors: Iterator[Tensor] = (s.to(gradient) * 2 - 1 for s in signs)
        diagonal = torch.stack([v * times(v) for v in vectors]).mean(0)
    else:
        eye = torch.eye(gated.units, dtype=gradient.dtype, device=gradient.device)
        diagonal = torch.stack([times(row)[i] for i, row in enumerate(eye)])
    return gradient.detach(), diagonal


def taylor_second(gradient: Tensor, diagonal: Tensor) -> Tensor:
    """(-g_u + H_uu / 2)^2: Eq. 4 with the diagonal of the Hessian alone."""
    return (diagonal / 2 - gradient).square()


def brain_damage(diagonal: Tensor) -> Tensor:
    """H_uu / 2: optimal brain damage (LeCun et al., 1989), which takes the gradient for zero."""
    return diagonal / 2


# -- the logits expanded instead of the loss ----------------------------------------------------------


def logit_shifts(
    gated: Gated, inputs: Tensor, labels: Tensor, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """(log p, d): how the wrong classes gain on the right one as a unit leaves, logits linear in its gate.

    log p: (n, 1 + k), the right class first. d: (n, k, units), by how much a wrong one's logit minus the
    right one's rises, J_y - J_c with J_c = dlogit_c / dz_u. classes: only the likeliest wrong ones of each
    example by themselves, and all the others as one, whose shift is the mean of theirs weighted by p. One
    backward pass through the activations for each of k: every wrong class if None, else `classes` and one.
    """
    logits = logits_of(gated(inputs))
    gates, many = gated.used, logits.shape[1]
    assert gates is not None
    log_p = logits.detach().log_softmax(1)
    right = functional.one_hot(labels, many).to(log_p)
    wrong = log_p.masked_fill(right.bool(), -torch.inf)
    count = many - 1 if classes is None else min(classes, many - 1)
    own, order = wrong.topk(count, dim=1)
    columns = [functional.one_hot(index, many).to(log_p) for index in order.T]
    if count < many - 1:
        rest = wrong.scatter(1, order, -torch.inf)
        own = torch.cat([own, rest.logsumexp(1, keepdim=True)], 1)
        columns.append(rest.softmax(1))
    found = [
        torch.autograd.grad(logits, gates, right - column, retain_graph=number + 1 < len(columns))[0]
        for number, column in enumerate(columns)
    ]
    return torch.cat([log_p.gather(1, labels[:, None]), own], 1), torch.stack(found, 1)


def loss_changes(log_p: Tensor, shifts: Tensor) -> Tensor:
    """How the cross-entropy of each example changes when its logits shift, exactly: (n, units).

    cross_entropy(l - J_u, y) - cross_entropy(l, y) = log(p_y + sum_c p_c exp(d_cu)), c the wrong classes.
    """
    share = torch.einsum("nk,nku->nu", log_p[:, 1:].exp(), shifts.expm1())  # that, minus 1
    after = torch.logaddexp((log_p[:, 1:, None] + shifts).logsumexp(1), log_p[:, :1])
    return torch.where(share.abs() < 0.5, share.log1p(), after)  # the former is precise near 0


def squared_mean(changes: Tensor) -> Tensor:
    """(mean_n change)^2 of a minibatch: the statistic of Eq. 3 as the paper accumulates it, (units,)."""
    return changes.mean(0).square()


# -- the truth ----------------------------------------------------------------------------------------


@torch.no_grad()
def leave_one_out(
    gated: Gated, inputs: Tensor, labels: Tensor, *, together: int = 1, units: Any = None
) -> Tensor:
    """The oracle: the change of every example's loss when one unit is left out, (n, units).

    together: units that go through the network in one batch. units: which ones; all if None. Only what
    comes after a unit's gates is computed again.
    """
    chosen = torch.arange(gated.units) if units is None else torch.as_tensor(units)
    replay, n, found = Replay(gated, inputs), len(inputs), []
    before = functional.cross_entropy(logits_of(replay.result), labels, reduction="none")
    for part in torch.split(chosen, together):
        logits = logits_of(replay.without(part))
        after = functional.cross_entropy(logits, labels.repeat(len(part)), reduction="none")
        found.append(after.reshape(len(part), n) - before)
    return torch.cat(found).T


# -- of the weights alone -----------------------------------------------------------------------------


def norm_scale(net: nn.Module, cmap: ChannelMap, *, gradient: bool = False) -> Tensor:
    """sum |gamma| over a unit's batch norms (Liu et al., ICCV 2017), or (sum gamma dL/dgamma)^2.

    Units without a batch norm get 0. gradient: call after `loss.backward()`.
    """
    found = unit_zeros(net, cmap)
    for writer in cmap.writers:
        units = cmap.axes.get(writer.weight)
        if units is None or not writer.gamma:
            continue
        gamma = get_tensor(net, writer.gamma)
        if not gradient:
            add_by_unit(found, gamma.detach().abs(), units)
        elif gamma.grad is not None:
            add_by_unit(found, gamma.detach() * gamma.grad, units)
    return found[:-1].square() if gradient else found[:-1]
