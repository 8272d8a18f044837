"""Accuracy against MACs on CIFAR-10: our criteria and Torch-Pruning's, same network, data, budget.

    COMPRESS_DATA=... python benchmarks/accuracy.py [--peer-python PYTHON] [--seeds 3] [--epochs 1]
        [--only TOOL:CRITERION ...]

A run already in benchmarks/results/accuracy.json is not done again. Each prunes a pretrained ResNet-20 step
by step while it trains, through four shares of the MACs, and at each fine-tunes a copy and measures it on
the 10,000 test images. Goal: above Torch-Pruning at each share by more than the seeds' spread.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import accuracy_job as job
from benchmarks.common import RESULTS, known_rows, note, write

OURS: dict[str, dict[str, Any]] = {
    "taylor": {},
    "logits": {"criterion": "logits"},
    "taylor, rank importance": {"rank": "importance"},
    "logits, rank importance": {"criterion": "logits", "rank": "importance"},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
}
PEER = ("taylor", "magnitude")
PEER_NAME = "torch-pruning 1.6.1"


def trajectory(
    net: Any, data: job.Data, criterion: str, seed: int, left: job.Goal
) -> Iterator[tuple[float, Any]]:
    """Ours: `compress.prune` from point to point."""
    import torch

    import compress
    from compress.channelmap import channel_map
    from compress.task import CrossEntropy
    from compress.trace import trace

    example, full = torch.zeros(2, 3, 32, 32), job.macs(net)
    units = channel_map(trace(net, (example,))).units
    for number, point in enumerate(left.points):
        net, _ = compress.prune(
            net,
            example,
            lambda epoch, first=100 * number: data.epoch(first + epoch),
            CrossEntropy(),
            macs_ratio=point * full / job.macs(net),
            minibatches_per_step=job.MINIBATCHES,
            units_per_step=round(job.STEP_SHARE * units),
            min_keep=job.MIN_KEEP,
            seed=seed,
            **job.PRUNE,
            **OURS[criterion],
        )
        yield point, net


def measure(tool: str, criterion: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one trajectory."""
    if tool == "compress":
        return job.rows(
            trajectory, tool, criterion, seed, epochs=options.epochs, model=options.model, say=note
        )
    script = str(Path(__file__).with_name("accuracy_peer.py"))
    arguments = [criterion, str(seed), str(options.epochs), options.model, "macs"]
    done = subprocess.run([options.peer_python, script, *arguments], stdout=subprocess.PIPE, check=True)
    return list(json.loads(done.stdout))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per point every tool's mean and range over seeds; at how many points we are ahead."""
    points: dict[str, Any] = {}
    for target in sorted({row["target"] for row in rows}, reverse=True):
        at = [row for row in rows if row["target"] == target]
        runs = sorted({(row["tool"], row["criterion"]) for row in at})
        points[str(target)] = {
            f"{tool} {criterion}": _spread(
                [r for r in at if (r["tool"], r["criterion"]) == (tool, criterion)]
            )
            for tool, criterion in runs
        }
    return {"points": points, "points_ahead": sum(_ahead(point) for point in points.values())}


def _spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = [row["accuracy"] for row in rows]
    return {
        "mean": round(statistics.mean(found), 4), "low": min(found), "high": max(found), "seeds": len(found),
        "before": round(statistics.mean(row["before"] for row in rows), 4),
        "macs_ratio": round(statistics.mean(row["macs_ratio"] for row in rows), 4),
    }  # fmt: skip


def _ahead(point: dict[str, Any]) -> bool:
    """Every seed of our default criterion lies above every seed of the peer's criteria."""
    peers = [value["high"] for name, value in point.items() if not name.startswith("compress")]
    return bool(peers) and "compress taylor" in point and point["compress taylor"]["low"] > max(peers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--model", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--only", nargs="*", default=[], metavar="TOOL:CRITERION")
    options = parser.parse_args()
    runs = [("compress", c) for c in OURS]
    if options.peer_python:
        runs += [(PEER_NAME, c) for c in PEER]
    for seed in range(options.seeds):
        for tool, criterion in runs:
            mine = (options.model, tool, criterion, seed)
            known = known_rows("accuracy")
            if options.only and f"{tool.split()[0]}:{criterion}" not in options.only:
                continue
            if any((r["model"], r["tool"], r["criterion"], r["seed"]) == mine for r in known):
                continue
            fresh = measure(tool, criterion, seed, options)
            RESULTS.mkdir(exist_ok=True)
            with (RESULTS / ".accuracy.lock").open("w") as lock:  # several such scripts may run side by side
                fcntl.flock(lock, fcntl.LOCK_EX)
                rows = known_rows("accuracy") + fresh
                write("accuracy", summary(rows), rows)


if __name__ == "__main__":
    main()
