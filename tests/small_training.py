"""A training small enough for a test: a net with what makes resuming hard, on a few real digits."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.config import DataConfig, ModelConfig, TrainConfig
from compress.task import Task, build_task
from compress.train import TrainResult, train

STEPS = 6  # a batch count per epoch of the small task below


def digits(**given: Any) -> Task:
    model = ModelConfig(name="x:y", input_shape=[1, 28, 28])
    return build_task(DataConfig(name="mnist5k", **given), model, 0, Path("."))


@functools.cache
def small_task() -> Task:
    return digits(batch_size=20, train_limit=150, validation=0.2, test_limit=20, augment="flip_crop")


def net(seed: int = 0) -> nn.Module:
    """A small net with what makes resuming hard: batch norm and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def hard(**given: Any) -> TrainConfig:
    """Momentum, decay, warm-up, a falling rate, and smoothed labels."""
    base = {"epochs": 3, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "warmup_epochs": 0.5}
    return TrainConfig(**(base | {"label_smoothing": 0.1} | given))


class StopAfter:
    """Says stop once this many steps were done."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def facts(result: TrainResult) -> Any:
    return [replace(epoch, seconds=0.0) for epoch in result.history], result.best_epoch, result.best


def uninterrupted(config: TrainConfig, **given: Any) -> tuple[dict[str, Tensor], Any]:
    model = net()
    result = train(model, small_task(), config, seed=4, **given)
    return weights(model), facts(result)
