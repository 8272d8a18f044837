"""Batch-norm statistics estimated anew: exactly those of the minibatches, and never to the worse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn
from torch.nn import functional

from compress.config import TrainConfig
from compress.errors import DataError, Interrupted
from compress.part_trace import arguments, trace_parts
from compress.parts import Whole
from compress.recalibration import recalibrate
from compress.task import CrossEntropy, Evaluation, Task
from compress.trace import GraphNet, eval_mode, trace
from compress.train import Progress, train
from compress.zoo import cifar_resnet

BATCHES = [
    (torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(i)) * (i + 1) + i, torch.arange(8) % 4)
    for i in range(3)
]


def task(value: Callable[[nn.Module], float] | None = None) -> Task:
    """Three minibatches an epoch; the validation value is `value` of the model, else minus its loss."""

    def evaluate(model: nn.Module, split: str) -> Evaluation:
        assert split == "validation"
        with torch.no_grad(), eval_mode(model):
            loss = sum(float(CrossEntropy()(model, batch)) for batch in BATCHES)
        return Evaluation("value", -loss if value is None else value(model), loss, 24)

    def batches(epoch: int, start: int) -> Iterator[Any]:
        return iter((BATCHES[epoch % 3 :] + BATCHES[: epoch % 3])[start:])

    return Task(CrossEntropy(), batches, 3, evaluate, 24, 24, 0, name="three")


def always(model: nn.Module) -> float:
    return 1.0


class First(nn.Module):
    """A norm right behind the input, so that its statistics are the input's."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=momentum)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((2, 3)))  # type: ignore[no-any-return]


