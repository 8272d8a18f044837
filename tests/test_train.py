"""Training: it learns, it resumes to the same bits, and it stops with one clear line."""

from __future__ import annotations

import functools
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from compress import checkpoint as disk
from compress import files
from compress.config import DataConfig, DistillConfig, ModelConfig, TrainConfig
from compress.errors import (
    CompressError,
    ConfigError,
    DataError,
    IntegrityError,
    Interrupted,
    ModelError,
    ResourceError,
)
from compress.objective import Objective, distance
from compress.task import CrossEntropy, Task, build_task
from compress.train import DivergedError, Progress, TrainResult, learning_rate, train

STEPS = 6  # a batch count per epoch of the small task below


def digits(**given: Any) -> Task:
    model = ModelConfig(name="x:y", input_shape=[1, 28, 28])
    return build_task(DataConfig(name="mnist5k", **given), model, 0, Path("."))


@functools.cache
def small_task() -> Task:
    return digits(batch_size=20, train_limit=150, validation=0.2, test_limit=20, augment="flip_crop")


def net(seed: int = 0) -> nn.Module:
    """A small net with what makes resuming hard: batch norm and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def hard(**given: Any) -> TrainConfig:
    """Momentum, decay, warm-up, a falling rate, and smoothed labels."""
    base = {"epochs": 3, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "warmup_epochs": 0.5}
    return TrainConfig(**(base | {"label_smoothing": 0.1} | given))


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


class StopAfter:
    """Says stop once this many steps were done."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def facts(result: TrainResult) -> Any:
    return [replace(epoch, seconds=0.0) for epoch in result.history], result.best_epoch, result.best


def refused(kind: type[CompressError], code: int, call: Callable[[], Any], *texts: str) -> str:
    with pytest.raises(kind) as caught:
        call()
    line = str(caught.value)
    assert caught.value.exit_code == code
    assert len(line.splitlines()) == 1
    for text in texts:
        assert text in line
    return line


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
        config = hard(distill=DistillConfig(alpha=alpha, temperature=2.0))
        found = Objective(CrossEntropy(), config, teacher, torch.device("cpu"))(student, batch)
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


def uninterrupted(config: TrainConfig, **given: Any) -> tuple[dict[str, Tensor], Any]:
    model = net()
    result = train(model, small_task(), config, seed=4, **given)
    return weights(model), facts(result)


