"""How much each unit matters: first-order Taylor, magnitude, random.

A unit's gate is a factor z = 1 on its channel; its importance is the squared change of the loss when
z goes to 0, to first order (dL/dz)^2 (Molchanov et al., CVPR 2019, Eq. 8). No gate is needed: on the
reading side dL/dz = sum(w * dL/dw) over the columns that read the channel, on the writing side
sum(w * dL/dw) + b * dL/db over a row, or gamma * dL/dgamma + beta * dL/dbeta of the batch norm behind
it. A unit with several members (a residual stream) adds their gates first and is squared once, Eq. 6.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compress.channelmap import ChannelMap
from compress.errors import ModelError
from compress.trace import get_tensor

Side = Literal["read", "write"]
CACHED = 2**16  # numbers of a product that stay in the processor's cache


@contextlib.contextmanager
def scored(
    net: nn.Module, cmap: ChannelMap, trained: Iterable[Tensor], side: Side = "read"
) -> Iterator[None]:
    """Inside, all that the gates of `side` are read off takes gradients; afterwards what is not trained has
    none again.

    What is frozen, and the gates of `compress.gates`, are scored but never trained.
    """
    owned = {id(tensor) for tensor in trained}
    names = {name for name, _ in cmap.reads} if side == "read" else {name for name, _ in _members(cmap)}
    asked = [get_tensor(net, name) for name in sorted(names)]
    resting = [tensor for tensor in asked if id(tensor) not in owned]
    for tensor in resting:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in resting:
            tensor.requires_grad_(False)
            tensor.grad = None


def read_gates(net: nn.Module, cmap: ChannelMap) -> Tensor:
    """dL/dz per unit, (units,), from the columns that read it; call after `loss.backward()`.

    The exact first-order expansion of removal, whatever activation lies in between.
    """
    gates = unit_zeros(net, cmap)
    for name, dim in sorted(cmap.reads):
        weight = get_tensor(net, name)
        if weight.grad is not None:
            add_by_unit(gates, slice_sums(weight.detach(), weight.grad, dim), cmap.axes[name, dim])
    return gates[:-1]


def write_gates(net: nn.Module, cmap: ChannelMap) -> Tensor:
    """dL/dz per unit, (units,), from what writes it: the batch norm where one follows, else row and bias.

    In front of a train-mode batch norm the row's own sum is zero (scale invariance), so it is never used.
    Equal to `read_gates` where the activation in between is positively homogeneous (ReLU).
    """
    gates = unit_zeros(net, cmap)
    for (name, dim), units in _members(cmap).items():
        tensor = get_tensor(net, name)
        if tensor.grad is not None:
            add_by_unit(gates, slice_sums(tensor.detach(), tensor.grad, dim), units)
    return gates[:-1]


def _members(cmap: ChannelMap) -> dict[tuple[str, int], np.ndarray]:
    """The axes that `write_gates` reads units off, and their units."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for writer in cmap.writers:
        units = cmap.axes.get(writer.weight)
        if units is None:
            continue
        own = [(writer.gamma, 0), (writer.beta, 0)] if writer.gamma else [writer.weight, (writer.bias, 0)]
        found |= {(name, dim): units for name, dim in own if name}
    return found


def unit_zeros(net: nn.Module, cmap: ChannelMap) -> Tensor:
    """One number per unit, and a last one that takes what belongs to none; (units + 1,)."""
    device = next(net.parameters()).device
    return torch.zeros(cmap.units + 1, dtype=torch.float32, device=device)


