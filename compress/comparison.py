"""Any two artifacts side by side: parity, size and paired latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress import files, graphfile
from compress.errors import ConfigError
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
    """Compare two of: an ONNX file, a .pt2 file, a .graph.json, a run folder (its dense ONNX file).

    passed: every batch size agrees within `tolerance`. Raises ConfigError when an artifact is missing
    or the two take inputs of different shapes.
    """
    from deploy import latency, parity, runners

    first, second = _artifact(a), _artifact(b)
    if first["shapes"] != second["shapes"]:
        raise ConfigError(
            f"{a} takes inputs {first['shapes']}, {b} takes {second['shapes']}", fix="compare like with like"
        )
    shapes = first["shapes"]
    ours = runners.open_runner(first["runner"], first.pop("artifact"), threads)
    theirs = runners.open_runner(second["runner"], second.pop("artifact"), threads)
    same = parity.compare(ours.infer, theirs.infer, shapes, batches, tolerance, 0)
    rows: list[Any] = []
    ratios: list[Any] = []
    for number, batch in enumerate(batches):

        def show(done: int, of: int, number: int = number, batch: int = batch) -> None:
            events.progress("compare", number + done / of, len(batches), f"batch {batch}")

        found = latency.measure({"a": ours, "b": theirs}, shapes, batch, repeats, seconds, progress=show)
        rows += [finite(row.as_dict()) for row in found.latency]
        ratios += [finite(asdict(ratio)) for ratio in found.speedup]
    theirs.close()
    ours.close()
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
            "no such file", str(path), "give an ONNX, .pt2 or .graph.json file, or a run's folder"
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
    raise ConfigError(
        f"cannot compare a {path.suffix or 'file without ending'}",
        str(path),
        "give .onnx, .pt2 or .graph.json",
    )


def _program_shapes(program: torch.export.ExportedProgram, count: int) -> list[list[Any]]:
    users = list(program.graph_signature.user_inputs)[:count]
    nodes = {node.name: node for node in program.graph.nodes}
    return [list(nodes[str(name)].meta["val"].shape) for name in users]


def _onnx_shapes(path: Path) -> list[list[int]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [[int(size) for size in port.shape[1:]] for port in session.get_inputs()]