class TestResume:
    @pytest.mark.parametrize(("optimizer", "ema"), [("sgd", 0.0), ("adamw", 0.0), ("sgd", 0.9)])
    def test_stopped_at_every_kind_of_step(self, tmp_path: Path, optimizer: str, ema: float) -> None:
        config = hard(optimizer=optimizer, ema=ema, distill=DistillConfig())
        expected, expected_facts = uninterrupted(config, teacher=net(8))
        for stop in (0, 1, 4, STEPS, STEPS + 1, 2 * STEPS - 1, 3 * STEPS - 1):
            folder = tmp_path / str(stop)
            with pytest.raises(Interrupted) as caught:
                train(
                    net(),
                    small_task(),
                    config,
                    seed=4,
                    teacher=net(8),
                    checkpoint=folder,
                    should_stop=StopAfter(stop),
                )
            assert caught.value.exit_code == 130
            assert f"step {stop % STEPS} of {STEPS}" in str(caught.value)
            model = net()
            torch.manual_seed(stop)  # the state of the caller's generators must not matter
            result = train(model, small_task(), config, seed=4, teacher=net(8), checkpoint=folder)
            assert_same(weights(model), expected)
            assert facts(result) == expected_facts

    def test_stopped_after_every_step(self, tmp_path: Path) -> None:
        config = hard()
        expected, expected_facts = uninterrupted(config)
        stops = 0
        while True:
            model = net()
            try:
                result = train(
                    model, small_task(), config, seed=4, checkpoint=tmp_path, should_stop=StopAfter(1)
                )
                break
            except Interrupted:
                stops += 1
        assert stops == 3 * STEPS - 1
        assert_same(weights(model), expected)
        assert facts(result) == expected_facts

    def test_checkpoints_do_not_change_the_result(self, tmp_path: Path) -> None:
        config = hard()
        expected, expected_facts = uninterrupted(config)
        found, found_facts = uninterrupted(config, checkpoint=tmp_path, checkpoint_seconds=0.0)
        assert_same(found, expected)
        assert found_facts == expected_facts
        messages: list[str] = []
        again, again_facts = uninterrupted(
            config, checkpoint=tmp_path, progress=lambda p: messages.append(p.message)
        )
        assert_same(again, expected)  # nothing left to do
        assert again_facts == expected_facts
        assert messages == []

    def test_data_that_draw_from_the_global_generators_do_not_move_the_dropout(self, tmp_path: Path) -> None:
        def batches(epoch: int, start: int) -> Any:
            torch.rand(5)  # as a DataLoader does when it starts
            yield from small_task().train_batches(epoch, start)

        config = hard(epochs=2)
        expected, _ = uninterrupted(config)
        task = replace(small_task(), train_batches=batches)
        with pytest.raises(Interrupted):
            train(net(), task, config, seed=4, checkpoint=tmp_path, should_stop=StopAfter(STEPS + 3))
        model = net()
        train(model, task, config, seed=4, checkpoint=tmp_path)
        assert_same(weights(model), expected)

    def test_noise_of_each_batch_is_the_same_again(self, tmp_path: Path) -> None:
        def batches(epoch: int, start: int) -> Any:
            for images, labels in small_task().train_batches(epoch, start):
                yield images + 0.1 * torch.randn_like(images), labels

        def run(**given: Any) -> dict[str, Tensor]:
            model = net()
            train(model, replace(small_task(), train_batches=batches), hard(epochs=2), seed=4, **given)
            return weights(model)

        with pytest.raises(Interrupted):
            run(checkpoint=tmp_path, should_stop=StopAfter(STEPS + 3))
        assert_same(run(checkpoint=tmp_path), run())

    def test_the_message_says_where_it_goes_on(self, tmp_path: Path) -> None:
        with pytest.raises(Interrupted, match="run the same command again"):
            train(net(), small_task(), hard(), checkpoint=tmp_path, should_stop=StopAfter(STEPS + 2))
        messages: list[str] = []
        train(net(), small_task(), hard(), checkpoint=tmp_path, progress=lambda p: messages.append(p.message))
        assert messages[0] == "going on from epoch 2, step 2"
        assert set(messages[1:]) == {""}
        with pytest.raises(Interrupted, match="nothing was saved"):
            train(net(), small_task(), hard(), should_stop=StopAfter(2))

    @pytest.mark.parametrize("change", ["config", "seed", "weights", "data"])
    def test_another_runs_checkpoint_is_not_taken(self, tmp_path: Path, change: str) -> None:
        with pytest.raises(Interrupted):
            train(net(), small_task(), hard(), checkpoint=tmp_path, should_stop=StopAfter(3))
        task = digits(batch_size=20, train_limit=151, validation=0.2) if change == "data" else small_task()
        config = hard(lr=0.04) if change == "config" else hard()
        seed = 1 if change == "seed" else 0

        def run(**given: Any) -> dict[str, Tensor]:
            model = net(3) if change == "weights" else net()
            train(model, task, config, seed=seed, **given)
            return weights(model)

        messages: list[str] = []
        found = run(checkpoint=tmp_path, progress=lambda p: messages.append(p.message))
        assert messages[0] == f"the checkpoint in {tmp_path} is of another run and is replaced"
        assert_same(found, run())


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_train import hard, net, small_task
from compress.train import train
print("ready", flush=True)
train(net(), small_task(), hard(epochs=4), seed=4, checkpoint=Path({folder!r}), checkpoint_seconds=0.0,
      progress=lambda p: (print(p.epoch, p.step, flush=True), time.sleep(0.05)))
"""


# In a process of its own, for autograd's threads do not survive a fork. Prints how many children were killed.
KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_train import hard, uninterrupted
generator, killed = torch.Generator().manual_seed(7), 0
while True:
    child = os.fork()
    if child == 0:
        try:
            slowly = dict(progress=lambda p: time.sleep(0.02))  # so that the first kills cannot miss
            uninterrupted(hard(), checkpoint=Path({folder!r}), checkpoint_seconds=0.0, **slowly)
        finally:
            os._exit(0)
    time.sleep(0.02 + 0.1 * float(torch.rand(1, generator=generator)) * (1 + killed / 5))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        break
    killed += 1
print(killed)
"""


class TestKilled:
    @pytest.mark.slow
    def test_by_sigkill_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        """Killed in the middle of epoch 2, then gone on with here."""
        root = Path(__file__).parent
        script = SCRIPT.format(tests=str(root), folder=str(tmp_path))
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root.parent
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "2 3":
                process.kill()
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        expected, _ = uninterrupted(hard(epochs=4))
        messages: list[str] = []
        found, _ = uninterrupted(
            hard(epochs=4), checkpoint=tmp_path, progress=lambda p: messages.append(p.message)
        )
        assert messages[0].startswith("going on from epoch 2, step ")
        assert_same(found, expected)

    @pytest.mark.slow
    def test_at_any_moment(self, tmp_path: Path) -> None:
        """Forked children, saving at every step, are killed after random times until one gets to the end."""
        root = Path(__file__).parent
        script = KILLER.format(tests=str(root), folder=str(tmp_path))
        ended = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root.parent, check=True
        )
        assert int(ended.stdout.split()[-1]) >= 2
        expected, expected_facts = uninterrupted(hard())
        found, found_facts = uninterrupted(hard(), checkpoint=tmp_path)
        assert_same(found, expected)
        assert found_facts == expected_facts
        files.clean(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} <= {"a.json", "a.safetensors", "b.json", "b.safetensors"}


