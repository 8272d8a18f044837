"""A DCGAN generator of digits, pruned against its former self and the discriminator: Frechet distance.

The generator and the discriminator (Radford, Metz and Chintala, ICLR 2016) learn from 4,000 MNIST images.
The loss that prunes and fine-tunes needs no data at all: the distance to what the original generator makes
of the same noise, and what the frozen discriminator thinks of it.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.any_loss_digits import TRAIN, digits
from benchmarks.any_loss_harness import Job, fit, frozen, shown
from benchmarks.common import note

NOISE, BATCH = 64, 64
ADVERSARIAL = 0.02  # weight of the discriminator's opinion beside the distance to the original
AVERAGE = 0.998  # of the weights over the training steps: that network is the one that is kept


def generator(width: int) -> nn.Sequential:
    """Noise (n, 64, 1, 1) to images (n, 1, 28, 28) in -1..1."""
    return nn.Sequential(
        *(nn.ConvTranspose2d(NOISE, 2 * width, 7, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh()),
    )


def discriminator(width: int) -> nn.Sequential:
    """Images (n, 1, 28, 28) to one logit (n, 1): real or made."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(2 * width, 4 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(4 * width), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * width * 16, 1)),
    )


def train_gan(width: int, steps: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Both networks after `steps` steps of the non-saturating loss; the generator with averaged weights."""
    make, judge = generator(width), discriminator(width // 2)
    for module in [*make.modules(), *judge.modules()]:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0, 0.02)
    average = copy.deepcopy(make).requires_grad_(False)
    making = torch.optim.Adam(make.parameters(), 4e-4, (0.5, 0.999))
    judging = torch.optim.Adam(judge.parameters(), 2e-4, (0.5, 0.999))
    images = digits()[0][:TRAIN] * 2 - 1
    for step in range(steps):
        real = images[torch.randint(TRAIN, (BATCH,))]
        made = make(torch.randn(BATCH, NOISE, 1, 1))
        doubt = functional.softplus(-judge(real)).mean() + functional.softplus(judge(made.detach())).mean()
        _descend(judging, doubt)
        _descend(making, functional.softplus(-judge(made)).mean())
        decay = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), make.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
    _settle(average)
    return average.requires_grad_(True), judge.eval()


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()


def _settle(model: nn.Module) -> None:
    """Give averaged weights batch-norm statistics of their own."""
    model.train()
    with torch.no_grad():
        for _ in range(100):
            model(torch.randn(BATCH, NOISE, 1, 1))
    model.eval()


@dataclass(frozen=True)
class Imitate:
    """Mean absolute difference to the original's images, plus the discriminator's opinion of the new ones."""

    original: nn.Module
    judge: nn.Module

    def __call__(self, model: nn.Module, noise: Tensor) -> Tensor:
        made = model(noise)
        with torch.no_grad():
            wanted = self.original(noise)
        return (made - wanted).abs().mean() + ADVERSARIAL * functional.softplus(-self.judge(made)).mean()


class Features(nn.Module):
    """A digit classifier; its 64 features behind the last hidden layer measure the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@dataclass(frozen=True)
class Judgement:
    """How generated digits are measured: by features of a classifier, against held-out real digits."""

    net: Features
    accuracy: float
    real: Tensor
    noise: Tensor

    def __call__(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            made = torch.cat([model(part) for part in self.noise.split(250)])
        return self.of(made)

    def of(self, images: Tensor) -> dict[str, float]:
        """frechet: see `frechet`. confidence: mean largest probability. diversity: entropy of the classes'
        shares, over its largest value. Images (n, 1, 28, 28) in -1..1."""
        with torch.no_grad():
            features = self.net.body(images)
            p = self.net.head(features).softmax(1)
            goal = self.net.body(self.real)
        shares = torch.bincount(p.argmax(1), minlength=10) / len(p)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum() / torch.tensor(10.0).log()
        return {
            "frechet": frechet(features, goal),
            "confidence": float(p.amax(1).mean()),
            "diversity": float(entropy),
        }


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two normal distributions fitted to features (n, d) and (m, d).

    |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) (Dowson and Landau, 1982; Heusel et al., NeurIPS 2017).
    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    """
    a, b = a.double(), b.double()
    first, second = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + first.trace() + second.trace() - 2 * cross)


def judgement(quick: bool) -> Judgement:
    """Train the classifier on the 4,000 training digits; its accuracy is over the 1,000 others."""
    images, labels = digits()[0] * 2 - 1, digits()[1]

    def batches(number: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(number))
        return [(images[part], labels[part]) for part in order[: 256 if quick else TRAIN].split(64)]

    net = Features()
    fit(net, batches, lambda m, b: functional.cross_entropy(m(b[0]), b[1]), 1 if quick else 8, lr=2e-3)
    net.requires_grad_(False)
    right = (net(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean()
    noise = torch.randn(200 if quick else 5000, NOISE, 1, 1, generator=torch.Generator().manual_seed(99))
    return Judgement(net, float(right), images[TRAIN:], noise)


@lru_cache(maxsize=4)
def epoch(number: int, count: int) -> list[Tensor]:
    """`count` batches of noise."""
    noise = torch.randn(count * BATCH, NOISE, 1, 1, generator=torch.Generator().manual_seed(number))
    return list(noise.split(BATCH))


def job(quick: bool) -> tuple[Job, float]:
    """The trained generator with all that its pruning needs, and the CPU seconds its training took."""
    torch.manual_seed(0)
    started = time.process_time()
    judge_of_all = judgement(quick)
    model, critic = train_gan(16 if quick else 48, 20 if quick else 2500)
    seconds = time.process_time() - started
    note(f"generator trained: {seconds:.0f} s, {shown(judge_of_all(model))}")
    per_epoch = 5 if quick else 50
    floor = judge_of_all.of(digits()[0][:1000] * 2 - 1)
    return Job(
        name="generator",
        model=model,
        example=torch.randn(2, NOISE, 1, 1),
        batches=lambda number: epoch(number, per_epoch),
        loss=Imitate(frozen(model), frozen(critic)),
        quality=judge_of_all,
        measure="frechet",
        larger_is_better=False,
        prune={"macs_ratio": 0.5, "minibatches_per_step": 1 if quick else 8, "lr": 0.01}
        | {"rank": "importance_per_cost"}
        | ({"units_per_step": 20} if quick else {}),
        finetune_epochs=1 if quick else 4,
        finetune_lr=1e-3,
        facts={
            "model": "DCGAN generator: three transposed convolutions and one convolution, batch norm between",
            "loss": "mean absolute difference to the original's images of the same noise, plus "
            f"{ADVERSARIAL} of the adversarial loss against the frozen discriminator",
            "quality": "Frechet distance of 5,000 generated digits to 1,000 real held-out ones, in the 64 "
            f"features of a classifier that is right on {judge_of_all.accuracy:.1%} of those",
            "data": "4,000 MNIST images to train both networks; pruning and fine-tuning see noise alone",
            "real_digits_against_real_digits": floor,
        },
    ), seconds
