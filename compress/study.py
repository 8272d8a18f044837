"""Do the scores tell the truth? Every criterion against units that are really left out.

The truth of a unit is how the loss changes when it alone leaves, in eval mode, summed up in three ways:
"mean" the square of the mean change over all examples, "minibatch" the mean over minibatches of the squared
mean change (as the paper accumulates its estimate), "example" the mean over examples of the squared change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import criteria, importance
from compress.channelmap import ChannelMap
from compress.errors import DataError
from compress.gated import Gated
from compress.sources import Images
from compress.task import CrossEntropy
from compress.trace import GraphNet

TRUTHS = ("mean", "minibatch", "example")
SIGNS = 16
"""Random vectors for the diagonal of the Hessian, per minibatch."""


@dataclass(frozen=True)
class Study:
    """scores: by criterion; truths: by their kind; (units,) each. classes: the layer of each unit.

    units: the ones that were left out; scores hold these only. images: how many examples.
    """

    scores: dict[str, np.ndarray]
    truths: dict[str, np.ndarray]
    classes: np.ndarray
    units: np.ndarray
    images: int

    def correlations(self) -> list[dict[str, Any]]:
        """A row per criterion and truth: Pearson, Spearman, Kendall over all units, and within layers."""
        from scipy import stats

        rows = []
        for name, scores in self.scores.items():
            for kind, truth in self.truths.items():
                within = [self._within(scores, truth, layer) for layer in np.unique(self.classes)]
                known = [value for value in within if value is not None]
                rows.append(
                    {
                        "criterion": name,
                        "truth": kind,
                        "pearson": _correlation(stats.pearsonr, scores, truth),
                        "spearman": _correlation(stats.spearmanr, scores, truth),
                        "kendall": _correlation(stats.kendalltau, scores, truth),
                        "spearman_within_layers": float(np.median(known)) if known else None,
                    }
                )
        return rows

    def _within(self, scores: np.ndarray, truth: np.ndarray, layer: int) -> float | None:
        from scipy import stats

        own = self.classes == layer
        return _correlation(stats.spearmanr, scores[own], truth[own])


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
    gated, loss = Gated(net, cmap), CrossEntropy()
    classes, generator = torch.from_numpy(cmap.classes), torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    changes: list[Tensor] = []
    linear: list[Tensor] = []

    def add(name: str, value: Tensor) -> None:
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value

    for number, batch in enumerate(batches, start=1):
        images, labels = batch
        add("taylor", criteria.taylor(gated, batch, loss))
        add("taylor per example", criteria.taylor_examples(gated, batch, loss))
        add("taylor output", criteria.taylor_output(gated, batch, loss, classes))
        gradient, diagonal = criteria.hessian_diagonal(gated, batch, loss, samples=SIGNS, generator=generator)
        add("taylor second order", criteria.taylor_second(gradient, diagonal))
        add("optimal brain damage", criteria.brain_damage(diagonal))
        net.zero_grad(set_to_none=True)
        loss(net, batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        add("taylor weights", criteria.taylor_weights(net, cmap))
        add("norm scale taylor", criteria.norm_scale(net, cmap, gradient=True))
        net.zero_grad(set_to_none=True)
        linear.append(criteria.loss_changes(*criteria.logit_shifts(gated, images, labels)).double())
        changes.append(criteria.leave_one_out(gated, images, labels, units=chosen).double())
        progress(number)
    if not changes:
        raise DataError("no examples to study", "study", "give at least one batch")
    scores = {name: (value / len(changes)).numpy()[chosen] for name, value in sums.items()}
    scores |= {f"logits linear, {kind}": value[chosen] for kind, value in _statistics(linear).items()}
    scores |= {
        "norm scale": criteria.norm_scale(net, cmap).numpy()[chosen],
        "magnitude L1": importance.magnitude(net, cmap, 1)[chosen],
        "magnitude L2": importance.magnitude(net, cmap)[chosen],
        "random": importance.random(cmap, seed)[chosen],
    }
    images_seen = sum(len(c) for c in changes)
    return Study(scores, _statistics(changes), cmap.classes[chosen], chosen, images_seen)


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
