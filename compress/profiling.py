"""Where the time of both models goes, layer by layer, on the target's runner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress import aim
from compress.steps import Work, finite
from deploy.runners import ENGINE_KINDS

RUNS = 20


def profile(work: Work, document: Mapping[str, Any], artifacts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The comparison of both models at the gated batch size; None where the target's runner has no profiler.

    artifacts: for "original" and "dense" the ONNX file, and for engines the open runner, as (file, runner).
    """
    from deploy import parity
    from deploy import profile as profiles

    kind, bench = aim.target(work.config).runner, work.config.bench
    batch = work.config.gates.batch or max(bench.batches or [1])
    inputs = parity.normal_inputs(work.shapes, batch, work.config.seed)
    if kind == "onnxruntime":
        found = _onnx(artifacts, inputs, bench.threads or 1)
    elif kind in ENGINE_KINDS:
        found = {name: _engine(path, runner, inputs) for name, (path, runner) in artifacts.items()}
    else:
        return None
    layers = work.read("prune.json")["layers"]
    macs = [{row["name"]: batch * row[f"macs_{when}"] for row in layers} for when in ("before", "after")]
    before, after = found["original"], found["dense"]
    rows = profiles.compare(before, after, align=work.align, macs_before=macs[0], macs_after=macs[1])
    medians = {
        row["model"]: row["median"]
        for row in document["latency"]
        if (row["runner"], row["batch"]) == (kind, batch)
    }
    measured = medians.get("original"), medians.get("dense")
    whole = profiles.document(before, after, rows, measured_ms=measured)
    return {"runner": kind, "batch": batch, **whole, "rows": [finite(row) for row in whole["rows"]]}


def _onnx(artifacts: Mapping[str, Any], inputs: Any, threads: int) -> Mapping[str, Any]:
    from deploy import profilers

    paths = {name: path for name, (path, _) in artifacts.items()}
    return profilers.profile_onnx(paths, inputs, runs=RUNS, threads=threads)


def _engine(path: Any, runner: Any, inputs: Any) -> Any:
    import onnx

    from deploy import profilers

    runner.prepare(inputs)
    runs, whole = runner.layer_times(profilers.WARM_UP_RUNS + RUNS)
    graph = onnx.load(path, load_external_data=False).graph
    return profilers.read_tensorrt(runs, whole, runner.layers(), graph)
