"""Masked network against dense network, for every convolutional family of torchvision and the CIFAR ResNets.

    python benchmarks/exactness.py [NAME ...]

One row per family: parameters and batch-norm statistics randomised (zero and tiny ones too, else the check
is vacuous), a random 30 % of the units removed. exact: relative error at most 1e-5 in float32 and 1e-12 in
float64, the mask moves the output at least 1,000 times further, MACs as torch's FLOP counter has them,
parameters as `numel` has them.
"""

from __future__ import annotations

import copy
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import note, write

FAMILIES = (
    *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "regnet_x_400mf", "regnet_y_400mf"),
    *("densenet121", "vgg11", "vgg11_bn", "alexnet", "googlenet", "inception_v3", "mobilenet_v2"),
    *("mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s"),
    *("squeezenet1_0", "squeezenet1_1", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "convnext_tiny"),
    *("cifar_resnet20", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t"),
)
SIZES = {"inception_v3": 96, "alexnet": 80, "cifar_resnet20": 32, "vit_b_16": 224, "maxvit_t": 224}


def build(name: str) -> Any:
    import torchvision

    from compress.zoo import cifar_resnet

    if name == "cifar_resnet20":
        return cifar_resnet(20)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, **options)


def randomise(model: Any, seed: int) -> None:
    """Give every small or constant parameter and every batch-norm statistic a size that matters."""
    import torch

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(
                    torch.rand(p.shape, generator=g) + 0.5
                    if name.endswith("weight")
                    else torch.randn(p.shape, generator=g) * 0.2
                )
            elif float(p.abs().mean()) < 1e-3:
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=g) * 0.2)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)


def row(name: str) -> dict[str, Any]:
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from compress.channelmap import channel_map
    from compress.cost import class_counts, cost_model
    from compress.surgery import cut, mask, verify
    from compress.trace import trace

    model = build(name)
    randomise(model, 0)
    size = SIZES.get(name, 64)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    clock = [time.perf_counter()]
    traced = trace(model, (x,))
    clock.append(time.perf_counter())
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cmap = channel_map(traced)
    clock.append(time.perf_counter())
    label_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mib
    keep = np.random.default_rng(0).random(cmap.units) > 0.3
    for group in np.unique(cmap.classes):
        members = np.flatnonzero(cmap.classes == group)
        keep[members[0]] |= not keep[members].any()
    masked = copy.deepcopy(traced.net)
    mask(masked, cmap, keep)
    clock.append(time.perf_counter())
    dense, _ = cut(traced.net, cmap, keep)
    clock.append(time.perf_counter())
    single = verify(traced.net, masked, dense, (x,), dtype=torch.float32, tolerance=1e-5)
    double = verify(traced.net, masked, dense, (x,), dtype=torch.float64, tolerance=1e-12)
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(dense).to("meta")(x.to("meta"))
    costs, counts = cost_model(cmap), class_counts(cmap, keep)
    macs, params = counter.get_total_flops() / 4, sum(p.numel() for p in dense.parameters())
    counted = macs == costs.macs.total(counts) and params == costs.params.total(counts)
    return {
        "model": name,
        "input": size,
        "units": cmap.units,
        "pinned_channels": sum(p.channels for p in cmap.pinned),
        "relative_error_float32": single.relative_error,
        "relative_error_float64": double.relative_error,
        "movement": single.movement,
        "macs_ratio": costs.ratio("macs", counts),
        "macs_and_params_counted": counted,
        "exact": single.passed and double.passed and counted,
        "trace_s": clock[1] - clock[0],
        "label_s": clock[2] - clock[1],
        "surgery_s": clock[4] - clock[3],
        "label_peak_rss_growth_mib": label_mib,
    }


def main() -> None:
    import torch

    torch.set_num_threads(1)
    names = sys.argv[1:] or list(FAMILIES)
    rows = []
    for name in names:
        rows.append(row(name))
        found = rows[-1]
        note(f"{name} {found['exact']} {found['relative_error_float32']:.1e}")
    ratios = [r["movement"] / max(r["relative_error_float32"], 1e-12) for r in rows]
    write(
        "exactness",
        {
            "families": len(rows),
            "exact": sum(r["exact"] for r in rows),
            "worst_relative_error": max(r["relative_error_float32"] for r in rows),
            "worst_relative_error_float64": max(r["relative_error_float64"] for r in rows),
            "least_movement_over_error": min(ratios),
        },
        rows,
    )


if __name__ == "__main__":
    main()
