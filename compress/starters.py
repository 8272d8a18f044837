"""What ``compress init`` writes: pipeline files to start from, each whole and valid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of its training images


@dataclass(frozen=True)
class Starter:
    """``about``: what it is for, ``next``: what to do with the file, ``given``: values by section."""

    about: str
    next: str
    given: Mapping[str, Mapping[str, Any]]


STARTERS: dict[str, Starter] = {
    "mnist": Starter(
        "a small network on 5,000 digits: minutes on a CPU, nothing to download",
        "compress run",
        {
            "model": {
                "name": "compress.zoo:cifar_resnet",
                "weights": None,
                "kwargs": {"depth": 8, "width": 16, "channels": 1},
                "input_shape": [1, 28, 28],
            },
            "data": {"name": "mnist5k", "batch_size": 32},
            "train": {"epochs": 6, "lr": 0.1, "warmup_epochs": 1.0, "label_smoothing": 0.05},
            "prune": {"macs_ratio": 0.5, "lr": 0.01, "minibatches_per_step": 20},
            "finetune": {"epochs": 5, "lr": 0.03, "distill": {"alpha": 0.5, "temperature": 4.0}},
            "bench": {"batches": [1, 32], "repeats": 15, "seconds": 0.3},
            "gates": {"accuracy_drop": 0.01, "speedup": 1.2},
        },
    ),
    "cifar10": Starter(
        "ResNet-20 on CIFAR-10: for a GPU; the data are downloaded (170 MB)",
        "compress run",
        {
            "model": {
                "name": "compress.zoo:cifar_resnet",
                "weights": None,
                "kwargs": {"depth": 20},
                "input_shape": [3, 32, 32],
            },
            "data": {
                "name": "torchvision:CIFAR10",
                "mean": list(CIFAR_MEAN),
                "std": list(CIFAR_STD),
                "augment": "flip_crop",
                "kwargs": {"download": True},
            },
            "train": {"epochs": 100, "lr": 0.1, "weight_decay": 5e-4},
            "finetune": {"epochs": 40, "lr": 0.05, "weight_decay": 5e-4},
            "gates": {"speedup": 1.2},
        },
    ),
    "imagefolder": Starter(
        "a torchvision model with its ImageNet weights on your own folder of images",
        "put images in data/images/train/CLASS/ and data/images/test/CLASS/, set model.kwargs.num_classes, "
        "compress run",
        {
            "model": {
                "name": "torchvision:resnet18",
                "weights": "DEFAULT",
                "kwargs": {"num_classes": 10},  # the head is new, so it is trained first
                "input_shape": [3, 224, 224],
            },
            "data": {
                "name": "data/images",
                "batch_size": 64,
                "mean": [0.485, 0.456, 0.406],  # what torchvision's weights were trained with
                "std": [0.229, 0.224, 0.225],
                "augment": "flip_crop",
            },
            "train": {"epochs": 10, "lr": 0.01},
            "finetune": {"epochs": 10, "lr": 0.01},
            "gates": {"speedup": 1.2},
        },
    ),
}


def starter_text(name: str, recipe: str | None = None) -> str:
    """The commented pipeline file of one of STARTERS, by one of RECIPES, checked against the schema."""
    from compress.config import loads
    from compress.config_template import render

    text = render(STARTERS[name].given, None, recipe)
    loads(text, "the new compress.yaml")
    return text
