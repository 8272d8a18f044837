"""Recipes: values of `prune` and `finetune` that belong together, under one name.

A recipe speaks where the config file and ``--set`` say nothing; what they say wins, key by key. How much is
to be kept (`prune.macs_ratio` and its like) is never a recipe's to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Mapping[str, Any]]  # by section, then by key

RECIPES: dict[str, Values] = {
    # The loop of Molchanov et al., CVPR 2019, with the settings of its published ImageNet runs.
    "molchanov2019": {
        "prune": {
            "criterion": "taylor",
            "minibatches_per_step": 30,
            "units_per_step": 100,
            "lr": 1e-3,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "ema": 0.9,
            "align": 1,
            "min_keep": 0.0,
            "rank": "importance",
        },
        "finetune": {
            "epochs": 25,
            "optimizer": "sgd",
            "lr": 1e-3,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "schedule": "step",
            "step_epochs": 10,
            "step_gamma": 0.1,
            "warmup_epochs": 0.0,
            "label_smoothing": 0.0,
            "distill": None,
            "ema": 0.0,
            "recalibrate": 0,
            "amp": "off",
        },
    },
    # The same scores, and after them what has come since to train a small network.
    "modern": {
        "prune": {"criterion": "taylor", "momentum": 0.9, "ema": 0.9},
        "finetune": {
            "epochs": 30,
            "optimizer": "sgd",
            "lr": 0.03,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "distill": {"alpha": 0.5, "temperature": 4.0},
            "ema": 0.9998,
        },
    },
}


def with_recipe(data: Mapping[str, Any], recipe: Values) -> dict[str, Any]:
    """A config's raw data with the recipe's values where it has none.

    A section that is null is not the recipe's to fill: ``finetune: null`` stays off. (A bare ``prune:``, all
    of whose keys are comments, is null too, but means an empty section.)
    """
    filled = dict(data)
    for name, values in recipe.items():
        given = data.get(name, {})
        filled[name] = _filled({} if given is None and name == "prune" else given, values)
    return filled


def _filled(given: Any, values: Mapping[str, Any]) -> Any:
    """``values`` under what was given, to any depth; anything but a mapping was given whole."""
    if not isinstance(given, Mapping):
        return given
    filled = dict(given)
    for key, value in values.items():
        inner = isinstance(value, Mapping) and key in given
        filled[key] = _filled(given[key], value) if inner else given.get(key, value)
    return filled
