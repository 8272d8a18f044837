"""Looking before pruning: what can be removed, what cannot and why, what a ratio would give."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress import seeds
from compress.channelmap import ChannelMap, channel_map
from compress.config import ModelConfig, PruneConfig
from compress.cost import class_counts, cost_model, layers
from compress.errors import ConfigError, ModelError
from compress.importance import magnitude
from compress.models import build_model, is_program
from compress.program import load_program
from compress.select import Space, Target, remove, space
from compress.trace import Traced, from_program, trace

DEFAULT_RATIOS = (0.75, 0.5, 0.25)


def build(config: ModelConfig, folder: Path, seed: int = 0) -> Traced:
    """Build the model that the config names, and trace it."""
    example = torch.randn((2, *config.input_shape), generator=seeds.generator(seed, "example"))
    if not is_program(config.name):
        return trace(build_model(config, folder, seed=seed), (example,))
    program = load_program(folder / config.name)
    traced = from_program(program, (example,))
    try:
        with torch.no_grad():
            traced.net(example)
    except Exception as error:  # whatever the graph raises on a wrong shape
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the program does not take a batch of 2 of shape {list(config.input_shape)}: {reason}",
            config.name,
            "check model.input_shape; export it with a dynamic batch",
        ) from error
    return traced


def keep_names(net: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Parameters that the patterns name: a name, a module (all its parameters), or "re:PATTERN"."""
    names = [name for name, _ in net.named_parameters()]
    chosen: list[str] = []
    for pattern in patterns:
        if pattern.startswith("re:"):
            found = [n for n in names if re.search(pattern[3:], n)]
        else:
            found = [n for n in names if n == pattern or n.startswith(pattern + ".")]
        if not found:
            raise ConfigError(
                f"{pattern!r} names no parameter of the model",
                "prune.keep",
                "compress inspect lists the layers",
            )
        chosen += found
    return tuple(dict.fromkeys(chosen))


def choices(config: PruneConfig, cmap: ChannelMap, align: int) -> Space:
    """The widths, target and ranking that the `prune` section of a config asks for."""
    given = [(kind, getattr(config, f"{kind}_ratio")) for kind in ("macs", "params", "units")]
    target = next(Target(kind, ratio) for kind, ratio in given if ratio is not None)  # the schema sees to one
    per_mac = config.rank == "importance_per_mac"
    return space(cmap, target, align=align, min_keep=config.min_keep, per_mac=per_mac)


def pinned_rows(cmap: ChannelMap) -> list[dict[str, Any]]:
    """What stays and why, as plain data."""
    return [{**asdict(p), "parameters": list(p.parameters)} for p in cmap.pinned]


def inspect(
    config: ModelConfig, folder: Path, *, keep: Sequence[str] = (), ratios: Sequence[float] = DEFAULT_RATIOS
) -> dict[str, Any]:
    """Everything that is known of a model before any data is seen."""
    started = time.perf_counter()
    traced = build(config, folder)
    middle = time.perf_counter()
    cmap = channel_map(traced, keep_names(traced.net, keep))
    labelled = time.perf_counter()
    model = cost_model(cmap)
    whole = np.ones(cmap.units, dtype=bool)
    return {
        "model": config.name,
        "units": cmap.units,
        "classes": len(model.full),
        "macs": round(model.macs.total(model.full)),
        "params": round(model.params.total(model.full)),
        "seconds": {"trace": middle - started, "label": labelled - middle},
        "layers": [
            {
                "name": row.name,
                "kind": row.kind,
                "channels": row.before,
                "macs": row.macs_before,
                "pinned": row.pinned,
            }
            for row in layers(cmap, whole)
        ],
        "couplings": couplings(cmap),
        "pinned": pinned_rows(cmap),
        "unreached": list(traced.unreached),
        "ratios": [_ratio(traced, cmap, ratio) for ratio in ratios] if cmap.units else [],
    }


def couplings(cmap: ChannelMap) -> list[dict[str, Any]]:
    """Groups of channels that leave together through more than one layer, largest first."""
    found = []
    for group in range(int(cmap.classes.max(initial=-1)) + 1):
        members = cmap.classes == group
        names = [w.weight[0] for w in cmap.writers if _any(cmap, w.weight, members)]
        if len(names) > 1:
            found.append({"units": int(members.sum()), "layers": [n.removesuffix(".weight") for n in names]})
    return sorted(found, key=lambda row: -len(row["layers"]))


def _any(cmap: ChannelMap, axis: tuple[str, int], members: np.ndarray) -> bool:
    units = cmap.axes.get(axis)
    return units is not None and bool(members[units[units >= 0]].any())


def _ratio(traced: Traced, cmap: ChannelMap, ratio: float) -> dict[str, Any]:
    """What keeping this share of the MACs would leave, by weight magnitude."""
    model = cost_model(cmap)
    try:
        where = space(cmap, Target("macs", ratio))
    except ModelError as error:
        return {
            "macs_ratio": ratio,
            "reachable": False,
            "params_ratio": None,
            "units": None,
            "why": error.what,
        }
    chosen = remove(magnitude(traced.net, cmap), np.ones(cmap.units, dtype=bool), where)
    counts = class_counts(cmap, chosen.keep)
    left = {"params_ratio": model.ratio("params", counts), "units": int(chosen.keep.sum()), "why": ""}
    return {"macs_ratio": ratio, "reachable": True, **left}
