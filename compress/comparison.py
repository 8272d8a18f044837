"""Any two artifacts side by side: parity, size and paired latency."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress import files, graphfile
from compress.errors import ConfigError, IntegrityError
from compress.program import load_program
from compress.steps import Events, finite
from compress.trace import from_program, placeholders


def compare(
    a: Path,
    b: Path,
    *,
    batches: Sequence[int] = (1, 8),
    repeats: int = 10,
    seconds: float = 1.0,
    tolerance: float = 1e-4,
    threads: int = 1,
    events: Events,
) -> dict[str, Any]:
    """Compare two of: an ONNX, .pt2 or .graph.json file, an engine, a run folder (its dense ONNX file).

    passed: every batch size agrees within `tolerance`. Raises ConfigError when an artifact is missing
    or the two take inputs of different shapes, ArtifactError (exit 8) for an engine that this tool did not
    build, RunnerError (exit 6) for one that does not run here.
    """
    from deploy import latency, parity, runners

    first, second = _artifact(a), _artifact(b)
    if first["shapes"] != second["shapes"]:
        raise ConfigError(
            f"{a} takes inputs {first['shapes']}, {b} takes {second['shapes']}", fix="compare like with like"
        )
    shapes = first["shapes"]
    rows: list[Any] = []
    ratios: list[Any] = []
    with ExitStack() as opened:
        ours = runners.open_runner(first["runner"], first.pop("artifact"), threads)
        opened.callback(ours.close)  # in reverse order: they restore the thread count
        theirs = runners.open_runner(second["runner"], second.pop("artifact"), threads)
        opened.callback(theirs.close)
        if ours.timed != theirs.timed:
            events.note(f"the times span different things: {ours.timed} in a, {theirs.timed} in b")
        same = parity.compare(ours.infer, theirs.infer, shapes, batches, tolerance, 0)
        for number, batch in enumerate(batches):

            def show(done: int, of: int, number: int = number, batch: int = batch) -> None:
                events.progress("compare", number + done / of, len(batches), f"batch {batch}")

            found = latency.measure({"a": ours, "b": theirs}, shapes, batch, repeats, seconds, progress=show)
            rows += [finite(row.as_dict()) for row in found.latency]
            ratios += [finite(asdict(ratio)) for ratio in found.speedup]
    return {
        "a": first,
        "b": second,
        "parity": [finite(asdict(row)) for row in same],
        "size": {
            "a": first["bytes"],
            "b": second["bytes"],
            "ratio": second["bytes"] / max(first["bytes"], 1),
        },
        "latency": rows,
        "speedup": ratios,
        "passed": all(row.passed for row in same),
    }


def _artifact(path: Path) -> dict[str, Any]:
    """What to run, with which runner, its input shapes without batch, and its size in bytes."""
    if path.is_dir():
        path = path / "dense.onnx"
    if not path.is_file():
        raise ConfigError(
            "no such file", str(path), "give an ONNX, .pt2, .graph.json or .engine file, or a run's folder"
        )
    facts: dict[str, Any] = {"path": str(path), "sha256": files.sha256(path), "bytes": path.stat().st_size}
    if path.name.endswith(".graph.json"):
        stem = path.with_name(path.name.removesuffix(".graph.json"))
        net, shapes = graphfile.load(stem)
        facts["bytes"] += stem.with_name(stem.name + ".safetensors").stat().st_size
        return {**facts, "runner": "torch", "shapes": shapes, "artifact": net}
    if path.suffix == ".pt2":
        program = load_program(path)
        net = from_program(program, ()).net
        shapes = [list(shape[1:]) for shape in _program_shapes(program, len(placeholders(net)))]
        return {**facts, "runner": "torch", "shapes": shapes, "artifact": net}
    if path.suffix == ".onnx":
        return {**facts, "runner": "onnxruntime", "shapes": _onnx_shapes(path), "artifact": path}
    if path.suffix == ".engine":
        return {**facts, **_engine_facts(path), "artifact": path}
    raise ConfigError(
        f"cannot compare a {path.suffix or 'file without ending'}",
        str(path),
        "give .onnx, .pt2, .graph.json or .engine",
    )


def _engine_facts(path: Path) -> dict[str, Any]:
    """Library and inputs by the sidecar; the runner checks the engine against it before it loads it."""
    from deploy.engines import read_sidecar, sidecar_path

    sidecar = read_sidecar(path)
    try:
        shapes = [list(port["shape"][1:]) for port in sidecar["inputs"]]
        return {"runner": str(sidecar["library"]), "shapes": shapes}
    except (KeyError, TypeError) as error:
        what = f"does not say what the engine takes: {error!r}"
        raise IntegrityError(what, str(sidecar_path(path)), "build the engine again") from error


def _program_shapes(program: torch.export.ExportedProgram, count: int) -> list[list[Any]]:
    users = list(program.graph_signature.user_inputs)[:count]
    nodes = {node.name: node for node in program.graph.nodes}
    return [list(nodes[str(name)].meta["val"].shape) for name in users]


def _onnx_shapes(path: Path) -> list[list[int]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [[int(size) for size in port.shape[1:]] for port in session.get_inputs()]
