"""What each ingredient of the `modern` recipe is worth, and what removing step by step is worth.

    COMPRESS_DATA=... python benchmarks/recipe_ablation.py [--seeds 2] [--epochs 4] [--only NAME ...]

The pretrained CIFAR-10 ResNet-20 at half its MACs. "recipe" rows fine-tune one and the same pruned network,
each with one ingredient more than plain SGD on a cosine, or with all that `modern` has. "pruning" rows
prune in other ways and fine-tune plainly. A row already in the result file is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import cifar_nets
from benchmarks.common import known_rows, note, write

PLAIN: dict[str, Any] = {"lr": 0.03, "weight_decay": 1e-4, "amp": "bf16"}
INGREDIENTS: dict[str, dict[str, Any]] = {
    "distillation": {"distill": {"alpha": 0.5, "temperature": 4.0}},
    "averaged weights": {"ema": 0.9998},
    "recalibration": {"recalibrate": 100},
    "weight decay 5e-4": {"weight_decay": 5e-4},
    "label smoothing": {"label_smoothing": 0.1},
    "half the rate": {"lr": 0.015},
}
MODERN = ("distillation", "averaged weights")
PRUNE: dict[str, Any] = {"macs_ratio": 0.5, "lr": 0.01, "weight_decay": 1e-4, "minibatches_per_step": 10}


def fine_tunings() -> dict[str, dict[str, Any]]:
    """Options of every fine-tuning by name."""
    every = {key: value for name in MODERN for key, value in INGREDIENTS[name].items()}
    found = {"plain": PLAIN} | {f"plain + {name}": PLAIN | own for name, own in INGREDIENTS.items()}
    return found | {"all of it": PLAIN | every}


def in_steps(net: Any, task: Any, seed: int, **options: Any) -> Any:
    """`compress.prune`, removed units held at zero and cut out at the end."""
    import compress

    return compress.prune(
        net,
        torch.zeros(2, 3, 32, 32),
        lambda epoch: Epoch(task, epoch),
        task.loss,
        seed=seed,
        **PRUNE | options,
    )[0]


def at_once(net: Any, task: Any, seed: int) -> Any:
    """One removal after as many minibatches as ten steps have."""
    return in_steps(net, task, seed, units_per_step=10**6, minibatches_per_step=100)


def cut_in_between(net: Any, task: Any, seed: int) -> Any:
    """The channels are cut out four times on the way, so that the minibatches that follow are cheaper."""
    from benchmarks.accuracy_job import macs

    full = macs(net)
    for share in (0.85, 0.72, 0.6, 0.5):
        net = in_steps(net, task, seed, macs_ratio=share * full / macs(net))
    return net


PRUNINGS: dict[str, Callable[..., Any]] = {
    "in steps": in_steps,
    "at once": at_once,
    "in steps, cut out in between": cut_in_between,
}


class Epoch:
    """An epoch of a task, as `compress.prune` takes it."""

    def __init__(self, task: Any, number: int) -> None:
        self.task, self.number = task, number

    def __len__(self) -> int:
        return int(self.task.batches_per_epoch)

    def __iter__(self) -> Any:
        return iter(self.task.train_batches(self.number, 0))


def tuned(net: Any, task: Any, seed: int, epochs: int, options: dict[str, Any], teacher: Any) -> float:
    """Test accuracy of a fine-tuned copy."""
    from compress.config import TrainConfig
    from compress.train import train

    net, config = copy.deepcopy(net), TrainConfig.model_validate({"epochs": epochs, **options})
    train(net, task, config, seed=seed, teacher=teacher)
    return float(task.evaluate(net, "test").value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = known_rows("recipe_ablation")
    for seed in range(options.seeds):
        task = cifar_nets.task(64, seed)
        start: Any = None
        plans = [("pruning", name, PLAIN) for name in PRUNINGS]
        plans += [("recipe", name, own) for name, own in fine_tunings().items()]
        for kind, name, own in plans:
            key = {"kind": kind, "name": name, "seed": seed, "epochs": options.epochs}
            known = any(key.items() <= row.items() for row in rows)
            if known or (options.only and name not in options.only):
                continue
            began, original = time.monotonic(), cifar_nets.load("resnet20")
            if kind == "pruning":
                net = PRUNINGS[name](copy.deepcopy(original), task, seed)
            else:
                net = start = start or in_steps(copy.deepcopy(original), task, seed)
            row = key | {"prune_seconds": round(time.monotonic() - began, 1)}
            row["pruned"] = task.evaluate(net, "test").value
            row["accuracy"] = tuned(net, task, seed, options.epochs, own, original)
            note(json.dumps(row))
            rows.append(row)
            write("recipe_ablation", summary(rows), rows)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracy over the seeds, and for prunings the seconds."""
    found: dict[str, Any] = {}
    for row in rows:
        found.setdefault(row["kind"], {}).setdefault(row["name"], []).append(row)
    return {
        kind: {
            name: {
                "accuracy": round(sum(r["accuracy"] for r in runs) / len(runs), 4),
                "pruned": round(sum(r["pruned"] for r in runs) / len(runs), 4),
                "seeds": len(runs),
            }
            | ({"prune_seconds": min(r["prune_seconds"] for r in runs)} if kind == "pruning" else {})
            for name, runs in by.items()
        }
        for kind, by in found.items()
    }


if __name__ == "__main__":
    main()
