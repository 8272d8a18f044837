"""Training that can be stopped at any moment and gone on with, to the same bits.

What a step does depends on the weights, the optimizer's state, the random generators' states, and the
batch. The first three are in the checkpoint; the batch depends on (seed, epoch, number) alone. So a resumed
run ends in the same weights as one that was never stopped, on the same machine and library versions.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compress import checkpoint as disk
from compress import distributed, seeds, shares
from compress.errors import DataError, Interrupted, ModelError, ResourceError
from compress.objective import Objective
from compress.recalibration import Recalibration, recalibrate
from compress.task import Task, move, train_shares

if TYPE_CHECKING:
    from compress.config import TrainConfig

CHECKPOINT_SECONDS = 30.0
OptimizerState = Mapping[str, Mapping[str, Tensor]]  # parameter name -> e.g. {"momentum_buffer": tensor}


@dataclass(frozen=True)
class Epoch:
    """One epoch, counted from 1. loss: mean over its batches. validation: the measure's value on the held-out
    examples. lr: of its last step. seconds: wall time, interruptions left out."""

    epoch: int
    loss: float
    validation: float
    validation_loss: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Where training is, after each step; ``message`` is something the user should see, once."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    message: str = ""


@dataclass(frozen=True)
class TrainResult:
    """history: one entry per epoch. best_epoch, best: whose weights the model has, and its value.

    recalibration: of batch norms after the last epoch, where it was asked for."""

    history: tuple[Epoch, ...]
    best_epoch: int
    best: float
    recalibration: Recalibration | None = None


class DivergedError(ModelError):
    """The loss or a weight is no longer finite (exit 4). The model has its last good weights."""


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    teacher: nn.Module | None = None,
    optimizer_state: OptimizerState | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda _: None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> TrainResult:
    """Train ``model`` in place and leave it, on ``device`` and in eval mode, with its best epoch's weights.

    Best is the highest validation value, then the lowest validation loss, then the earliest epoch. With
    ``config.ema`` it is the running average of the weights that is evaluated and kept.

    checkpoint: a folder. A run with the same config, task, seed and initial weights that finds its state
    there goes on from it; another run's state is replaced. It is written each epoch, every
    ``checkpoint_seconds``, and when ``should_stop`` (asked before each step) says so. teacher: for
    ``config.distill``. optimizer_state: by parameter name, to start from. The caller's random generators
    are left as they were. With no epochs at all the model is only evaluated, and recalibrated if
    ``config.recalibrate`` says so. Of several processes the first writes and reports; all end with the same
    weights.

    Raises Interrupted (exit 130) when stopped; DivergedError (exit 4) on a loss or weight that is not
    finite; ConfigError (exit 3) when the config asks for what the task or device cannot do; ResourceError
    (exit 7) when memory or disk runs out.
    """
    place = torch.device(device)
    model.to(place)
    shares.spread(model, teacher)
    if config.epochs == 0:
        result = TrainResult((), 0, task.evaluate(model, "validation").value)
        return _recalibrated(result, model, task, config, seed, place, should_stop)
    with seeds.isolated(seeds.derive(seed, "train"), place), _deterministic(place), _memory_errors():
        run = _Run(model, task, config, seed, place, checkpoint, teacher, should_stop, progress)
        run.begin(optimizer_state)
        while run.at.epoch <= config.epochs:
            run.finish_epoch(checkpoint_seconds)
        _copy_into(model, run.best)
    model.eval()
    result = TrainResult(tuple(run.at.history), run.at.best_epoch, run.at.best_value)
    return _recalibrated(result, model, task, config, seed, place, should_stop)


def _recalibrated(
    result: TrainResult,
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    seed: int,
    device: torch.device,
    should_stop: Callable[[], bool],
) -> TrainResult:
    """Batch-norm statistics of the model as it is now, over minibatches that it was not trained on yet."""
    if not config.recalibrate:
        return result
    with _deterministic(device), _memory_errors():
        found = recalibrate(
            model, task, config.recalibrate, epoch=config.epochs + 1, seed=seed, device=device,
            should_stop=should_stop,
        )  # fmt: skip
    return replace(result, best=found.after if found.kept else found.before, recalibration=found)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of step number ``step``, counted from 0 over all epochs.

    A linear rise to ``lr`` over ``warmup_epochs``, then the schedule: cosine falls to 0 over what remains
    (Loshchilov and Hutter 2017, equation 5, without restarts), step falls by ``step_gamma`` every
    ``step_epochs``.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        share = (step - warmup) / max(1, config.epochs * steps_per_epoch - warmup)
        return config.lr * (1 + math.cos(math.pi * share)) / 2
    if config.schedule == "step":
        return config.lr * float(config.step_gamma ** (step // steps_per_epoch // config.step_epochs))
    return config.lr


@dataclass
class _Position:
    """Where a run is: its state but for the tensors. ``step`` counts the finished ones of ``epoch``."""

    epoch: int = 1
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    best_epoch: int = 0
    best_value: float = 0.0
    best_loss: float = 0.0
    history: list[Epoch] = field(default_factory=list)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> _Position:
        return cls(**{**state, "history": [Epoch(**entry) for entry in state["history"]]})


class _Run:
    """One run of `train`: the state that steps change, and how it gets to disk and back."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        seed: int,
        device: torch.device,
        folder: Path | None,
        teacher: nn.Module | None,
        should_stop: Callable[[], bool],
        progress: Callable[[Progress], None],
    ) -> None:
        self.model, self.task, self.config = model, task, config
        self.seed, self.device, self.folder = seed, device, folder
        self.should_stop, self.progress = should_stop, progress
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ModelError("no parameter of the model can be trained", "train", "set requires_grad on some")
        self.optimizer = _optimizer(config, list(self.parameters.values()))
        self.objective = Objective(task, config, teacher, device)
        self.average = _average(model, config.ema) if config.ema else None
        self.at = _Position()
        self.best = _copy_of(model)
        self.identity = _identity(self.best, task, config, seed, teacher)
        self.saved_at = time.monotonic()
        self.message = ""

    def begin(self, optimizer_state: OptimizerState | None) -> None:
        """Take up the state on disk, if it is this run's; else start."""
        _set_optimizer_state(self.optimizer, self.parameters, optimizer_state or {})
        found = disk.load(self.folder) if self.folder is not None else None
        if found is None:
            return
        if found.state.get("identity") != self.identity:
            self.message = f"the checkpoint in {self.folder} is of another run and is replaced"
            return
        _copy_into(self.model, disk.under(found.tensors, "model/"))
        if self.average is not None:
            _copy_into(self.average, disk.under(found.tensors, "average/"))
        self.at = _Position.from_json(found.state["position"])
        if self.at.best_epoch:
            self.best = disk.under(found.tensors, "best/")
        _set_optimizer_state(self.optimizer, self.parameters, disk.by_parameter(found.tensors))
        self.objective.scaler.load_state_dict(found.state["scaler"])
        seeds.set_rng_state(disk.under(found.tensors, "rng/"), self.device)
        self.message = f"going on from epoch {self.at.epoch}, step {self.at.step}"
        if found.note:
            self.message += f", an earlier checkpoint, because {found.note}"

    def finish_epoch(self, checkpoint_seconds: float) -> None:
        """The steps of this epoch that are still to do, its evaluation, and a checkpoint."""
        started, before = time.monotonic(), self.at.seconds
        self.model.train()
        with closing(self._batches()) as batches:
            while self.at.step < self.task.batches_per_epoch:
                self.at.seconds = before + time.monotonic() - started
                if distributed.any_of(self.should_stop()):
                    self._stop()
                self._step(self._next(batches))
                due = self.folder is not None and time.monotonic() - self.saved_at >= checkpoint_seconds
                if distributed.any_of(due and distributed.is_main()):
                    self.save()
        self._evaluate()
        self.at.history[-1] = replace(self.at.history[-1], seconds=before + time.monotonic() - started)
        self.at.epoch, self.at.step, self.at.loss_sum, self.at.seconds = self.at.epoch + 1, 0, 0.0, 0.0
        self.save()

    def save(self) -> None:
        if self.folder is None:
            return
        tensors = disk.prefixed("model/", self.model.state_dict())
        if not all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()):
            self._diverge("a weight")
        if not distributed.is_main():
            return
        if self.average is not None:
            tensors |= disk.prefixed("average/", self.average.state_dict())
        if self.at.best_epoch:
            tensors |= disk.prefixed("best/", self.best)
        for name, parameter in self.parameters.items():
            tensors |= disk.prefixed(f"optimizer/{name}/", self.optimizer.state.get(parameter, {}))
        tensors |= disk.prefixed("rng/", seeds.rng_state(self.device))
        state = {
            "identity": self.identity,
            "position": asdict(self.at),
            "scaler": self.objective.scaler.state_dict(),
        }
        disk.save(self.folder, disk.Snapshot(tensors, state))
        self.saved_at = time.monotonic()

    def _batches(self) -> Generator[shares.Share, None, None]:
        # A generator of our own, so that closing() ends the data loader's processes whatever the task gave.
        yield from train_shares(self.task, self.at.epoch, self.at.step)

    def _next(self, batches: Iterator[shares.Share]) -> shares.Share:
        # What the data draw from the global generators depends on the step alone, and does not move them.
        with seeds.isolated(seeds.derive(self.seed, "data", self.at.epoch, self.at.step), self.device):
            try:
                return next(batches)
            except StopIteration:
                given, wanted = self.at.step, self.task.batches_per_epoch
                what = f"epoch {self.at.epoch} ended after {given} of {wanted} batches"
                fix = "train_batches must give batches_per_epoch batches"
                raise DataError(what, self.task.name, fix) from None

    def _step(self, share: shares.Share) -> None:
        steps = self.task.batches_per_epoch
        number = (self.at.epoch - 1) * steps + self.at.step
        lr = learning_rate(self.config, number, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        shares.own_draws(self.seed, number, self.device)
        with share.together():
            loss = self.objective(self.model, move(share.batch, self.device))
        value = share.mean(loss)
        if not math.isfinite(value):
            self._diverge(f"the loss ({value})")
        self.optimizer.zero_grad(set_to_none=True)
        share.backward(self.objective.scaler.scale(loss))
        shares.reduce_gradients(self.model)  # before the scaler looks for overflow: all see the same
        self.objective.scaler.step(self.optimizer)
        self.objective.scaler.update()
        shares.level_buffers(self.model)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.at.step += 1
        self.at.loss_sum += value
        at, message, self.message = self.at, self.message, ""
        if distributed.is_main():
            self.progress(Progress(at.epoch, self.config.epochs, at.step, steps, value, lr, message))

    def _evaluate(self) -> None:
        at, steps = self.at, self.task.batches_per_epoch
        lr = learning_rate(self.config, at.epoch * steps - 1, steps)
        model = self.model if self.average is None else self.average.module
        with seeds.isolated(seeds.derive(self.seed, "validation", at.epoch), self.device):
            measured = self.task.evaluate(model, "validation")
        value, loss = distributed.from_main(np.array([measured.value, measured.loss])).tolist()
        found = replace(measured, value=value, loss=loss)
        if not (math.isfinite(found.loss) and math.isfinite(found.value)):
            self._diverge(f"the validation loss ({found.loss})")
        at.history.append(Epoch(at.epoch, at.loss_sum / steps, found.value, found.loss, lr, 0.0))
        if at.best_epoch == 0 or (found.value, -found.loss) > (at.best_value, -at.best_loss):
            at.best_epoch, at.best_value, at.best_loss = at.epoch, found.value, found.loss
            self.best = _copy_of(model)

    def _stop(self) -> None:
        self.save()
        what = f"stopped at epoch {self.at.epoch}, step {self.at.step} of {self.task.batches_per_epoch}"
        fix = "run the same command again to go on from there" if self.folder else "nothing was saved"
        raise Interrupted(what, "train", fix)

    def _diverge(self, what: str) -> NoReturn:
        """Put the last good weights back and say where it went wrong."""
        at, steps = self.at, self.task.batches_per_epoch
        step = min(at.step + 1, steps)
        lr = learning_rate(self.config, (at.epoch - 1) * steps + step - 1, steps)
        found = disk.load(self.folder) if self.folder is not None else None
        if found is not None and found.state.get("identity") != self.identity:
            found = None
        _copy_into(self.model, disk.under(found.tensors, "model/") if found is not None else self.best)
        self.model.eval()
        where = f"epoch {at.epoch}, step {step} of {steps}, learning rate {lr:.3g}"
        kept = f"; the last good checkpoint is in {self.folder}" if found is not None else ""
        fix = f"lower lr or raise warmup_epochs{kept}"
        raise DivergedError(f"{what} is not finite at {where}", "train", fix)


def _optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay)


