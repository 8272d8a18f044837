"""How the time for labelling grows with the depth and the width of a network, beside torch.export's.

    python benchmarks/growth.py

ResNet-18 to ResNet-152, ViT-B/32 to ViT-H/14, residual chains of 50 to 1,000 convolutions, and chains of
30 convolutions of 64 to 2,048 channels; one thread, each model traced once and labelled three times (the
median counts). Writes the figures and draws docs/labelling.png. Goal: linear, that is an exponent of about
1 in nodes, and less than that in channels.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import note, write

if TYPE_CHECKING:
    from torch import nn

REPEATS = 3
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "labelling.png"


def models() -> Iterator[tuple[str, str, Callable[[], nn.Module], int]]:
    """(family, name, builder, input side)."""
    from torchvision import models as tv

    for depth in (18, 34, 50, 101, 152):
        yield "ResNet", f"resnet{depth}", getattr(tv, f"resnet{depth}"), 64
    for name, side in (("vit_b_32", 128), ("vit_l_32", 128), ("vit_h_14", 112)):
        yield "ViT", name, lambda name=name, side=side: getattr(tv, name)(image_size=side), side
    for layers in (50, 100, 200, 500, 1000):
        yield "chain, deeper", f"chain of {layers}", lambda layers=layers: chain(layers, 16), 8
    for width in (64, 128, 256, 512, 1024, 2048):
        yield "chain, wider", f"{width} channels", lambda width=width: chain(30, width), 8


def chain(layers: int, width: int) -> nn.Module:
    """Residual blocks of two convolutions: `layers` convolutions of `width` channels in all."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )

        def forward(self, x: Any) -> Any:
            return x + self.body(x)

    blocks = [Block() for _ in range(layers // 2)]
    return nn.Sequential(nn.Conv2d(3, width, 3), *blocks, nn.Flatten(), nn.Linear(36 * width, 10))


def measure(family: str, name: str, build: Callable[[], nn.Module], side: int) -> dict[str, Any]:
    """One row: nodes, channels, seconds for export and labelling."""
    import torch

    from compress.channelmap import channel_map
    from compress.trace import trace

    model = build()
    started = time.perf_counter()
    traced = trace(model, (torch.zeros(2, 3, side, side),))
    exported = time.perf_counter() - started
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        cmap = channel_map(traced)
        taken.append(time.perf_counter() - started)
    channels = sum(shape[0] for term in cmap.terms if (shape := cmap.shapes.get(term.weight)))
    row = {
        "family": family,
        "model": name,
        "nodes": len(traced.net.graph.nodes),
        "channels": channels,
        "units": cmap.units,
        "export_s": round(exported, 3),
        "label_s": round(statistics.median(taken), 3),
        "label_over_export": round(statistics.median(taken) / exported, 3),
    }
    note(" ".join(f"{k} {v}" for k, v in row.items()))
    return row


def exponent(rows: list[dict[str, Any]], size: str) -> float:
    """k of seconds ~ size^k, by least squares on the logarithms."""
    import numpy as np

    x, y = (np.log([row[key] for row in rows]) for key in (size, "label_s"))
    return round(float(np.polyfit(x, y, 1)[0]), 2)


def draw(rows: list[dict[str, Any]]) -> None:
    """Seconds against nodes where networks grow deeper, against channels where one grows wider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure, (deep, wide) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for family, colour in (("ResNet", "C0"), ("ViT", "C1"), ("chain, deeper", "C2")):
        own = [row for row in rows if row["family"] == family]
        nodes = [row["nodes"] for row in own]
        deep.loglog(nodes, [row["label_s"] for row in own], "o-", color=colour, label=f"{family}: labels")
        deep.loglog(nodes, [row["export_s"] for row in own], "x:", color=colour, label=f"{family}: export")
    own = [row for row in rows if row["family"] == "chain, wider"]
    widths = [int(row["model"].split()[0]) for row in own]
    wide.loglog(widths, [row["label_s"] for row in own], "o-", color="C3", label="labels")
    wide.loglog(widths, [row["export_s"] for row in own], "x:", color="C3", label="export")
    deep.set(xlabel="nodes of the graph", ylabel="seconds, one thread", title="deeper")
    wide.set(xlabel="channels of each of 30 convolutions", title="wider")
    wide.sharey(deep)
    deep.set_xticks([200, 500, 1000, 2000, 5000])
    wide.set_xticks([64, 128, 256, 512, 1024, 2048])
    for axes in (deep, wide):
        axes.set_yticks([0.3, 1, 3, 10, 30])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    measure("", "warm-up", lambda: chain(2, 8), 8)
    rows = [measure(*model) for model in models()]
    families = {family: [r for r in rows if r["family"] == family] for family in {r["family"] for r in rows}}
    summary = {
        "exponent_in_nodes": {
            family: exponent(own, "nodes")
            for family, own in sorted(families.items())
            if family != "chain, wider"
        },
        "exponent_in_channels": exponent(families["chain, wider"], "channels"),
        "label_seconds_worst": max(row["label_s"] for row in rows),
        "label_over_export_median": round(statistics.median(r["label_over_export"] for r in rows), 3),
    }
    draw(rows)
    write("growth", summary, rows)


if __name__ == "__main__":
    main()
