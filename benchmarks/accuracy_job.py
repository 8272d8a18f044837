"""What every pruning tool in `accuracy.py` gets alike: the network, the data, the measure, the fine-tuning.

Plain torch only: the peer's environment imports it too.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import cifar10, cifar_nets
from deploy.quiet import Quiet

BATCH, IMAGES, TEST = 64, 45_000, 10_000
POINTS = (1 / 1.5, 1 / 2, 1 / 2.57, 1 / 4)
"""Shares of the MACs that are left, from one to the next in one trajectory."""
PRUNE = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
MINIBATCHES, STEP_SHARE, MIN_KEEP = 5, 0.01, 0.1
"""Minibatches between removals, share of the units in each, least share of a layer."""
TUNE = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
MEAN, STD = torch.tensor(cifar10.MEAN), torch.tensor(cifar10.STD)


class Shortcut(nn.Conv2d):
    """A padded shortcut of the CIFAR ResNet as a 1x1 convolution that computes the same to begin with."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, 1, stride, bias=False)
        with torch.no_grad():
            first = (outputs - inputs) // 2
            self.weight.copy_(torch.eye(outputs, inputs).roll(first, 0)[:, :, None, None])


class Block(nn.Module):
    """A block of `compress.zoo.cifar_resnet` with a `Shortcut`; same names."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        inputs, outputs = self.conv1.in_channels, self.conv2.out_channels
        self.shortcut: nn.Module = nn.Identity()
        if block.stride != 1 or block.padding:
            self.shortcut = Shortcut(inputs, outputs, block.stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(self.shortcut(x) + y)


def network(name: str) -> nn.Module:
    """One of `cifar_nets`; ResNets with convolutions as shortcuts: Torch-Pruning cannot prune padded ones."""
    net: Any = cifar_nets.load(name)
    if not name.startswith("resnet"):
        return net  # type: ignore[no-any-return]  # a net by any name
    for stage in (net.layer1, net.layer2, net.layer3):
        for number, block in enumerate(stage):
            stage[number] = Block(block)
    return net.eval()  # type: ignore[no-any-return]  # a net by any name


class Data:
    """CIFAR-10 in memory. images: uint8 (n, 3, 32, 32); seen: minibatches handed out so far."""

    def __init__(self, seed: int) -> None:
        splits = cifar10.splits()
        self.images, self.labels = (torch.from_numpy(a) for a in splits["train"])
        self.test_images, self.test_labels = (torch.from_numpy(a) for a in splits["test"])
        self.seed, self.seen = seed, 0

    def epoch(self, number: int) -> Epoch:
        """Its minibatches, shuffled, cropped and flipped by (seed, number) alone."""
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(1000 * self.seed + number))
        return Epoch(self, order[: IMAGES // BATCH * BATCH].split(BATCH), number)

    def augmented(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(hash((self.seed, epoch, int(index[0]))) % 2**31)
        n = len(index)
        x = functional.pad(self.images[index], (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2, n, 1, 1, 1), generator=generator)
        rows, columns = torch.arange(32)[None, None, :, None], torch.arange(32)[None, None, None, :]
        flip = torch.rand((n, 1, 1, 1), generator=generator) < 0.5
        columns = torch.where(flip, 31 - columns, columns)
        x = x[
            torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None], top + rows, left + columns
        ]
        return normal(x), self.labels[index]

    def accuracy(self, net: nn.Module, images: int = TEST) -> float:
        """Share of right answers on the first test images, float32."""
        net.eval()
        with torch.no_grad():
            parts = zip(
                self.test_images[:images].split(500), self.test_labels[:images].split(500), strict=True
            )
            return sum(int((net(normal(x)).argmax(1) == y).sum()) for x, y in parts) / images


@dataclass(frozen=True)
class Epoch:
    """Minibatches (images float32, labels), each made when it is asked for."""

    data: Data
    indices: Sequence[Tensor]
    number: int

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in self.indices:
            self.data.seen += 1
            yield self.data.augmented(index, self.number)


def normal(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]


def macs(net: nn.Module) -> int:
    """Multiply-adds of one image, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    return int(counter.get_total_flops()) // 2


