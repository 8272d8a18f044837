"""What a layer's least important channels are worth; and that the network is as it was afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomise
from torch import Tensor, nn

from compress.channelmap import ChannelMap, channel_map
from compress.config import DataConfig, ModelConfig
from compress.cost import class_counts, cost_model
from compress.inspection import written_by
from compress.part_trace import arguments, trace_parts
from compress.parts import Whole
from compress.sensitivity import SHARES, Sensitivity, sensitivity
from compress.surgery import mask
from compress.task import CrossEntropy, Evaluation, build_task
from compress.trace import GraphNet, trace
from compress.zoo import cifar_resnet

X = torch.randn(12, 3, 10, 10, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 4


@torch.no_grad()
def evaluate(net: nn.Module) -> Evaluation:
    logits = net(X)
    return Evaluation(
        "top1", float((logits.argmax(1) == Y).float().mean()), float(CrossEntropy()(net, (X, Y))), 12
    )


def prepared() -> tuple[GraphNet, ChannelMap, np.ndarray]:
    traced = trace(randomise(cifar_resnet(8, width=4, classes=4)).eval(), (X[:2],))
    cmap = channel_map(traced)
    return traced.net, cmap, np.random.default_rng(0).random(cmap.units)


def bits(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def group_of(cmap: ChannelMap, one: Sensitivity) -> int:
    return written_by(cmap).index(list(one.layers))


def test_every_point_is_the_masked_network() -> None:
    net, cmap, scores = prepared()
    full, found = sensitivity(net, cmap, scores, evaluate)
    assert full == evaluate(net)
    assert sorted(group_of(cmap, one) for one in found) == list(range(len(found)))
    assert sum(one.units for one in found) == cmap.units
    assert [one.rise for one in found] == sorted((one.rise for one in found), reverse=True)
    moved = 0
    for one in found:
        members = np.flatnonzero(cmap.classes == group_of(cmap, one))
        for share, point in zip(SHARES, one.points, strict=True):
            assert (point.share, point.kept) == (share, max(1, round(share * one.units)))
            keep = np.ones(cmap.units, dtype=bool)
            keep[members[np.argsort(scores[members])][: one.units - point.kept]] = False
            other = copy.deepcopy(net)
            mask(other, cmap, keep)
            expected = evaluate(other)
            assert (point.loss, point.value) == (expected.loss, expected.value)
            assert point.macs == round(cost_model(cmap).macs.total(class_counts(cmap, keep)))
            moved += point.loss != full.loss
        assert one.rise == pytest.approx(np.mean([p.loss for p in one.points]) - full.loss)
    assert moved > len(found)


def test_the_network_is_as_it_was_to_the_bit() -> None:
    net, cmap, scores = prepared()
    before = bits(net)
    masked = []

    def watched(model: nn.Module) -> Evaluation:
        masked.append(any(not torch.equal(model.state_dict()[k], v) for k, v in before.items()))
        return evaluate(model)

    sensitivity(net, cmap, scores, watched)
    assert masked[0] is False
    assert all(masked[1:])
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_an_evaluation_that_fails_leaves_the_network_as_it_was() -> None:
    net, cmap, scores = prepared()
    before, calls = bits(net), iter(range(10))

    def failing(model: nn.Module) -> Evaluation:
        if next(calls) == 4:
            raise RuntimeError("no more")
        return evaluate(model)

    with pytest.raises(RuntimeError, match="no more"):
        sensitivity(net, cmap, scores, failing)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_one_unit_stays_and_no_width_is_evaluated_twice() -> None:
    net, cmap, scores = prepared()
    seen: list[tuple[int, int]] = []
    shares = (0.01, 0.02, 1.0)
    _, found = sensitivity(net, cmap, scores, evaluate, shares=shares, progress=lambda *now: seen.append(now))
    assert all([p.kept for p in one.points] == [1, 1, one.units] for one in found)
    assert seen == [(n + 1, len(found)) for n in range(len(found))]


# -- on some of the validation examples ---------------------------------------------------------------


def digits(**given: Any) -> Any:
    model = ModelConfig(name="x:y", input_shape=[1, 28, 28])
    return build_task(DataConfig(name="mnist5k", batch_size=32, **given), model, 0, Path("."))


def test_few_validation_examples() -> None:
    task = digits(train_limit=400, validation=0.25)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    whole = task.evaluate(net, "validation")
    every, few = task.few(1000)(net), task.few(40)
    assert torch.equal(every.correct, whole.correct)
    assert every.loss == pytest.approx(whole.loss)
    found = few(net)
    assert found.n == 40
    assert torch.equal(found.correct, task.few(40)(net).correct)
    assert task.few(1)(net).n == 1


def test_few_are_not_the_first_ones() -> None:
    task = digits(train_limit=400, validation=0.5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    place = torch.linspace(0, 1, 784)
    with torch.no_grad():  # the logits tell which image it is
        net[1].weight.copy_(torch.stack([place * k for k in range(10)]))
    first = task.evaluate(net, "validation").correct[:20]
    assert not torch.equal(task.few(20)(net).correct, first)


def test_few_examples_of_a_whole_model_around_its_part() -> None:
    task = digits(train_limit=100, validation=0.4)
    model = nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.Sequential(nn.Flatten(), nn.Linear(256, 10))).eval()
    given = arguments(torch.zeros(2, 1, 28, 28))
    expected = task.few(10)(model)
    parts = trace_parts(model, ["0"], given)
    with Whole(model, parts, given) as whole:
        found = whole.around(task).few(10)(parts.traced.net)
    assert torch.equal(found.correct, expected.correct)
    assert found.loss == pytest.approx(expected.loss)
