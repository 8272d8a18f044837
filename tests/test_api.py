"""The one call: compress.prune."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

import compress
from compress.errors import CompressError
from compress.zoo import cifar_resnet


def batches(count: int = 4, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 16, 16, generator=g), torch.randint(0, classes, (8,), generator=g))
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


OPTIONS = {"minibatches_per_step": 1, "units_per_step": 20}


def test_returns_a_dense_model_and_leaves_the_given_one_alone() -> None:
    model = cifar_resnet(8, width=8)
    before = copy.deepcopy(model.state_dict())
    dense, result = compress.prune(model, batches()[0][0], batches(), loss, macs_ratio=0.5, **OPTIONS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert result.reached
    assert result.macs[1] <= 0.5 * result.macs[0]
    assert sum(p.numel() for p in dense.parameters()) == result.params[1] < result.params[0]
    assert result.verification.passed
    assert dense(batches()[0][0]).shape == (8, 10)


def test_in_place_slices_the_users_own_module() -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=10)
    same, result = compress.prune(
        model, batches()[0][0], batches(), loss, macs_ratio=0.7, in_place=True, units_per_step=300,
        minibatches_per_step=1,
    )  # fmt: skip
    assert same is model
    assert sum(p.numel() for p in model.parameters()) == result.params[1]
    loss(model, batches()[0]).backward()


def test_in_place_leaves_channels_that_the_code_counts() -> None:
    model = cifar_resnet(8, width=8)
    _, result = compress.prune(
        model, batches()[0][0], batches(), loss, macs_ratio=0.8, in_place=True, **OPTIONS
    )
    assert any(
        "written into the model's code" in pin.reason and "zoo.py" in pin.source for pin in result.pinned
    )
    assert model.layer3[0].conv2.out_channels == 32
    assert model(batches()[0][0]).shape == (8, 10)


def test_any_loss_will_do() -> None:
    """A generator against a fixed critic: no labels, no logits."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.ConvTranspose2d(8, 32, 4),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Tanh(),
    )
    critic = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 1)).requires_grad_(
        False
    )
    noise = [torch.randn(4, 8, 1, 1) for _ in range(3)]
    dense, result = compress.prune(
        generator,
        noise[0],
        noise,
        lambda model, z: -critic(model(z)).mean(),
        macs_ratio=0.5,
        minibatches_per_step=1,
    )
    assert result.reached
    assert dense(noise[0]).shape == (4, 3, 8, 8)
    assert result.history[-1].accuracy is None


def test_save_and_load_need_no_source(tmp_path: object) -> None:
    from pathlib import Path

    stem = Path(str(tmp_path)) / "small"
    dense, _ = compress.prune(cifar_resnet(8, width=8), batches()[0][0], batches(), loss, **OPTIONS)
    compress.save(dense, stem, batches()[0][0])
    x = batches()[0][0]
    assert torch.equal(compress.load(stem)(x), dense.eval()(x))


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"macs_ratio": 0.0}, 3, "compress.prune(macs_ratio): must be more than 0, found 0"),
        ({"macs_ratio": 1.5}, 3, "compress.prune(macs_ratio): must be less than 1, found 1.5"),
        ({"mac_ratio": 0.5}, 3, "compress.prune(mac_ratio): unknown key; did you mean macs_ratio?"),
        ({"keep": ["nosuch"]}, 3, "'nosuch' names no parameter of the model"),
        ({"macs_ratio": 0.001}, 4, "macs_ratio 0.001 cannot be reached"),
        ({"max_accuracy_drop": 0.1}, 3, "max_accuracy_drop needs evaluate"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, object], code: int, text: str) -> None:
    with pytest.raises(CompressError) as refused:
        compress.prune(cifar_resnet(8, width=8), batches()[0][0], batches(), loss, **options)
    assert refused.value.exit_code == code
    assert text in str(refused.value)


def test_keep_pins_a_layer() -> None:
    model = cifar_resnet(8, width=8)
    _, result = compress.prune(
        model,
        batches()[0][0],
        batches(),
        loss,
        macs_ratio=0.7,
        keep=["layer1.0.conv1", "re:^layer2.*conv1"],
        **OPTIONS,
    )
    widths = {layer.name: (layer.before, layer.after) for layer in result.layers}
    assert widths["layer1.0.conv1"][0] == widths["layer1.0.conv1"][1]
    assert widths["layer2.0.conv1"][0] == widths["layer2.0.conv1"][1]
    assert any(pin.reason == "kept on request" for pin in result.pinned)


@pytest.mark.parametrize("criterion", ["taylor", "magnitude", "random"])
@pytest.mark.parametrize("target", ["macs_ratio", "params_ratio", "units_ratio"])
def test_every_criterion_meets_every_target(criterion: str, target: str) -> None:
    model = cifar_resnet(8, width=8)
    dense, result = compress.prune(
        model, batches()[0][0], batches(), loss, criterion=criterion, **{target: 0.6}, **OPTIONS
    )
    left = {
        "macs_ratio": result.macs[1] / result.macs[0],
        "params_ratio": sum(p.numel() for p in dense.parameters())
        / sum(p.numel() for p in model.parameters()),
        "units_ratio": result.history[-1].units_kept / 88,  # 56 inside the blocks, 32 in the streams
    }
    assert result.reached
    assert 0.2 < left[target] <= 0.6


def test_stops_at_the_accuracy_that_may_be_lost_and_says_so() -> None:
    values = iter([0.9, 0.89, 0.88, 0.5])
    options = {**OPTIONS, "units_per_step": 4, "macs_ratio": 0.2, "max_accuracy_drop": 0.05}
    _, result = compress.prune(
        cifar_resnet(8, width=8), batches()[0][0], batches(), loss, evaluate=lambda _: next(values), **options
    )
    assert not result.reached
    assert result.stop_reason == (
        "accuracy fell from 0.9000 to 0.5000, more than max_accuracy_drop 0.05; went back to removal 2"
    )
    assert [step.accuracy for step in result.history] == [0.89, 0.88]
    assert result.verification.passed


def test_public_names() -> None:
    assert all(getattr(compress, name) is not None for name in compress.__all__)
    assert len(compress.__all__) <= 12
