"""Criteria against the truth on CIFAR-10: the pretrained ResNet-20, or ResNet-56, all units, test images.

    COMPRESS_DATA=... python benchmarks/correlation.py [resnet20] [resnet56] [--images 2000] [--batch 50]

The truth is `compress.study`'s: each unit left out alone, skip connections included, on test images that the
network has not seen. Goals: the paper's criterion at least 0.93 against the truth summed up per minibatch,
as the paper accumulates it; the expanded logits at least 0.98 against all three.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, data_folder, note, write

WEIGHTS = {"resnet20": (20, "resnet20-12fca82f.th"), "resnet56": (56, "resnet56-4bfd9763.th")}


def measure(name: str, images: int, batch: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the rows of one network."""
    import torch

    from benchmarks import cifar10
    from compress.channelmap import channel_map
    from compress.config import DataConfig, ModelConfig
    from compress.models import build_model
    from compress.study import study
    from compress.task import build_task
    from compress.trace import trace

    torch.set_num_threads(1)
    depth, file = WEIGHTS[name]
    model = ModelConfig(
        name="compress.zoo:cifar_resnet",
        kwargs={"depth": depth},
        weights=str(data_folder().resolve() / "weights" / file),
        input_shape=[3, 32, 32],
    )
    data = DataConfig(
        name="benchmarks.cifar10:splits", mean=list(cifar10.MEAN), std=list(cifar10.STD), test_limit=images
    )
    task = build_task(data, model, 0, Path())
    assert task.test_batches is not None
    traced = trace(build_model(model, Path(), seed=0), (torch.zeros(2, 3, 32, 32),))
    cmap, started = channel_map(traced), time.monotonic()
    found = study(
        traced.net,
        cmap,
        task.test_batches(batch),
        progress=lambda done: note(f"{name} {done * batch}/{images} {time.monotonic() - started:.0f} s"),
    )
    rows = [{"model": name, "images": found.images, **row} for row in found.correlations()]
    summary = {
        row["criterion"]: {key: row[key] for key in ("pearson", "spearman", "kendall")}
        for row in rows
        if row["truth"] == "minibatch"
    }
    return summary, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(WEIGHTS), metavar="NAME")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    path = RESULTS / "correlation.json"
    known = json.loads(path.read_text()) if path.exists() else {"summary": {}, "rows": []}
    summary, rows = known["summary"], known["rows"]
    for name in options.names:
        summary[name], fresh = measure(name, options.images, options.batch)
        rows = [row for row in rows if row["model"] != name] + fresh
        write("correlation", summary, rows)


if __name__ == "__main__":
    main()
