"""One call for those who want one: a model, data and a loss in, a dense smaller model out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from compress import graphfile
from compress.channelmap import PinnedChannels, channel_map
from compress.config_faults import translate
from compress.cost import Layer, class_counts, cost_model, layers
from compress.errors import ConfigError
from compress.inspection import choices, keep_names
from compress.loop import Step
from compress.loop import prune as prune_loop
from compress.plan import Plan
from compress.schema import PruneConfig
from compress.surgery import Verification, apply_plan, cut, verify
from compress.task import Batch, Evaluation, Task, device_of
from compress.trace import GraphNet, trace


@dataclass(frozen=True)
class Result:
    """What a pruning did. macs and params: (before, after); one multiply-add is one MAC."""

    plan: Plan
    reached: bool
    stop_reason: str
    macs: tuple[int, int]
    params: tuple[int, int]
    history: tuple[Step, ...]
    layers: tuple[Layer, ...]
    pinned: tuple[PinnedChannels, ...]
    unreached: tuple[str, ...]
    verification: Verification


def prune(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    in_place: bool = False,
    seed: int = 0,
    progress: Callable[[Step, float], None] = lambda step, target: None,
    **options: Any,
) -> tuple[nn.Module, Result]:
    """Prune a trained model by first-order Taylor importance while it trains on.

    example_inputs: tensors whose dimension 0 is the batch. batches: an iterable that can be gone through
    again and has a length (a list, a DataLoader), or a function of the epoch (from 1) that gives one.
    loss: any callable of (model, batch) that gives a scalar, so that generators and policies can be
    pruned too. evaluate: larger is better; needed for `max_accuracy_drop`. options: the keys of the
    config's `prune` section, with the same defaults (macs_ratio=0.5, criterion="taylor", lr=0.001, ...);
    align is 1 unless given.

    Returns the dense model and a Result. The dense model is a new graph with the same parameter names;
    the given model is left as it was. With in_place=True it is the given model itself, trained and
    sliced, without the channels whose number its Python code fixes. Raises CompressError.
    """
    config = _options(options)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    subject = model if in_place else copy.deepcopy(model)
    traced = trace(subject, inputs)
    cmap = channel_map(traced, keep_names(traced.net, config.keep), in_place=in_place)
    align = 1 if config.align == "auto" else config.align
    where = choices(config, cmap, align)
    task = _task(batches, loss, evaluate, config)
    done = prune_loop(
        traced.net, cmap, where, task, config, seed=seed, device=device_of(model), progress=progress
    )
    dense, plan = cut(done.masked, cmap, done.keep)
    proof = verify(done.unmasked, done.masked, dense, traced.example)
    costs, counts = cost_model(cmap), class_counts(cmap, done.keep)
    result = Result(
        plan,
        done.reached,
        done.stop_reason,
        (round(costs.macs.total(costs.full)), round(costs.macs.total(counts))),
        (round(costs.params.total(costs.full)), round(costs.params.total(counts))),
        done.history,
        layers(cmap, done.keep),
        cmap.pinned,
        traced.unreached,
        proof,
    )
    return (apply_plan(plan, subject) if in_place else dense), result


def save(net: GraphNet, path: str | Path, example_inputs: Tensor | Sequence[Tensor]) -> None:
    """Write a dense graph as `path`.graph.json and `path`.safetensors: no code, no pickle."""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    graphfile.save(net, Path(path), [list(x.shape[1:]) for x in inputs])


def load(path: str | Path) -> GraphNet:
    """Read what `save` or a run wrote (`path` without its endings); the model's source is not needed."""
    return graphfile.load(Path(path))[0]


def _options(options: dict[str, Any]) -> PruneConfig:
    try:
        return PruneConfig(**options)
    except ValidationError as error:
        problem = translate(error, options, PruneConfig)[0]
        place = ".".join(str(part) for part in problem.path)
        raise ConfigError(problem.what, f"compress.prune({place})", problem.fix) from None


def _task(
    batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    evaluate: Callable[[nn.Module], float] | None,
    config: PruneConfig,
) -> Task:
    source = batches if callable(batches) else lambda epoch: batches
    first = source(1)
    if not isinstance(first, Sized):
        raise ConfigError(
            "batches has no length", "compress.prune", "give a list, a DataLoader, or a function of the epoch"
        )
    if evaluate is None and config.max_accuracy_drop is not None:
        raise ConfigError(
            "max_accuracy_drop needs evaluate", "compress.prune", "give evaluate=FUNCTION of the model"
        )

    def train_batches(epoch: int, start: int) -> Iterator[Batch]:
        return islice(iter(source(epoch)), start, None)

    def measure(model: nn.Module, split: str) -> Evaluation:
        value = evaluate(model) if evaluate is not None else float("nan")
        return Evaluation("value", value, float("nan"), 0)

    return Task(loss, train_batches, len(first), measure, 0, 0, 0, name="compress.prune")
