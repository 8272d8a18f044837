"""What a model is trained for: batches, a loss, a measure. Classification by name, all else by user code."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress import distributed, seeds, shares
from compress.data import Splits, open_data
from compress.errors import ConfigError, DataError, ModelError
from compress.names import first_line, users_line
from compress.sources import Draw, Images, Source, TensorSource
from compress.trace import eval_mode

if TYPE_CHECKING:
    from compress.config import DataConfig, ModelConfig

Batch = Any  # whatever the task's loss understands; for classification (images, labels)


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on one split. ``value``: larger is better, a share of 1 for "top1".

    loss: mean over the examples. n: examples. correct: (n,) bool on the CPU, in the split's fixed order, for
    paired statistics; None when the measure is not a share of right answers. majority: what always answering
    the most frequent class would get; None where that is not known.
    """

    metric: str
    value: float
    loss: float
    n: int
    correct: Tensor | None = None
    majority: float | None = None


@dataclass(frozen=True)
class Task:
    """Batches, loss and measure of one piece of work. User code may make its own.

    loss: any callable of (model, batch) that gives a scalar tensor. train_batches(epoch, start): the
    batches of that epoch (the first is 1) from number ``start`` on, the same whenever it is asked.
    evaluate(model, split): "validation" or "test", in eval mode, the model's mode restored. classes: None
    when labels are not class numbers. fingerprint: a hash of the data, so that results of other data are
    not taken for these; test_fingerprint: of the test examples in their order alone, by which two releases
    are known to be evaluated alike. example: what the model is called with (a tuple of arguments, or a dict
    of keyword arguments) where that is not one tensor of `model.input_shape`. test_batches(size): the test
    examples in batches of that size, in a fixed order; None where the task has none to give. few(n): what
    evaluates a model on at most n validation examples, which it reads once; None where the task cannot
    leave any out.

    With several processes (see `compress.distributed`) train_batches gives whole batches in each of them, and
    they are cut there; the loss is a mean over the examples. train_shares(epoch, start) gives a process its
    share of the same batches without the rest. evaluate runs in each.
    """

    loss: Callable[[nn.Module, Batch], Tensor]
    train_batches: Callable[[int, int], Iterator[Batch]]
    batches_per_epoch: int
    evaluate: Callable[[nn.Module, str], Evaluation]
    n_train: int
    n_validation: int
    n_test: int
    classes: int | None = None
    fingerprint: str = ""
    test_fingerprint: str = ""
    name: str = "task"
    example: Any = None
    test_batches: Callable[[int], Iterator[Batch]] | None = None
    few: Callable[[int], Callable[[nn.Module], Evaluation]] | None = None
    train_shares: Callable[[int, int], Iterator[shares.Share]] | None = None


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy of (images, labels), in nats; ``smoothing`` spreads that share over all classes."""

    smoothing: float = 0.0

    def __call__(self, model: nn.Module, batch: Images) -> Tensor:
        images, labels = batch
        logits = logits_of(model(images))
        return functional.cross_entropy(logits, labels, label_smoothing=self.smoothing)


def build_task(config: DataConfig, model: ModelConfig, seed: int, folder: Path) -> Task:
    """The task that ``config`` names: classification of its images, or the Task that user code returns.

    ``train_limit`` images (all if None) are taken from the training images in a fixed random order; the share
    ``validation`` of them is held out. Neither that choice nor the test images depend on ``seed``. Raises
    DataError (exit 3).
    """
    found = open_data(config, model.input_shape, folder)
    if isinstance(found, Task):
        return found
    if not isinstance(found, Splits):
        fix = "return a compress.task.Task, or {'train': ..., 'test': ...}"
        raise DataError(f"gave a {type(found).__name__}", config.name, fix)
    return _classification(found, config, seed)


def check(model: nn.Module, task: Task, input_shape: Sequence[int]) -> float:
    """Run one training batch through the model in eval mode and return its loss; nothing is changed.

    Raises DataError (exit 3) when the images do not have ``input_shape`` or a label has no output of the
    model, ModelError (exit 4) when the model fails on them, or its loss is no finite scalar.
    """
    with seeds.isolated(), eval_mode(model):
        batch = move(next(train_shares(task, 1, 0)).batch, device_of(model))
        if task.classes is not None:
            _check_classification(model, task, batch, tuple(input_shape))
        with torch.enable_grad(), _model_errors():
            loss = scalar(
                task.loss(model, batch), task.name, any(p.requires_grad for p in model.parameters())
            )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ModelError(
            f"the loss of the first batch is {value}", task.name, "check data.mean, data.std and weights"
        )
    return value


def scalar(loss: Any, name: str, trains: bool = True) -> Tensor:
    """What a loss of the user's gave, as a scalar that gradients follow from where the model `trains`.

    Raises ModelError (exit 4).
    """
    if not isinstance(loss, Tensor):
        fix = "end it with return" if loss is None else "return the tensor itself, not its item()"
        raise ModelError(f"the loss is a {type(loss).__name__}, not a scalar tensor", name, fix)
    if loss.ndim != 0:
        what = f"the loss is not a scalar tensor but has shape {list(loss.shape)}"
        raise ModelError(what, name, "return one number for the batch, such as the mean over its examples")
    if trains and not loss.requires_grad:
        what = "the loss is cut off from the model's parameters: no gradient reaches them"
        fix = "compute it from what the model returns, without detach(), item() or no_grad()"
        raise ModelError(what, name, fix)
    return loss


def train_shares(task: Task, epoch: int, start: int) -> Iterator[shares.Share]:
    """This process's shares of the training batches: those that the task makes, else cut from whole ones.

    Raises ConfigError (exit 3) where the first of the whole ones is not the same in all processes.
    """
    if distributed.size() > 1 and task.train_shares is not None:
        yield from task.train_shares(epoch, start)
        return
    for number, batch in enumerate(task.train_batches(epoch, start)):
        if number == 0:
            shares.agree(batch)
        yield shares.share(batch)


def logits_of(output: Any) -> Tensor:
    """The (n, classes) tensor in a model's output: itself, ``.logits``, or the first of several.

    Auxiliary outputs (GoogLeNet, Inception in train mode) are left out. Raises ModelError (exit 4).
    """
    found = getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if isinstance(found, Tensor):
        return found
    fix = "give a function that returns a Task with a loss of its own"
    raise ModelError(f"the model's output is a {type(found).__name__}, not a tensor of logits", "model", fix)


def move(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, at any depth of tuples, lists and dicts, on ``device``."""
    return shares.mapped(value, lambda tensor: tensor.to(device, non_blocking=True))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU when it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@dataclass(frozen=True)
