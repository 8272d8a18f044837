"""Engines of TensorRT-RTX from the demo's models, built without a GPU: bytes and build times by precision.

    python benchmarks/tensorrt_build.py [RUN]

RUN is the folder of a finished `make demo` (demo/run); without it the demo's stages up to the export are run
first, which takes minutes. int8 is calibrated on 256 training images; what a precision costs is measured with
ONNX Runtime on all test images, since an engine cannot run here. Each engine is built five times, in turn.
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
MODELS = ("original", "dense")
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


def build_all(run: Path, folder: Path) -> list[dict[str, Any]]:
    """One row for each model and precision."""
    from deploy.precision import convert, evaluate
    from deploy.runners import open_runner
    from deploy.to_tensorrt import EngineOptions, build

    calibration, test = data()
    rows = []
    for model in MODELS:
        for precision in PRECISIONS:
            onnx = folder / f"{model}.{precision}.onnx"
            converted = convert(run / f"{model}.onnx", onnx, precision, calibration=calibration)
            pair = (open_runner("onnxruntime", path) for path in (run / f"{model}.onnx", onnx))
            found = evaluate(*pair, test)
            row = {
                "model": model,
                "precision": precision,
                "batches": list(BATCHES),
                "onnx_bytes": converted.bytes,
                "nodes_low": converted.nodes_low,
                "nodes_kept": converted.nodes_kept,
                "test_images": found.images,
                "relative_error": found.relative,
                "top1_lost": found.drop,
                "seconds_all": [],
            }
            rows.append(row)
    for _ in range(REPEATS):
        for row in rows:
            name = f"{row['model']}.{row['precision']}"
            made = build(
                folder / f"{name}.onnx", folder / f"{name}.engine", LIBRARY, EngineOptions(batches=BATCHES)
            )
            row["seconds_all"].append(made.seconds)
            row |= {"bytes": made.bytes, "library": f"{LIBRARY} {made.sidecar['library_version']}"}
            row |= {key: made.sidecar[key] for key in ("gpu", "flags", "inputs", "outputs", "warnings")}
            note(f"{name}: {made.bytes} bytes, {made.seconds:.2f} s")
    for row in rows:
        row["seconds"] = statistics.median(row["seconds_all"])
    return rows


def main() -> None:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = build_all(Path(sys.argv[1]) if len(sys.argv) > 1 else demo(folder), folder)
    dense = {row["precision"]: row for row in rows if row["model"] == "dense"}
    write(
        "tensorrt_build",
        {name: {"bytes": row["bytes"], "seconds": row["seconds"]} for name, row in dense.items()},
        rows,
    )


if __name__ == "__main__":
    main()
