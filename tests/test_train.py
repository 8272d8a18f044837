"""Training: it learns, distils, follows its schedule, and stops with one clear line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from safetensors.torch import load_file
from small_training import STEPS, StopAfter, assert_same, digits, hard, net, small_task, weights
from torch import Tensor, nn
from torch.nn import functional

from compress import checkpoint as disk
from compress.config import DistillConfig, TrainConfig
from compress.errors import ConfigError, DataError, Interrupted, ModelError, ResourceError
from compress.objective import Objective, distance
from compress.task import CrossEntropy, Task
from compress.train import DivergedError, Progress, TrainResult, learning_rate, train


class Indexed(nn.Module):
    """Reads its input through a table of integers, which no average may touch."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 10)
        self.register_buffer("table", torch.arange(784).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(x.flatten(1)[:, self.table])
        return found


class TestLearning:
    def test_real_digits_above_95_percent(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 49, 10)),
        )
        task = digits(batch_size=32)
        config = TrainConfig(epochs=2, lr=0.05, weight_decay=5e-4, warmup_epochs=0.2)
        result = train(model, task, config)
        found = task.evaluate(model, "test")
        assert found.value > 0.95
        assert result.history[-1].loss < result.history[0].loss
        assert not model.training

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_first_step_is_the_optimizers_own(self, optimizer: str) -> None:
        task = replace(small_task(), batches_per_epoch=1)
        config = TrainConfig(epochs=1, optimizer=optimizer, lr=0.01, schedule="constant", weight_decay=0.02)
        model, twin = (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
            nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
        )
        twin.load_state_dict(model.state_dict())
        train(model, task, config)
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        extra = {"momentum": 0.9} if optimizer == "sgd" else {}
        plain = kind(twin.parameters(), lr=0.01, weight_decay=0.02, **extra)  # type: ignore[arg-type]
        images, labels = next(task.train_batches(1, 0))
        functional.cross_entropy(twin(images), labels).backward()
        plain.step()
        assert_same(weights(model), weights(twin))

    def test_the_best_epoch_is_kept(self) -> None:
        task = small_task()
        values = iter([0.5, 0.7, 0.7, 0.6, 0.7])
        losses = iter([1.0, 0.9, 0.8, 0.1, 0.8])
        seen: list[dict[str, Tensor]] = []

        def evaluate(model: nn.Module, split: str) -> Any:
            assert split == "validation"
            seen.append(weights(model))
            return replace(task.evaluate(model, split), value=next(values), loss=next(losses))

        model = net()
        result = train(model, replace(task, evaluate=evaluate), hard(epochs=5))
        assert (result.best_epoch, result.best) == (
            3,
            0.7,
        )  # the tie is broken by the loss, then by the earlier
        assert_same(weights(model), seen[2])
        assert [epoch.epoch for epoch in result.history] == [1, 2, 3, 4, 5]

    def test_running_averages_are_evaluated_and_kept(self) -> None:
        task = replace(small_task(), batches_per_epoch=4)
        images = [batch for batch, _ in zip(task.train_batches(1, 0), range(4), strict=False)]
        config = TrainConfig(epochs=1, lr=0.1, momentum=0.0, schedule="constant", weight_decay=0.0, ema=0.3)
        model, twin = Indexed(), Indexed()
        twin.load_state_dict(model.state_dict())
        train(model, task, config)
        average = weights(twin)
        for count, (x, y) in enumerate(images):
            functional.cross_entropy(twin(x), y).backward()
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter -= 0.1 * parameter.grad  # type: ignore[operator]
                    parameter.grad = None
            decay = min(0.3, (1 + count) / (10 + count)) if count else 0.0
            for name, value in twin.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * value.detach()
        for name, value in weights(model).items():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6, msg=name)

    def test_no_epochs_only_evaluates(self) -> None:
        model, task = net(), small_task()
        before = weights(model)
        result = train(model, task, hard(epochs=0, warmup_epochs=0.0))
        assert (result.history, result.best_epoch) == ((), 0)
        assert result.best == task.evaluate(model, "validation").value
        assert_same(weights(model), before)

    def test_the_callers_generators_and_the_seed(self) -> None:
        torch.manual_seed(11)
        expected = torch.rand(4)
        runs = []
        for seed in (1, 1, 2):
            model = net()
            torch.manual_seed(11)
            train(model, small_task(), hard(epochs=1), seed=seed)
            assert torch.equal(torch.rand(4), expected)
            runs.append(weights(model)["0.weight"])
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])  # another dropout

    def test_progress(self) -> None:
        seen: list[Progress] = []
        train(net(), small_task(), hard(epochs=2), progress=seen.append)
        assert [(p.epoch, p.step) for p in seen] == [(e, s) for e in (1, 2) for s in range(1, STEPS + 1)]
        assert {(p.epochs, p.steps) for p in seen} == {(2, STEPS)}
        assert [p.lr for p in seen] == [learning_rate(hard(epochs=2), i, STEPS) for i in range(2 * STEPS)]

    def test_a_given_optimizer_state_is_used(self) -> None:
        config = TrainConfig(epochs=1, lr=0.1, momentum=0.5, weight_decay=0.0, schedule="constant")
        task = replace(
            small_task(), loss=lambda model, batch: 0.0 * model(batch[0]).sum(), batches_per_epoch=2
        )
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        before = weights(model)
        push = torch.ones(10)
        train(model, task, config, optimizer_state={"1.bias": {"momentum_buffer": push}})
        assert torch.allclose(model[1].bias, before["1.bias"] - 0.1 * (0.5 + 0.25))
        assert torch.equal(push, torch.ones(10))
        for state, text in (
            ({"1.bias": {"momentum_buffer": torch.ones(9)}}, "momentum_buffer of 1.bias has shape [9]"),
            ({"2.bias": {}}, "'2.bias', which is no parameter"),
        ):
            refused(ModelError, 4, lambda s=state: train(model, task, config, optimizer_state=s), text)


