"""From single units to sets: what one network loses when many units leave together, without fine-tuning.

    COMPRESS_DATA=... python benchmarks/joint.py [NAME ...] [--seeds 2] [--images 500]

Two questions on each network (resnet20, resnet56, vgg, mobilenet). Which criterion, re-scored every 2.5 % of
the units on augmented training images, keeps most accuracy? And how well is the loss without a set of units
foretold, by the sum of its units' first-order terms and by the expanded logits of all of them together, for
random and for chosen sets?
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from benchmarks import cifar_nets
from benchmarks.common import known_rows, note, write

SHARES = (0.1, 0.2, 0.3, 0.4)
STEP, BATCH = 0.025, 50
SETS = (0.05, 0.1, 0.2, 0.3, 0.4)


CRITERIA = ("taylor", "taylor per example", "logits 0", "logits 1", "logits 2", "logits all")
"""logits: how many wrong classes are followed by themselves; the others move as one."""


def scorer(gated: Any, name: str) -> Callable[[Any], Tensor]:
    """What one minibatch says by this criterion."""
    from compress import criteria
    from compress.task import CrossEntropy

    if name == "taylor":
        return lambda batch: criteria.taylor(gated, batch, CrossEntropy())
    if name == "taylor per example":
        return lambda batch: criteria.taylor_examples(gated, batch, CrossEntropy())
    classes = None if name.endswith("all") else int(name.split()[1])

    def logits(batch: Any) -> Tensor:
        return criteria.squared_mean(criteria.loss_changes(*criteria.logit_shifts(gated, *batch, classes)))

    return logits


def removal(net: Any, cmap: Any, task: Any, batches: list[Any], name: str) -> dict[str, Any]:
    """Accuracy at each of SHARES as the least important units leave, re-scored after every STEP of them."""
    from compress.gated import Gated
    from compress.surgery import mask

    own = {key: value.clone() for key, value in net.state_dict().items()}
    score, keep = scorer(Gated(net, cmap), name), np.ones(cmap.units, dtype=bool)
    goals = [round(share * cmap.units) for share in SHARES]
    found, seconds, gone = [], 0.0, 0
    while gone < goals[-1]:
        started = time.perf_counter()
        scores = torch.stack([score(batch) for batch in batches]).mean(0).numpy()
        seconds += time.perf_counter() - started
        following = next(goal for goal in goals if goal > gone)
        least = np.argsort(np.where(keep, scores, np.inf), kind="stable")
        keep[least[: min(following - gone, round(STEP * cmap.units))]] = False
        gone = int((~keep).sum())
        mask(net, cmap, keep)
        if gone in goals:
            found.append(task.evaluate(net, "test").value)
    net.load_state_dict(own)
    return {"accuracy": dict(zip(map(str, SHARES), found, strict=True)), "scoring_seconds": seconds}


def foretold(net: Any, cmap: Any, batches: list[Any], seed: int) -> list[dict[str, Any]]:
    """True change of the mean loss without a set of units, and what two expansions say of it."""
    from compress import criteria
    from compress.gated import Gated

    gated, generator = Gated(net, cmap), np.random.default_rng(seed)
    taylor = torch.stack([scorer(gated, "taylor")(batch) for batch in batches]).mean(0).numpy()
    rows = []
    for share in SETS:
        size = round(share * cmap.units)
        sets = {f"random {i}": generator.choice(cmap.units, size, replace=False) for i in range(3)}
        sets["least important"] = np.argsort(taylor, kind="stable")[:size]
        index = torch.from_numpy(np.stack(list(sets.values())))
        sums: dict[str, list[Tensor]] = {"true": [], "first order": [], "logits": []}
        for images, labels in batches:
            sums["true"].append(criteria.leave_out(gated, images, labels, index).mean(0))
            log_p, shifts = criteria.logit_shifts(gated, images, labels)
            together = torch.stack([shifts[:, :, own].sum(2) for own in index], 2)
            sums["logits"].append(criteria.loss_changes(log_p, together).mean(0))
            p = log_p[:, 1:].exp()
            sums["first order"].append(torch.einsum("nk,nks->ns", p, together).mean(0))
        means = {key: torch.stack(value).mean(0) for key, value in sums.items()}
        for number, kind in enumerate(sets):
            own = {key: round(float(value[number]), 4) for key, value in means.items()}
            rows.append({"share": share, "set": kind, **own})
    return rows


def measure(name: str, seeds: int, images: int, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of one network that are not known yet."""
    from compress.channelmap import channel_map
    from compress.trace import trace

    torch.set_num_threads(1)
    task = cifar_nets.task(BATCH, test_limit=2000)
    traced = trace(cifar_nets.load(name), (torch.zeros(2, 3, 32, 32),))
    net, cmap = traced.net.eval(), channel_map(traced)
    before = task.evaluate(net, "test").value
    for seed in range(seeds):
        batches = list(islice(task.train_batches(1 + seed, 0), images // BATCH))
        for criterion in (*CRITERIA, "foretold"):
            key = {"model": name, "seed": seed, "criterion": criterion}
            if any(key.items() <= row.items() for row in known):
                continue
            row: dict[str, Any] = {"units": cmap.units, "before": before, "images": images}
            if criterion == "foretold":
                row["sets"] = foretold(net, cmap, batches, seed)
            else:
                row |= removal(net, cmap, task, batches, criterion)
            yield key | row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per network and criterion, the mean accuracy at each share over the seeds."""
    found: dict[str, Any] = {}
    for row in rows:
        if "accuracy" in row:
            found.setdefault(row["model"], {}).setdefault(row["criterion"], []).append(row["accuracy"])
    return {
        model: {
            criterion: {share: round(float(np.mean([r[share] for r in runs])), 4) for share in runs[0]}
            for criterion, runs in by.items()
        }
        for model, by in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(cifar_nets.NETS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    rows = known_rows("joint")
    for name in options.names:
        for row in measure(name, options.seeds, options.images, list(rows)):
            note(json.dumps(row))
            rows.append(row)
            write("joint", summary(rows), rows)


if __name__ == "__main__":
    main()
