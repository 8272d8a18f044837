"""Budgets in the loop and in whole runs: stopped and resumed, and measured on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Mlp, randomise
from torch import Tensor, nn
from torch.nn import functional

from compress import aim, config, files, loop
from compress.budget import AIM, WITHIN, Look
from compress.budgeting import budgeted
from compress.channelmap import channel_map
from compress.cost import class_counts
from compress.errors import Interrupted, TargetError
from compress.loop import Pruned
from compress.meter import Listener
from compress.schema import PruneConfig
from compress.select import Space, Target
from compress.task import Batch, Evaluation, Task
from compress.trace import Traced, trace
from compress.zoo import cifar_resnet
from tests.pipelines import CONFIG, Silent, start, stop_after
from tests.test_budget import Board, space_of

OPTIONS = PruneConfig(minibatches_per_step=2, units_per_step=6, lr=0.02, align=1)


@cache
def data() -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((64, 4), generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    return tuple((x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16))  # type: ignore[return-value]


def task(falls_after: int = 10**6) -> Task:
    """falls_after: evaluations, after which accuracy falls."""
    evaluations = count()

    def batches(epoch: int, start_at: int) -> Iterator[Batch]:
        yield from data()[start_at:]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])  # type: ignore[index]

    def evaluate(model: nn.Module, split: str) -> Evaluation:
        return Evaluation(
            value=0.5 if next(evaluations) < falls_after else 0.1,
            loss=1.0,
            n=64,
            metric="accuracy",
            correct=None,
        )

    return Task(loss, batches, 4, evaluate, n_train=64, n_validation=0, n_test=64)


def net() -> Traced:
    return trace(randomise(Mlp((4, 48, 40, 32, 3))), (torch.randn(2, 4),))


def pruned(
    *targets: Target,
    factor: float = 1.0,
    folder: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    options: PruneConfig = OPTIONS,
    falls_after: int = 10**6,
) -> Pruned:
    traced = net()
    where = space_of(channel_map(traced), *targets)
    if measured(where, factor) is None:
        where = replace(where, cost=replace(where.cost, latency=None))
    return loop.prune(
        traced.net, where.cmap, where, task(falls_after), options,
        checkpoint=folder, should_stop=should_stop, measure=measured(where, factor),
    )  # fmt: skip


def measured(where: Space, factor: float) -> Callable[[np.ndarray], float] | None:
    return Board(where, factor) if any(t.kind == "latency" for t in where.targets) else None


def same(a: Pruned, b: Pruned) -> None:
    assert np.array_equal(a.keep, b.keep)
    assert (a.looks, a.gap, a.reached, a.stop_reason) == (b.looks, b.gap, b.reached, b.stop_reason)
    assert a.history == b.history
    for name, value in a.masked.state_dict().items():
        assert torch.equal(value, b.masked.state_dict()[name]), name


LATENCY = Target("latency", 0.6 * AIM)


class TestLoop:
    @pytest.mark.parametrize("factor", [0.8, pytest.param(1.25, marks=pytest.mark.slow)])
    def test_stopped_after_any_removal_it_ends_the_same(self, tmp_path: Path, factor: float) -> None:
        whole = pruned(LATENCY, factor=factor)
        assert whole.reached
        assert len(whole.looks) >= 2
        for number in range(3, len(whole.history) + 1, 8):
            folder = tmp_path / str(number)
            folder.mkdir()
            with pytest.raises(Interrupted):
                pruned(LATENCY, factor=factor, folder=folder, should_stop=stop_after(number))
            same(pruned(LATENCY, factor=factor, folder=folder), whole)

    @pytest.mark.slow
    def test_every_stop_resumed_at_once(self, tmp_path: Path) -> None:
        whole = pruned(LATENCY, factor=1.2)
        for _ in range(len(whole.history) + 5):
            try:
                done = pruned(LATENCY, factor=1.2, folder=tmp_path, should_stop=stop_after(1))
                break
            except Interrupted:
                continue
        same(done, whole)

    def test_it_says_what_it_reached(self) -> None:
        done = pruned(LATENCY, factor=1.1)
        look = done.look
        assert look is not None
        assert look == done.looks[-1]
        assert look.fits
        assert done.stop_reason == (
            f"target met: {look.measured:.1%} of the original's latency measured, 60.0% asked for"
        )
        ratios = [step.latency_ratio for step in done.history]
        assert ratios[-1] == pytest.approx(look.measured, rel=0.05)
        assert 0 <= done.gap <= 1

    @pytest.mark.slow
    def test_what_is_out_of_reach_is_measured_and_told(self) -> None:
        done = pruned(Target("latency", 0.5 * AIM), factor=2.5)
        assert not done.reached
        look = done.look
        assert look is not None
        assert look.measured > 0.5 * (1 + WITHIN)
        assert done.stop_reason == (
            f"{look.measured:.1%} of the original's latency measured, 50.0% asked for; the widths allowed "
            "and other budgets have nothing nearer"
        )

    @pytest.mark.slow
    def test_several_budgets_are_all_met(self) -> None:
        targets = (LATENCY, Target("macs", 0.5), Target("params", 0.45))
        done = pruned(*targets)
        assert done.reached
        where = space_of(channel_map(net()), *targets)
        counts = class_counts(where.cmap, done.keep)
        assert where.cost.ratio("macs", counts) <= 0.5 + 1e-9
        assert where.cost.ratio("params", counts) <= 0.45 + 1e-9
        assert done.look is not None
        assert done.look.met

    def test_without_latency_nothing_is_asked_of_the_target(self) -> None:
        done = pruned(Target("macs", 0.6), Target("params", 0.7))
        assert (done.reached, done.looks, done.stop_reason) == (True, (), "target met")
        assert all(step.latency_ratio is None for step in done.history)

    @pytest.mark.slow
    def test_another_model_of_the_latency_is_another_pruning(self, tmp_path: Path) -> None:
        with pytest.raises(Interrupted):
            pruned(LATENCY, folder=tmp_path, should_stop=stop_after(4))
        traced = net()
        where = space_of(channel_map(traced), LATENCY, power=0.8)
        done = loop.prune(
            traced.net, where.cmap, where, task(), OPTIONS, checkpoint=tmp_path, measure=Board(where)
        )
        traced = net()
        fresh = loop.prune(traced.net, where.cmap, where, task(), OPTIONS, measure=Board(where))
        same(done, fresh)

    @pytest.mark.slow
    def test_a_tolerance_goes_back_to_what_was_good(self) -> None:
        options = OPTIONS.model_copy(update={"max_accuracy_drop": 0.2})
        done = pruned(LATENCY, options=options, falls_after=5)
        assert not done.reached
        assert done.stop_reason.endswith("went back to removal 4")
        assert len(done.history) == 4
        last = len(pruned(LATENCY).history)
        done = pruned(LATENCY, options=options, falls_after=last)  # the last removal, which was measured
        assert not done.reached
        assert done.stop_reason.endswith(f"went back to removal {last - 1}")
        assert done.look is None


BUDGET = CONFIG.replace("macs_ratio: 0.6, ", "").replace("align: 2", "align: 1")
BUDGET = BUDGET.replace("batches: [1]", "batches: [16]") + "budget: {latency_ratio: 0.6}\n"


@pytest.mark.slow
def test_a_latency_model_of_this_machine(tmp_path: Path) -> None:
    if os.getloadavg()[0] > (os.cpu_count() or 1) / 2:
        pytest.skip("this machine is busy with other work, so it has no latency to model")
    traced = trace(randomise(cifar_resnet(8, 32)).eval(), (torch.randn(2, 3, 32, 32),))
    cmap = channel_map(traced)
    text = "version: 1\nmodel: {name: x:y, input_shape: [3, 32, 32]}\ndata: {name: mnist5k}\n"
    own = aim.aimed(config.loads(text + "bench: {batches: [4]}\nbudget: {latency_ratio: 0.6}\n"))
    seen: list[tuple[int, int]] = []
    found = budgeted(
        own, traced.net, cmap, traced.example, run=None, folder=tmp_path,
        listener=Listener(lambda done, of, text: seen.append((done, of))),
    )  # fmt: skip
    assert seen == [(n, 9) for n in range(9)]
    assert found.latency is not None
    assert found.measure is not None
    assert found.latency.error < 0.25
    keep = np.zeros(cmap.units, dtype=bool)
    for members in cmap.members():
        keep[members[: max(len(members) // 2, 1)]] = True
    predicted = found.where.cost.ratio("latency", class_counts(cmap, keep))
    assert predicted == pytest.approx(found.measure(keep), rel=0.25)
    layers = found.latency.by_layer(found.where.cost.full)
    assert {"conv1", "layer1.0.conv1", "layer3.0.conv2"} <= {name.partition(" > ")[0] for name in layers}


@pytest.mark.slow
def test_a_run_with_a_budget_of_latency(tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text(BUDGET.replace("width: 8", "width: 32"))
    outcome = start(tmp_path)
    run = tmp_path / "run"
    document = files.read_json(run / "prune.json")
    latency = document["budget"]["latency"]
    assert document["target"] == {"kind": "latency_ratio", "value": pytest.approx(0.6)}
    assert (latency["target"], latency["batch"], latency["runner"]) == ("cpu-ort", 16, "onnxruntime")
    looks = [Look(*(look[key] for key in ("asked", "predicted", "measured"))) for look in latency["looks"]]
    assert looks
    assert document["reached"] == looks[-1].met
    assert latency["measured_ratio"] == looks[-1].measured
    assert looks[-1].measured < 0.9
    assert all(step["latency_ratio"] < 1 for step in document["history"])
    gates = {gate["name"]: gate for gate in files.read_json(run / "gate.json")["gates"]}
    assert any("speed" in name for name in gates), gates
    assert outcome.exit_code in (0, 5)  # this machine may be busy while the gate measures
    assert (run / "latency.json").is_file()
    events = Silent()
    start(tmp_path, events=events)
    assert {status for _, status in events.stages} == {"cached"}
    events = Silent()
    again = start(tmp_path, ["bench.threads=2"], events=events, dry_run=True)
    assert "prune" in [name for name, status, _ in again.stages if status != "cached"]


def test_a_gpu_that_is_not_here_is_told_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = CONFIG.replace("macs_ratio: 0.6, ", "")
    (tmp_path / "compress.yaml").write_text(text + "budget: {latency_ms: 1, target: h100}\n")
    events = Silent()
    with pytest.raises(TargetError, match=r"^budget\.target: h100 needs a CUDA device") as caught:
        start(tmp_path, events=events)
    assert caught.value.exit_code == 6
    assert events.stages == []
    assert not (tmp_path / "run").exists()
