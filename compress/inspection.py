"""Looking before pruning: what can be removed, what cannot and why, what a ratio would give."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compress import seeds
from compress.channelmap import ChannelMap, channel_map
from compress.config import ModelConfig, PruneConfig
from compress.cost import class_counts, cost_model, layers
from compress.errors import ConfigError, ModelError, did_you_mean
from compress.folding import folded
from compress.gates import with_gates
from compress.importance import magnitude_share
from compress.labels import Granularity, short_name
from compress.models import build_model, is_program
from compress.parts import Whole, arguments, trace_parts
from compress.program import load_program
from compress.select import Space, Target, remove, space
from compress.trace import GraphNet, Traced, from_program, get_tensor, trace

DEFAULT_RATIOS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Built:
    """A model ready to be labelled. whole: the user's model around the traced part, None where all of it
    is traced. why: what forbade to trace all of it.
    """

    traced: Traced
    whole: Whole | None = None
    why: str = ""

    @property
    def shapes(self) -> list[list[int]]:
        """Of the inputs, without the batch."""
        return [list(x.shape[1:]) for x in self.traced.example]


def build(config: ModelConfig, folder: Path, seed: int = 0, example: Any = None) -> Built:
    """Build the model that the config names, and trace it: all of it where that can be, else its parts.

    example: what the model is called with, where that is not one tensor of `config.input_shape`.
    """
    tensor = torch.randn((2, *config.input_shape), generator=seeds.generator(seed, "example"))
    if is_program(config.name):
        return Built(_program(config, folder, tensor))
    model = build_model(config, folder, seed=seed)
    paths = part_paths(config)
    if example is None:
        try:
            return Built(trace(model, (tensor,)))
        except ModelError as error:
            if not paths:
                raise
            why = str(error)
    else:
        why = "its example is not one tensor"
    given = arguments(tensor if example is None else example)
    parts = trace_parts(model, paths or [""], given)
    return Built(parts.traced, Whole(model, parts, given), why)


def part_paths(config: ModelConfig) -> list[str]:
    """The parts that `model.part` names; none: all of the model."""
    return [config.part] if isinstance(config.part, str) else list(config.part or ())


def _program(config: ModelConfig, folder: Path, example: Tensor) -> Traced:
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


def kept_names(
    net: nn.Module, config: ModelConfig, patterns: Sequence[str], whole: Whole | None = None
) -> tuple[str, ...]:
    """Parameters that must stay: those of `keep_names`, and all outside `model.part`, or read there too."""
    kept, paths = keep_names(net, patterns), part_paths(config)
    if whole is not None:
        return tuple(dict.fromkeys((*kept, *whole.shared)))
    if not paths:
        return kept
    names = [name for name, _ in net.named_parameters()]
    for part in paths:
        if not any(name.startswith(part + ".") for name in names):
            modules = {name for name, _ in net.named_modules()} - {""}
            what = f"{part!r} names no module of the model that has parameters"
            raise ConfigError(what, "model.part", did_you_mean(part, modules))
    inside = tuple(part + "." for part in paths)
    outside = [name for name in names if not name.startswith(inside)]
    return tuple(dict.fromkeys((*kept, *outside)))


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


def labelled(
    traced: Traced,
    keep: Sequence[str],
    config: PruneConfig,
    *,
    in_place: bool = False,
    counted: Collection[str] = (),
) -> tuple[Traced, ChannelMap]:
    """The traced model and its units as the `prune` section wants them.

    Computed weights are folded into plain ones, unless the user's own module is to be cut, which goes on
    computing them; gates are put in where they are needed. A folded weight of a kept parameter is kept.
    grouped_convs "auto" takes what gives more units: whole groups, or the same offset of every group.
    """
    if config.fold_weights and not in_place:
        traced = folded(traced)
        keep = [*keep, *(name for name, origins in traced.folded if set(origins) & set(keep))]
    if config.attention == "dims":
        traced = with_gates(traced)
    kinds: list[Literal["offsets", "groups"]] = ["offsets", "groups"]
    if config.grouped_convs != "auto":
        kinds = [config.grouped_convs]
    if not _has_grouped_convs(traced.net):
        kinds = kinds[:1]
    maps = []
    for kind in kinds:
        granularity = Granularity(config.attention, kind, config.inexact_norms)
        maps.append(channel_map(traced, keep, in_place=in_place, counted=counted, granularity=granularity))
    return traced, max(maps, key=lambda cmap: cmap.units)


def _has_grouped_convs(net: GraphNet) -> bool:
    """Whether groups of more than one channel occur; in a depthwise conv both choices are the same."""
    for node in net.graph.nodes:
        groups = node.args[6] if short_name(node).startswith("conv") and len(node.args) > 6 else 1
        if groups == 1:
            continue
        weight = node.args[1]  # a computed one may have any width
        if weight.op != "get_attr" or get_tensor(net, str(weight.target)).shape[1] > 1:
            return True
    return False


def choices(config: PruneConfig, cmap: ChannelMap, align: int) -> Space:
    """The widths, target and ranking that the `prune` section of a config asks for."""
    given = [(kind, getattr(config, f"{kind}_ratio")) for kind in ("macs", "params", "units")]
    target = next(Target(kind, ratio) for kind, ratio in given if ratio is not None)  # the schema sees to one
    per_cost = config.rank == "importance_per_cost"
    return space(cmap, target, align=align, min_keep=config.min_keep, per_cost=per_cost)


def inexact_because(cmap: ChannelMap) -> str:
    """Why the dense model will differ from the masked one, "" where it will not."""
    reasons = dict.fromkeys(f"{pin.reason} at {pin.source}" for pin in cmap.inexact)
    first = next(iter(reasons), "")
    return f"{first} and {len(reasons) - 1} more" if len(reasons) > 1 else first


def pinned_rows(cmap: ChannelMap) -> list[dict[str, Any]]:
    """What stays and why, as plain data."""
    return [{**asdict(p), "parameters": list(p.parameters)} for p in cmap.pinned]


def inspect(
    config: ModelConfig,
    folder: Path,
    *,
    prune: PruneConfig | None = None,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    example: Any = None,
) -> dict[str, Any]:
    """Everything that is known of a model before any data is seen. example: as for `build`."""
    started = time.perf_counter()
    built = build(config, folder, example=example)
    middle = time.perf_counter()
    prune = prune or PruneConfig()
    kept = kept_names(built.traced.net, config, prune.keep, built.whole)
    traced, cmap = labelled(built.traced, kept, prune)
    ended = time.perf_counter()
    model = cost_model(cmap)
    whole = np.ones(cmap.units, dtype=bool)
    return {
        "model": config.name,
        "parts": part_paths(config) if built.whole is not None else [],
        "units": cmap.units,
        "classes": len(model.full),
        "macs": round(model.macs.total(model.full)),
        "params": round(model.params.total(model.full)),
        "seconds": {"trace": middle - started, "label": ended - middle},
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
        "folded": [name for name, _ in traced.folded],
        "ratios": [_ratio(traced, cmap, ratio) for ratio in ratios] if cmap.units else [],
    }


def couplings(cmap: ChannelMap) -> list[dict[str, Any]]:
    """Groups of channels that leave together through more than one layer, largest first."""
    units = np.bincount(cmap.classes, minlength=1)
    found = [
        {"units": int(count), "layers": names}
        for count, names in zip(units, written_by(cmap), strict=False)
        if len(names) > 1
    ]
    return sorted(found, key=lambda row: -len(row["layers"]))


def written_by(cmap: ChannelMap) -> list[list[str]]:
    """The layers that write each class of units, in the order of the graph."""
    found: list[dict[str, None]] = [{} for _ in cmap.members()]
    for writer in cmap.writers:
        units = cmap.axes.get(writer.weight, np.empty(0, dtype=int))
        for group in np.unique(cmap.classes[units[units >= 0]]):
            found[group][writer.weight[0].removesuffix(".weight")] = None
    return [list(names) for names in found]


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
    chosen = remove(magnitude_share(traced.net, cmap), np.ones(cmap.units, dtype=bool), where)
    counts = class_counts(cmap, chosen.keep)
    left = {"params_ratio": model.ratio("params", counts), "units": int(chosen.keep.sum()), "why": ""}
    return {"macs_ratio": ratio, "reachable": True, **left}
