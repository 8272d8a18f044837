"""Labelled images in memory or read one by one, in batches that can be made again.

Everything random about a batch comes from its key (seed, epoch, number), never from what was drawn before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compress import seeds
from compress.errors import DataError
from compress.names import first_line

Shape = tuple[int, int, int]  # channels, height, width
Images = tuple[Tensor, Tensor]  # float32 (n, channels, height, width), int64 (n,)

FLIP_CROP, TRIVIAL, IMAGENET = "flip_crop", "trivial_augment", "imagenet"  # data.augment
SCALES = {FLIP_CROP: (0.35, 1.0), TRIVIAL: (0.35, 1.0), IMAGENET: (0.08, 1.0)}  # of a picture's area, cropped
PAD = 4  # pixels on each side, from which a crop is taken (He et al. 2016, section 4.2)


@dataclass(frozen=True)
class Draw:
    """One batch to come: the indices of its examples, and the key of its augmentation (None: none).

    rows: those of the batch that are wanted; they are what they are in the whole batch.
    """

    indices: Tensor
    key: tuple[int, int, int] | None = None  # seed, epoch, number of the batch
    rows: slice = field(default_factory=lambda: slice(None))


class Source(Protocol):
    """Examples of one split. ``labels`` is None when they are known only by reading every example."""

    @property
    def labels(self) -> Tensor | None: ...
    def __len__(self) -> int: ...
    def batches(self, draws: Iterable[Draw]) -> Iterator[Images]: ...
    def digest(self) -> str: ...


@dataclass(frozen=True)
class Normalise:
    """Pixel values 0..255 (uint8) to 0..1, then (x - mean) / std for each channel."""

    mean: Tensor | None = None
    std: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32)
        if images.dtype == torch.uint8:
            x = x / 255
        return x if self.mean is None or self.std is None else (x - self.mean) / self.std


@dataclass(frozen=True)
class TensorSource:
    """Images (n, channels, height, width), uint8 or float32, and labels (n,), int64, in memory."""

    images: Tensor
    labels: Tensor
    normalise: Normalise = field(default_factory=Normalise)
    augment: str = FLIP_CROP

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, draws: Iterable[Draw]) -> Iterator[Images]:
        for draw in draws:
            own = draw.indices[draw.rows]
            images = self.images[own]
            if draw.key is not None:
                images = self._augmented(images, draw, draw.key)
            yield self.normalise(images), self.labels[own]

    def _augmented(self, images: Tensor, draw: Draw, key: tuple[int, int, int]) -> Tensor:
        images = flip_crop(images, seeds.generator("augment", *key), len(draw.indices), draw.rows)
        if self.augment != TRIVIAL:
            return images
        changed = []
        with seeds.isolated():
            for row, image in zip(range(len(draw.indices))[draw.rows], images, strict=True):
                seeds.seed_all(seeds.derive("trivial", *key, row))
                changed.append(trivial_augment(image))
        return torch.stack(changed)

    def digest(self) -> str:
        parts = (self.images.contiguous().numpy(), self.labels.contiguous().numpy())
        facts = hashlib.sha256(repr([(p.shape, str(p.dtype)) for p in parts]).encode())
        for part in parts:
            facts.update(part.data)
        return facts.hexdigest()


@dataclass(frozen=True)
class SampleSource:
    """A map-style data set of (image, label), read one example at a time by ``workers`` processes.

    Pictures (PIL) are brought to ``shape``; tensors must have it. The result does not depend on ``workers``:
    each example has its own seed. augment: one of SCALES, for draws that ask for it.
    """

    dataset: Any
    shape: Shape
    normalise: Normalise = field(default_factory=Normalise)
    resize: int | None = None
    workers: int = 0
    augment: str = FLIP_CROP

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> Tensor | None:
        return known_labels(self.dataset)

    def batches(self, draws: Iterable[Draw]) -> Iterator[Images]:
        from torch.utils.data import DataLoader

        wanted = [[(int(i), draw.key and draw.key[:2]) for i in draw.indices[draw.rows]] for draw in draws]
        loader: Any = DataLoader(
            _Samples(self),  # type: ignore[arg-type]  # a data set is anything with these two methods
            batch_sampler=wanted,
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # else starting an epoch would draw from the global generator
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = batch
            yield self.normalise(images), labels

    def digest(self) -> str:
        facts: list[Any] = [type(self.dataset).__name__, len(self), self.shape, self.resize]
        samples = getattr(self.dataset, "samples", None)
        if isinstance(samples, list):
            root = Path(getattr(self.dataset, "root", "."))
            facts += [(str(Path(p).relative_to(root)), Path(p).stat().st_size, label) for p, label in samples]
        elif (labels := self.labels) is not None:
            facts.append(labels.tolist())
        return hashlib.sha256(repr(facts).encode()).hexdigest()


@dataclass(frozen=True)
class _Samples:
    """The data set as the loader's processes see it; errors are returned, as raising there garbles them."""

    source: SampleSource

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, tuple[int, int] | None]) -> tuple[Tensor, int] | DataError:
        index, key = item
        parts = ("sample", index) if key is None else ("sample", index, *key)
        with seeds.isolated(seeds.derive(*parts)):
            try:
                image, label = self.source.dataset[index]
                return _prepare(image, self.source, index, augment=key is not None), int(label)
            except DataError as error:
                return error
            except Exception as error:  # a damaged file can make its decoder raise anything
                return DataError(f"example {index} cannot be read: {first_line(error)}", self._file(index))

    def _file(self, index: int) -> str:
        samples = getattr(self.source.dataset, "samples", None)
        return str(samples[index][0]) if isinstance(samples, list) else "data"


