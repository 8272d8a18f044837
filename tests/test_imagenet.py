"""ImageNet: pictures cropped and scaled as usual for it, and the files of its benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2

from compress.config import DataConfig, ModelConfig, json_schema, load, to_dict
from compress.data import Splits, open_data
from compress.errors import DataError
from compress.recipes import RECIPES
from compress.sources import Draw
from compress.task import build_task

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "imagenet"
files = pytest.mark.parametrize("path", sorted(BENCHMARK.glob("*.yaml")), ids=lambda path: path.stem)


def photographs(root: Path) -> Path:
    """Parts of two real photographs, as JPEG, two for each of two classes, to train on and to test on."""
    for c, photograph in enumerate(load_sample_images().images):
        for part, left in (("train", 0), ("val", 200)):
            folder = root / part / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = photograph[40 * i : 40 * i + 320, left : left + 400]
                Image.fromarray(pixels).save(folder / f"{i}.JPEG", quality=95)
    return root


def opened(folder: Path, shape: tuple[int, ...] = (3, 224, 224), **given: Any) -> Splits:
    found = open_data(DataConfig(name="pics", augment="imagenet", **given), list(shape), folder)
    assert isinstance(found, Splits)
    return found


def drawn(source: Any, indices: list[int], key: tuple[int, int, int] | None) -> Tensor:
    [(images, _)] = source.batches([Draw(torch.tensor(indices), key)])
    return images  # type: ignore[no-any-return]


def test_evaluation_is_on_the_centre_of_the_scaled_picture(tmp_path: Path) -> None:
    photographs(tmp_path / "pics")
    found = drawn(opened(tmp_path).test, [0, 1, 2, 3], None)
    usual = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    paths = sorted((tmp_path / "pics" / "val").rglob("*.JPEG"))
    for image, path in zip(found, paths, strict=True):
        expected = usual(v2.functional.pil_to_tensor(Image.open(path)))
        assert torch.equal((image * 255).round().to(torch.uint8), expected)


def test_another_size_is_scaled_alike_and_resize_is_the_users_where_given(tmp_path: Path) -> None:
    photographs(tmp_path / "pics")
    assert opened(tmp_path).test.resize == 256  # type: ignore[attr-defined]
    assert opened(tmp_path, (3, 112, 128)).test.resize == 128  # type: ignore[attr-defined]
    given = opened(tmp_path, kwargs={"resize": 232, "workers": 1}).test
    assert (given.resize, given.workers) == (232, 1)  # type: ignore[attr-defined]
    plain = open_data(DataConfig(name="pics", augment="flip_crop"), [3, 224, 224], tmp_path).test
    assert plain.resize is None
    assert plain.digest() != opened(tmp_path).test.digest()


def ramps(folder: Path) -> None:
    """A picture whose red is the column and whose green is the row, so that a crop tells where it is from."""
    rows, columns = np.mgrid[0:256, 0:256].astype(np.uint8)
    for part in ("train", "test"):
        (folder / part / "ramp").mkdir(parents=True)
        pixels = np.stack([columns, rows, np.zeros_like(rows)], axis=2)
        Image.fromarray(pixels).save(folder / part / "ramp" / "0.png")


@pytest.mark.parametrize(("augment", "least"), [("imagenet", 0.08), ("flip_crop", 0.35)])
def test_training_crops_a_part_of_the_picture_and_mirrors_half(
    tmp_path: Path, augment: str, least: float
) -> None:
    ramps(tmp_path / "pics")
    config = DataConfig(name="pics", augment=augment)  # type: ignore[arg-type]
    source = open_data(config, [3, 32, 32], tmp_path).train
    crops = torch.cat([drawn(source, [0], (0, epoch, 0)) for epoch in range(200)]) * 255
    red, green = crops[:, 0], crops[:, 1]
    width, height = red.amax((1, 2)) - red.amin((1, 2)), green.amax((1, 2)) - green.amin((1, 2))
    area = (width / 255) * (height / 255)
    assert 0.9 * least < float(area.min()) < least + 0.1
    assert float(area.max()) > 0.85
    mirrored = red[:, 0, 0] > red[:, 0, -1]
    assert 70 < int(mirrored.sum()) < 130
    assert not (green[:, 0, 0] > green[:, -1, 0]).any()  # never upside down


def test_the_same_crops_again_whatever_the_workers(tmp_path: Path) -> None:
    photographs(tmp_path / "pics")
    alone, two = opened(tmp_path, (3, 32, 32)), opened(tmp_path, (3, 32, 32), kwargs={"workers": 2})
    first = drawn(alone.train, [2, 0, 1], (7, 1, 0))
    assert torch.equal(drawn(two.train, [2, 0, 1], (7, 1, 0)), first)
    assert not torch.equal(drawn(alone.train, [2, 0, 1], (7, 2, 0)), first)


def test_a_task_trains_on_crops_and_is_judged_on_centres(tmp_path: Path) -> None:
    photographs(tmp_path / "pics")
    model = ModelConfig(name="x:y", input_shape=[3, 32, 32])
    given = {"name": "pics", "batch_size": 2, "validation": 0.25}
    task, plain = (
        build_task(DataConfig(**given, augment=kind), model, 0, tmp_path)  # type: ignore[arg-type]
        for kind in ("imagenet", "none")
    )
    images, _ = next(iter(task.train_batches(1, 0)))
    assert images.shape == (2, 3, 32, 32)
    assert not torch.equal(images, next(iter(task.train_batches(2, 0)))[0])
    assert task.n_test == 4
    assert task.fingerprint != plain.fingerprint


TENSORS = """
import torch
def pair():
    images, labels = torch.zeros(20, 3, 8, 8), torch.arange(20) % 2
    return {"train": (images, labels), "test": (images, labels)}
