"""Each process's share of a minibatch, and what makes the shares one minibatch again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress import distributed, seeds
from compress.errors import DataError


@dataclass(frozen=True)
class Share:
    """This process's examples of a minibatch. weight: their share of it. split: the others have other ones.

    A minibatch of fewer examples than processes is not split: all have all of it, and equal weights.
    """

    batch: Any
    weight: float = 1.0
    split: bool = False

    def together(self) -> AbstractContextManager[Any]:
        """Inside, what a model computes over a minibatch (batch norm) it computes over all shares."""
        if not self.split:
            return nullcontext()
        from compress.sync_norm import Together

        return Together()

    def backward(self, loss: Tensor) -> None:
        """Gradients of this share's part in the minibatch's mean loss."""
        part = loss if self.weight == 1 else loss * self.weight
        part.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def mean(self, loss: Tensor) -> float:
        """The minibatch's mean loss, from the mean losses of all shares."""
        value = float(loss.detach())
        if distributed.size() == 1:
            return value
        return float(distributed.summed(torch.tensor(self.weight * value, dtype=torch.float64)))

    def averaged(self, values: Tensor) -> Tensor:
        """The minibatch's mean of what the values are the mean of over this share."""
        if distributed.size() == 1:
            return values
        return distributed.summed(self.weight * values.cpu().double()).to(values)


def rows(n: int) -> slice | None:
    """Which of a minibatch's n examples are this process's; None where there are fewer than processes."""
    size, rank = distributed.size(), distributed.rank()
    return slice(n * rank // size, n * (rank + 1) // size) if n >= size else None


def shared(batch: Any, n: int, cut: Callable[[Any, slice], Any]) -> Share:
    """The share of a minibatch of n examples; ``cut`` takes rows of it."""
    if distributed.size() == 1:
        return Share(batch)
    own = rows(n)
    if own is None:
        return Share(batch, 1 / distributed.size())
    return Share(cut(batch, own), (own.stop - own.start) / n, split=True)


def agree(batch: Any) -> None:
    """Raise ConfigError (exit 3) unless all processes have the same batch before each takes its share."""
    if distributed.size() > 1:
        digest = hashlib.sha256()
        for tensor in _tensors(batch):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        fix = "give whole batches, the same in each: no DistributedSampler, no random choice without a seed"
        distributed.agree(digest.hexdigest(), "the first batch", fix)


def share(batch: Any) -> Share:
    """This process's share of any batch: the rows of its tensors, or of its lists.

    A tuple or dict of lists of one length is cut in these (a detector's images and targets), a list of tuples
    in itself. Else tensors of one length are cut along dimension 0. Else a list holds examples. Raises
    DataError (exit 3).
    """
    if distributed.size() == 1:
        return Share(batch)
    members: Any = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else ()
    found = {len(member) if isinstance(member, (list, tuple)) else -1 for member in members}
    if len(found) == 1 and -1 not in found:
        return shared(batch, found.pop(), _cut_members)
    lengths = {len(tensor) for tensor in _tensors(batch) if tensor.dim()}
    pairs = isinstance(batch, list) and all(isinstance(item, tuple) for item in batch)
    if len(lengths) == 1 and not pairs:
        return shared(batch, lengths.pop(), _cut_tensors)
    if isinstance(batch, list):
        return shared(batch, len(batch), lambda value, own: value[own])
    said = f"tensors of lengths {', '.join(map(str, sorted(lengths)))}" if lengths else "no tensors"
    what = f"a batch of {said} cannot be shared among {distributed.size()} processes"
    fix = "give tensors of one length, or lists with an item for each example"
    raise DataError(what, "batches", fix)


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``function`` of every tensor in it, at any depth of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, function) for item in value)
    return value


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(batch, found.append)
    return found


def _cut_tensors(batch: Any, own: slice) -> Any:
    return mapped(batch, lambda tensor: tensor[own] if tensor.dim() else tensor)


def _cut_members(batch: Any, own: slice) -> Any:
    if isinstance(batch, Mapping):
        return {key: member[own] for key, member in batch.items()}
    cut = [member[own] for member in batch]
    return type(batch)(*cut) if hasattr(batch, "_fields") else tuple(cut)


def own_draws(seed: int, step: int, device: torch.device) -> None:
    """Let dropout draw differently in every process, and by the step alone: so resumed runs draw alike."""
    if distributed.size() > 1:
        seeds.seed_all(seeds.derive(seed, "process", distributed.rank(), step), device)


def reduce_gradients(net: nn.Module) -> None:
    """Sum the gradients of all that takes any over the processes: parameters, and tensors that are scored."""
    if distributed.size() > 1:
        tensors = (*net.parameters(), *net.buffers())
        distributed.reduce_gradients(t for t in tensors if t.requires_grad)


def spread(*nets: nn.Module | None) -> None:
    """Give the nets of every process the bits that process 0 has: all begin alike."""
    distributed.spread(t for net in nets if net is not None for t in (*net.parameters(), *net.buffers()))


def level_buffers(net: nn.Module) -> None:
    """Give buffers that a forward pass moves by its own examples (running statistics) process 0's values."""
    if distributed.size() > 1:
        distributed.spread(b for b in net.buffers() if b.is_floating_point() and not b.requires_grad)