class TestSchedule:
    def test_cosine_with_warm_up(self) -> None:
        config = TrainConfig(epochs=4, lr=0.8, warmup_epochs=1.0, schedule="cosine")
        rates = [learning_rate(config, i, 4) for i in range(16)]
        assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
        assert rates[4] == pytest.approx(0.8)
        assert rates[10] == pytest.approx(0.4)
        assert rates[-1] == pytest.approx(0.4 * (1 + math.cos(math.pi * 11 / 12)))
        assert learning_rate(config, 16, 4) == pytest.approx(0.0)

    def test_step_and_constant(self) -> None:
        config = TrainConfig(epochs=6, lr=1.0, schedule="step", step_epochs=2, step_gamma=0.1)
        assert [learning_rate(config, 3 * epoch, 3) for epoch in range(6)] == pytest.approx(
            [1, 1, 0.1, 0.1, 0.01, 0.01]
        )
        assert {learning_rate(TrainConfig(lr=0.3, schedule="constant"), i, 5) for i in range(50)} == {0.3}


class TestDistillation:
    def test_distance_is_the_written_formula(self) -> None:
        torch.manual_seed(0)
        student, teacher = torch.randn(5, 4), torch.randn(5, 4)
        p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
        assert float(distance(student, teacher, 3.0)) == pytest.approx(
            float((p * (p / q).log()).sum(1).mean() * 9), rel=1e-5
        )
        assert float(distance(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)
        text = "the model's logits have shape [5, 4], the teacher's [5, 3]"
        refused(ModelError, 4, lambda: distance(student, teacher[:, :3], 3.0), text)

    @pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
    def test_objective(self, alpha: float) -> None:
        student, teacher = net(1).eval(), net(2)
        batch = next(small_task().train_batches(1, 0))
        config = hard(distill=DistillConfig(alpha=alpha, temperature=2.0), label_smoothing=0.0)
        found = Objective(small_task(), config, teacher, torch.device("cpu"))(student, batch)
        logits = student(batch[0])
        expected = (1 - alpha) * functional.cross_entropy(logits, batch[1])
        expected = expected + alpha * distance(logits, teacher.eval()(batch[0]), 2.0)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        assert not student._forward_hooks
        assert all(p.grad is None for p in teacher.parameters())

    def test_one_forward_pass_a_step(self) -> None:
        model = net()
        config = hard(epochs=2, distill=DistillConfig())
        train(model, small_task(), config, teacher=net(5))
        assert int(model[1].num_batches_tracked) in (STEPS, 2 * STEPS)

    def test_a_student_comes_to_agree_with_its_teacher(self) -> None:
        task, teacher, student = small_task(), net(5), net(6)
        images = next(task.train_batches(9, 0))[0]
        before = float(distance(student.eval()(images), teacher.eval()(images), 1.0).detach())
        # The teacher's labels are random, so agreement can come from its outputs only.
        train(student, task, hard(label_smoothing=0.0, distill=DistillConfig(alpha=1.0)), teacher=teacher)
        assert float(distance(student(images), teacher(images), 1.0).detach()) < 0.7 * before

    def test_refusals(self) -> None:
        config = hard(label_smoothing=0.0, distill=DistillConfig())
        refused(ConfigError, 3, lambda: train(net(), small_task(), config), "distill needs a teacher")
        aside = replace(small_task(), loss=lambda model, batch: model[5].bias.sum())
        refused(ModelError, 4, lambda: train(net(), aside, config, teacher=net()), "does not call the model")


class TestRefusals:
    def test_smoothing_needs_the_known_loss(self) -> None:
        other = replace(small_task(), loss=lambda model, batch: model(batch[0]).mean(), name="mine")
        refused(
            ConfigError, 3, lambda: train(net(), other, hard()), "label_smoothing: mine has a loss of its own"
        )

    def test_fp16_on_the_cpu(self) -> None:
        refused(
            ConfigError,
            3,
            lambda: train(net(), small_task(), hard(amp="fp16")),
            "amp: fp16 needs a CUDA device",
        )

    def test_bf16_on_the_cpu_trains(self) -> None:
        plain, mixed = net(), net()
        train(plain, small_task(), hard(epochs=1))
        result = train(mixed, small_task(), hard(epochs=1, amp="bf16"))
        assert math.isfinite(result.history[0].loss)
        assert mixed[0].weight.dtype == torch.float32
        assert not torch.equal(plain[0].weight, mixed[0].weight)

    def test_nothing_to_train(self) -> None:
        refused(
            ModelError, 4, lambda: train(net().requires_grad_(False), small_task(), hard()), "no parameter"
        )

    def test_frozen_parameters_stay(self) -> None:
        model = net()
        model[0].requires_grad_(False)
        before = weights(model)
        train(model, small_task(), hard(epochs=1))
        assert torch.equal(model[0].weight, before["0.weight"])
        assert not torch.equal(model[5].weight, before["5.weight"])

    def test_batches_that_end_early(self) -> None:
        short = replace(small_task(), batches_per_epoch=STEPS + 1)
        text = f"mnist5k: epoch 1 ended after {STEPS} of {STEPS + 1} batches"
        refused(DataError, 3, lambda: train(net(), short, hard()), text)

    def test_out_of_memory(self) -> None:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

        task = replace(small_task(), loss=loss)
        text = "train: out of memory; lower data.batch_size"
        refused(ResourceError, 7, lambda: train(net(), task, hard(label_smoothing=0.0)), text)


class TestDivergence:
    def failing(self, at: int, kind: str = "loss") -> Task:
        """A task whose loss, or gradient, is NaN at step ``at`` counted from 1."""
        calls = [0]

        def loss(model: nn.Module, batch: Any) -> Tensor:
            calls[0] += 1
            value = CrossEntropy()(model, batch)
            if calls[0] != at:
                return value
            return value * float("nan") if kind == "loss" else value + (model[5].bias.sum() * 0).sqrt()

        return replace(small_task(), loss=loss)

    def test_nan_loss_without_a_checkpoint(self) -> None:
        model = net()
        before = weights(model)
        config = hard(label_smoothing=0.0)
        line = refused(DivergedError, 4, lambda: train(model, self.failing(3), config))
        rate = learning_rate(config, 2, STEPS)
        assert f"the loss (nan) is not finite at epoch 1, step 3 of {STEPS}, learning rate {rate:.3g}" in line
        assert "lower lr" in line
        assert_same(weights(model), before)

    def test_the_last_good_checkpoint_is_restored_and_stays(self, tmp_path: Path) -> None:
        model = net()
        config = hard(label_smoothing=0.0)
        task = self.failing(STEPS + 4)

        def run() -> TrainResult:
            return train(model, task, config, checkpoint=tmp_path, checkpoint_seconds=0.0)

        line = refused(DivergedError, 4, run, f"the last good checkpoint is in {tmp_path}")
        assert f"epoch 2, step 4 of {STEPS}" in line
        found = disk.load(tmp_path)
        assert found is not None
        assert (found.state["position"]["epoch"], found.state["position"]["step"]) == (2, 3)
        assert_same(weights(model), disk.under(found.tensors, "model/"))
        twin = net()
        with pytest.raises(Interrupted):
            train(twin, small_task(), config, should_stop=StopAfter(STEPS + 3), checkpoint=tmp_path / "twin")
        assert_same(weights(model), weights(twin))

    def test_bad_weights_are_never_saved(self, tmp_path: Path) -> None:
        config = hard(label_smoothing=0.0)
        for at, text in ((2, "a weight is not finite"), (STEPS, "the validation loss (nan) is not finite")):
            folder, seconds = tmp_path / str(at), 0.0 if at == 2 else 1e9
            given: dict[str, Any] = {"checkpoint": folder, "checkpoint_seconds": seconds}
            task = self.failing(at, "gradient")
            refused(DivergedError, 4, lambda t=task, g=given: train(net(), t, config, **g), text)
            for file in folder.glob("*.safetensors"):
                assert all(
                    bool(t.isfinite().all()) for t in load_file(file).values() if t.is_floating_point()
                )