def items():
    data = [(torch.zeros(3, 8, 8), i % 2) for i in range(20)]
    return {"train": data, "test": data}
"""


@pytest.mark.parametrize(
    ("name", "what"),
    [("pair", "these are tensors"), ("items", "example "), ("mnist5k", "these are tensors")],
)
def test_images_that_are_no_pictures_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    (tmp_path / "imagenet_tensors.py").write_text(TENSORS)
    monkeypatch.syspath_prepend(str(tmp_path))
    shape = [1, 28, 28] if name == "mnist5k" else [3, 8, 8]
    full = name if name == "mnist5k" else f"imagenet_tensors:{name}"
    config = DataConfig(name=full, batch_size=4, augment="imagenet")
    with pytest.raises(DataError) as caught:
        next(
            iter(
                build_task(config, ModelConfig(name="x:y", input_shape=shape), 0, tmp_path).train_batches(
                    1, 0
                )
            )
        )
    said = str(caught.value)
    assert said.startswith(f"data.augment: imagenet crops pictures of any size, and {what}")
    assert said.endswith("; take flip_crop")


# -- the benchmark's files ----------------------------------------------------------------------------


@files
def test_the_files_load_and_follow_the_paper(path: Path) -> None:
    from jsonschema import Draft7Validator

    config = load(path)
    found = to_dict(config)
    Draft7Validator(json_schema()).validate(found)
    for section, values in RECIPES["molchanov2019"].items():
        assert {key: found[section][key] for key in values} == values
    assert (config.recipe, config.data.augment, config.data.batch_size) == ("molchanov2019", "imagenet", 256)
    assert f"torchvision:{path.stem}" == config.model.name
    by_units = load(path, ["prune.macs_ratio=null", "prune.units_ratio=0.8069"])
    assert (by_units.prune.macs_ratio, by_units.prune.units_ratio) == (None, 0.8069)


@pytest.mark.parametrize(
    ("name", "units", "gigaflops", "row"), [("resnet50", 11392, 4.09, 2.25), ("resnet34", 4736, 3.64, 2.83)]
)
def test_the_files_ask_for_the_papers_rows(name: str, units: int, gigaflops: float, row: float) -> None:
    from compress import inspection

    config = load(BENCHMARK / f"{name}.yaml")
    model = config.model.model_copy(update={"weights": None})
    seen = inspection.inspect(model, BENCHMARK, prune=config.prune, ratios=())
    assert seen["units"] == units
    assert seen["macs"] / 1e9 == pytest.approx(gigaflops, rel=0.01)
    assert config.prune.macs_ratio == pytest.approx(row / gigaflops, abs=1e-3)
