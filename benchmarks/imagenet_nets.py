"""Networks of ImageNet's size with random weights, labelled and scored: for latencies, as any weights do."""

from __future__ import annotations

from typing import Any

MODELS = {
    "resnet18": "classification",
    "resnet50": "classification",
    "mobilenet_v3_large": "classification",
    "efficientnet_b0": "classification",
    "vit_tiny_patch16_224": "timm",
}
SHAPE = (3, 224, 224)


def scored(name: str) -> tuple[Any, Any, Any, Any]:
    """(net, cmap, scores, example): the graph in eval mode, its channel map, Taylor scores (units,) of one
    random minibatch, and the example it was traced with."""
    import torch

    from benchmarks import zoo_models
    from benchmarks.zoo_row import taylor
    from compress.channelmap import channel_map
    from compress.folding import folded
    from compress.trace import trace

    torch.manual_seed(0)
    model = zoo_models.build(zoo_models.Spec(MODELS[name], name))
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    zoo_models.randomise(model)
    zoo_models.calibrate(model, (x,))
    traced = folded(trace(model, (x,)))
    cmap = channel_map(traced)
    return traced.net.eval(), cmap, taylor(traced, cmap), (x,)
