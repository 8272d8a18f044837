"""Asked for a share of the latency, is it reached? ONNX Runtime on a CPU, one thread.

    python benchmarks/latency_budget.py [MODEL ...] [--asked 0.75 0.5 0.35] [--batch 1]

Widths are chosen as a run chooses them, in steps of 2 % and with the last network measured before it is
taken, by Taylor scores of one random minibatch and without training, on which latency does not depend. The
network is then exported and measured anew, in longer turns with the unpruned one; that is what counts. Goal:
within 3 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import imagenet_nets
from benchmarks.common import known_rows, note, write
from benchmarks.latency_model import MODELS
from deploy.quiet import Quiet

RESULT = "latency_budget"


def measure(name: str, asked: Sequence[float], batch: int) -> list[dict[str, Any]]:
    """One row per share of the latency."""
    from compress import aim
    from compress.budgeting import budgeted, chosen
    from compress.config import BenchConfig, BudgetConfig, Config, GatesConfig, PruneConfig
    from compress.cost import class_counts
    from compress.surgery import cut

    net, cmap, scores, example = imagenet_nets.scored(name)
    rows, quiet = [], Quiet("original")
    with tempfile.TemporaryDirectory() as folder:
        for share in asked:
            budget = BudgetConfig(latency_ratio=share, batch=batch, table="latency.json")
            config = Config.model_construct(
                version=1, model={}, data={}, prune=PruneConfig(), budget=budget,
                bench=BenchConfig(batches=[batch]), gates=GatesConfig(),
            )  # fmt: skip
            began = time.monotonic()
            found = budgeted(aim.aimed(config), net, cmap, example, run=Path(folder), folder=Path(folder))
            fitted = time.monotonic() - began
            keep, _, looks = chosen(found, scores)
            seconds = time.monotonic() - began - fitted
            assert found.meter is not None
            known = found.meter.table
            quiet.fastest_ms = min(entry.original_ms for entry in (*known.entries, *known.looks))
            counts = class_counts(cmap, keep)
            latency = again(net, cut(net, cmap, keep)[0].eval(), example, batch, Path(folder), quiet)
            rows.append(
                {
                    "model": name, "batch": batch, "asked": share, **latency,
                    "reached": latency["ratio"] / share,
                    "macs_ratio": found.where.cost.ratio("macs", counts),
                    "importance": float(scores[keep].sum() / scores.sum()),
                    "looks": [[look.predicted, look.measured] for look in looks],
                    "fit_seconds": fitted, "choose_seconds": seconds,
                }
            )  # fmt: skip
            note(f"{name} asked {share}: {latency['ratio']:.3f}, {len(looks)} looks, {seconds:.0f} s")
    return rows


def again(
    original: Any, dense: Any, example: Any, batch: int, folder: Path, quiet: Quiet
) -> dict[str, float]:
    """Both exported anew and timed in turns: medians in ms, and their ratio with its interval."""
    from deploy.latency import measure as timed
    from deploy.runners import open_runner
    from deploy.to_onnx import export

    runners, found = {}, []
    for which, net in (("original", original), ("dense", dense)):
        export(net, example[0], folder / f"{which}.onnx")
        runners[which] = open_runner("onnxruntime", folder / f"{which}.onnx", 1)

    def quick() -> dict[str, float]:
        one = timed(runners, [list(example[0].shape[1:])], batch, 15, 3.0, seed=1)
        found.append((one.quick_ms, one))
        return found[-1][0]

    taken = quiet(quick)
    for runner in runners.values():
        runner.close()
    best = next(one for ms, one in found if ms is taken)
    (speed,) = best.speedup
    return {
        "original_ms": best.latency[0].median,
        "dense_ms": best.latency[1].median,
        "ratio": taken["dense"] / taken["original"],
        "ratio_of_medians": 1 / speed.ratio,
        "low": 1 / speed.high,
        "high": 1 / speed.low,
        "tries": len(found),
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many were asked for, and how many reached."""
    from compress.budget import WITHIN

    reached = [row for row in rows if abs(row["reached"] - 1) <= WITHIN]
    worst = max((abs(row["reached"] - 1) for row in rows), default=0.0)
    return {
        "asked": len(rows),
        "reached_within_3_percent": len(reached),
        "worst": round(worst, 4),
        "most_looks": max((len(row["looks"]) for row in rows), default=0),
    }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--asked", nargs="+", type=float, default=[0.75, 0.5, 0.35])
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = known_rows(RESULT)
    for name in options.models:
        known = {row["asked"] for row in rows if (row["model"], row["batch"]) == (name, options.batch)}
        if open_ones := [share for share in options.asked if share not in known]:
            rows += measure(name, open_ones, options.batch)
            write(RESULT, summary(rows), rows)


if __name__ == "__main__":
    main()
