"""Criteria against the truth on CIFAR-10: two pretrained ResNets and a VGG trained here, on test images.

    COMPRESS_DATA=... python benchmarks/correlation.py [NAME ...] [--images 2000] [--batch 50] [--units N]

The truth is `compress.study`'s: each unit left out alone, skip connections included, on test images that the
network has not seen. Goals: the paper's criterion at least 0.93 against the truth summed up per minibatch,
as the paper accumulates it; the expanded logits at least 0.98 against all three.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import known_rows, note, write

NAMES = ("resnet20", "vgg", "resnet56")


def measure(name: str, images: int, batch: int, limit: int | None) -> list[dict[str, Any]]:
    """The rows of one network: correlations, and those of fewer images."""
    import numpy as np
    import torch

    from benchmarks import cifar_nets
    from compress.channelmap import channel_map
    from compress.study import study
    from compress.trace import trace

    torch.set_num_threads(1)
    task = cifar_nets.task(batch, test_limit=images)
    assert task.test_batches is not None
    traced = trace(cifar_nets.load(name), (torch.zeros(2, 3, 32, 32),))
    accuracy = task.evaluate(traced.net, "test")
    cmap, started = channel_map(traced), time.monotonic()
    units = None
    if limit is not None and limit < cmap.units:
        units = np.random.default_rng(0).choice(cmap.units, limit, replace=False)
    found = study(
        traced.net,
        cmap,
        task.test_batches(batch),
        units=units,
        progress=lambda done: note(f"{name} {done * batch}/{images} {time.monotonic() - started:.0f} s"),
    )
    facts = {
        "model": name,
        "accuracy": accuracy.value,
        "loss": round(accuracy.loss, 4),
        "units": cmap.units,
        "left_out": len(found.units),
        "batch": batch,
    }
    rows = [facts | {"images": found.images, **row} for row in found.correlations()]
    return rows + [facts | row for row in found.samples()]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per network and criterion, against the truth summed up per minibatch; Spearman against all three."""
    found: dict[str, Any] = {}
    for row in rows:
        if "truth" in row:
            own = found.setdefault(row["model"], {}).setdefault(row["criterion"], {})
            own[f"spearman_{row['truth']}"] = row["spearman"]
            if row["truth"] == "minibatch":
                own |= {key: row[key] for key in ("pearson", "spearman", "kendall")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="NAME")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--units", type=int, help="leave out that many random units only")
    options = parser.parse_args()
    rows = known_rows("correlation")
    for name in options.names:
        fresh = measure(name, options.images, options.batch, options.units)
        rows = [row for row in rows if row["model"] != name] + fresh
        write("correlation", summary(rows), rows)


if __name__ == "__main__":
    main()
