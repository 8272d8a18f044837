"""Where the time of both models goes, layer by layer, on the target's runner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress import aim
from compress.steps import Work, finite
from deploy import profile as profiles
from deploy.runners import ENGINE_KINDS

RUNS = 20


def profile(work: Work, document: Mapping[str, Any], artifacts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The comparison of both models at the gated batch size; None where the target's runner has no profiler.

    artifacts: for "original" and "dense", in this order, (ONNX file, open runner); the runner is for engines.
    """
    from deploy import parity, profilers

    kind, bench = aim.target(work.config).runner, work.config.bench
    if kind not in ("onnxruntime", *ENGINE_KINDS):
        return None
    batch = work.config.gates.batch or max(bench.batches or [1])
    inputs = parity.normal_inputs(work.shapes, batch, work.config.seed)
    pruned = work.read("prune.json")
    layers, align = pruned["layers"], pruned["align"]
    before, after = (
        {row["name"]: batch * row[f"macs_{when}"] for row in layers} for when in ("before", "after")
    )
    medians = {
        row["model"]: row["median"]
        for row in document["latency"]
        if (row["runner"], row["batch"]) == (kind, batch)
    }
    measured = medians.get("original"), medians.get("dense")
    if kind == "onnxruntime":
        (original, _), (dense, _) = artifacts["original"], artifacts["dense"]
        whole = profilers.compare_onnx(
            original, dense, inputs, align=align, threads=bench.threads or 1,
            macs=(before, after), measured_ms=measured,
        )  # fmt: skip
    else:
        old, new = (
            profilers.profile_engine(runner, file, inputs, runs=RUNS) for file, runner in artifacts.values()
        )
        rows = profiles.compare(old, new, align=align, macs_before=before, macs_after=after)
        whole = profiles.document(old, new, rows, measured_ms=measured)
    return {"runner": kind, "batch": batch, **whole, "rows": [finite(row) for row in whole["rows"]]}