def slice_sums(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """sum(a * b) over every dimension but `dim`, (size of dim,); of complex numbers, Re(a * conj(b)).

    In blocks of rows that fit the processor's cache: the product never goes to memory.
    """
    if a.is_complex():  # dL/dz of a real gate: torch's gradients are dL/dRe + i dL/dIm
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if a.dim() == 1:
        return a * b
    others = [d for d in range(a.dim()) if d != dim]
    rows = max(1, CACHED * len(a) // max(a.numel(), 1))
    if rows >= len(a) or a.device.type != "cpu":
        return (a * b).sum(dim=others)
    parts = [(x * y).sum(dim=others) for x, y in zip(torch.split(a, rows), torch.split(b, rows), strict=True)]
    return torch.cat(parts) if dim == 0 else torch.stack(parts).sum(0)


def add_by_unit(gates: Tensor, values: Tensor, units: np.ndarray) -> None:
    """Add the values of an axis, (size,), to those of its units."""
    index = torch.from_numpy(units).to(gates.device) % len(gates)  # -1, what stays, goes to the last
    gates.index_add_(0, index, values.to(gates.dtype))


@dataclass
class Average:
    """The mean over the minibatches of a pruning step, then an exponential moving average over steps.

    a = ema * a + (1 - ema) * s, first a = s (Molchanov et al., CVPR 2019, section 4.1).
    """

    ema: float = 0.9
    total: Tensor | None = field(default=None, init=False)
    minibatches: int = field(default=0, init=False)
    average: Tensor | None = field(default=None, init=False)

    def add(self, values: Tensor) -> None:
        """What one minibatch says, (units,)."""
        self.total = values if self.total is None else self.total + values
        self.minibatches += 1

    def scores(self) -> np.ndarray:
        """Close a pruning step: the moving average over steps, float64 (units,)."""
        if self.total is None:
            raise ModelError("no gradient was accumulated", fix="call accumulate() after each backward()")
        step = self.total / self.minibatches
        self.average = step if self.average is None else self.ema * self.average + (1 - self.ema) * step
        self.total, self.minibatches = None, 0
        return self.average.cpu().numpy().astype(np.float64)


class Taylor(Average):
    """First-order Taylor importance, accumulated the paper's way: squared per minibatch, of the
    gradient of the minibatch's mean loss."""

    def __init__(self, cmap: ChannelMap, ema: float = 0.9, side: Side = "read") -> None:
        """Raises ModelError (exit 4) where a unit has no weight that writes it, and side is "write"."""
        super().__init__(ema)
        self.cmap, self.gates = cmap, read_gates if side == "read" else write_gates
        if side == "write":
            written = {unit for units in _members(cmap).values() for unit in units.tolist()}
            lost = cmap.units - len(written - {-1})
            if lost:
                raise ModelError(f"no weight writes {lost} of {cmap.units} units", "prune.gates", "use read")

    def accumulate(self, net: nn.Module, share: Any = None) -> None:
        """Take the gradients of one minibatch; call between `backward()` and `zero_grad()`."""
        self.add(self.gates(net, self.cmap).square())


def magnitude(net: nn.Module, cmap: ChannelMap, norm: Literal[1, 2] = 2) -> np.ndarray:
    """L2 or L1 norm of the rows that write a unit, all members together (Li et al., ICLR 2017)."""
    found = unit_zeros(net, cmap)
    for weight, dim, units in _rows(net, cmap):
        add_by_unit(found, slice_sums(weight, weight if norm == 2 else weight.sign(), dim), units)
    norms = found[:-1].sqrt() if norm == 2 else found[:-1]
    return norms.cpu().numpy().astype(np.float64)


def magnitude_share(net: nn.Module, cmap: ChannelMap) -> np.ndarray:
    """The share of a layer's squared L2 norm in the rows that write a unit, summed over the layers.

    Norms are not comparable between layers, and a layer of few channels loses more with one of them; a unit
    that several layers write is worth something to each.
    """
    found = unit_zeros(net, cmap)
    for weight, dim, units in _rows(net, cmap):
        squares = slice_sums(weight, weight, dim).to(found.dtype)  # a whole layer's may be too large for fp16
        add_by_unit(found, squares / squares.sum().clamp_min(torch.finfo(found.dtype).tiny), units)
    return found[:-1].cpu().numpy().astype(np.float64)


def _rows(net: nn.Module, cmap: ChannelMap) -> Iterator[tuple[Tensor, int, np.ndarray]]:
    """The weights that write units: tensor, the dimension of its rows, their units."""
    for writer in cmap.writers:
        name, dim = writer.weight
        units = cmap.axes.get((name, dim))
        if units is not None:
            yield get_tensor(net, name).detach(), dim, units


def random(cmap: ChannelMap, seed: int) -> np.ndarray:
    """Uniform scores: the baseline that any criterion must beat."""
    return np.random.default_rng(seed).random(cmap.units)