def finetune(net: nn.Module, data: Data, minibatches: int) -> None:
    """SGD with momentum and one fall of the rate along a cosine, bfloat16 autocast."""
    optimizer = torch.optim.SGD(net.parameters(), **TUNE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, minibatches)
    net.train()
    for x, y in islice(endless(data, 500), minibatches):
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(net(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def endless(data: Data, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches, epoch after epoch, from the one after `epoch`."""
    while True:
        epoch += 1
        yield from data.epoch(epoch)


class MacsLeft:
    """What is asked of a pruned network: shares of the MACs, one after the other in one trajectory."""

    name, points, spare = "macs_ratio", POINTS, 0

    def __init__(self, original: nn.Module) -> None:
        self.full = macs(original)

    def __call__(self, net: nn.Module) -> float:
        return macs(net) / self.full

    def sure(self, net: nn.Module) -> float:
        """As it is reported."""
        return self(net)


class LatencyLeft:
    """A share of the latency in ONNX Runtime, one thread, one image, measured in turns with the original."""

    name, points, spare = "latency_ratio", (0.75, 0.5, 0.35), 800
    """spare: minibatches for pruning up to the last point. How many steps lead to a latency differs by tool,
    so fine-tuning gets what pruning has not used."""

    def __init__(self, original: nn.Module) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.original, self.quiet = self._exported(original, "original"), Quiet("original")

    def _exported(self, net: nn.Module, name: str) -> Path:
        from deploy.to_onnx import export

        path = Path(self.folder.name, f"{name}.onnx")
        export(copy.deepcopy(net).eval(), torch.zeros(2, 3, 32, 32), path)
        return path

    def __call__(self, net: nn.Module, repeats: int = 8, seconds: float = 0.4) -> float:
        from deploy.latency import measure
        from deploy.runners import open_runner

        paths = {"original": self.original, "pruned": self._exported(net, "pruned")}
        runners = {name: open_runner("onnxruntime", path, 1) for name, path in paths.items()}

        def timed() -> dict[str, float]:
            return measure(runners, [[3, 32, 32]], 1, repeats, seconds, clock=time.thread_time).quick_ms

        found = self.quiet(timed)
        for runner in runners.values():
            runner.close()
        return found["pruned"] / found["original"]

    def sure(self, net: nn.Module) -> float:
        """As it is reported."""
        return self(net, 15, 2.0)


Goal = MacsLeft | LatencyLeft
Trajectory = Callable[[nn.Module, Data, str, int, Goal], Iterator[tuple[float, nn.Module]]]
"""(network, data, criterion, seed, goal): at every point of the goal a network that may be trained on."""


def rows(
    trajectory: Trajectory, tool: str, criterion: str, seed: int, *, epochs: int, model: str = "resnet20",
    goal: type[Goal] = MacsLeft, say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Prune once, and at every point fine-tune a copy and measure it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net, data, found = network(model), Data(seed), []
    full, started, left = macs(net), time.monotonic(), goal(net)
    for point, pruned in trajectory(net, data, criterion, seed, left):
        seconds = time.monotonic() - started
        tuned = copy.deepcopy(pruned)
        before, seen = data.accuracy(tuned), data.seen
        finetune(tuned, data, epochs * (IMAGES // BATCH) + max(left.spare - seen, 0))
        data.seen = seen
        row = {
            "model": model, "tool": tool, "criterion": criterion, "seed": seed, "epochs": epochs,
            "target": round(point, 4), "macs_ratio": round(macs(tuned) / full, 4), "before": before,
            "accuracy": data.accuracy(tuned), "prune_seconds": round(seconds, 1), "prune_minibatches": seen,
        }  # fmt: skip
        row[left.name] = round(left.sure(tuned), 4)
        say(str(row))
        found.append(row)
        started = time.monotonic() - seconds
    return found
