"""Accuracy at equal measured latency on CIFAR-10: what is gained by choosing widths by latency.

    COMPRESS_DATA=... python benchmarks/latency_accuracy.py [--peer-python PYTHON] [--seeds 0 1 2]
        [--models resnet20 mobilenet] [--epochs 1] [--only NAME ...]

One network, data, budget of minibatches and fine-tuning for all, as in `accuracy.py`. "latency" asks for the
latency itself; "macs" and "macs, any width" (as most tools prune) take out MACs until the network measured is
fast enough; "uniform" narrows every layer alike, the least important channels first; so does Torch-Pruning's
global Taylor pruner. Latency: ONNX Runtime on this CPU, one thread, one image. Rows that the result file has
are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import accuracy_job as job
from benchmarks.common import known_rows, note, write

RESULT = "latency_accuracy"
PEER_NAME = "torch-pruning 1.6.1"
STEP = 0.06
"""Share of the MACs left by which they fall until the latency is reached."""
LEAST, WITHIN = 0.05, 0.01
"""Shares of the channels: the least that every class keeps alike, and how near the one looked for."""
ALIGN = 16


def _pruned(net: Any, data: job.Data, seed: int, number: int, **options: Any) -> Any:
    import torch

    import compress
    from compress.task import CrossEntropy

    example, units = torch.zeros(2, 3, 32, 32), _labelled(net)[1].units
    return compress.prune(
        net, example, lambda epoch: data.epoch(100 * number + epoch), CrossEntropy(), seed=seed,
        minibatches_per_step=job.MINIBATCHES, units_per_step=max(1, round(job.STEP_SHARE * units)),
        **job.PRUNE | {"min_keep": job.MIN_KEEP} | options,
    )[0]  # fmt: skip


def by_latency(
    net: Any, data: job.Data, criterion: str, seed: int, left: job.Goal
) -> Iterator[tuple[float, Any]]:
    """A budget of latency from point to point."""
    reached = 1.0
    for number, point in enumerate(left.points):
        net = _pruned(net, data, seed, number, latency=point / reached, align="auto")
        reached = left(net)
        yield point, net


def by_macs(align: int) -> Callable[..., Iterator[tuple[float, Any]]]:
    """MACs fall until the latency is reached."""

    def trajectory(
        net: Any, data: job.Data, criterion: str, seed: int, left: job.Goal
    ) -> Iterator[tuple[float, Any]]:
        full, number, share = job.macs(net), 0, 1.0
        for point in left.points:
            while left(net) > point:
                number, share = number + 1, share * (1 - STEP)
                net = _pruned(net, data, seed, number, macs_ratio=share * full / job.macs(net), align=align)
                share = min(share, job.macs(net) / full)
            yield point, net

    return trajectory


def uniform(
    net: Any, data: job.Data, criterion: str, seed: int, left: job.Goal
) -> Iterator[tuple[float, Any]]:
    """Every class of units keeps the same share, found by halves: latency does not depend on the weights."""
    from compress import meter
    from compress.surgery import cut

    for number, point in enumerate(left.points):
        traced, cmap = _labelled(net)
        low, high = LEAST, 1.0
        while high - low > WITHIN:
            middle = (low + high) / 2
            dense, _ = cut(copy.deepcopy(traced.net), cmap, meter.first_units(cmap, _narrowest(cmap, middle)))
            low, high = (middle, high) if left(dense) <= point else (low, middle)
        share = float(_narrowest(cmap, low).sum()) / cmap.units
        net = _pruned(net, data, seed, number, units_ratio=share + 1e-6, min_keep=low, align=1)
        yield point, net


def _labelled(net: Any) -> tuple[Any, Any]:
    import torch

    from compress.channelmap import channel_map
    from compress.trace import trace

    traced = trace(net, (torch.zeros(2, 3, 32, 32),))
    return traced, channel_map(traced)


def _narrowest(cmap: Any, share: float) -> Any:
    """Units per class, at least this share of each."""
    import numpy as np

    from compress.select import levels_of

    return np.array([own[0] for own in levels_of(cmap, 1, share)])


OURS: dict[str, Callable[..., Iterator[tuple[float, Any]]]] = {
    "latency": by_latency,
    "macs": by_macs(ALIGN),
    "macs, any width": by_macs(1),
    "uniform": uniform,
}


def measure(
    model: str, tool: str, criterion: str, seed: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one trajectory."""
    if tool == "compress":
        return job.rows(
            OURS[criterion], tool, criterion, seed, epochs=options.epochs, model=model,
            goal=job.LatencyLeft, say=note,
        )  # fmt: skip
    script = str(Path(__file__).with_name("accuracy_peer.py"))
    arguments = [criterion, str(seed), str(options.epochs), model, "latency"]
    done = subprocess.run([options.peer_python, script, *arguments], stdout=subprocess.PIPE, check=True)
    return list(json.loads(done.stdout))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By model and share of the latency asked for: mean accuracy, its range over seeds, latency reached."""
    points: dict[str, Any] = {}
    for row in rows:
        name = f"{row['tool']} {row['criterion']}".removeprefix("compress ")
        points.setdefault(f"{row['model']} at {row['target']}", {}).setdefault(name, []).append(row)
    found = {
        point: {
            name: {
                "mean": round(statistics.mean(r["accuracy"] for r in own), 4),
                "low": min(r["accuracy"] for r in own),
                "high": max(r["accuracy"] for r in own),
                "seeds": len(own),
                "latency_ratio": round(statistics.mean(r["latency_ratio"] for r in own), 4),
                "macs_ratio": round(statistics.mean(r["macs_ratio"] for r in own), 4),
            }
            for name, own in names.items()
        }
        for point, names in points.items()
    }
    ahead = [
        point
        for point, names in found.items()
        if "latency" in names and names["latency"]["mean"] == max(one["mean"] for one in names.values())
    ]
    return {"points": found, "of": len(found), "best_mean_by_latency": len(ahead)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default="")
    parser.add_argument("--models", nargs="+", default=["resnet20", "mobilenet"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    options = parser.parse_args()
    runs = [("compress", name) for name in OURS]
    if options.peer_python:
        runs.append((PEER_NAME, "taylor"))
    rows = known_rows(RESULT)
    for seed in options.seeds:
        for model in options.models:
            for tool, criterion in runs:
                mine = (model, tool, criterion, seed)
                known = {(r["model"], r["tool"], r["criterion"], r["seed"]) for r in rows}
                if mine in known or (options.only and criterion not in options.only):
                    continue
                rows += measure(*mine, options)
                write(RESULT, summary(rows), rows)


if __name__ == "__main__":
    main()
