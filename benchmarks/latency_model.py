"""How well is the latency of a pruned network known before it exists? ONNX Runtime on a CPU, one thread.

    python benchmarks/latency_model.py [MODEL ...] [--prunings 30] [--batch 1]

A latency model is fitted to the unpruned network and eight of other widths, as `compress` does it. Then
random prunings (each class of units at a random width of those the target runs well, around a random share)
are predicted, built and measured in turns with the unpruned one. The error is that of the ratio of latencies.
Rows that the result file has are not measured again. Goal: median at most 5 %, worst at most 15 %.
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

import numpy as np

from benchmarks import imagenet_nets
from benchmarks.common import known_rows, note, write

RESULT = "latency_model"
MODELS = ("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0")
LEAST_SHARE = 0.25


def meter_of(name: str, batch: int, folder: Path) -> Any:
    """A meter of the network on the target cpu-ort."""
    from compress.aim import Place
    from compress.meter import Meter
    from compress.select import levels_of
    from deploy import targets

    target = targets.load("cpu-ort")
    align = targets.resolve_align(target)
    net, cmap, _, example = imagenet_nets.scored(name)
    levels = levels_of(cmap, align, 0.1)
    place = Place(target, target.precision, target.threads, batch)
    return Meter(net, cmap, levels, example, place, folder / "latency.json", block=align)


def random_widths(levels: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A width of every class, scattered around a share that is drawn for the whole network."""
    share = rng.uniform(LEAST_SHARE, 1)
    shares = np.clip(share + rng.uniform(-0.3, 0.3, len(levels)), 0, 1)
    return np.array([own[np.abs(own - s * own[-1]).argmin()] for own, s in zip(levels, shares, strict=True)])


def measure(name: str, prunings: int, batch: int) -> list[dict[str, Any]]:
    """One row per pruning."""
    from compress.meter import first_units

    with tempfile.TemporaryDirectory() as folder:
        meter = meter_of(name, batch, Path(folder))
        began = time.monotonic()
        model = meter.calibrated()
        seconds = time.monotonic() - began
        note(f"{name}: {seconds:.0f} s to fit, leave-one-out error {model.error:.1%}")
        rng, rows = np.random.default_rng(1), []
        for number in range(prunings):
            counts = random_widths(meter.levels, rng)
            measured = meter.ratio(first_units(meter.cmap, counts))
            predicted = model.ms(counts) / model.original_ms
            rows.append(
                {
                    "model": name, "batch": batch, "number": number, "original_ms": model.original_ms,
                    "predicted": predicted, "measured": measured, "error": predicted / measured - 1,
                    "fit_seconds": seconds, "leave_one_out": model.error,
                }
            )  # fmt: skip
            note(f"{name} {number}: {measured:.3f} measured, {predicted / measured - 1:+.1%}")
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Errors over all rows, and by model."""

    def errors(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sizes = [abs(row["error"]) for row in found]
        return {
            "median_error": round(float(np.median(sizes)), 4),
            "worst_error": round(max(sizes), 4),
            "prunings": len(sizes),
        }

    models = dict.fromkeys((row["model"], row["batch"]) for row in rows)
    own = {
        f"{name} batch {batch}": errors([r for r in rows if (r["model"], r["batch"]) == (name, batch)])
        for name, batch in models
    }
    return errors(rows) | {"models": own}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--prunings", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = known_rows(RESULT)
    for name in options.models:
        if (name, options.batch) in {(row["model"], row["batch"]) for row in rows}:
            continue
        rows += measure(name, options.prunings, options.batch)
        write(RESULT, summary(rows), rows)


if __name__ == "__main__":
    main()
