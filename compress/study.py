"""Do the scores tell the truth? Every criterion against units that are really left out.

The truth of a unit is how the loss changes when it alone leaves, in eval mode, summed up in three ways:
"mean" the square of the mean change over all examples, "minibatch" the mean over minibatches of the squared
mean change (as the paper accumulates its estimate), "example" the mean over examples of the squared change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau as kendall
from scipy.stats import pearsonr as pearson
from scipy.stats import spearmanr as spearman
from torch import Tensor

from compress import criteria, importance
from compress.channelmap import ChannelMap
from compress.errors import DataError
from compress.gated import Gated
from compress.scorers import CLASSES
from compress.sources import Images
from compress.task import CrossEntropy
from compress.trace import GraphNet

TRUTHS = ("mean", "minibatch", "example")
SIGNS = 16
"""Random vectors for the diagonal of the Hessian, per minibatch."""


@dataclass(frozen=True)
class Study:
    """scores: by criterion; truths: by their kind; (units,) each. classes: the layer of each unit.

    units: the ones that were left out; scores hold these only. images: how many examples. minibatches:
    (number, units) of what is a mean over minibatches, "the truth" summed up per minibatch among it.
    """

    scores: dict[str, np.ndarray]
    truths: dict[str, np.ndarray]
    classes: np.ndarray
    units: np.ndarray
    images: int
    minibatches: dict[str, np.ndarray] = field(default_factory=dict)

    def correlations(self) -> list[dict[str, Any]]:
        """A row per criterion and truth: Pearson, Spearman, Kendall over all units, and within layers."""
        rows = []
        for name, scores in self.scores.items():
            for kind, truth in self.truths.items():
                within = [self._within(scores, truth, layer) for layer in np.unique(self.classes)]
                known = [value for value in within if value is not None]
                rows.append(
                    {
                        "criterion": name,
                        "truth": kind,
                        "pearson": _correlation(pearson, scores, truth),
                        "spearman": _correlation(spearman, scores, truth),
                        "kendall": _correlation(kendall, scores, truth),
                        "spearman_within_layers": float(np.median(known)) if known else None,
                    }
                )
        return rows

    def samples(self) -> list[dict[str, Any]]:
        """How many images suffice: Spearman of scores of the first 1, 2, 4, ... minibatches with the truth
        per minibatch of all of them."""
        rows = []
        for name, found in self.minibatches.items():
            counts = [2**k for k in range(20) if 2**k < len(found)] + [len(found)]
            for count in counts:
                told = _correlation(spearman, found[:count].mean(0), self.truths["minibatch"])
                images = round(self.images * count / len(found))
                rows.append({"criterion": name, "minibatches": count, "images": images, "spearman": told})
        return rows

    def _within(self, scores: np.ndarray, truth: np.ndarray, layer: int) -> float | None:
        own = self.classes == layer
        return _correlation(spearman, scores[own], truth[own])


def study(
    net: GraphNet,
    cmap: ChannelMap,
    batches: Iterable[Images],
    *,
    units: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Study:
    """Score every unit by every criterion on (images, labels) batches in eval mode, and leave each out once.

    units: the ones to leave out (all if None). progress: gets the number of minibatches done. Raises
    ModelError (exit 4) where a gate cannot stand, DataError (exit 3) without batches.
    """
    chosen = np.arange(cmap.units) if units is None else np.sort(np.asarray(units))
    net.eval()
    gated, generator = Gated(net, cmap), torch.Generator().manual_seed(seed)
    said: dict[str, list[Tensor]] = {}
    changes: list[Tensor] = []
    linear: list[Tensor] = []
    for number, batch in enumerate(batches, start=1):
        images, labels = batch
        own = _by_gates(gated, cmap, batch, generator) | _by_parameters(net, cmap, batch)
        linear.append(criteria.loss_changes(*criteria.logit_shifts(gated, images, labels)).double())
        changes.append(criteria.leave_out(gated, images, labels, torch.from_numpy(chosen)[:, None]).double())
        for name, values in own.items():
            said.setdefault(name, []).append(values.detach().double()[chosen])
        said.setdefault("logits, all classes", []).append(criteria.squared_mean(linear[-1])[chosen])
        said.setdefault("the truth", []).append(criteria.squared_mean(changes[-1]))
        progress(number)
    if not changes:
        raise DataError("no examples to study", "study", "give at least one batch")
    minibatches = {name: torch.stack(values).numpy() for name, values in said.items()}
    scores = {name: values.mean(0) for name, values in minibatches.items() if name != "the truth"}
    whole = _statistics(linear)
    scores |= {f"logits, all classes, per {kind}": whole[kind][chosen] for kind in ("mean", "example")}
    scores |= {name: values[chosen] for name, values in _by_weights(net, cmap, seed).items()}
    images_seen = sum(len(c) for c in changes)
    return Study(scores, _statistics(changes), cmap.classes[chosen], chosen, images_seen, minibatches)


def _by_gates(gated: Gated, cmap: ChannelMap, batch: Images, generator: torch.Generator) -> dict[str, Tensor]:
    """What one minibatch says through explicit gates."""
    loss, classes = CrossEntropy(), torch.from_numpy(cmap.classes)
    gradient, diagonal = criteria.hessian_diagonal(gated, batch, loss, samples=SIGNS, generator=generator)
    return {
        "taylor": criteria.taylor(gated, batch, loss),
        "taylor per example": criteria.taylor_examples(gated, batch, loss),
        "taylor output": criteria.taylor_output(gated, batch, loss, classes),
        "taylor second order": criteria.taylor_second(gradient, diagonal),
        "optimal brain damage": criteria.brain_damage(diagonal),
        "logits": criteria.squared_mean(
            criteria.loss_changes(*criteria.logit_shifts(gated, *batch, CLASSES))
        ),
    }


def _by_parameters(net: GraphNet, cmap: ChannelMap, batch: Images) -> dict[str, Tensor]:
    """What one minibatch says through the gradients of the parameters."""
    net.zero_grad(set_to_none=True)
    CrossEntropy()(net, batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    found = {
        "taylor, writing side": importance.write_gates(net, cmap).square(),
        "taylor weights": criteria.taylor_weights(net, cmap),
        "norm scale taylor": criteria.norm_scale(net, cmap, gradient=True),
    }
    net.zero_grad(set_to_none=True)
    return found


def _by_weights(net: GraphNet, cmap: ChannelMap, seed: int) -> dict[str, np.ndarray]:
    """What needs no minibatch."""
    return {
        "norm scale": criteria.norm_scale(net, cmap).numpy(),
        "magnitude L1": importance.magnitude(net, cmap, 1),
        "magnitude L2": importance.magnitude(net, cmap),
        "magnitude share": importance.magnitude_share(net, cmap),
        "random": importance.random(cmap, seed),
    }


def _statistics(changes: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """The three truths of per-example changes, a list of (examples, units)."""
    together = torch.cat(list(changes))
    minibatch = torch.stack([criteria.squared_mean(c) for c in changes]).mean(0)
    found = (together.mean(0).square(), minibatch, together.square().mean(0))
    return {kind: value.numpy() for kind, value in zip(TRUTHS, found, strict=True)}


def _correlation(measure: Any, scores: np.ndarray, truth: np.ndarray) -> float | None:
    """None where there is none to speak of: fewer than three units, or all equal."""
    if len(scores) < 3 or np.ptp(scores) == 0 or np.ptp(truth) == 0:
        return None
    return float(measure(scores, truth).statistic)
