"""Batch-norm statistics estimated anew over training minibatches, and kept only where that does no harm.

Running statistics lag behind weights that were pruned or averaged. Here they become the mean, over N
minibatches, of each one's mean and unbiased variance under the final weights (as Izmailov et al., UAI 2018,
section 3.2, do for averaged weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress import distributed, seeds
from compress.errors import DataError, Interrupted
from compress.norm_calls import NormCalls
from compress.task import Batch, Evaluation, Task, move


@dataclass(frozen=True)
class Recalibration:
    """minibatches: asked for. norms: batch norms with running statistics that are not frozen; where there
    are none, nothing was done. before, after: validation values. kept: whether the new statistics were."""

    minibatches: int
    norms: int
    before: float
    after: float
    kept: bool


@dataclass
class _Statistics:
    """The running statistics of a batch norm, and sums of what its minibatches had."""

    mean: Tensor
    var: Tensor
    mean_sum: Tensor
    var_sum: Tensor
    uses: int = 0

    @torch.no_grad()
    def settle(self) -> None:
        self.mean.copy_(self.mean_sum / self.uses)
        self.var.copy_(self.var_sum / self.uses)


class _Watch(NormCalls):
    """Inside, batch norms in train mode leave their running statistics alone and tell their minibatch's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, _Statistics] = {}

    def normed(self, func: Any, given: dict[str, Any]) -> Any:
        mean, var = given.get("running_mean"), given.get("running_var")
        if mean is None or var is None:
            return func(**given)
        own = {"running_mean": torch.zeros_like(mean), "running_var": torch.zeros_like(var)}
        result = func(**{**given, **own, "momentum": 1.0})  # all of the minibatch, nothing of before
        if id(mean) not in self.seen:
            zeros = torch.zeros_like(mean, dtype=torch.float64)
            self.seen[id(mean)] = _Statistics(mean, var, zeros, zeros.clone())
        found = self.seen[id(mean)]
        found.mean_sum += own["running_mean"]
        found.var_sum += own["running_var"]
        found.uses += 1
        return result


def recalibrate(
    model: nn.Module,
    task: Task,
    minibatches: int,
    *,
    epoch: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
) -> Recalibration:
    """Estimate the running statistics of `model`'s batch norms over training minibatches, in place.

    The minibatches are those of `epoch` and, when it ends, of the next ones, in train mode, without
    gradients; frozen norms stay as they are. The old statistics come back where the validation value (or,
    at the same value, the loss) is worse with the new ones. Leaves the model in eval mode. Raises Interrupted
    (exit 130) between two minibatches, with nothing changed.
    """
    place = torch.device(device)
    with seeds.isolated(seeds.derive(seed, "recalibrate"), place):
        before = _evaluated(model, task, seed, place)
        seen = _statistics(model, task, minibatches, epoch, place, should_stop)
        old = [(s.mean.clone(), s.var.clone()) for s in seen]
        for found in seen:
            found.settle()
        after = _evaluated(model, task, seed, place) if seen else before
    better = (after.value, -after.loss) >= (before.value, -before.loss)
    own = bool(seen) and math.isfinite(after.loss) and better
    kept = bool(distributed.from_main(np.array([own]))[0])
    if not kept:
        for found, (mean, var) in zip(seen, old, strict=True):
            found.mean.copy_(mean)
            found.var.copy_(var)
    return Recalibration(minibatches, len(seen), before.value, after.value, kept)


def _evaluated(model: nn.Module, task: Task, seed: int, device: torch.device) -> Evaluation:
    with seeds.isolated(seeds.derive(seed, "validation", "recalibrate"), device):
        return task.evaluate(model.eval(), "validation")


@torch.no_grad()
def _statistics(
    model: nn.Module,
    task: Task,
    minibatches: int,
    epoch: int,
    device: torch.device,
    should_stop: Callable[[], bool],
) -> list[_Statistics]:
    """What the batch norms see in that many minibatches; their running statistics are not moved."""
    watch = _Watch()
    model.train()
    with closing(_batches(task, epoch)) as batches:  # ends the data loader's processes
        for batch in islice(batches, minibatches):
            if distributed.any_of(should_stop()):
                fix = "run the same command again to go on from there"
                raise Interrupted("stopped while estimating batch-norm statistics", "train", fix)
            with watch:
                task.loss(model, move(batch, device))
            if not watch.seen:
                break
    model.eval()
    return list(watch.seen.values())


def _batches(task: Task, first: int) -> Generator[Batch, None, None]:
    """Those of the epoch `first`, then of the next one, without end."""
    for epoch in count(first):
        given = False
        for batch in task.train_batches(epoch, 0):
            yield batch
            given = True
        if not given:
            raise DataError(f"epoch {epoch} has no batches", task.name, "train_batches must give some")
