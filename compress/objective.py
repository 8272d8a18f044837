"""What training minimises: the task's loss, a teacher's outputs, and the precision it is computed in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import ConfigError, ModelError
from compress.task import Batch, CrossEntropy, Task, logits_of, scalar

if TYPE_CHECKING:
    from compress.config import TrainConfig


class Objective:
    """The task's loss, with the teacher's outputs where distilling, in the chosen precision.

    Distillation (Hinton et al. 2015, section 2): (1 - alpha) loss + alpha T^2 KL(teacher / T || student / T),
    in nats, mean over the batch. The model's inputs and logits are taken from the forward pass that the
    task's loss makes, so any loss that calls the model will do.
    """

    def __init__(
        self, task: Task, config: TrainConfig, teacher: nn.Module | None, device: torch.device
    ) -> None:
        self.given, self.name = loss_of(task, config), task.name
        self.distill, self.device = config.distill, device
        if self.distill is not None and teacher is None:
            fix = "remove it: this stage has no original model to learn from"
            raise ConfigError("distill needs a teacher", "distill", fix)
        self.teacher = teacher.to(device).eval() if teacher is not None and self.distill is not None else None
        self.dtype = _precision(config.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        amp = torch.autocast(self.device.type, self.dtype) if self.dtype is not None else nullcontext()
        with amp:
            return self._distilled(model, batch) if self.teacher is not None else self._loss(model, batch)

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return scalar(self.given(model, batch), self.name)

    def _distilled(self, model: nn.Module, batch: Batch) -> Tensor:
        assert self.distill is not None  # for the type checker: there is a teacher
        assert self.teacher is not None
        calls: list[tuple[Any, Any, Any]] = []

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((args, kwargs, output))

        hook = model.register_forward_hook(note, with_kwargs=True)
        try:
            loss = self._loss(model, batch)
        finally:
            hook.remove()
        if not calls:
            what = "the task's loss does not call the model, so it cannot learn from another"
            raise ModelError(what, "distill")
        args, kwargs, output = calls[0]
        with torch.no_grad():
            wanted = logits_of(self.teacher(*args, **kwargs))
        alpha, temperature = self.distill.alpha, self.distill.temperature
        return (1 - alpha) * loss + alpha * distance(logits_of(output), wanted, temperature)


def distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher / T || student / T) of two (n, classes) tensors of logits, in nats, mean over n."""
    if student.shape != teacher.shape:
        what = f"the model's logits have shape {list(student.shape)}, the teacher's {list(teacher.shape)}"
        raise ModelError(what, "distill")
    ours = functional.log_softmax(student.float() / temperature, dim=-1)
    theirs = functional.log_softmax(teacher.float() / temperature, dim=-1)
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def loss_of(task: Task, config: TrainConfig) -> Callable[[nn.Module, Batch], Tensor]:
    """The task's loss, smoothed as ``config`` asks. Raises ConfigError when it is not `CrossEntropy`."""
    if not config.label_smoothing:
        return task.loss
    if isinstance(task.loss, CrossEntropy):
        return replace(task.loss, smoothing=config.label_smoothing)
    fix = "set it to 0, or smooth in that loss"
    raise ConfigError(f"{task.name} has a loss of its own", "label_smoothing", fix)


def _precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type that autocast uses; None without it. "auto" is off on the CPU, where it is seldom faster."""
    if amp == "off" or (amp == "auto" and device.type != "cuda"):
        return None
    if amp == "fp16" and device.type != "cuda":
        raise ConfigError("fp16 needs a CUDA device", "amp", 'use "auto", "off" or "bf16"')
    if amp == "bf16" or (amp == "auto" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float16
