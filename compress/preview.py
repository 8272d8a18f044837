"""Scores and selection without training: what a run would remove, and whether its target can be met."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from compress.cost import class_counts, cost_model, layers
from compress.importance import Taylor, magnitude, random, scored
from compress.inspection import choices, kept_names, labelled, pinned_rows
from compress.select import remove
from compress.steps import Events, Work
from compress.surgery import cut
from compress.task import Task, check
from compress.trace import Traced


def plan(work: Work, traced: Traced | None = None) -> dict[str, Any]:
    """Score on one step's minibatches, select once, and say what would go. Nothing is written.

    traced: the model if it is there already. A run re-scores after every removal while it trains, so it
    will choose somewhat differently.
    """
    with work.around() if traced else work.inside(work.built.whole):
        return _plan(work, traced or work.built.traced)


def _plan(work: Work, traced: Traced) -> dict[str, Any]:
    config, task = work.config, work.task
    check(traced.net, task, config.model.input_shape)
    kept = kept_names(traced.net, config.model, config.prune.keep, work.whole)
    traced, cmap = labelled(traced, kept, config.prune)
    where = choices(config.prune, cmap, work.align)
    if config.prune.criterion == "taylor":
        scores = _taylor(traced.net, cmap, task, config.prune.minibatches_per_step, work.events)
    elif config.prune.criterion == "magnitude":
        scores = magnitude(traced.net, cmap)
    else:
        scores = random(cmap, config.seed)
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


def _taylor(net: Any, cmap: Any, task: Task, minibatches: int, events: Events) -> np.ndarray:
    """Importance of the model as it stands: eval mode, no step is taken."""
    importance = Taylor(cmap)
    for number, batch in enumerate(islice(task.train_batches(1, 0), minibatches), start=1):
        net.zero_grad(set_to_none=True)
        with scored(net, cmap, [p for p in net.parameters() if p.requires_grad]):
            task.loss(net, batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            importance.accumulate(net)
        events.progress("plan", number, minibatches, "scoring")
    return importance.scores()