def _average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving averages of weights and batch-norm statistics, one update per step.

    Early on the decay is (1 + n) / (10 + n) after n updates, so that the start is soon forgotten.
    """

    def update(averages: Any, weights: Any, count: Any) -> None:
        if not averages[0].is_floating_point():  # counters and index tables
            for average, value in zip(averages, weights, strict=True):
                average.copy_(value)
            return
        given = min(decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(given)(averages, weights, count)  # type: ignore[no-untyped-call]

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return average.requires_grad_(False)


def _set_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: OptimizerState
) -> None:
    unknown = next((name for name in state if name not in parameters), None)
    if unknown is not None:
        raise ModelError(
            f"the optimizer's state has {unknown!r}, which is no parameter of the model", "train"
        )
    for name, entries in state.items():
        parameter = parameters[name]
        for key, value in entries.items():
            if value.ndim and value.shape != parameter.shape:
                what = f"{key} of {name} has shape {list(value.shape)}, the parameter {list(parameter.shape)}"
                raise ModelError(f"the optimizer's {what}", "train")
        # A number (AdamW's "step") stays on the CPU, as the optimizer itself keeps it.
        optimizer.state[parameter] = {
            key: value.detach().clone().to(parameter.device if key != "step" else "cpu")
            for key, value in entries.items()
        }


def _identity(
    weights: Mapping[str, Tensor], task: Task, config: TrainConfig, seed: int, teacher: nn.Module | None
) -> str:
    """A hash of everything that decides where the run ends."""
    taught = _digest(teacher.state_dict()) if teacher is not None and config.distill is not None else ""
    facts = [
        repr(config),
        seed,
        task.name,
        task.fingerprint,
        task.batches_per_epoch,
        _digest(weights),
        taught,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _copy_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, as copies on the CPU."""
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def _copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            value.copy_(tensors[name])


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Inside, cuDNN takes the same algorithms every time, where it has a choice."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError("out of memory", "train", "lower data.batch_size") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError("out of memory", "train", "lower data.batch_size") from error