def flip_crop(
    images: Tensor, generator: torch.Generator, of: int | None = None, own: slice = slice(None)
) -> Tensor:
    """Each image (n, channels, height, width) padded by 4 black pixels, cropped at random, mirrored or not.

    He et al. 2016, section 4.2. The result depends on ``generator`` alone. of, own: the images are these
    of a batch of so many.
    """
    n, _, height, width = images.shape
    drawn = n if of is None else of
    top = torch.randint(0, 2 * PAD + 1, (drawn, 1), generator=generator)[own]
    left = torch.randint(0, 2 * PAD + 1, (drawn, 1), generator=generator)[own]
    mirror = torch.rand((drawn, 1), generator=generator)[own] < 0.5
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(mirror, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (PAD, PAD, PAD, PAD))
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def trivial_augment(image: Tensor) -> Tensor:
    """One of 14 changes of shape or colour, of random strength, to a uint8 image (channels, height, width).

    Mueller and Hutter 2021 (TrivialAugment, wide range), as torchvision has it. What is random comes from the
    global generators.
    """
    from torchvision.transforms import v2

    return v2.TrivialAugmentWide()(image)  # type: ignore[no-any-return]  # torchvision is untyped


def known_labels(dataset: Any) -> Tensor | None:
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if isinstance(values, (list, np.ndarray, Tensor)) and len(values) == len(dataset):
            labels = torch.as_tensor(values)
            if labels.ndim == 1 and not labels.is_floating_point():
                return labels.to(torch.int64)
    return None


def check_shape(found: tuple[int, ...], wanted: Shape, where: str) -> None:
    if found != wanted:
        what = f"images have shape {list(found)}, but model.input_shape is {list(wanted)}"
        raise DataError(what, where, f"set model.input_shape to {list(found)}, or change the images")


def _prepare(image: Any, source: SampleSource, index: int, augment: bool) -> Tensor:
    """One picture or tensor as (channels, height, width); what is random comes from the global generators."""
    from PIL import Image
    from torchvision.transforms import v2

    shape = source.shape
    if isinstance(image, Image.Image):
        tensor: Tensor = v2.functional.pil_to_tensor(
            image.convert({1: "L", 3: "RGB"}.get(shape[0], image.mode))
        )
        if augment:
            tensor = v2.RandomResizedCrop(shape[1:], scale=SCALES[source.augment], antialias=True)(tensor)
            tensor = v2.RandomHorizontalFlip()(tensor)
            return trivial_augment(tensor) if source.augment == TRIVIAL else tensor
        return cover(tensor, shape, source.resize)
    tensor = torch.as_tensor(image)
    check_shape(tuple(tensor.shape), shape, f"example {index}")
    tensor = tensor if tensor.dtype == torch.uint8 else tensor.to(torch.float32)
    if not augment:
        return tensor
    check_augment(source.augment, tensor.dtype, f"example {index} is a tensor")
    tensor = flip_crop(tensor[None], torch.default_generator)[0]
    return trivial_augment(tensor) if source.augment == TRIVIAL else tensor


def check_augment(kind: str, dtype: torch.dtype, what: str) -> None:
    """Raises DataError where tensors of ``dtype`` cannot be augmented as ``kind``; ``what`` says which."""
    if kind == IMAGENET:
        raise DataError(f"imagenet crops pictures of any size, and {what}", "data.augment", "take flip_crop")
    if kind == TRIVIAL and dtype != torch.uint8:
        needs = f"trivial_augment changes pixels of 0 to 255 (uint8), and {what} of {dtype}"
        raise DataError(needs, "data.augment", "give uint8 images, or take flip_crop")


def cover(images: Tensor, shape: Shape, resize: int | None) -> Tensor:
    """Images (..., height, width) scaled without distortion to cover ``shape``, and its centre cut out.

    resize: length of the shorter side after scaling, instead (ImageNet's usual recipe: 256, then a 224 crop).
    """
    from torchvision.transforms.v2 import functional

    height, width = images.shape[-2:]
    ratio = max(shape[1] / height, shape[2] / width) if resize is None else resize / min(height, width)
    size = [max(1, round(height * ratio)), max(1, round(width * ratio))]
    scaled = functional.resize(images, size, antialias=True)
    return functional.center_crop(scaled, list(shape[1:]))  # type: ignore[no-any-return]  # torchvision is untyped


def _collate(samples: list[tuple[Tensor, int] | DataError]) -> Images | DataError:
    good = [sample for sample in samples if not isinstance(sample, DataError)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, DataError))
    return torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good])
