"""Tasks: splits, batches that can be made again, evaluation, and the checks before any work is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from compress.config import DataConfig, ModelConfig
from compress.errors import CompressError, ConfigError, DataError, ModelError
from compress.models import build_model
from compress.task import CrossEntropy, Evaluation, Task, build_task, check, eval_mode, logits_of, move

HERE = Path(".")
DIGITS = (1, 28, 28)


def mnist(seed: int = 0, **given: Any) -> Task:
    model = ModelConfig(name="x:y", input_shape=list(DIGITS))
    return build_task(DataConfig(name="mnist5k", **given), model, seed, HERE)


def linear(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, classes))


def refused(kind: type[CompressError], code: int, call: Any, *texts: str) -> None:
    """``call`` raises ``kind`` with this exit code, in one line that holds every text."""
    with pytest.raises(kind) as caught:
        call()
    line = str(caught.value)
    assert caught.value.exit_code == code
    assert len(line.splitlines()) == 1
    for text in texts:
        assert text in line


def keys(batches: Iterator[Any]) -> list[bytes]:
    return [image.numpy().tobytes() for images, _ in batches for image in images]


class TestSplits:
    def test_sizes(self) -> None:
        task = mnist(batch_size=100)
        assert (task.n_train, task.n_validation, task.n_test, task.classes) == (3600, 400, 1000, 10)
        assert task.batches_per_epoch == 36
        small = mnist(batch_size=64, train_limit=200, test_limit=50, validation=0.25)
        assert (small.n_train, small.n_validation, small.n_test) == (150, 50, 50)
        assert small.batches_per_epoch == 2
        assert mnist(batch_size=500, train_limit=100).batches_per_epoch == 1

    def test_training_and_held_out_images_are_disjoint(self) -> None:
        seen: dict[str, set[bytes]] = {}

        class Spy(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                seen.setdefault(self.split, set()).update(image.numpy().tobytes() for image in images)
                return torch.zeros(len(images), 10)

        task, spy = mnist(batch_size=100), Spy()
        for split in ("validation", "test"):
            spy.split = split
            task.evaluate(spy, split)
        train = set(keys(task.train_batches(1, 0)))
        assert (len(train), len(seen["validation"]), len(seen["test"])) == (3600, 400, 1000)
        assert not train & seen["validation"]
        assert not train & seen["test"]
        assert not seen["validation"] & seen["test"]

    def test_the_split_does_not_depend_on_the_seed_but_the_order_does(self) -> None:
        a, b = mnist(0, batch_size=100), mnist(1, batch_size=100)
        first, second = keys(a.train_batches(1, 0)), keys(b.train_batches(1, 0))
        assert first != second
        assert sorted(first) == sorted(second)
        assert a.fingerprint == b.fingerprint

    def test_too_few_images(self) -> None:
        refused(DataError, 3, lambda: mnist(train_limit=1), "1 training images are too few")

    def test_fingerprint_follows_the_data(self) -> None:
        prints = {mnist(**g).fingerprint for g in ({}, {"train_limit": 100}, {"mean": [0.5], "std": [1.0]})}
        assert len(prints) == 3
        assert mnist().fingerprint in prints

    def test_the_test_examples_have_a_fingerprint_of_their_own(self) -> None:
        ways: list[dict[str, Any]] = [{}, {"train_limit": 100}, {"batch_size": 8}, {"augment": "flip_crop"}]
        assert len({mnist(**way).test_fingerprint for way in ways}) == 1
        assert mnist(test_limit=100).test_fingerprint != mnist().test_fingerprint != ""


class TestBatches:
    @pytest.mark.parametrize("augment", ["none", "flip_crop", "trivial_augment"])
    def test_any_batch_can_be_made_again(self, augment: str) -> None:
        task = mnist(3, batch_size=64, train_limit=500, augment=augment)
        whole = list(task.train_batches(2, 0))
        assert len(whole) == task.batches_per_epoch
        for start in range(len(whole) + 1):
            rest = list(task.train_batches(2, start))
            assert len(rest) == len(whole) - start
            for (images, labels), (again, same) in zip(whole[start:], rest, strict=True):
                assert torch.equal(images, again)
                assert torch.equal(labels, same)

    def test_epochs_differ_and_every_batch_is_full(self) -> None:
        task = mnist(batch_size=64, train_limit=500)
        assert keys(task.train_batches(1, 0)) != keys(task.train_batches(2, 0))
        assert {len(labels) for _, labels in task.train_batches(1, 0)} == {64}

    def test_augmentation_changes_training_images_only(self) -> None:
        plain, augmented = (mnist(batch_size=64, train_limit=500, augment=a) for a in ("none", "flip_crop"))
        (a, same), (b, labels) = next(plain.train_batches(1, 0)), next(augmented.train_batches(1, 0))
        assert torch.equal(same, labels)
        assert not torch.equal(a, b)
        model = linear()
        assert plain.evaluate(model, "test").loss == augmented.evaluate(model, "test").loss

    def test_image_folder(self, tmp_path: Path) -> None:
        for part, n in (("train", 6), ("test", 4)):
            for c in ("a", "b"):
                (tmp_path / "pics" / part / c).mkdir(parents=True)
                for i in range(n):
                    pixels = np.full((12, 12, 3), 200 if c == "a" else 30 + i, np.uint8)
                    Image.fromarray(pixels).save(tmp_path / "pics" / part / c / f"{i}.png")
        model = ModelConfig(name="x:y", input_shape=[3, 8, 8])
        data = DataConfig(name="pics", batch_size=5, augment="flip_crop", validation=0.2)
        task = build_task(data, model, 0, tmp_path)
        assert (task.n_train, task.n_validation, task.n_test, task.classes) == (10, 2, 8, 2)
        whole, rest = list(task.train_batches(1, 0)), list(task.train_batches(1, 1))
        assert torch.equal(whole[1][0], rest[0][0])

        class Bright(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                bright = images.mean((1, 2, 3)) > 0.5
                return torch.stack([bright, ~bright], 1).float()

        found = task.evaluate(Bright(), "test")
        assert (found.value, found.n) == (1.0, 8)


class TestEvaluate:
    def test_value_loss_and_correct_answers(self) -> None:
        class Fixed(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return torch.tensor([0.0, 2.0] + [0.0] * 8).expand(len(images), 10)

        task = mnist(batch_size=77)
        found = task.evaluate(Fixed(), "test")
        ones = found.correct
        assert ones is not None
        assert (found.metric, found.n, ones.dtype, len(ones)) == ("top1", 1000, torch.bool, 1000)
        share = float(ones.double().mean())
        assert found.value == share
        assert 0.08 < share < 0.13
        log_sum = float(torch.tensor([0.0] * 9 + [2.0]).double().logsumexp(0))
        assert found.loss == pytest.approx(log_sum - 2 * share, abs=1e-6)

    def test_the_majority_is_what_the_best_constant_answer_gets(self) -> None:
        class Constant(nn.Module):
            def __init__(self, answer: int) -> None:
                super().__init__()
                self.register_buffer("logits", functional.one_hot(torch.tensor(answer), 10).float())

            def forward(self, images: Tensor) -> Tensor:
                return self.logits.expand(len(images), 10)

        found = [mnist(batch_size=77).evaluate(Constant(answer), "test") for answer in range(10)]
        assert {one.majority for one in found} == {max(one.value for one in found)}
        assert sum(one.value for one in found) == pytest.approx(1)

    def test_order_is_fixed_whatever_the_batch_size(self) -> None:
        torch.manual_seed(0)
        model = linear()
        a, b = (mnist(batch_size=size).evaluate(model, "test").correct for size in (50, 300))
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)

    def test_eval_mode_inside_and_every_mode_restored(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(0.5), nn.Linear(784, 10))
        model[1].eval()
        modes = [module.training for module in model.modules()]
        before = model[1].running_mean.clone()
        task = mnist(batch_size=100, train_limit=100)
        first, second = (task.evaluate(model, "validation").loss for _ in range(2))
        assert first == second  # no dropout
        assert torch.equal(model[1].running_mean, before)
        assert [module.training for module in model.modules()] == modes
        assert model.training

    def test_restored_after_an_error_too(self) -> None:
        model = linear()

        def fail() -> None:
            with eval_mode(model):
                assert not model.training
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert model.training

    def test_unknown_split(self) -> None:
        refused(
            ConfigError,
            3,
            lambda: mnist().evaluate(linear(), "train"),
            "unknown split 'train'",
            "validation, test",
        )


class TestCheck:
    def test_a_good_model(self) -> None:
        torch.manual_seed(0)
        task, model = mnist(batch_size=50), linear()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        rng = torch.get_rng_state()
        assert 1.5 < check(model, task, DIGITS) < 4
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), rng)

    def test_labels_without_an_output(self) -> None:
        text = "mnist5k: labels go up to 9, but the model has 8 outputs; set the model to 10 classes"
        refused(DataError, 3, lambda: check(linear(8), mnist(), DIGITS), text)

    def test_other_shapes(self) -> None:
        text = "images have shape [1, 28, 28], but model.input_shape is [3, 28, 28]"
        refused(DataError, 3, lambda: check(linear(), mnist(), [3, 28, 28]), text)

    def test_a_model_that_fails(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(700, 10))
        text = "model: the model fails on images of shape [128, 1, 28, 28]: RuntimeError: "
        refused(ModelError, 4, lambda: check(model, mnist(), DIGITS), text)

    def test_outputs_that_are_no_logits(self) -> None:
        class Returns(nn.Module):
            def __init__(self, value: Any) -> None:
                super().__init__()
                self.value = value

            def forward(self, images: Tensor) -> Any:
                return self.value

        for value, text in (
            ({"out": 3}, "the model's output is a dict, not a tensor of logits"),
            (torch.zeros(128, 10, 7, 7), "output has shape [128, 10, 7, 7], not [128, classes]"),
        ):
            refused(ModelError, 4, lambda v=value: check(Returns(v), mnist(), DIGITS), text)

    def test_losses_that_are_none(self) -> None:
        for loss, text in (
            (lambda model, batch: model(batch[0]), "not a scalar tensor but has shape [128, 10]"),
            (lambda model, batch: 3.0, "is a float, not a scalar tensor"),
            (lambda model, batch: None, "is a NoneType, not a scalar tensor"),
            (lambda model, batch: model(batch[0]).mean().detach(), "no gradient reaches them"),
            (lambda model, batch: model(batch[0]).sum() * float("nan"), "the loss of the first batch is nan"),
            (lambda model, batch: batch["image"], "the model fails in its loss: "),
        ):
            task = replace(mnist(), loss=loss)
            refused(ModelError, 4, lambda t=task: check(linear(), t, DIGITS), text)


class TestUserTasks:
    def test_any_loss_and_measure(self, tmp_path: Path) -> None:
        (tmp_path / "my_task_a.py").write_text(
            "import torch\n"
            "from compress.task import Evaluation, Task\n"
            "def build(n=4):\n"
            "    def batches(epoch, start):\n"
            "        return iter([{'noise': torch.full((2, 3), float(i))} for i in range(start, n)])\n"
            "    return Task(loss=lambda model, batch: model(batch['noise']).square().mean(),\n"
            "                train_batches=batches, batches_per_epoch=n,\n"
            "                evaluate=lambda model, split: Evaluation('return', 7.5, 0.0, 2),\n"
            "                n_train=8, n_validation=2, n_test=2, name='policy')\n"
            "def wrong(): return 3\n"
        )
        model = ModelConfig(name="x:y", input_shape=[3])
        task = build_task(DataConfig(name="my_task_a:build", kwargs={"n": 5}), model, 0, tmp_path)
        assert (task.name, task.batches_per_epoch, task.classes) == ("policy", 5, None)
        assert check(nn.Linear(3, 1), task, [3]) >= 0
        assert task.evaluate(nn.Linear(3, 1), "test") == Evaluation("return", 7.5, 0.0, 2)
        wrong = DataConfig(name="my_task_a:wrong")
        refused(DataError, 3, lambda: build_task(wrong, model, 0, tmp_path), "my_task_a:wrong: gave a int")

    def test_input_that_is_no_image(self) -> None:
        model = ModelConfig(name="x:y", input_shape=[784])
        text = "images have 3 dimensions, but model.input_shape is [784]"
        refused(DataError, 3, lambda: build_task(DataConfig(name="mnist5k"), model, 0, HERE), text)


class TestSmallThings:
    def test_logits(self) -> None:
        from torchvision.models.googlenet import GoogLeNetOutputs

        x = torch.zeros(2, 3)
        assert logits_of(x) is x
        assert logits_of((x, None)) is x
        assert logits_of(GoogLeNetOutputs(x, None, None)) is x

    def test_smoothing(self) -> None:
        logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
        log_p = logits.log_softmax(1)[0]
        plain = CrossEntropy()(nn.Identity(), (logits, labels))
        smooth = CrossEntropy(0.3)(nn.Identity(), (logits, labels))
        assert float(plain) == pytest.approx(float(-log_p[0]))
        assert float(smooth) == pytest.approx(float(-(0.7 * log_p[0] + 0.1 * log_p.sum())))

    def test_move_keeps_the_structure(self) -> None:
        from typing import NamedTuple

        class Pair(NamedTuple):
            a: Any
            b: Any

        batch = {"x": [torch.ones(2), "text"], "y": (torch.zeros(1), 3), "z": Pair(torch.ones(1), None)}
        moved = move(batch, torch.device("meta"))
        assert moved["x"][0].device.type == moved["y"][0].device.type == moved["z"].a.device.type == "meta"
        assert (moved["x"][1], moved["y"][1], type(moved["z"]).__name__) == ("text", 3, "Pair")


RESNET20 = """
import sys
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, inside, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.pad = stride, (planes - inside) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(x, (0, 0, 0, 0, self.pad, self.pad)))


