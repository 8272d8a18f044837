"""A small UNet that names the digit each pixel belongs to: cross-entropy, 11 classes, mean IoU."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.any_loss_digits import DATA, Scenes, scenes
from benchmarks.any_loss_harness import Job, fit, shown
from benchmarks.common import note

SIZE, CLASSES, BATCH = 64, 11, 16
NAMES = "background and ten digits"


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
        *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
    )


class UNet(nn.Module):
    """(n, 1, s, s) to logits (n, 11, s, s), s a multiple of 8; skips by concatenation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([1, *sizes], sizes, strict=False))
        ups = list(zip(sizes[:0:-1], sizes[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in ups)
        self.merge = nn.ModuleList(block(2 * b, b) for _, b in ups)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for number, down in enumerate(self.down):
            x = down(x if number == 0 else functional.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy over the pixels; a digit's pixel counts 4 times, as most pixels are background."""
    weight = torch.full((CLASSES,), 4.0)
    weight[0] = 1.0
    return functional.cross_entropy(model(batch[0]), batch[1], weight=weight)


def mean_iou(model: nn.Module, held_out: Scenes) -> dict[str, float]:
    """Mean over the 11 classes of intersection over union, counted over all pixels; pixel accuracy."""
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    model.eval()
    with torch.no_grad():
        for image, mask in zip(held_out.images.split(64), held_out.mask.split(64), strict=True):
            found = model(image).argmax(1)
            pairs = torch.bincount((mask * CLASSES + found).reshape(-1), minlength=CLASSES**2)
            confusion += pairs.reshape(CLASSES, CLASSES)
    both = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - both
    return {
        "mean_iou": float((both / union.clamp(min=1)).mean()),
        "pixel_accuracy": float(both.sum() / confusion.sum()),
    }


@lru_cache(maxsize=4)
def epoch(number: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of fresh scenes of training digits."""
    made = scenes(count * BATCH, SIZE, number)
    return list(zip(made.images.split(BATCH), made.mask.split(BATCH), strict=True))


def job(quick: bool) -> tuple[Job, float]:
    """The trained UNet with all that its pruning needs, and the CPU seconds its training took."""
    torch.manual_seed(0)
    started = time.process_time()
    model, per_epoch = UNet(4 if quick else 12), 20 if quick else 50
    epochs = 1 if quick else 20
    fit(model, lambda number: epoch(number, per_epoch), loss, epochs, lr=3e-3)
    held_out = scenes(16 if quick else 500, SIZE, 0, test=True)
    seconds = time.process_time() - started
    note(f"segmenter trained: {seconds:.0f} s, {shown(mean_iou(model, held_out))}")
    return Job(
        name="segmenter",
        model=model,
        example=torch.randn(2, 1, SIZE, SIZE),
        batches=lambda number: epoch(number, per_epoch),
        loss=loss,
        quality=lambda net: mean_iou(net, held_out),
        measure="mean_iou",
        larger_is_better=True,
        prune={"macs_ratio": 0.5, "minibatches_per_step": 1 if quick else 8, "lr": 0.01}
        | {"rank": "importance_per_cost"}
        | ({"units_per_step": 20} if quick else {}),
        finetune_epochs=1 if quick else 4,
        finetune_lr=2e-3,
        facts={
            "model": "UNet, 3 levels down, transposed convolutions up, skips by concatenation",
            "loss": "cross-entropy per pixel, digits weighted 4 to 1 against background",
            "quality": f"mean IoU over 11 classes ({NAMES}), {len(held_out.images)} scenes of unseen digits",
            "data": DATA,
        },
    ), seconds
