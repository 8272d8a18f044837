"""A small anchor-free detector of digits in scenes: focal loss and IoU loss, mAP at 0.5.

One prediction per 4x4 pixels, as CenterNet and FCOS have it: ten class heat maps that peak at a digit's
centre, and the distances from there to the four sides of its box. The network is tensor in, tensors out;
peaks become boxes outside it.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.any_loss_digits import DATA, Scenes, scenes
from benchmarks.any_loss_harness import Job, fit, shown
from benchmarks.common import note

SIZE, CLASSES, BATCH, STRIDE = 64, 10, 16, 4
CELLS = SIZE // STRIDE
AT_MOST = 20  # boxes per scene

Targets = tuple[Tensor, Tensor, Tensor, Tensor]  # images, heat maps, sides, where the sides count


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.second(self.first(x)))


class Detector(nn.Module):
    """(n, 1, 64, 64) to class logits (n, 10, 16, 16) and side distances in cells (n, 4, 16, 16)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, width, 2), conv(width, width))
        self.fine = nn.Sequential(conv(width, 2 * width, 2), Residual(2 * width))
        self.coarse = nn.Sequential(conv(2 * width, 4 * width, 2), Residual(4 * width), Residual(4 * width))
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.lateral = nn.Conv2d(2 * width, 2 * width, 1)
        self.neck = conv(2 * width, 2 * width)
        self.classes = nn.Sequential(conv(2 * width, 2 * width), nn.Conv2d(2 * width, CLASSES, 1))
        self.sides = nn.Sequential(conv(2 * width, 2 * width), nn.Conv2d(2 * width, 4, 1))
        nn.init.constant_(self.classes[1].bias, -4.0)  # type: ignore[arg-type]  # few cells hold a digit

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(self.stem(x))
        joined = self.neck(self.lateral(fine) + self.up(self.coarse(fine)))
        return self.classes(joined), functional.softplus(self.sides(joined))


def targets(made: Scenes) -> Targets:
    """What the network should say: a bump of height 1 per digit, and sides at the 3x3 cells around it."""
    count = len(made.boxes)
    heat = torch.zeros(count, CLASSES, CELLS, CELLS)
    sides = torch.zeros(count, 4, CELLS, CELLS)
    counts = torch.zeros(count, CELLS, CELLS)
    steps = torch.arange(CELLS) + 0.5
    for scene, (boxes, kinds) in enumerate(zip(made.boxes, made.digits, strict=True)):
        for (left, top, right, bottom), kind in zip(boxes / STRIDE, kinds, strict=True):
            x, y = int((left + right) / 2), int((top + bottom) / 2)
            across = (torch.arange(CELLS) - x) / (0.15 * (right - left) + 0.3)
            down = (torch.arange(CELLS) - y) / (0.15 * (bottom - top) + 0.3)
            bump = torch.exp(-(across[None] ** 2 + down[:, None] ** 2) / 2)
            heat[scene, kind] = torch.maximum(heat[scene, kind], bump)
            near = (slice(max(0, y - 1), y + 2), slice(max(0, x - 1), x + 2))
            columns, rows = steps[None].expand(CELLS, CELLS), steps[:, None].expand(CELLS, CELLS)
            distances = torch.stack([columns - left, rows - top, right - columns, bottom - rows])
            sides[scene][:, *near] = distances[:, *near]
            counts[scene][near] = (distances[:, *near] > 0).all(0).float()
    return made.images, heat, sides, counts


def loss(model: nn.Module, batch: Targets) -> Tensor:
    """Focal loss of the heat maps (Law and Deng, ECCV 2018) plus 1 - IoU of the boxes at digits."""
    images, heat, sides, counts = batch
    logits, found = model(images)
    right, wrong = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    p, peak = logits.sigmoid(), (heat == 1).float()
    focal = -(peak * (1 - p) ** 2 * right + (1 - peak) * (1 - heat) ** 4 * p**2 * wrong)
    shared = torch.minimum(found, sides)
    both = (shared[:, 0] + shared[:, 2]) * (shared[:, 1] + shared[:, 3])
    areas = [(box[:, 0] + box[:, 2]) * (box[:, 1] + box[:, 3]) for box in (found, sides)]
    iou = both / (areas[0] + areas[1] - both).clamp(min=1e-6)
    return focal.sum() / peak.sum() + ((1 - iou) * counts).sum() / counts.sum()


