"""Engines of TensorRT-RTX from the demo's models and ResNet-18, built without a GPU: bytes and build times.

    python benchmarks/tensorrt_build.py [RUN]

RUN is the folder of a finished `make demo` (demo/run); without it the demo's stages up to the export are run
first, which takes minutes. int8 is calibrated on 256 training images; what a precision costs is measured with
ONNX Runtime on all test images, since an engine cannot run here. ResNet-18 (224 pixels, random weights) shows
sizes where weights outweigh the kernels. Each engine is built five times, in turn.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import note, write

LIBRARY = "tensorrt_rtx"
PRECISIONS = ("fp32", "fp16", "int8")
BATCHES = (1, 8, 32)
REPEATS, CALIBRATION_BATCHES = 5, 8


def demo(folder: Path) -> Path:
    """The demo's run folder, made by the stages that lead to the ONNX files."""
    config = folder / "compress.yaml"
    for words in (["init", str(config), "--template", "mnist"], ["run", str(config), "--until", "export"]):
        subprocess.run([sys.executable, "-m", "compress", "-q", *words], check=True)
    return folder / "run"


def data() -> tuple[list[tuple[Any, ...]], list[tuple[tuple[Any, ...], Any]]]:
    """Batches to calibrate on, and test batches with labels, as the demo's network gets them."""
    from compress.config import loads
    from compress.starters import starter_text
    from compress.task import build_task

    config = loads(starter_text("mnist"))
    task = build_task(config.data, config.model, config.seed, Path())
    assert task.test_batches is not None
    train = zip(range(CALIBRATION_BATCHES), task.train_batches(1, 0), strict=False)
    test = [((images.numpy(),), labels.numpy()) for images, labels in task.test_batches(100)]
    return [(images.numpy(),) for _, (images, _) in train], test


def resnet18(folder: Path) -> Path:
    """ResNet-18 as ONNX, with random weights."""
    import torch
    import torchvision

    from deploy.to_onnx import export

    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    return export(net, torch.randn(2, 3, 224, 224), folder / "resnet18.onnx").path


def convert_all(run: Path, folder: Path) -> list[dict[str, Any]]:
    """One row for each model and precision, and its ONNX file in the folder."""
    import numpy as np

    from deploy.precision import convert

    calibration, test = data()
    noise = [(np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32),)]
    models: list[tuple[Path, list[tuple[Any, ...]], Any]] = [
        (run / "original.onnx", calibration, test),
        (run / "dense.onnx", calibration, test),
        (resnet18(folder), noise, None),
    ]
    rows = []
    for onnx, batches, labelled in models:
        for precision in PRECISIONS:
            made = folder / f"{onnx.stem}.{precision}.onnx"
            converted = convert(onnx, made, precision, calibration=batches)
            row = {"model": onnx.stem, "precision": precision, "onnx_bytes": converted.bytes}
            row |= {"nodes_low": converted.nodes_low, "nodes_kept": converted.nodes_kept}
            rows.append(row | (cost(onnx, made, labelled) if labelled else {}))
    return rows


def cost(onnx: Path, made: Path, labelled: Any) -> dict[str, Any]:
    """What the precision costs on test images, in ONNX Runtime on the CPU."""
    from deploy.precision import evaluate
    from deploy.runners import open_runner

    found = evaluate(open_runner("onnxruntime", onnx), open_runner("onnxruntime", made), labelled)
    return {"test_images": found.images, "relative_error": found.relative, "top1_lost": found.drop}


def build_in_turn(rows: list[dict[str, Any]], folder: Path) -> None:
    """Add sizes and times to the rows."""
    from deploy.to_tensorrt import EngineOptions, build

    seconds: list[list[float]] = [[] for _ in rows]
    for _ in range(REPEATS):
        for row, taken in zip(rows, seconds, strict=True):
            path = folder / f"{row['model']}.{row['precision']}.onnx"
            made = build(path, path.with_suffix(".engine"), LIBRARY, EngineOptions(batches=BATCHES))
            taken.append(made.seconds)
            row |= {"batches": list(BATCHES), "library": f"{LIBRARY} {made.sidecar['library_version']}"}
            row |= {key: made.sidecar[key] for key in ("gpu", "flags", "warnings")} | {"bytes": made.bytes}
            note(f"{path.stem}: {made.bytes} bytes, {made.seconds:.2f} s")
    for row, taken in zip(rows, seconds, strict=True):
        row |= {"seconds": statistics.median(taken), "seconds_all": taken}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = convert_all(Path(sys.argv[1]) if len(sys.argv) > 1 else demo(folder), folder)
        build_in_turn(rows, folder)
    dense = {row["precision"]: row for row in rows if row["model"] == "dense"}
    write(
        "tensorrt_build",
        {name: {"bytes": row["bytes"], "seconds": row["seconds"]} for name, row in dense.items()},
        rows,
    )


if __name__ == "__main__":
    main()
