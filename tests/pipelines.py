"""A whole run small enough for a test: a narrow ResNet on a few hundred real digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress import config, pipeline

MODEL = """
version: 1
model:
  name: compress.zoo:cifar_resnet
  kwargs: {depth: 8, width: 8, channels: 1}
  input_shape: [1, 28, 28]
"""
LOOKED_AT = (
    MODEL
    + """data: {name: mnist5k, batch_size: 16, train_limit: 100, validation: 0.4}
prune: {align: 2, minibatches_per_step: 2}
"""
)
"""For what looks at the model once and trains nothing."""
CONFIG = (
    MODEL
    + """data: {name: mnist5k, train_limit: 640, test_limit: 200, batch_size: 32}
train: {epochs: 3, lr: 0.1}
prune: {macs_ratio: 0.6, align: 2, minibatches_per_step: 2, units_per_step: 4, lr: 0.01}
finetune: {epochs: 2, lr: 0.05, recalibrate: 3}
bench: {batches: [1], repeats: 5, seconds: 0.01}
gates: {accuracy_drop: null, parity: true}
out: run
"""
)

DECIDES = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.Flatten())
        self.head = nn.Linear(200, 10)
    def forward(self, x):
        return self.head(self.body(x)) if x.sum() > -1e9 else x
def net():
    return Net()
"""
"""A model that decides on its data, so that it cannot be traced whole."""


class Silent:
    """Events that remember what was said."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, str]] = []
        self.seen: list[str] = []

    def stage(self, name: str, status: str, detail: str = "") -> None:
        self.stages.append((name, status))

    def progress(self, stage: str, done: float, total: float, text: str = "") -> None:
        self.seen.append(stage)

    def note(self, text: str) -> None:
        self.seen.append(text)

    warn = note


def start(folder: Path, overrides: Sequence[str] = (), **options: Any) -> pipeline.Outcome:
    """Write the config into `folder` (if it is not there) and run it."""
    path = folder / "compress.yaml"
    if not path.exists():
        path.write_text(CONFIG)
    options.setdefault("events", Silent())
    return pipeline.run(config.load(path, overrides), folder, **options)


def stop_after(calls: int) -> Callable[[], bool]:
    """A should_stop that says yes from its `calls`-th question on."""
    left = iter(range(calls))
    return lambda: next(left, None) is None
