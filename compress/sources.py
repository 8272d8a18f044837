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

SCALES = {"flip_crop": (0.35, 1.0), "imagenet": (0.08, 1.0)}  # of a picture's area, in a random crop of it
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

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, draws: Iterable[Draw]) -> Iterator[Images]:
        for draw in draws:
            own = draw.indices[draw.rows]
            images = self.images[own]
            if draw.key is not None:
                images = flip_crop(
                    images, seeds.generator("augment", *draw.key), len(draw.indices), draw.rows
                )
            yield self.normalise(images), self.labels[own]

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
    augment: str = "flip_crop"

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
            crop = v2.RandomResizedCrop(shape[1:], scale=SCALES[source.augment], antialias=True)
            return v2.RandomHorizontalFlip()(crop(tensor))  # type: ignore[no-any-return]  # torchvision is untyped
        return cover(tensor, shape, source.resize)
    tensor = torch.as_tensor(image)
    check_shape(tuple(tensor.shape), shape, f"example {index}")
    tensor = tensor if tensor.dtype == torch.uint8 else tensor.to(torch.float32)
    if augment and source.augment == "imagenet":
        raise whole_pictures(f"example {index} is a tensor")
    return flip_crop(tensor[None], torch.default_generator)[0] if augment else tensor


def whole_pictures(what: str) -> DataError:
    """What to say where `augment: imagenet` finds images that have the model's size already."""
    return DataError(f"imagenet crops pictures of any size, and {what}", "data.augment", "take flip_crop")


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
