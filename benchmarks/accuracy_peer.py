"""Torch-Pruning's trajectory for `accuracy.py` and `latency_accuracy.py`, in an environment that has it.

PEER_PYTHON benchmarks/accuracy_peer.py CRITERION SEED EPOCHS MODEL macs|latency
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.nn import functional

from benchmarks import accuracy_job as job


def trajectory(
    net: nn.Module, data: job.Data, criterion: str, seed: int, left: job.Goal
) -> Iterator[tuple[float, nn.Module]]:
    """Its global pruner, one share of the channels at a time, between the minibatches that ours trains on.

    Taylor gets the sum of the gradients of the minibatches since the last removal.
    """
    import torch_pruning

    importance: Any = {
        "taylor": torch_pruning.importance.GroupTaylorImportance,
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    }[criterion]()
    pruner = torch_pruning.pruner.BasePruner(
        net,
        torch.zeros(2, 3, 32, 32),
        importance=importance,
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=round(1 / job.STEP_SHARE),
        max_pruning_ratio=1 - job.MIN_KEEP,
        ignored_layers=[m for m in net.modules() if isinstance(m, nn.Linear)],
    )
    batches, points = job.endless(data), list(left.points)
    while points:
        optimizer = torch.optim.SGD(net.parameters(), **job.PRUNE)
        net.train()
        sums: dict[str, torch.Tensor] = {}
        for _ in range(job.MINIBATCHES):
            x, y = next(batches)
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            for name, p in net.named_parameters():
                sums[name] = sums.get(name, 0) + p.grad
            optimizer.step()
        if left(net) <= points[0]:
            yield points.pop(0), net
            continue
        net.train()
        for name, p in net.named_parameters():
            p.grad = sums[name]
        pruner.step()


def main() -> None:
    criterion, seed, epochs, model, kind = sys.argv[1:]
    found = job.rows(
        trajectory, "torch-pruning 1.6.1", criterion, int(seed), epochs=int(epochs), model=model,
        goal={"macs": job.MacsLeft, "latency": job.LatencyLeft}[kind], say=lambda text: None,
    )  # fmt: skip
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
