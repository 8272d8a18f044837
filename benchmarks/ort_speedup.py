"""Half the MACs: how much faster is that in ONNX Runtime on a CPU, in fp32 and int8, and why not twice?

    python benchmarks/ort_speedup.py [MODEL ...] [--batches 1 32] [--threads 1 2] [--repeats 10] [--seconds 2]

Five networks with random weights, cut to 50 % of their MACs in one shot by Taylor scores of one random
minibatch, widths aligned as the target cpu-ort asks; speed does not depend on what the weights are. Original
and pruned take turns (`deploy.latency`). Where the speed-up is under 0.8 of what the MACs promise, both are
profiled and the row says where the time went. Rows that the result file has are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import imagenet_nets
from benchmarks.common import known_rows, note, write
from benchmarks.imagenet_nets import SHAPE

PRECISIONS = ("fp32", "int8")
TARGET = 0.5  # share of the MACs that is to stay
REACHED = 0.8  # share of 1 / macs_ratio below which a row needs an explanation
CALIBRATION_BATCHES = 4
PROFILED_RUNS = 10
REASONS_TOLD = 3
RESULT = "ort_speedup"


def pruned(name: str, align: int) -> tuple[Any, Any, float]:
    """(original, dense, macs_ratio): both as graphs in eval mode."""
    import numpy as np

    from compress.cost import class_counts, cost_model
    from compress.select import Target, remove, space
    from compress.surgery import cut

    net, cmap, scores, _ = imagenet_nets.scored(name)
    where = space(cmap, Target("macs", TARGET), align=align)
    keep = remove(scores, np.ones(cmap.units, dtype=bool), where).keep
    dense, _ = cut(net, cmap, keep)
    ratio = cost_model(cmap).ratio("macs", class_counts(cmap, keep))
    return net, dense.eval(), float(ratio)


@contextlib.contextmanager
def files(name: str, align: int) -> Iterator[tuple[dict[str, dict[str, Path]], float]]:
    """ONNX files by precision: {"original": path, "pruned": path}; and macs_ratio."""
    import torch

    from deploy.parity import normal_inputs
    from deploy.precision import convert
    from deploy.to_onnx import export

    original, dense, ratio = pruned(name, align)
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, dict[str, Path]] = {precision: {} for precision in PRECISIONS}
        for which, net in (("original", original), ("pruned", dense)):
            exported = Path(folder, f"{which}.onnx")
            export(net, torch.randn(2, *SHAPE), exported)
            for precision in PRECISIONS:
                out = Path(folder, f"{which}-{precision}.onnx")
                batches = (normal_inputs([SHAPE], 4, seed) for seed in range(CALIBRATION_BATCHES))
                convert(exported, out, precision, calibration=batches, runner="onnxruntime")
                made[precision][which] = out
        yield made, ratio


def row(paths: dict[str, Path], batch: int, threads: int, repeats: int, seconds: float) -> dict[str, Any]:
    """Both latencies and the paired speed-up with its interval."""
    from deploy.latency import measure
    from deploy.runners import open_runner

    runners = {which: open_runner("onnxruntime", path, threads) for which, path in paths.items()}
    found = measure(runners, [SHAPE], batch, repeats, seconds)
    for runner in runners.values():
        runner.close()
    (speed,) = found.speedup
    return {
        "original_ms": found.latency[0].median,
        "pruned_ms": found.latency[1].median,
        "speedup": speed.ratio,
        "interval": [speed.low, speed.high],
        "verdict": speed.verdict,
        "pairs": speed.pairs,
        "warnings": sorted({text for latency in found.latency for text in latency.warnings}),
    }


def why(paths: dict[str, Path], batch: int, threads: int, align: int, ratio: float) -> str:
    """Where the time went that the MACs promised to save: reasons by time, each with its worst layer."""
    from deploy import parity, profile, profilers

    inputs = parity.normal_inputs([SHAPE], batch, 0)
    profiles = profilers.profile_onnx(paths, inputs, runs=PROFILED_RUNS, threads=threads)
    before, after = profiles["original"], profiles["pruned"]
    rows = profile.compare(before, after, align=align)
    lost: dict[str, float] = {"outside the layers": after.outside_ms - ratio * before.outside_ms}
    worst: dict[str, tuple[float, str]] = {}
    for change in rows:
        missed = (change.after_ms or 0.0) - ratio * (change.before_ms or 0.0)
        reason = change.reason or "pruned less than the rest"
        lost[reason] = lost.get(reason, 0.0) + missed
        told = f"{change.layer}: {change.why}" if change.why and change.why != reason else change.layer
        worst[reason] = max(worst.get(reason, (0.0, "")), (missed, told))
    return told_by_time(lost, worst, after.run_ms - ratio * before.run_ms)


def told_by_time(lost: dict[str, float], worst: dict[str, tuple[float, str]], total: float) -> str:
    """The reasons that hold the most lost time (ms), as one sentence; "" where none was lost."""
    if total <= 0:
        return ""
    leading = sorted((item for item in lost.items() if item[1] > 0), key=lambda item: -item[1])
    parts = []
    for reason, spent in leading[:REASONS_TOLD]:
        example = worst.get(reason, (0.0, ""))[1]
        parts.append(f"{reason} {spent:.2f} ms" + (f" (most in {example})" if example else ""))
    return f"{total:.2f} ms more than the MACs promise: " + "; ".join(parts)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    short = [r for r in rows if not reached(r)]
    return {
        "rows": len(rows),
        "at_least_0_8_of_macs": len(rows) - len(short),
        "explained": sum(bool(r["why"]) for r in short),
    }


def reached(found: dict[str, Any]) -> bool:
    return bool(found["speedup"] * found["macs_ratio"] >= REACHED)


def identity(found: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(found[key] for key in ("model", "precision", "batch", "threads"))


def run(args: argparse.Namespace, align: int) -> None:
    rows = known_rows(RESULT)
    have = {identity(found) for found in rows}
    for name in args.models:
        asked = [(p, b, t) for b in args.batches for t in args.threads for p in PRECISIONS]
        open_ones = [case for case in asked if (name, *case) not in have]
        if not open_ones:
            continue
        note(f"{name}: prune, export, quantise")
        with files(name, align) as (made, ratio):
            for precision, batch, threads in open_ones:
                found = {"model": name, "precision": precision, "batch": batch, "threads": threads}
                found |= {"macs_ratio": ratio, "align": align}
                found |= row(made[precision], batch, threads, args.repeats, args.seconds)
                short = not reached(found)
                found["why"] = why(made[precision], batch, threads, align, ratio) if short else ""
                rows.append(found)
                write(RESULT, summary(rows), rows)
                low, high = found["interval"]
                note(f"{identity(found)} {found['speedup']:.2f} [{low:.2f}, {high:.2f}] {found['why']}")


def main() -> None:
    import torch

    from deploy.targets import load, resolve_align

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", default=list(imagenet_nets.MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    torch.set_num_threads(1)
    run(parser.parse_args(), resolve_align(load("cpu-ort")))


if __name__ == "__main__":
    main()
