"""Scores and selection without training: what a run would remove, and whether its target can be met."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from compress.channelmap import ChannelMap
from compress.config import Config
from compress.cost import class_counts, cost_model, layers
from compress.errors import ConfigError, ModelError
from compress.importance import scored
from compress.inspection import choices, kept_names, labelled, pinned_rows
from compress.scorers import OF_WEIGHTS, scorer
from compress.select import remove
from compress.sensitivity import SHARES
from compress.sensitivity import sensitivity as classes_sensitivity
from compress.shares import Share
from compress.steps import Events, Work, finite
from compress.study import study as criteria_study
from compress.surgery import cut
from compress.task import Evaluation, Task, check, device_of, move
from compress.trace import GraphNet, Traced


def plan(work: Work, traced: Traced | None = None) -> dict[str, Any]:
    """Score on one step's minibatches, select once, and say what would go. Nothing is written.

    traced: the model if it is there already. A run re-scores after every removal while it trains, so it
    will choose somewhat differently.
    """
    with work.around() if traced else work.inside(work.built.whole):
        return _plan(work, traced or work.built.traced)


def _plan(work: Work, traced: Traced) -> dict[str, Any]:
    config, task = work.config, work.task
    traced, cmap = _checked(work, traced)
    where = choices(config.prune, cmap, work.align)
    scores = _scores(traced.net, cmap, task, config, work.events)
    chosen = remove(scores, np.ones(cmap.units, dtype=bool), where)
    _, cut_plan = cut(traced.net, cmap, chosen.keep)
    model, counts = cost_model(cmap), class_counts(cmap, chosen.keep)
    target = where.target
    floor = np.array([level[0] for level in where.levels])
    return {
        "target": {"kind": f"{target.kind}_ratio", "value": target.ratio},
        "reachable": chosen.reached,
        "least": model.ratio(target.kind, floor),
        "macs": {"before": round(model.macs.total(model.full)), "after": round(model.macs.total(counts))},
        "params": {
            "before": round(model.params.total(model.full)),
            "after": round(model.params.total(counts)),
        },
        "units": {"total": cmap.units, "kept": int(chosen.keep.sum())},
        "layers": [asdict(layer) for layer in layers(cmap, chosen.keep)],
        "pinned": pinned_rows(cmap),
        "plan": cut_plan.to_json(),
    }


def study(work: Work, traced: Traced | None, images: int, batch: int, limit: int | None) -> dict[str, Any]:
    """Every criterion against units that are left out, on test examples.

    traced: the model if it is there already. images: how many examples; batch: of a minibatch; limit: leave
    out that many random units only.
    """
    task, config = work.data, work.config
    is_part = traced is None and work.built.whole is not None
    if task.test_batches is None or task.classes is None or is_part:
        what = "takes classifiers that are traced whole, with labelled test images"
        fix = "in Python compress.study.study takes any labelled batches"
        raise ConfigError(f"a study {what}", "study", fix)
    traced, cmap = _checked(work, traced or work.built.traced)
    units = None
    if limit is not None and limit < cmap.units:
        units = np.random.default_rng(config.seed).choice(cmap.units, limit, replace=False)
    total = math.ceil(min(images, task.n_test) / batch)
    found = criteria_study(
        traced.net,
        cmap,
        islice(task.test_batches(batch), total),
        units=units,
        seed=config.seed,
        progress=lambda done: work.events.progress("study", done, total, "leaving units out"),
    )
    return {
        "model": config.model.name,
        "units": cmap.units,
        "left_out": len(found.units),
        "images": found.images,
        "batch": batch,
        "rows": found.correlations(),
        "samples": found.samples(),
        "scores": {name: values.tolist() for name, values in found.scores.items()},
        "truths": {name: values.tolist() for name, values in found.truths.items()},
    }


def sensitivity(work: Work, traced: Traced | None, images: int) -> dict[str, Any]:
    """Every class of units at several widths, each with the others whole, on validation examples.

    traced: the model if it is there already. images: at most so many, where the task can leave some out.
    """
    with work.around() if traced else work.inside(work.built.whole):
        return _sensitivity(work, traced or work.built.traced, images)


def _sensitivity(work: Work, traced: Traced, images: int) -> dict[str, Any]:
    config, task = work.config, work.task
    traced.net.to(work.device)
    traced, cmap = _checked(work, traced)
    if cmap.units == 0:
        fix = "compress inspect lists what stays, and why"
        raise ModelError("the model has no prunable unit", config.model.name, fix)

    def everything(net: nn.Module) -> Evaluation:
        return task.evaluate(net, "validation")

    full, found = classes_sensitivity(
        traced.net,
        cmap,
        _scores(traced.net, cmap, task, config, work.events),
        task.few(images) if task.few is not None else everything,
        progress=lambda done, total: work.events.progress("sensitivity", done, total, "leaving units out"),
    )
    model = cost_model(cmap)
    return {
        "model": config.model.name,
        "criterion": config.prune.criterion,
        "images": full.n,
        "metric": full.metric,
        "loss": full.loss,
        "value": full.value,
        "macs": round(model.macs.total(model.full)),
        "shares": list(SHARES),
        "classes": [
            finite(asdict(one)) | {"points": [finite(asdict(point)) for point in one.points]} for one in found
        ],
    }


def _checked(work: Work, traced: Traced) -> tuple[Traced, ChannelMap]:
    """The model with its labels, after one batch has gone through it."""
    config = work.config
    check(traced.net, work.task, config.model.input_shape)
    kept = kept_names(traced.net, config.model, config.prune.keep, work.whole)
    return labelled(traced, kept, config.prune)


def _scores(net: GraphNet, cmap: ChannelMap, task: Task, config: Config, events: Events) -> np.ndarray:
    """Importance of the model as it stands: eval mode, no step is taken."""
    found = scorer(config.prune, net, cmap, task, seed=config.seed)
    minibatches = 0 if config.prune.criterion in OF_WEIGHTS else config.prune.minibatches_per_step
    for number, batch in enumerate(islice(task.train_batches(1, 0), minibatches), start=1):
        net.zero_grad(set_to_none=True)
        with scored(net, cmap, [p for p in net.parameters() if p.requires_grad], config.prune.gates):
            given = move(batch, device_of(net))
            task.loss(net, given).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            found.accumulate(net, Share(given))
        events.progress("scores", number, minibatches, "scoring")
    net.zero_grad(set_to_none=True)
    return found.scores()
