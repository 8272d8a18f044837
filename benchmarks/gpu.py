"""Original against pruned on the NVIDIA GPU at hand: every runner, precision and batch that 7 minutes allow.

    python benchmarks/gpu.py [--out FILE] [--budget SECONDS] [--dry-run]

One call, one JSON (benchmarks/results/gpu.json). To repeat it on any GPU: Python 3.11 or newer, an NVIDIA
driver, `pip install -e '.[gpu,timm,tensorrt-rtx]'` with a CUDA build of torch; `onnxruntime-gpu` in place of
`onnxruntime` for ONNX Runtime's rows, the extra `pycuda` for the row that compares buffers. What is not
installed, or does not take this GPU, becomes a row that says why. Without a GPU the file says so; `--dry-run`
goes through everything on the CPU with tiny settings and calls nothing measured.

Networks have random weights and calibrated norms: latency does not depend on weights. They are cut to half
the MACs in multiples of 8 channels, the units chosen at random. Outputs are compared with PyTorch's in
strict fp32 on the same GPU before anything is timed; what differs by more than TOLERANCES is not timed.

Rows come in a fixed order (`cells`): batches 1 and 64 of every runner but torch.compile, then batches 8 and
256, then several streams and buffers, then torch.compile. When the budget is used up the rest of that order
is left out, and each row left out says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, note, provenance

if TYPE_CHECKING:
    from torch import nn

    from deploy.latency import Latency
    from deploy.runners import Array, Runner

MACS = 0.5
ALIGN = 8
ENGINE = "tensorrt_rtx"
TOLERANCES = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 5e-2}  # relative to the largest output
STREAMS = (1, 2, 4)


@dataclass(frozen=True)
class Settings:
    """What to measure; `seconds` per runner and row, `size` of the square inputs."""

    models: tuple[str, ...] = ("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "vit_tiny")
    runners: tuple[str, ...] = ("torch_cuda_graph", "torch_cuda", ENGINE, "onnxruntime_cuda")
    late_runners: tuple[str, ...] = ("torch_cuda_compile",)
    precisions: tuple[str, ...] = ("fp32", "tf32", "fp16")
    batches: tuple[int, ...] = (1, 64)
    late_batches: tuple[int, ...] = (8, 256)
    several: tuple[tuple[str, str], ...] = (
        ("resnet50", "torch_cuda_graph"),
        ("resnet18", "torch_cuda_graph"),
    )
    buffers: tuple[tuple[str, int], ...] = (("resnet18", 1), ("resnet18", 64))
    size: int = 224
    repeats: int = 6
    seconds: float = 0.25
    reference: str = "torch_cuda"
    dry: bool = False


DRY = Settings(
    models=("resnet18",),
    runners=("torch", "onnxruntime"),
    late_runners=(),
    precisions=("fp32",),
    batches=(1,),
    late_batches=(2,),
    several=(),
    buffers=(("resnet18", 1),),
    size=32,
    repeats=5,
    seconds=0.02,
    reference="torch",
    dry=True,
)


@dataclass(frozen=True)
class Cell:
    """One row to be measured; `kind` is latency, streams or buffers."""

    kind: str
    model: str
    runner: str
    precision: str
    batch: int


def cells(settings: Settings) -> list[Cell]:
    """Every row in the order of importance: what does not fit into the budget is left out from the end."""
    found: list[Cell] = []

    def add(runners: Sequence[str], batches: Sequence[int]) -> None:
        for batch in batches:
            for runner in runners:
                for precision in settings.precisions:
                    found.extend(Cell("latency", m, runner, precision, batch) for m in settings.models)

    add(settings.runners, settings.batches)
    add(settings.runners, settings.late_batches)
    low = settings.precisions[-1]
    found += [Cell("streams", model, runner, low, 8) for model, runner in settings.several]
    found += [Cell("buffers", model, ENGINE, low, batch) for model, batch in settings.buffers]
    add(settings.late_runners, (*settings.batches, *settings.late_batches))
    return found


class Pair:
    """The original and the pruned form of one model, and what was exported and built of them so far."""

    def __init__(self, name: str, settings: Settings, folder: Path) -> None:
        self.shape = (3, settings.size, settings.size)
        self._folder, self._name = folder / name, name
        self._folder.mkdir()
        self.nets, self.macs_ratio = halved(name, settings.size)

    def artifact(self, which: str, runner: str, precision: str) -> Any:
        """What `runner` takes: the net, an ONNX file, or an engine; made when first asked for."""
        if runner.startswith("torch"):
            return self.nets[which]
        stored = precision if precision == "fp16" else "fp32"  # TF32 is a way to run an fp32 file
        onnx = self._onnx(which, stored)
        return self._engine(onnx, precision) if runner == ENGINE else onnx

    def _onnx(self, which: str, precision: str) -> Path:
        import torch

        path = self._folder / f"{which}-{precision}.onnx"
        if path.exists():
            return path
        if precision == "fp32":
            from deploy.to_onnx import export

            return export(self.nets[which], torch.zeros(2, *self.shape), path).path
        from deploy.precision import convert

        convert(self._onnx(which, "fp32"), path, precision)
        return path

    def _engine(self, onnx: Path, precision: str) -> Path:
        from deploy.to_tensorrt import EngineOptions, build

        path = onnx.with_name(f"{onnx.stem}-{precision}.engine")
        if not path.exists():
            options = EngineOptions(batches=(1, 64, 256), tf32=precision == "tf32")
            build(onnx, path, ENGINE, options)
        return path


def halved(name: str, size: int) -> tuple[dict[str, nn.Module], float]:
    """A model of random weights as two graphs, "original" and "dense" with half of its MACs; the ratio."""
    import numpy as np
    import torch

    from benchmarks.zoo_models import calibrate
    from compress.channelmap import channel_map
    from compress.cost import class_counts, cost_model
    from compress.select import Target, remove, space
    from compress.surgery import cut
    from compress.trace import trace

    torch.manual_seed(0)
    model, example = built(name, size), torch.randn(8, 3, size, size)
    calibrate(model, (example,))
    traced = trace(model.eval(), (example[:2],))
    cmap = channel_map(traced)
    scores = np.random.default_rng(0).random(cmap.units)
    keep = remove(scores, np.ones(cmap.units, bool), space(cmap, Target("macs", MACS), align=ALIGN)).keep
    dense, _ = cut(traced.net, cmap, keep)
    ratio = cost_model(cmap).ratio("macs", class_counts(cmap, keep))
    return {"original": traced.net.eval(), "dense": dense.eval()}, float(ratio)


def built(name: str, size: int) -> nn.Module:
    import torchvision

    if name == "vit_tiny":
        import timm

        net: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=size)
        return net
    made: nn.Module = torchvision.models.get_model(name)
    return made


def inputs_of(pair: Pair, batch: int) -> tuple[Array, ...]:
    from deploy.parity import normal_inputs

    return normal_inputs([pair.shape], batch, 0)


def latency_row(pair: Pair, cell: Cell, settings: Settings) -> dict[str, Any]:
    """Parity of both models, then their latency in pairs."""
    from deploy.latency import measure
    from deploy.runners import open_runner

    opened: dict[str, Runner] = {}
    try:
        for which in ("original", "dense"):
            artifact = pair.artifact(which, cell.runner, cell.precision)
            given = "fp32" if cell.precision == "fp16" and isinstance(artifact, Path) else cell.precision
            # An engine has TF32 built in.
            given = "fp32" if cell.runner == ENGINE else given
            opened[which] = open_runner(cell.runner, artifact, precision=given)
        errors = {which: parity(pair, which, one, cell, settings) for which, one in opened.items()}
        if wrong := [which for which, found in errors.items() if not found["passed"]]:
            return {"parity": errors, "why": f"not timed: {' and '.join(wrong)} differs from PyTorch"}
        found = measure(opened, [pair.shape], cell.batch, settings.repeats, settings.seconds)
    finally:
        for one in reversed(list(opened.values())):
            one.close()
    rows = {one.model: thinned(one) for one in found.latency}
    return {"parity": errors, "latency": rows, "speedup": asdict(found.speedup[0])}


def thinned(found: Latency) -> dict[str, Any]:
    """A latency with the number of its samples in place of the samples."""
    row = found.as_dict()
    return row | {"samples_ms": len(row["samples_ms"])}


def parity(pair: Pair, which: str, one: Runner, cell: Cell, settings: Settings) -> dict[str, Any]:
    """Against PyTorch in strict fp32, at this row's batch."""
    from deploy.parity import compare
    from deploy.runners import open_runner

    reference = open_runner(settings.reference, pair.nets[which])
    try:
        (found,) = compare(reference.infer, one.infer, [pair.shape], [cell.batch], TOLERANCES[cell.precision])
    finally:
        reference.close()
    return {"relative": finite(found.relative), "passed": found.passed, "reason": found.reason}


def finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def streams_row(pair: Pair, cell: Cell, settings: Settings) -> dict[str, Any]:
    """Throughput of the pruned model with one, two and four streams; copies included."""
    from deploy.gpu_latency import throughput
    from deploy.runners import StagedRunner, open_runner

    found = []
    for streams in STREAMS:
        artifact = pair.artifact("dense", cell.runner, cell.precision)
        opened = [open_runner(cell.runner, artifact, precision=cell.precision) for _ in range(streams)]
        try:
            for one in opened:
                one.prepare(inputs_of(pair, cell.batch))
            staged = [one for one in opened if isinstance(one, StagedRunner)]
            found.append(asdict(throughput(staged, cell.batch, 2 * settings.seconds)))
        finally:
            for one in reversed(opened):
                one.close()
    return {"throughput": found}


def buffers_row(pair: Pair, cell: Cell, settings: Settings) -> dict[str, Any]:
    """One engine with torch's memory and stream against the same with pycuda's."""
    from deploy.latency import measure
    from deploy.tensorrt_runner import BUFFERS, open_tensorrt

    path = pair.artifact("dense", ENGINE, cell.precision)
    opened = {name: open_tensorrt(path, ENGINE, buffers=name) for name in BUFFERS}
    try:
        found = measure(opened, [pair.shape], cell.batch, settings.repeats, settings.seconds)
    finally:
        for one in reversed(list(opened.values())):
            one.close()
    rows = {one.model: thinned(one) for one in found.latency}
    return {"latency": rows, "speedup": asdict(found.speedup[0])}