class _Part:
    """Some examples of a source, in a fixed order."""

    source: Source
    indices: Tensor

    def draws(self, size: int) -> Iterator[Draw]:
        for indices in self.indices.split(size):  # type: ignore[no-untyped-call]  # torch leaves it untyped
            yield Draw(indices)


@dataclass(frozen=True)
class _Classifying:
    """Training and evaluation of a classifier on three parts."""

    train: _Part
    held_out: Mapping[str, _Part]
    batch_size: int
    augment: bool
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        return max(1, len(self.train.indices) // self.batch_size)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Images]:
        """Batches of one size; what is left over at the end of an epoch's order is not used in that epoch."""
        return self.train.source.batches(self._draws(epoch, start))

    def train_shares(self, epoch: int, start: int = 0) -> Iterator[shares.Share]:
        """This process's share of the same batches; only that is decoded."""
        draws = self._draws(epoch, start)
        own = [shares.shared(draw, len(draw.indices), lambda d, r: replace(d, rows=r)) for draw in draws]
        found = self.train.source.batches([share.batch for share in own])
        for share, batch in zip(own, found, strict=True):
            yield replace(share, batch=batch)

    def _draws(self, epoch: int, start: int) -> list[Draw]:
        order = torch.randperm(len(self.train.indices), generator=seeds.generator("order", self.seed, epoch))
        indices, size = self.train.indices[order], self.batch_size
        return [
            Draw(indices[i * size : (i + 1) * size], (self.seed, epoch, i) if self.augment else None)
            for i in range(start, self.batches_per_epoch)
        ]

    def evaluate(self, model: nn.Module, split: str) -> Evaluation:
        """Whole batches, dealt to the processes in turn: the same batches as in one process."""
        if split not in self.held_out:
            raise ConfigError(f"unknown split {split!r}", "evaluate", f"one of {', '.join(self.held_out)}")
        part, device, size = self.held_out[split], device_of(model), self.batch_size
        draws, n = list(part.draws(size)), len(part.indices)
        own = range(distributed.rank(), len(draws), distributed.size())
        losses, correct = torch.zeros(len(draws), dtype=torch.float64), torch.zeros(n, dtype=torch.uint8)
        answers = torch.zeros(n, dtype=torch.int64)
        with eval_mode(model), torch.no_grad():
            for i, batch in zip(own, part.source.batches([draws[i] for i in own]), strict=True):
                images, labels = move(batch, device)
                logits = logits_of(model(images))
                losses[i] = functional.cross_entropy(logits.double(), labels, reduction="sum")
                correct[i * size : (i + 1) * size] = logits.argmax(1) == labels
                answers[i * size : (i + 1) * size] = labels
        right = distributed.summed(correct).bool()
        total = sum(distributed.summed(losses).tolist())
        answers = distributed.summed(answers)
        majority = int((answers == answers.mode().values).sum()) / n
        return Evaluation("top1", float(right.double().mean()), total / n, n, right, majority)

    def few(self, n: int) -> Callable[[nn.Module], Evaluation]:
        """`evaluate` on n validation examples, drawn at random but always the same; they stay in memory."""
        part = self.held_out["validation"]
        chosen = _Part(part.source, part.indices[_some(len(part.indices), n).sort().values])
        images, labels = zip(*part.source.batches(chosen.draws(self.batch_size)), strict=True)
        memory = TensorSource(torch.cat(images), torch.cat(labels))
        own = replace(self, held_out={"validation": _Part(memory, torch.arange(len(memory)))})
        return lambda model: own.evaluate(model, "validation")


def _classification(splits: Splits, config: DataConfig, seed: int) -> Task:
    train, validation = _train_and_validation(splits, config)
    test = _Part(splits.test, _some(len(splits.test), config.test_limit).sort().values)
    augment = config.augment != "none"
    held_out = {"validation": validation, "test": test}
    parts = _Classifying(train, held_out, config.batch_size, augment, seed)
    everything, tested = _fingerprints(splits, config)
    return Task(
        loss=CrossEntropy(),
        train_batches=parts.train_batches,
        batches_per_epoch=parts.batches_per_epoch,
        evaluate=parts.evaluate,
        n_train=len(train.indices),
        n_validation=len(validation.indices),
        n_test=len(test.indices),
        classes=_classes(splits),
        fingerprint=everything,
        test_fingerprint=tested,
        name=splits.name,
        test_batches=lambda size: test.source.batches(test.draws(size)),
        few=parts.few,
        train_shares=parts.train_shares,
    )


def _train_and_validation(splits: Splits, config: DataConfig) -> tuple[_Part, _Part]:
    chosen = _some(len(splits.train), config.train_limit)
    if splits.validation is not None:
        everything = torch.arange(len(splits.validation))
        return _Part(splits.train, chosen), _Part(splits.validation, everything)
    held_out = max(1, round(len(chosen) * config.validation))
    if held_out >= len(chosen):
        what = f"{len(chosen)} training images are too few to hold some out"
        raise DataError(what, splits.name, "give more images, or raise data.train_limit")
    return _Part(splits.train, chosen[held_out:]), _Part(splits.train, chosen[:held_out].sort().values)


def _some(n: int, limit: int | None) -> Tensor:
    """``limit`` of ``n`` indices (all if None) in an order that is random but always the same."""
    return torch.randperm(n, generator=seeds.generator("choice", n))[:limit]


def _classes(splits: Splits) -> int:
    """One more than the largest label, or the classes that the data set names if those are more."""
    sources = [s for s in (splits.train, splits.test, splits.validation) if s is not None]
    known = [int(labels.max()) + 1 for s in sources if (labels := s.labels) is not None]
    return max([*known, splits.classes or 0])


def _fingerprints(splits: Splits, config: DataConfig) -> tuple[str, str]:
    """Of all that training and evaluation see, and of the test examples alone."""
    facts: list[Any] = [s.digest() for s in (splits.train, splits.test)]
    tested = repr([facts[1], config.test_limit])
    facts += [splits.validation.digest() if splits.validation is not None else None]
    facts += [config.batch_size, config.mean, config.std, config.augment, config.validation]
    facts += [config.train_limit, config.test_limit, sorted(config.kwargs.items(), key=repr)]
    everything = repr(facts)
    return hashlib.sha256(everything.encode()).hexdigest(), hashlib.sha256(tested.encode()).hexdigest()


def _check_classification(model: nn.Module, task: Task, batch: Batch, shape: tuple[int, ...]) -> None:
    images, labels = batch
    if tuple(images.shape[1:]) != shape:
        what = f"images have shape {list(images.shape[1:])}, but model.input_shape is {list(shape)}"
        raise DataError(what, task.name, "change one of the two")
    with torch.no_grad(), _model_errors(list(images.shape)):
        logits = logits_of(model(images))
    if logits.ndim != 2 or len(logits) != len(images):
        what = f"the model's output has shape {list(logits.shape)}, not [{len(images)}, classes]"
        raise ModelError(what, "model", "give a function that returns a Task with a loss of its own")
    largest = max(int(labels.max()), (task.classes or 0) - 1)
    if largest >= logits.shape[1]:
        what = f"labels go up to {largest}, but the model has {logits.shape[1]} outputs"
        raise DataError(
            what, task.name, f"set the model to {largest + 1} classes (model.kwargs: num_classes)"
        )
    if int(labels.min()) < 0:
        raise DataError(f"label {int(labels.min())} is below 0", task.name, "classes are counted from 0")


@contextmanager
def _model_errors(shape: Sequence[int] | None = None) -> Iterator[None]:
    """Anything the model's own code raises on its first batch, as one line."""
    try:
        yield
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        AssertionError,
        AttributeError,
        KeyError,
    ) as error:
        if shape is None:
            what, where = f"the model fails in its loss: {first_line(error)}", users_line(error) or "model"
            raise ModelError(what, where, "--debug shows the whole traceback") from error
        what = f"the model fails on images of shape {list(shape)}: {first_line(error)}"
        raise ModelError(what, "model", "is model.input_shape what it was built for?") from error
