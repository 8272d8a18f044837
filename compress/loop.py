"""The paper's loop: train, accumulate importance, remove the least important units, go on.

Molchanov et al., CVPR 2019, section 3: every k minibatches the n least important units leave; training
goes on without them until the target is met. Removed units are held at zero on their reading side, which
is exactly the network without them; surgery happens once, at the end.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compress import checkpoint as disk
from compress import distributed, seeds, shares
from compress.budget import Look, Measure, close, corrected, narrow
from compress.channelmap import ChannelMap
from compress.cost import class_counts
from compress.errors import Interrupted
from compress.importance import scored
from compress.scorers import scorer
from compress.select import Selection, Space, remove
from compress.surgery import mask
from compress.task import Task, move, scalar, train_shares
from compress.trace import GraphNet, get_tensor
from compress.train import CHECKPOINT_SECONDS, DivergedError

if TYPE_CHECKING:
    from compress.config import PruneConfig

STEP_SHARE = 0.02  # of all units, removed at once when the config does not say (section 4.1 of the paper)
LOOKS = 10  # evaluations along the pruning when no tolerance asks for more


@dataclass(frozen=True)
class Step:
    """One removal. minibatches: trained before it. loss: mean over the minibatches that followed it.

    accuracy: on the validation examples after those, None where it was not measured. latency_ratio,
    energy_ratio: by the model of the target, None without a budget of it. memory_ratio: of the peak of
    activations, likewise.
    """

    step: int
    minibatches: int
    units_kept: int
    macs_ratio: float
    params_ratio: float
    loss: float | None = None
    accuracy: float | None = None
    latency_ratio: float | None = None
    energy_ratio: float | None = None
    memory_ratio: float | None = None

    def left(self, kind: str, units: int) -> float:
        """The share that is left of one of `select.KINDS`; units: how many there were."""
        if kind == "units":
            return self.units_kept / units
        found: float | None = getattr(self, f"{kind}_ratio")
        return 1.0 if found is None else found


@dataclass(frozen=True)
class Pruned:
    """masked: the trained network with removed units at zero. unmasked: the same with their reading
    slices as they were when they left. keep: bool (units,). optimizer: state by parameter name. looks: at
    the latency or energy on the target; look: the one at this network, None where it was not measured; gap:
    the largest of a step's selection."""

    masked: GraphNet
    unmasked: GraphNet
    keep: np.ndarray
    history: tuple[Step, ...]
    reached: bool
    stop_reason: str
    baseline: float | None
    optimizer: dict[str, dict[str, Tensor]]
    looks: tuple[Look, ...] = ()
    look: Look | None = None
    gap: float = 0.0


@dataclass
class _State:
    """What changes from step to step, but for tensors. ended: the last removal is done."""

    epoch: int = 1
    position: int = 0
    minibatches: int = 0
    first_loss: float | None = None
    baseline: float | None = None
    stop_reason: str = ""
    reached: bool = False
    history: list[Step] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    gap: float = 0.0
    ended: bool = False


def prune(
    net: GraphNet,
    cmap: ChannelMap,
    where: Space,
    task: Task,
    config: PruneConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Step, float], None] = lambda step, target: None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    measure: Measure | None = None,
) -> Pruned:
    """Prune `net` (trained in place) down to the target of `where`.

    A run that finds its own state in the folder `checkpoint` goes on from it and ends with the same
    weights as one that was never stopped. progress gets each step and the target ratio. Of several processes
    the first writes and reports; all end with the same network. measure: with a budget of latency or energy;
    asked on the way and before the last removal.

    Raises Interrupted when `should_stop` says so between two removals; DivergedError when the loss is
    not finite (the last good state stays in `checkpoint`).
    """
    place = torch.device(device)
    net.to(place)
    shares.spread(net)
    with seeds.isolated(seeds.derive(seed, "prune"), place):
        run = _Run(net, cmap, where, task, config, seed, place, checkpoint, measure)
        run.begin()
        while not run.state.stop_reason:
            if distributed.any_of(should_stop()):
                run.save()
                raise Interrupted(
                    f"stopped after removal {len(run.state.history)}",
                    "prune",
                    "run the same command again to go on from there" if checkpoint else "nothing was saved",
                )
            run.step()
            if run.state.history and distributed.is_main():
                progress(run.state.history[-1], where.target.ratio)
            if checkpoint is not None and time.monotonic() - run.saved_at >= checkpoint_seconds:
                run.save()
        return run.result()


