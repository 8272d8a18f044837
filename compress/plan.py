"""The plan: which indices of which axes stay. JSON, no code; applies to a fresh model without tracing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.channelmap import ChannelMap
from compress.errors import ConfigError, ModelError

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """shapes: tensor name -> shape in the unpruned model. axes: (name, dim) -> kept indices, ascending.

    groups: weight name -> new group count of a depthwise conv whose channels were removed.
    hard_coded: source lines that carry sizes the plan changes (splits, slices, channel padding, shuffles):
    the dense graph has them rewritten, the user's own Python code has not.
    """

    shapes: dict[str, tuple[int, ...]]
    axes: dict[tuple[str, int], tuple[int, ...]]
    groups: dict[str, int]
    hard_coded: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 of the unpruned model's tensor names and shapes."""
        text = json.dumps(sorted((name, list(shape)) for name, shape in self.shapes.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A JSON document; `from_json` reads it back."""
        axes: dict[str, dict[str, list[int]]] = {}
        for (name, dim), kept in self.axes.items():
            axes.setdefault(name, {})[str(dim)] = list(kept)
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "shapes": shapes,
            "axes": axes,
            "groups": self.groups,
            "hard_coded": list(self.hard_coded),
        }


def make_plan(
    cmap: ChannelMap, keep: np.ndarray, groups: dict[str, int], hard_coded: Sequence[str] = ()
) -> Plan:
    """The plan of a keep mask (bool (units,)); axes that keep everything are left out."""
    if keep.shape != (cmap.units,):
        raise ValueError(f"keep has shape {keep.shape}, the model has {cmap.units} units")
    axes = {}
    for key, units in cmap.axes.items():
        if key[0] not in cmap.shapes:
            continue
        stays = (units < 0) | keep[units]
        if not stays.any():
            raise ModelError(
                f"no channel of {key[0]} (dimension {key[1]}) would stay", fix="raise prune.min_keep"
            )
        if not stays.all():
            axes[key] = tuple(int(i) for i in np.flatnonzero(stays))
    return Plan(dict(cmap.shapes), axes, groups, tuple(dict.fromkeys(hard_coded)))


def from_json(document: Any, where: str = "plan.json") -> Plan:
    """Read and check a plan. Raises ConfigError naming the first thing that is wrong."""
    try:
        if document["version"] != VERSION:
            raise ConfigError(
                f"plan version {document['version']} is not {VERSION}", where, "make the plan again"
            )
        shapes = {str(n): tuple(int(s) for s in shape) for n, shape in document["shapes"].items()}
        axes = {
            (str(n), int(d)): tuple(int(i) for i in kept)
            for n, dims in document["axes"].items()
            for d, kept in dims.items()
        }
        groups = {str(n): int(g) for n, g in document["groups"].items()}
        plan = Plan(shapes, axes, groups, tuple(str(line) for line in document["hard_coded"]))
        stated = document["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"not a plan: {type(error).__name__} {error}", where, "make the plan again"
        ) from error
    for (name, dim), kept in plan.axes.items():
        size = shapes[name][dim] if name in shapes and 0 <= dim < len(shapes[name]) else 0
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
            raise ConfigError(f"axis {dim} of {name} is not an ascending choice of {size} indices", where)
    for name, count in groups.items():
        if name not in shapes or not 1 <= count <= shapes[name][0]:
            raise ConfigError(f"{count} groups do not fit {name}", where, "make the plan again")
    if stated != plan.fingerprint:
        raise ConfigError("the plan's fingerprint does not fit its shapes", where, "make the plan again")
    return plan
