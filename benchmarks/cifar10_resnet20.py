"""The pretrained CIFAR-10 ResNet-20 to half its MACs, fine-tuned on the CPU, as a whole run.

    COMPRESS_DATA=... python benchmarks/cifar10_resnet20.py [--out DIR] [KEY=VALUE ...]

With --out the run is kept, and a second call goes on where the first one stopped.

Goals: within 1.0 point of the original on the 10,000 test images; the ONNX model at least 1.5 times as
fast on one thread of ONNX Runtime at batch 64 (paired, interleaved).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import data_folder, note, write

CONFIG = """
version: 1
model:
  name: compress.zoo:cifar_resnet
  kwargs: {{depth: 20}}
  weights: {weights}
  input_shape: [3, 32, 32]
data:
  name: benchmarks.cifar10:splits
  mean: {mean}
  std: {std}
  batch_size: 64
  augment: flip_crop
  validation: 0.05
prune: {{macs_ratio: 0.5, lr: 0.01, weight_decay: 0.0001, minibatches_per_step: 30}}
finetune:
  {{epochs: 24, lr: 0.03, weight_decay: 0.0001, ema: 0.9998, amp: bf16,
    distill: {{alpha: 0.5, temperature: 4}}}}
bench: {{batches: [1, 64], repeats: 20}}
gates: {{accuracy_drop: 0.01, speedup: 1.5, batch: 64}}
out: run
"""


class Lines:
    """A run's events, one line each."""

    def stage(self, name: str, status: str, detail: str = "") -> None:
        note(f"{name} {status} {detail}")

    def progress(self, stage: str, done: float, total: float, text: str = "") -> None:
        if "epoch" not in text or done == int(done):
            note(f"  {stage} {done / total:.0%} {text}")

    def note(self, text: str) -> None:
        note(text)

    warn = note


def main() -> None:
    from benchmarks import cifar10
    from compress import config, pipeline

    kept = None
    if "--out" in sys.argv:
        kept = str(Path(sys.argv.pop(sys.argv.index("--out") + 1)).resolve())
        sys.argv.remove("--out")
    overrides = [*sys.argv[1:], *([f"out={kept}"] if kept else [])]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "compress.yaml"
        weights = data_folder().resolve() / "weights" / "resnet20-12fca82f.th"
        path.write_text(CONFIG.format(weights=weights, mean=cifar10.MEAN, std=cifar10.STD))
        outcome = pipeline.run(config.load(path, overrides), path.parent, events=Lines())
    results = outcome.results
    accuracy, macs, params = results["accuracy"], results["cost"]["macs"], results["cost"]["params"]
    speed = {(row["runner"], row["batch"]): row for row in results["speedup"]}
    summary = {
        "accuracy_before": accuracy["before"],
        "accuracy_after": accuracy["after"],
        "macs_ratio": macs["after"] / macs["before"],
        "ort_speedup_b64": speed["onnxruntime", 64]["ratio"],
        "ort_speedup_b64_interval": [speed["onnxruntime", 64]["low"], speed["onnxruntime", 64]["high"]],
        "params_ratio": params["after"] / params["before"],
        "verdict": results["verdict"],
    }
    settings = results["provenance"]["config"]
    settings["model"].pop("weights")
    settings.pop("out")
    medians = [
        {k: row[k] for k in ("runner", "model", "batch", "threads", "median", "p99")}
        for row in results["latency"]
    ]
    write(
        "cifar10_resnet20",
        summary,
        [
            {"config": settings, "pruning": results["pruning"], "finetune": results["finetune"]},
            {"accuracy": accuracy, "gates": results["gates"], "verification": results["verification"]},
            *results["speedup"],
            *medians,
            *results["layers"],
        ],
    )


if __name__ == "__main__":
    main()