class _Run:
    """One pruning: the network, its optimizer, the scores, and how they get to disk and back."""

    def __init__(
        self,
        net: GraphNet,
        cmap: ChannelMap,
        where: Space,
        task: Task,
        config: PruneConfig,
        seed: int,
        device: torch.device,
        folder: Path | None,
        measure: Measure | None,
    ) -> None:
        self.measure = measure
        self.net, self.cmap, self.where, self.task, self.config = net, cmap, where, task, config
        self.seed, self.device, self.folder = seed, device, folder
        self.keep = np.ones(cmap.units, dtype=bool)
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.SGD(
            self.parameters.values(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        self.scorer = scorer(config, net, cmap, task, seed=seed)
        self.count = config.units_per_step or math.ceil(STEP_SHARE * cmap.units)
        self.columns = {name: get_tensor(net, name).detach().clone() for name, _ in cmap.reads}
        self.state = _State()
        self.identity = self._identity()
        self.batches: Iterator[shares.Share] = iter(())
        self.good: tuple[dict[str, Any], np.ndarray] | None = None
        self.saved_at = time.monotonic()

    def begin(self) -> None:
        """Take up the state on disk if it is this run's, else measure where we start."""
        found = disk.load(self.folder) if self.folder is not None else None
        if found is not None and found.state.get("identity") == self.identity:
            self._restore(found)
        elif self.config.max_accuracy_drop is not None:
            self.state.baseline = self._accuracy()

    def step(self) -> None:
        """k minibatches, a look at what the last removal cost, the next removal."""
        losses = [self._minibatch() for _ in range(self.config.minibatches_per_step)]
        loss = sum(losses) / len(losses)
        self.state.first_loss = loss if self.state.first_loss is None else self.state.first_loss
        if self.state.history:
            self._look_back(loss)
        if not self.state.stop_reason:
            self._remove()

    def _look_back(self, loss: float) -> None:
        """Measure the network that the last removal left, now that its batch norms have seen some data."""
        last = self.state.history[-1]
        accuracy = self._accuracy() if self._looks_now(last) else None
        if accuracy is not None and not math.isfinite(accuracy):
            accuracy = None  # the task has no measure
        self.state.history[-1] = replace(last, loss=loss, accuracy=accuracy)
        self._judge(loss, accuracy)

    def _remove(self) -> None:
        if self._tolerances():
            self.good = (copy.deepcopy(self.net.state_dict()), self.keep.copy())
        chosen = self._chosen(distributed.from_main(self.scorer.scores()))
        if not chosen.removed:
            at_least = "every layer is at its least width"
            self.state.stop_reason = self._met() if self.state.ended else at_least
            return
        self._remember_columns(self.keep & ~chosen.keep)
        self.keep = chosen.keep
        mask(self.net, self.cmap, self.keep)
        counts, ratio = class_counts(self.cmap, self.keep), corrected(self.where, self.state.looks).cost.ratio
        number, units = len(self.state.history) + 1, int(self.keep.sum())
        entry = Step(number, self.state.minibatches, units, ratio("macs", counts), ratio("params", counts))
        if (measured := self.where.measured) is not None:
            left = ratio(measured.kind, counts)
            is_energy = measured.kind == "energy"
            entry = replace(entry, energy_ratio=left) if is_energy else replace(entry, latency_ratio=left)
        if self.where.cost.memory is not None:
            entry = replace(entry, memory_ratio=ratio("memory", counts))
        self.state.history.append(entry)
        self.state.reached = chosen.reached or self.state.ended

    def _chosen(self, scores: np.ndarray) -> Selection:
        """What stays after the next removal."""
        if not self.where.budgets:
            return remove(scores, self.keep, self.where, self.count)
        pace = self.count / self.cmap.units
        if self.measure is None:
            chosen = narrow(scores, self.keep, self.where, pace)
        else:
            found = close(scores, self.keep, self.where, pace, self.measure, self.state.looks)
            chosen = found.selection
            self.state.looks += found.looks
            self.state.ended = found.ends
        self.state.gap = max(self.state.gap, chosen.gap)
        return chosen

    def result(self) -> Pruned:
        unmasked = copy.deepcopy(self.net)
        for name, dim in sorted(self.cmap.reads):
            units = self.cmap.axes[name, dim]
            gone = torch.from_numpy(np.flatnonzero((units >= 0) & ~self.keep[units])).to(self.device)
            with torch.no_grad():
                get_tensor(unmasked, name).index_copy_(dim, gone, self.columns[name].index_select(dim, gone))
        state = {
            name: {k: v for k, v in self.optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
            for name, p in self.parameters.items()
        }
        s = self.state
        return Pruned(
            self.net.eval(),
            unmasked.eval(),
            self.keep,
            tuple(s.history),
            s.reached,
            s.stop_reason,
            s.baseline,
            {name: entry for name, entry in state.items() if entry},
            tuple(s.looks),
            s.looks[-1] if s.ended else None,
            s.gap,
        )

    def save(self) -> None:
        """Write everything a later run needs to go on as if nothing had happened."""
        if self.folder is None or not distributed.is_main():
            return
        tensors = disk.prefixed("model/", self.net.state_dict()) | disk.prefixed("columns/", self.columns)
        for name, parameter in self.parameters.items():
            tensors |= disk.prefixed(f"optimizer/{name}/", self.optimizer.state.get(parameter, {}))
        tensors |= disk.prefixed("rng/", seeds.rng_state(self.device))
        tensors["keep"] = torch.from_numpy(self.keep)
        if self.scorer.average is not None:
            tensors["average"] = self.scorer.average
        if self.good is not None:
            tensors |= disk.prefixed("good/", self.good[0]) | {"good_keep": torch.from_numpy(self.good[1])}
        disk.save(
            self.folder, disk.Snapshot(tensors, {"identity": self.identity, "state": asdict(self.state)})
        )
        self.saved_at = time.monotonic()

    def _restore(self, found: disk.Snapshot) -> None:
        with torch.no_grad():
            for name, value in self.net.state_dict().items():
                value.copy_(found.tensors[f"model/{name}"])
        self.columns = {k: v.to(self.device) for k, v in disk.under(found.tensors, "columns/").items()}
        for name, entry in disk.by_parameter(found.tensors).items():
            self.optimizer.state[self.parameters[name]] = {k: v.to(self.device) for k, v in entry.items()}
        seeds.set_rng_state(disk.under(found.tensors, "rng/"), self.device)
        self.keep = found.tensors["keep"].numpy().copy()
        average = found.tensors.get("average")
        self.scorer.average = average.to(self.device) if average is not None else None
        if "good_keep" in found.tensors:
            self.good = (disk.under(found.tensors, "good/"), found.tensors["good_keep"].numpy().copy())
        state = dict(found.state["state"])
        lists = {
            "history": [Step(**e) for e in state["history"]],
            "looks": [Look(**e) for e in state["looks"]],
        }
        self.state = _State(**{**state, **lists})

    def _identity(self) -> str:
        latency = self.where.cost.latency
        measured = None if latency is None else [latency.factor.tolist(), latency.power]
        facts = [repr(self.config), repr(self.where.targets), [own.tolist() for own in self.where.levels]]
        facts.append(repr(measured))
        digest = hashlib.sha256(
            json.dumps([facts, self.seed, self.task.name, self.task.fingerprint]).encode()
        )
        for name, tensor in self.net.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _minibatch(self) -> float:
        """One training step; removed units stay at zero."""
        self.net.train()
        with scored(self.net, self.cmap, self.parameters.values(), self.config.gates):
            value = self._backward()
        self.optimizer.step()
        shares.level_buffers(self.net)
        mask(self.net, self.cmap, self.keep)
        self.state.minibatches += 1
        return value

    def _backward(self) -> float:
        """Gradients of one minibatch, added to the scores; the loss. Raises where it is not finite."""
        share = self._next_batch()
        share = replace(share, batch=move(share.batch, self.device))
        shares.own_draws(self.seed, self.state.minibatches, self.device)
        with share.together():
            loss = scalar(self.task.loss(self.net, share.batch), self.task.name)
        value = share.mean(loss)
        if not math.isfinite(value):
            kept = f"; the last good state is in {self.folder}" if self.folder else ""
            raise DivergedError(
                f"the loss is {value} at minibatch {self.state.minibatches + 1}",
                "prune",
                f"lower prune.lr{kept}",
            )
        self.optimizer.zero_grad(set_to_none=True)
        share.backward(loss)
        shares.reduce_gradients(self.net)
        self.scorer.accumulate(self.net, share)
        return value

    def _next_batch(self) -> shares.Share:
        """The next batch of the endless sequence of epochs; it depends on its place alone."""
        with seeds.isolated(seeds.derive(self.seed, "data", self.state.epoch, self.state.position)):
            if self.state.position >= self.task.batches_per_epoch:
                self.state.epoch, self.state.position, self.batches = self.state.epoch + 1, 0, iter(())
            batch = next(self.batches, None)
            if batch is None:
                self.batches = train_shares(self.task, self.state.epoch, self.state.position)
                batch = next(self.batches)
        self.state.position += 1
        return batch

    def _remember_columns(self, gone: np.ndarray) -> None:
        """Keep the reading slices of units that leave now, to show later what the mask did."""
        for name, dim in sorted(self.cmap.reads):
            units = self.cmap.axes[name, dim]
            index = torch.from_numpy(np.flatnonzero((units >= 0) & gone[units])).to(self.device)
            if len(index):
                tensor = get_tensor(self.net, name).detach()
                self.columns[name].index_copy_(dim, index, tensor.index_select(dim, index))

    def _tolerances(self) -> bool:
        return self.config.max_accuracy_drop is not None or self.config.max_loss_increase is not None

    def _looks_now(self, last: Step) -> bool:
        """Whether to evaluate after this removal: always under a tolerance, else about LOOKS times."""
        if self.state.reached or self.config.max_accuracy_drop is not None:
            return True
        target, measured = self.where.target, sum(step.accuracy is not None for step in self.state.history)
        gone = 1 - last.left(target.kind, self.cmap.units)
        return gone / (1 - target.ratio) * LOOKS >= measured + 1

    def _accuracy(self) -> float:
        with seeds.isolated(seeds.derive(self.seed, "validation", len(self.state.history)), self.device):
            found = self.task.evaluate(self.net, "validation").value
        return float(distributed.from_main(np.array(found)))

    def _judge(self, loss: float, accuracy: float | None) -> None:
        """Set the reason to stop, if there is one; a breached tolerance goes back to the last good point."""
        first, baseline = self.state.first_loss, self.state.baseline
        drop, rise = self.config.max_accuracy_drop, self.config.max_loss_increase
        if drop is not None and baseline is not None and accuracy is not None and baseline - accuracy > drop:
            fell = f"accuracy fell from {baseline:.4f} to {accuracy:.4f}"
            self._back(f"{fell}, more than max_accuracy_drop {drop:g}")
        elif rise is not None and first is not None and loss - first > rise:
            self._back(f"the loss rose from {first:.4f} to {loss:.4f}, more than max_loss_increase {rise:g}")
        elif self.state.reached:
            self.state.stop_reason = self._met()

    def _met(self) -> str:
        """How near the target is, where it was measured."""
        if not self.state.ended:
            return "target met"
        look = self.state.looks[-1]
        self.state.reached = look.met
        assert self.where.measured is not None
        kind = self.where.measured.kind
        said = f"{look.measured:.1%} of the original's {kind} measured, {look.asked:.1%} asked for"
        said += "" if look.near else "; the widths allowed and other budgets have nothing nearer"
        return f"target met: {said}" if look.met else said

    def _back(self, reason: str) -> None:
        """Undo the last removal: the network as it was right before it."""
        assert self.good is not None
        weights, self.keep = self.good
        with torch.no_grad():
            for name, value in self.net.state_dict().items():
                value.copy_(weights[name])
        self.state.reached = self.state.ended = False
        self.state.history = self.state.history[:-1]
        self.state.stop_reason = f"{reason}; went back to removal {len(self.state.history)}"
