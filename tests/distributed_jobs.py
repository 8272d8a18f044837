"""What test_distributed.py does in one process and in two: each job gives tensors by name.

As a program it joins the processes that the environment names, does every job and writes what came out to
the folder that is its argument, as JOB-RANK.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import compress
from compress import checkpoint, distributed, loop, shares
from compress.channelmap import channel_map
from compress.data import Splits
from compress.errors import ConfigError, DataError, Interrupted
from compress.inspection import choices
from compress.schema import DataConfig, PruneConfig, TrainConfig
from compress.sources import TensorSource
from compress.task import CrossEntropy, Task, _classification
from compress.trace import trace
from compress.train import train

Found = dict[str, Tensor]


class Net(nn.Module):
    """Two convolutions with batch norm, a skip and a linear layer; dropout where it is asked for."""

    def __init__(self, seed: int = 0, drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False)
        self.fc1, self.bn3, self.fc2 = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.drop = nn.Dropout(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.fc2(self.drop(torch.relu(self.bn3(self.fc1(x.mean((2, 3)))))))


def examples(n: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    images = torch.randn((n, 3, 6, 6), generator=generator, dtype=dtype)
    return images + labels[:, None, None, None], labels


def loss(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def differing(seed: int = 0) -> int:
    """A seed for weights that process 1 begins with others of."""
    return seed + 100 * distributed.rank()


# -- jobs ---------------------------------------------------------------------------------------------


def batch_norm(folder: Path, traced: bool = False) -> Found:
    """Loss, gradients and statistics of one minibatch of seven, in float64."""
    model: nn.Module = Net().double()
    if traced:
        model = trace(model, examples(2, 0, torch.float64)[:1]).net
    share = shares.share(examples(7, 1, torch.float64))
    with share.together():
        value = loss(model.train(), share.batch)
    share.backward(value)
    shares.reduce_gradients(model)
    found = {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: b for name, b in model.named_buffers() if "running" in name}
    return found | {"loss": torch.tensor(share.mean(value))}


def batch_norm_graph(folder: Path) -> Found:
    return batch_norm(folder, traced=True)


def prune(folder: Path, loss: Any = loss, **own: Any) -> Found:
    """compress.prune on batches of five, one of a single example, with a frozen layer that is scored."""
    model: Any = Net(differing())
    model.conv2.weight.requires_grad_(False)
    model.bn3 = nn.Identity()  # it could make nothing of a single example
    batches = [examples(5, seed) for seed in range(7)] + [examples(1, 9)]
    seen: list[int] = []
    options = {"macs_ratio": 0.5, "minibatches_per_step": 4, "units_per_step": 2, "lr": 0.02} | own
    dense, result = compress.prune(
        model, examples(2, 0)[0], batches, loss, evaluate=lambda net: float(distributed.rank()),
        progress=lambda step, target: seen.append(step.step), **options,
    )  # fmt: skip
    facts = {"plan": text(repr(result.plan.to_json())), "seen": torch.tensor(len(seen))}
    facts["measured"] = torch.tensor([s.accuracy for s in result.history if s.accuracy is not None])
    return facts | {f"dense/{n}": t.clone() for n, t in dense.state_dict().items()}


def prune_by_logits(folder: Path) -> Found:
    """Its scores are of examples, not of gradients that are summed anyway."""
    return prune(folder, CrossEntropy(), criterion="logits")


def classify(folder: Path) -> Found:
    """Train on batches of seven that are cropped and mirrored; evaluate shares the examples."""
    task, model = classification(), Net(differing())
    done = train(model, task, TrainConfig(epochs=2, lr=0.05, ema=0.5))
    last = task.evaluate(model, "test")
    assert last.correct is not None
    found = {"correct": last.correct.to(torch.uint8), "loss": torch.tensor(last.loss)}
    found["majority"] = torch.tensor(last.majority)
    found["history"] = torch.tensor([[e.loss, e.validation, e.validation_loss] for e in done.history])
    return found | {f"model/{n}": t.clone() for n, t in model.state_dict().items()}


def classification() -> Task:
    images, labels = examples(60, 3)
    sources = TensorSource(images[:45], labels[:45]), TensorSource(images[45:], labels[45:])
    config = DataConfig(name="made", batch_size=7, augment="flip_crop", validation=0.2)
    return _classification(Splits("made", *sources, classes=4), config, 0)


def resumed_training(folder: Path) -> Found:
    """Stopped in the third step, by the last process alone, and gone on with: as if never stopped."""
    found: Found = {}
    for name, calls in (("whole", 10**6), ("stopped", 3)):
        model, task = Net(drop=0.3), classification()
        options = {"checkpoint": made(folder / f"training-{name}"), "checkpoint_seconds": 0.0}
        config = TrainConfig(epochs=2, lr=0.05)
        try:
            train(model, task, config, should_stop=last_stops(calls), **options)  # type: ignore[arg-type]
        except Interrupted as stop:
            found["said"] = text(str(stop).partition(";")[0])
            model = Net(drop=0.3)
            train(model, task, config, **options)  # type: ignore[arg-type]
        found |= {f"{name}/{n}": t.clone() for n, t in model.state_dict().items()}
    return found


def resumed_pruning(folder: Path) -> Found:
    found: Found = {}
    config = PruneConfig(macs_ratio=0.5, minibatches_per_step=2, units_per_step=2, lr=0.02, align=1)
    for name, calls in (("whole", 10**6), ("stopped", 2)):
        traced = trace(Net(drop=0.3), examples(2, 0)[:1])
        cmap = channel_map(traced)
        given = (cmap, choices(config, cmap, 1), classification(), config)
        place = made(folder / f"pruning-{name}")
        try:
            done = loop.prune(traced.net, *given, checkpoint=place, should_stop=last_stops(calls))
        except Interrupted:
            done = loop.prune(trace(Net(drop=0.3), examples(2, 0)[:1]).net, *given, checkpoint=place)
        found |= {f"{name}/{n}": t.clone() for n, t in done.masked.state_dict().items()}
        found[f"{name}/keep"] = torch.from_numpy(done.keep)
    return found


def last_stops(calls: int) -> Callable[[], bool]:
    """A should_stop that says yes in the last process only, from its `calls`-th question on."""
    left = iter(range(calls))
    last = distributed.rank() == distributed.size() - 1
    return lambda: next(left, None) is None and last


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def own_measure(folder: Path) -> Found:
    """Each process measures something else; all keep the epoch that is best for the first.

    The model comes in DistributedDataParallel, which is taken off.
    """
    model: nn.Module = Net(differing())
    if distributed.size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    values = [[0.1, 0.3, 0.2], [0.9, 0.1, 0.2]][distributed.rank()]
    left = iter(values)
    batches = [examples(6, seed) for seed in range(3)]
    _, done = compress.finetune(model, batches, loss, evaluate=lambda net: next(left), epochs=3, lr=0.01)
    inner = model.module if distributed.size() > 1 else model
    found = {n: t.clone() for n, t in inner.state_dict().items()}
    return found | {"best": torch.tensor([done.best_epoch, done.best])}


def gradients(folder: Path) -> Found:
    """Tensors of all kinds: with a gradient here only, with none anywhere, complex, of half precision."""
    kinds = (torch.float32, torch.float64, torch.complex64, torch.bfloat16)
    every = [torch.zeros(3, dtype=kind, requires_grad=True) for kind in kinds]
    some, none = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    for tensor in every:
        tensor.grad = torch.full_like(tensor, 1 + distributed.rank())
    if distributed.rank() == distributed.size() - 1:
        some.grad = torch.full_like(some, 5.0)
    distributed.reduce_gradients([*every, some, none, every[0]])
    assert none.grad is None
    assert some.grad is not None
    return {**{str(t.dtype): t.grad.real.clone() for t in every if t.grad is not None}, "some": some.grad}


def lists(folder: Path) -> Found:
    """A detector's batch, images of several sizes and what is in them; and one that cannot be shared."""
    images, targets = [torch.full((3, 4 + i, 5), float(i)) for i in range(5)], [{"n": i} for i in range(5)]
    share = shares.share((images, targets))
    pairs = shares.share(list(zip(images, targets, strict=True)))
    assert [target["n"] for target in share.batch[1]] == [target["n"] for _, target in pairs.batch]
    try:
        shares.share((torch.zeros(4), torch.zeros(5)))
        said = ""
    except DataError as error:
        said = str(error)
    other = examples(4, distributed.rank())
    try:
        compress.finetune(Net(), [other], loss, epochs=1)
        differs = ""
    except ConfigError as error:
        differs = str(error)
    own = torch.tensor([float(image.mean()) for image in share.batch[0]])
    return {"own": own, "weight": torch.tensor(share.weight), "said": text(said), "differs": text(differs)}


def norms_of_instances(folder: Path) -> Found:
    """Running statistics that each process moves by its own examples end as those of the first."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten())
    task = replace(classification(), loss=lambda net, batch: net(batch[0]).square().mean(), classes=None)
    task = replace(task, evaluate=lambda net, split: classification().evaluate(Net(), split))
    train(model, task, TrainConfig(epochs=1, lr=0.01))
    return {n: t.clone() for n, t in model.state_dict().items()}


JOBS: dict[str, Callable[[Path], Found]] = {
    job.__name__: job
    for job in (
        batch_norm, batch_norm_graph, prune, prune_by_logits, classify, resumed_training, resumed_pruning,
        own_measure, gradients, lists, norms_of_instances,
    )
}  # fmt: skip


def refuse(*_: object) -> None:
    raise AssertionError("a process that is not the first writes a checkpoint")


def results(folder: Path) -> Iterator[tuple[str, Found]]:
    for name, job in JOBS.items():
        yield name, {k: v.detach().contiguous().clone() for k, v in job(folder).items()}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")  # as a user may who calls compress from a program of several processes
    if not distributed.is_main():
        checkpoint.save = refuse
    for name, found in results(folder):
        save_file(found, str(folder / f"{name}-{distributed.rank()}.safetensors"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
