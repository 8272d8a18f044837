"""What importance costs on top of a training step, and labelling on top of export.

    python benchmarks/overhead.py

A training step (forward, loss, backward, SGD with momentum) without scores, with the paper's and with the
logits', interleaved on one thread; the overhead is the median of the paired ratios minus 1.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import write


def overhead(name: str, model: Any, batch: int, size: int, pairs: int) -> dict[str, Any]:
    """Paired overhead of scoring in one training step."""
    import torch
    from torch.nn.functional import cross_entropy

    from compress.channelmap import channel_map
    from compress.importance import Taylor
    from compress.scorers import Logits
    from compress.shares import Share
    from compress.trace import trace

    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 10, (batch,), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    traced = trace(model, (x[:2],))
    middle = time.perf_counter()
    cmap = channel_map(traced)
    labelled = time.perf_counter()
    net = traced.net.train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9)
    scorers = {"taylor": Taylor(cmap), "logits": Logits(net, cmap)}

    def step(criterion: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(net(x), y).backward()
        if criterion:
            scorers[criterion].accumulate(net, Share((x, y)))
        optimizer.step()

    taken: dict[str, list[float]] = {"": [], "taylor": [], "logits": []}
    for number in range(pairs + 1):
        order = list(taken)[:: 1 if number % 2 else -1]  # so that a drifting machine favours none
        for criterion in order:
            seconds = _seconds(lambda criterion=criterion: step(criterion))
            if number:  # the first round warms up
                taken[criterion].append(seconds)
    row = {
        "model": name,
        "batch": batch,
        "input": size,
        "pairs": pairs,
        "units": cmap.units,
        "step_ms": 1000 * statistics.median(taken[""]),
        "export_s": middle - started,
        "label_s": labelled - middle,
    }
    for criterion in scorers:
        ratios = sorted(b / a - 1 for a, b in zip(taken[""], taken[criterion], strict=True))
        row[f"overhead_{criterion}"] = statistics.median(ratios)
        row[f"overhead_{criterion}_quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
    return row


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    import torch
    import torchvision

    from compress.zoo import cifar_resnet

    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(64, 8, 12, 3, 192, 768, num_classes=10)
    rows = [
        overhead("resnet20", cifar_resnet(20), 128, 32, 31),
        overhead("resnet18", torchvision.models.resnet18(num_classes=10), 32, 64, 31),
        overhead("resnet50", torchvision.models.resnet50(num_classes=10), 8, 64, 15),
        overhead("vit_tiny", vit, 16, 64, 31),
    ]
    summary = {row["model"]: row["overhead_taylor"] for row in rows}
    summary["logits"] = {row["model"]: row["overhead_logits"] for row in rows}
    write(
        "overhead", summary | {"label_over_export_resnet50": rows[2]["label_s"] / rows[2]["export_s"]}, rows
    )


if __name__ == "__main__":
    main()