MEASURES: dict[str, Callable[[Pair, Cell, Settings], dict[str, Any]]] = {
    "latency": latency_row,
    "streams": streams_row,
    "buffers": buffers_row,
}


def run(
    settings: Settings,
    budget_s: float,
    measure_cell: Callable[[Cell], dict[str, Any]],
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """A row per cell: measured, failed (`why`), or left out when the budget was used up (`left_out`).

    The quickest row of a runner so far (of any, for a new one) tells what the next will take: one that would
    not end in time is not begun.
    """
    begin = clock()
    quickest: dict[str, float] = {}
    rows = []
    for cell in cells(settings):
        row: dict[str, Any] = asdict(cell)
        expected = quickest.get(cell.runner, min(quickest.values(), default=0.0))
        if (started := clock()) - begin + expected > budget_s:
            rows.append(row | {"left_out": f"the budget of {budget_s:.0f} s was used up"})
            continue
        try:
            row |= measure_cell(cell)
        except Exception as error:  # one runner that fails must not cost the others
            row["why"] = explain(error)
        row["seconds"] = round(clock() - started, 3)
        if "why" not in row:
            quickest[cell.runner] = min(quickest.get(cell.runner, row["seconds"]), row["seconds"])
        rows.append(row)
    return rows


def explain(error: Exception) -> str:
    """The error on one line, its class in front where it is not one of ours."""
    from deploy.errors import DeployError, one_line

    text = one_line(str(error))[:400]
    return text if isinstance(error, DeployError) else f"{type(error).__name__}: {text}"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many rows were measured, and the median speed-up by runner and precision."""
    from statistics import median

    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "latency" and "speedup" in row:
            ratios.setdefault(f"{row['runner']} {row['precision']}", []).append(row["speedup"]["ratio"])
    counts = {
        "rows": len(rows),
        "measured": sum("speedup" in row or "throughput" in row for row in rows),
        "failed": sum("why" in row for row in rows),
        "left_out": sum("left_out" in row for row in rows),
    }
    return counts | {"median_speedup": {name: median(found) for name, found in ratios.items()}}


def why_not() -> str:
    """Why there is nothing to measure here, "" where a GPU is at hand."""
    from deploy.availability import available

    found = {one.name: one for one in available()}["torch_cuda"]
    return "" if found.usable else f"no NVIDIA GPU at hand: {found.detail}; {found.fix}"


def measure_all(settings: Settings, budget_s: float) -> list[dict[str, Any]]:
    """All rows; nets are made when their first row comes, files live as long as this call."""
    with tempfile.TemporaryDirectory() as folder:
        pairs: dict[str, Pair] = {}

        def measure_cell(cell: Cell) -> dict[str, Any]:
            if cell.model not in pairs:
                pairs[cell.model] = Pair(cell.model, settings, Path(folder))
            found = MEASURES[cell.kind](pairs[cell.model], cell, settings)
            note(f"{cell.model} {cell.runner} {cell.precision} batch {cell.batch} {found.get('why', 'done')}")
            return {"macs_ratio": pairs[cell.model].macs_ratio, **found}

        return run(settings, budget_s, measure_cell)


def write(out: Path, why: str, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    document = {"measured": not why, **({"why": why} if why else {}), "provenance": provenance()}
    document |= more | {"summary": summary(rows), "rows": list(rows)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    note(json.dumps(document["summary"], indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds; what does not fit is left out")
    parser.add_argument("--dry-run", action="store_true", help="tiny settings on the CPU; measures nothing")
    given = parser.parse_args(arguments)
    settings = DRY if given.dry_run else Settings()
    why = "dry run on the CPU" if settings.dry else why_not()
    if why and not settings.dry:
        write(given.out, why, [])
        return
    rows = measure_all(settings, given.budget - (time.perf_counter() - begin))
    write(given.out, why, rows, settings=asdict(settings), budget_s=given.budget)


if __name__ == "__main__":
    main()