def wrong(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.fill_(40.0)
    return model


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("form", ["graph", "module", "module without momentum"])
def test_wrong_statistics_become_those_of_the_minibatches(form: str) -> None:
    model: nn.Module = wrong(First(None if "without" in form else 0.1))
    if form == "graph":
        model = trace(model.eval(), (BATCHES[0][0],)).net
    found = recalibrate(model, task(), 2, epoch=2)
    seen = [BATCHES[2][0], BATCHES[0][0]]  # the first two of epoch 2
    mean = torch.stack([x.double().mean((0, 2, 3)) for x in seen]).mean(0)
    var = torch.stack([x.double().var((0, 2, 3)) for x in seen]).mean(0)
    has = statistics(model)
    torch.testing.assert_close(has["norm.running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(has["norm.running_var"].double(), var, rtol=1e-6, atol=1e-6)
    assert (found.minibatches, found.norms, found.kept) == (2, 1, True)
    assert found.after > found.before
    assert not model.training


def test_as_torch_does_it_for_averaged_weights() -> None:
    """torch.optim.swa_utils.update_bn, which needs modules, gives the same for a whole ResNet."""
    model = randomise(cifar_resnet(8, width=4, classes=4))
    net = trace(copy.deepcopy(model).eval(), (BATCHES[0][0],)).net
    weights = [p.detach().clone() for p in net.parameters()]
    found = recalibrate(net, task(always), 5)
    torch.optim.swa_utils.update_bn([BATCHES[i % 3] for i in (1, 2, 0, 2, 0)], model)
    for name, expected in statistics(model).items():
        torch.testing.assert_close(net.get_buffer(name), expected, rtol=1e-4, atol=1e-5)
    assert found.norms == 7
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("harm", ["value", "loss", "not a number"])
def test_what_is_worse_is_not_kept(harm: str) -> None:
    model = trace(wrong(First()).eval(), (BATCHES[0][0],)).net
    before = statistics(model)

    def value(net: nn.Module) -> float:
        moved = not torch.equal(net.get_buffer("norm.running_mean"), before["norm.running_mean"])
        return {"value": -1.0, "loss": 0.0, "not a number": float("nan")}[harm] if moved else 0.0

    given = task(value)
    if harm == "loss":  # the same value, a higher loss
        start = value

        def evaluate(net: nn.Module, split: str) -> Evaluation:
            moved = not torch.equal(net.get_buffer("norm.running_mean"), before["norm.running_mean"])
            return Evaluation("value", start(net), 1.0 + moved, 24)

        given = Task(CrossEntropy(), given.train_batches, 3, evaluate, 24, 24, 0)
    found = recalibrate(model, given, 2)
    assert not found.kept
    for name, buffer in statistics(model).items():
        assert torch.equal(buffer, before[name])


class Twice(nn.Module):
    """One norm that is applied twice, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.frozen(self.norm(x) * 2 + 1)).mean((2, 3)))  # type: ignore[no-any-return]


def test_shared_and_frozen_norms() -> None:
    model = wrong(Twice().train())
    model.frozen.eval()
    net = trace(model, (BATCHES[0][0],)).net
    found = recalibrate(net, task(always), 1)
    x = BATCHES[1][0]
    inner = functional.batch_norm(x, None, None, training=True) * 2 + 1
    inner = (inner - 40) / (40 + 1e-5) ** 0.5
    mean = (x.mean((0, 2, 3)) + inner.mean((0, 2, 3))) / 2
    torch.testing.assert_close(net.get_buffer("norm.running_mean"), mean, rtol=1e-4, atol=1e-4)
    assert (net.get_buffer("frozen.running_mean") == 40).all()
    assert found.norms == 1


class Decides(nn.Module):
    """Can be traced in part only; a norm in the part, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.outside = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.outside(self.body(x)).mean((2, 3)))
        return found if x.sum() > -1e9 else x


def test_the_norms_of_a_part_inside_its_whole() -> None:
    torch.manual_seed(0)
    model, given = wrong(Decides()), arguments(BATCHES[0][0])
    parts = trace_parts(model, ["body"], given)
    with Whole(model, parts, given) as whole:
        found = recalibrate(parts.traced.net, whole.around(task(always)), 1)
    mean = BATCHES[1][0].mean((0, 2, 3))
    torch.testing.assert_close(statistics(parts.traced.net)["body.0.running_mean"], mean)
    assert (statistics(model)["outside.running_mean"] == 40).all()
    assert (found.norms, found.kept) == (1, True)


def test_without_batch_norms_nothing_is_done() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(432, 4))
    found = recalibrate(model, task(), 50)
    assert (found.norms, found.kept) == (0, False)
    assert found.after == found.before


def test_the_callers_generators_and_the_result_do_not_depend_on_history() -> None:
    nets = [trace(randomise(cifar_resnet(8, width=4, classes=4)).eval(), (BATCHES[0][0],)).net for _ in "ab"]
    recalibrate(nets[0], task(always), 4, seed=3)
    state = torch.get_rng_state()
    recalibrate(nets[1], task(always), 4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in statistics(nets[0]).items():
        assert torch.equal(nets[1].get_buffer(name), buffer)


def test_stopped_in_between_nothing_has_changed() -> None:
    model = wrong(First())
    asked = iter([False, True])
    with pytest.raises(Interrupted, match="stopped while estimating batch-norm statistics; run the same"):
        recalibrate(model, task(always), 3, should_stop=lambda: next(asked))
    assert all((buffer == 40).all() for buffer in statistics(model).values())


def test_an_epoch_without_batches_is_one_line() -> None:
    empty = Task(CrossEntropy(), lambda epoch, start: iter(()), 3, task().evaluate, 24, 24, 0, name="empty")
    with pytest.raises(DataError, match="empty: epoch 4 has no batches; train_batches must give some"):
        recalibrate(First(), empty, 3, epoch=4)


# -- in training --------------------------------------------------------------------------------------


def fresh() -> GraphNet:
    return trace(wrong(randomise(cifar_resnet(8, width=4, classes=4))).eval(), (BATCHES[0][0],)).net


def test_without_epochs_train_recalibrates_alone() -> None:
    net, other = fresh(), fresh()
    result = train(net, task(always), TrainConfig(epochs=0, recalibrate=3))
    alone = recalibrate(other, task(always), 3, epoch=1)
    assert result.recalibration == alone
    assert (result.history, result.best) == ((), alone.after)
    assert train(fresh(), task(), TrainConfig(epochs=0)).recalibration is None


def test_after_training_the_best_weights_are_recalibrated() -> None:
    config = TrainConfig(epochs=2, lr=0.01, ema=0.9)
    plain, net = fresh(), fresh()
    best = train(plain, task(always), config).best
    result = train(net, task(always), config.model_copy(update={"recalibrate": 3}))
    assert result.recalibration is not None
    assert result.recalibration.before == best == result.best
    recalibrate(plain, task(always), 3, epoch=3)
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_a_run_that_is_stopped_while_recalibrating_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = TrainConfig(epochs=1, lr=0.01, recalibrate=3)
    whole = fresh()
    expected = train(whole, task(), config)
    asked = iter([False] * 4 + [True])  # three steps of training, one minibatch
    net = fresh()
    with pytest.raises(Interrupted, match="batch-norm statistics"):
        train(net, task(), config, checkpoint=tmp_path, should_stop=lambda: next(asked))
    steps: list[Progress] = []
    again = fresh()
    result = train(again, task(), config, checkpoint=tmp_path, progress=steps.append)
    assert steps == []  # no step of training was done again
    assert result.recalibration == expected.recalibration
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