def decode(logits: Tensor, sides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (n, k), digits (n, k) and boxes in pixels (n, k, 4) of the k highest peaks of each scene."""
    heat = logits.sigmoid()
    peaks = heat * (heat == functional.max_pool2d(heat, 3, 1, 1))
    scores, index = peaks.flatten(1).topk(AT_MOST)
    kinds, cells = index // CELLS**2, index % CELLS**2
    x, y = cells % CELLS + 0.5, cells // CELLS + 0.5
    near = sides.flatten(2).gather(2, cells[:, None].expand(-1, 4, -1))
    boxes = torch.stack([x - near[:, 0], y - near[:, 1], x + near[:, 2], y + near[:, 3]], -1)
    return scores, kinds, boxes * STRIDE


def mean_average_precision(model: nn.Module, held_out: Scenes) -> dict[str, float]:
    """mAP at IoU 0.5: per digit the area under precision over recall (at every point), then their mean."""
    model.eval()
    with torch.no_grad():
        outputs = [decode(*model(images)) for images in held_out.images.split(64)]
    scores, kinds, boxes = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    each = [average_precision(scores, kinds, boxes, held_out, digit) for digit in range(CLASSES)]
    return {"map_50": sum(each) / CLASSES, "worst_digit_ap": min(each)}


def average_precision(scores: Tensor, kinds: Tensor, boxes: Tensor, truth: Scenes, digit: int) -> float:
    """AP of one digit: detections from sure to unsure, each true box found once."""
    real = [b[k == digit] for b, k in zip(truth.boxes, truth.digits, strict=True)]
    taken = [torch.zeros(len(b), dtype=torch.bool) for b in real]
    at = (kinds == digit).nonzero()
    order = scores[at[:, 0], at[:, 1]].argsort(descending=True, stable=True)
    hits = []
    for scene, rank in at[order].tolist():
        overlaps = iou(boxes[scene, rank], real[scene]).masked_fill(taken[scene], 0)
        best = int(overlaps.argmax()) if len(overlaps) else 0
        hit = len(overlaps) > 0 and float(overlaps[best]) >= 0.5
        if hit:
            taken[scene][best] = True
        hits.append(hit)
    found = torch.tensor(hits, dtype=torch.float64).cumsum(0)
    recall = found / max(1, sum(map(len, real)))
    precision = found / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((recall.diff(prepend=torch.zeros(1)) * envelope).sum())


def iou(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box (4,) with each of (k, 4); (k,)."""
    low, high = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both)


@lru_cache(maxsize=4)
def epoch(number: int, count: int) -> list[Targets]:
    """`count` batches of fresh scenes of training digits."""
    parts = (part.split(BATCH) for part in targets(scenes(count * BATCH, SIZE, number)))
    return list(zip(*parts, strict=True))


def job(quick: bool) -> tuple[Job, float]:
    """The trained detector with all that its pruning needs, and the CPU seconds its training took."""
    torch.manual_seed(0)
    started = time.process_time()
    model, per_epoch = Detector(4 if quick else 16), 20 if quick else 50
    fit(model, lambda number: epoch(number, per_epoch), loss, 1 if quick else 30, lr=3e-3)
    held_out = scenes(16 if quick else 500, SIZE, 0, test=True)
    seconds = time.process_time() - started
    note(f"detector trained: {seconds:.0f} s, {shown(mean_average_precision(model, held_out))}")
    return Job(
        name="detector",
        model=model,
        example=torch.randn(2, 1, SIZE, SIZE),
        batches=lambda number: epoch(number, per_epoch),
        loss=loss,
        quality=lambda net: mean_average_precision(net, held_out),
        measure="map_50",
        larger_is_better=True,
        prune={"macs_ratio": 0.5, "minibatches_per_step": 1 if quick else 8, "lr": 0.001}
        | {"rank": "importance_per_cost"}
        | ({"units_per_step": 20} if quick else {}),
        finetune_epochs=1 if quick else 4,
        finetune_lr=2e-3,
        facts={
            "model": "anchor-free detector: residual backbone, a top-down path added in, two heads",
            "loss": "focal loss of the class heat maps plus 1 - IoU of the boxes",
            "quality": f"mAP at IoU 0.5 over ten digits, {len(held_out.images)} scenes of unseen digits",
            "data": DATA,
        },
    ), seconds