class TestCheckpoint:
    def snapshot(self, value: float) -> disk.Snapshot:
        tensors = {
            "x": torch.full((3,), value),
            "n": torch.tensor(3),
            "bytes": torch.zeros(2, dtype=torch.uint8),
        }
        return disk.Snapshot(tensors, {"value": value})

    def test_round_trip_and_two_generations(self, tmp_path: Path) -> None:
        assert disk.load(tmp_path) is None
        for value in (1.0, 2.0, 3.0):
            disk.save(tmp_path, self.snapshot(value))
            found = disk.load(tmp_path)
            assert found is not None
            assert found.state == {"value": value}
            assert torch.equal(found.tensors["x"], torch.full((3,), value))
            assert found.tensors["bytes"].dtype == torch.uint8
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "a.json",
            "a.safetensors",
            "b.json",
            "b.safetensors",
        ]
        values = [json.loads((tmp_path / f"{slot}.json").read_text())["state"]["value"] for slot in "ab"]
        assert sorted(values) == [2.0, 3.0]

    def test_shared_and_strided_tensors(self, tmp_path: Path) -> None:
        x = torch.arange(6.0).view(2, 3)
        disk.save(tmp_path, disk.Snapshot({"x": x, "alias": x, "turned": x.T}, {}))
        found = disk.load(tmp_path)
        assert found is not None
        assert torch.equal(found.tensors["turned"], x.T)
        assert torch.equal(found.tensors["alias"], x)

    def test_every_flipped_byte_goes_back_one_generation(self, tmp_path: Path) -> None:
        for value in (1.0, 2.0):
            disk.save(tmp_path, self.snapshot(value))
        newest = tmp_path / "b.safetensors"
        whole = newest.read_bytes()
        for position in range(0, len(whole), 7):
            data = bytearray(whole)
            data[position] ^= 0x10
            newest.write_bytes(data)
            found = disk.load(tmp_path)
            assert found is not None
            assert found.state == {"value": 1.0}
            assert found.note.startswith("b.safetensors has changed: sha256 ")

    @pytest.mark.parametrize("damage", ["cut", "gone", "record"])
    def test_one_damaged_generation(self, tmp_path: Path, damage: str) -> None:
        for value in (1.0, 2.0):
            disk.save(tmp_path, self.snapshot(value))
        if damage == "record":
            (tmp_path / "b.json").write_text('{"format": 1, "serial"')
        elif damage == "gone":
            (tmp_path / "b.safetensors").unlink()
        else:
            (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-1])
        found = disk.load(tmp_path)
        assert found is not None
        assert found.state == {"value": 1.0}
        disk.save(tmp_path, self.snapshot(5.0))  # the damaged one is the one that is replaced
        found = disk.load(tmp_path)
        assert found is not None
        assert found.state == {"value": 5.0}

    def test_both_damaged(self, tmp_path: Path) -> None:
        for value in (1.0, 2.0):
            disk.save(tmp_path, self.snapshot(value))
        for slot in "ab":
            (tmp_path / f"{slot}.safetensors").write_bytes(b"x")
        refused(
            IntegrityError, 8, lambda: disk.load(tmp_path), "b.safetensors has changed", "remove this folder"
        )

    def test_a_full_disk_leaves_the_last_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        disk.save(tmp_path, self.snapshot(1.0))

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        refused(ResourceError, 7, lambda: disk.save(tmp_path, self.snapshot(2.0)), "no space left")
        found = disk.load(tmp_path)
        assert found is not None
        assert found.state == {"value": 1.0}

    def test_a_damaged_newest_one_is_told_and_the_result_is_the_same(self, tmp_path: Path) -> None:
        config = hard(epochs=2)
        expected, _ = uninterrupted(config)
        with pytest.raises(Interrupted):
            train(
                net(),
                small_task(),
                config,
                seed=4,
                checkpoint=tmp_path,
                checkpoint_seconds=0,
                should_stop=StopAfter(8),
            )
        records = {slot: json.loads((tmp_path / f"{slot}.json").read_text())["serial"] for slot in "ab"}
        newest = tmp_path / f"{max(records, key=lambda slot: records[slot])}.safetensors"
        save_file({"model/x": torch.zeros(1)}, str(newest))
        messages: list[str] = []
        found, _ = uninterrupted(config, checkpoint=tmp_path, progress=lambda p: messages.append(p.message))
        assert f"an earlier checkpoint, because {newest.name} has changed" in messages[0]
        assert_same(found, expected)
