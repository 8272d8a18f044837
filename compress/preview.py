"""Scores, selection and latency without training: what a run would remove, and what targets can be met."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from compress import aim
from compress.budgeting import budgeted, chosen, measured
from compress.channelmap import ChannelMap
from compress.config import Config
from compress.cost import class_counts, cost_model, layers
from compress.errors import ConfigError, ModelError
from compress.front import Outlook
from compress.importance import magnitude_share, scored
from compress.inspection import build, choices, kept_names, labelled, pinned_rows
from compress.latency import LatencyModel
from compress.scorers import OF_WEIGHTS, scorer
from compress.select import Space, levels_of, remove
from compress.sensitivity import SHARES
from compress.sensitivity import sensitivity as classes_sensitivity
from compress.shares import Share
from compress.steps import Events, Work, finite
from compress.study import study as criteria_study
from compress.surgery import cut
from compress.task import Evaluation, Task, check, device_of, move, scalar
from compress.trace import GraphNet, Traced

if TYPE_CHECKING:
    from deploy.latency_table import Table

DOUBTFUL = 0.15
"""An error of a latency model that its user is warned of."""


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
    scores = _scores(traced.net, cmap, task, config, work.events)
    found = _chosen(work, traced, cmap, scores)
    keep, where = found.keep, found.where
    _, cut_plan = cut(traced.net, cmap, keep)
    model, counts = where.cost, class_counts(cmap, keep)
    kind, facts = where.target.kind, found.budget
    led = facts and (facts["latency"] or facts["energy"])
    asked = led["asked_ratio"] if led else where.target.ratio
    floor = where.narrowest
    return {
        "target": {"kind": f"{kind}_ratio", "value": asked},
        "budget": facts,
        "reachable": found.reached,
        "least": model.ratio(kind, floor),
        "macs": {"before": round(model.macs.total(model.full)), "after": round(model.macs.total(counts))},
        "params": {
            "before": round(model.params.total(model.full)),
            "after": round(model.params.total(counts)),
        },
        "units": {"total": cmap.units, "kept": int(keep.sum())},
        "layers": [asdict(layer) for layer in layers(cmap, keep)],
        "pinned": pinned_rows(cmap),
        "plan": cut_plan.to_json(),
    }


@dataclass(frozen=True)
class _Chosen:
    """What a plan keeps, bool (units,), of what; budget: as in prune.json, None where none is set."""

    keep: np.ndarray
    where: Space
    reached: bool
    budget: dict[str, Any] | None = None


def _chosen(work: Work, traced: Traced, cmap: ChannelMap, scores: np.ndarray) -> _Chosen:
    """The selection, to the ratio of `prune` or to the budgets; one of latency or energy is measured."""
    config = work.config
    if config.budget is None:
        where = choices(config.prune, cmap, work.align)
        selection = remove(scores, np.ones(cmap.units, dtype=bool), where)
        return _Chosen(selection.keep, where, selection.reached)
    found = budgeted(
        config, traced.net, cmap, traced.example, run=None, folder=work.folder,
        listener=work.listener("latency"),
    )  # fmt: skip
    keep, reached, looks = chosen(found, scores)
    look = looks[-1] if looks else None
    return _Chosen(keep, found.where, reached, found.as_dict(keep, looks, look))


def front(work: Work, traced: Traced | None, target: str, elsewhere: Table | None = None) -> dict[str, Any]:
    """Kept importance against latency, and what each class of units costs, on a target: "" for the config's.

    traced: the model if it is there already. What the table of latencies lacks is measured; elsewhere: one of
    another machine, to which nothing is added.
    """
    with work.around() if traced else work.inside(work.built.whole):
        traced, cmap = _checked(work, traced or work.built.traced)
        scores = _scores(traced.net, cmap, work.task, work.config, work.events)
        return _front(work, traced, cmap, scores, target, elsewhere)


def front_of_weights(work: Work, target: str, elsewhere: Table | None = None) -> dict[str, Any]:
    """`front` by weight magnitude, of a model without data."""
    config = work.config
    traced = build(config.model, work.folder, config.seed).traced
    traced, cmap = labelled(traced, kept_names(traced.net, config.model, config.prune.keep), config.prune)
    return _front(work, traced, cmap, magnitude_share(traced.net, cmap), target, elsewhere)


def _front(
    work: Work,
    traced: Traced,
    cmap: ChannelMap,
    scores: np.ndarray,
    target: str,
    elsewhere: Table | None,
) -> dict[str, Any]:
    from deploy import targets

    config = work.config
    at = aim.place(config, target)
    levels = levels_of(cmap, aim.align(config, at), config.prune.min_keep)
    good = levels_of(cmap, targets.resolve_align(at.target), config.prune.min_keep)
    meter, latency = measured(
        config, at, traced.net, cmap, levels, traced.example, run=None, folder=work.folder,
        listener=work.listener("latency"), elsewhere=elsewhere,
    )  # fmt: skip
    if (latency.known_error or 0.0) > DOUBTFUL:
        far = f"{latency.known_error:.0%} off at networks that it has not seen"
        again = f"to measure again on an idle machine, delete {meter.path}"
        work.events.warn(f"the latency model is {far}; {again}")
    found = Outlook(cmap, latency.added_to(cost_model(cmap)), latency, levels, scores)
    return {
        "model": config.model.name,
        "criterion": config.prune.criterion,
        "target": at.target.name,
        **asdict(meter.table.setting),
        "asked_ratio": _asked(config, at, latency),
        **found.as_dict(good, meter.table.of(meter.model)),
    }


def _asked(config: Config, at: aim.Place, latency: LatencyModel) -> float | None:
    """The share of the latency that the config's budget asks for at this place, if it does."""
    budget = config.budget
    if budget is None or not budget.has_latency or at != aim.place(config):
        return None
    return budget.latency_ratio or (budget.latency_ms or 0.0) / latency.original_ms


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
            scalar(task.loss(net, given), task.name).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            found.accumulate(net, Share(given))
        events.progress("scores", number, minibatches, "scoring")
    net.zero_grad(set_to_none=True)
    return found.scores()