class ResNet(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        layers = []
        for inside, planes, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            rest = [Block(planes, planes, 1) for _ in range(n - 1)]
            layers.append(nn.Sequential(Block(inside, planes, stride), *rest))
        self.layer1, self.layer2, self.layer3 = layers
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def resnet(n=3):
    return ResNet(n)


def cifar(folder):
    sys.path.insert(0, folder)
    from unpack import load

    parts = {}
    for part in ("train", "test"):
        images, labels = load(part)
        parts[part] = (torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))
    return parts
"""


@pytest.mark.slow
def test_published_weights_reach_their_published_accuracy(tmp_path: Path, compress_data: Path) -> None:
    """ResNet-20 on all of CIFAR-10's test images: 91.73 %, cross-entropy 0.3727."""
    (tmp_path / "my_resnet20.py").write_text(RESNET20)
    weights = str(compress_data / "weights" / "resnet20-12fca82f.th")
    model = ModelConfig(name="my_resnet20:resnet", weights=weights, input_shape=[3, 32, 32])
    data = DataConfig(
        name="my_resnet20:cifar",
        kwargs={"folder": str(compress_data)},
        batch_size=200,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )
    net, task = build_model(model, tmp_path), build_task(data, model, 0, tmp_path)
    assert sum(p.numel() for p in net.parameters()) == 269_722
    assert (task.n_train, task.n_validation, task.n_test) == (45_000, 5_000, 10_000)
    assert check(net, task, [3, 32, 32]) < 0.5
    found = task.evaluate(net, "test")
    assert found.value == 0.9173
    assert found.loss == pytest.approx(0.3727, abs=1e-4)
