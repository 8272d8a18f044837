"""Runs of models that cannot be traced whole: the part is pruned, trained and judged inside the whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import files
from compress.errors import CompressError, Interrupted
from compress.task import Evaluation, Task
from tests.pipelines import DECIDES, Silent, start, stop_after
from tests.test_parts import pictures

RUN = """
version: 1
seed: 5
model: {name: "mine:net", part: body, input_shape: [1, 28, 28]}
data: {name: mnist5k, batch_size: 32, train_limit: 300, test_limit: 60}
train: {epochs: 1, lr: 0.02}
prune: {macs_ratio: 0.7, minibatches_per_step: 2, units_per_step: 2, align: 1}
finetune: {epochs: 1, lr: 0.01}
bench: {batches: [1], repeats: 3, seconds: 0.05}
gates: {accuracy_drop: null}
out: run
"""


def spots() -> Task:
    """Two pictures with a box each, for a detector that is called with a list of them."""
    images = pictures(0)
    target = {"boxes": torch.tensor([[5.0, 5.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    batch = (images, [target] * 2)

    def loss(net: nn.Module, given: Any) -> Tensor:
        losses: list[Tensor] = list(net.train()(*given).values())
        return torch.stack(losses).sum()

    def evaluate(net: nn.Module, split: str) -> Evaluation:
        with torch.no_grad():
            value = loss(net, batch).item()
        return Evaluation("minus loss", -value, value, 2)

    return Task(
        loss,
        lambda _, start: iter([batch] * (3 - start)),
        3,
        evaluate,
        6,
        2,
        2,
        name="spots",
        example=(images,),
    )


class TestRuns:
    def run(self, folder: Path, text: str, overrides: Sequence[str] = (), **options: Any) -> Any:
        (folder / "compress.yaml").write_text(text)
        return start(folder, overrides, **options)

    @pytest.mark.slow
    def test_data_that_decide(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(DECIDES)
        events = Silent()
        assert self.run(tmp_path, RUN, events=events).exit_code == 0
        assert any("body alone, inside the whole model" in text and "x.sum()" in text for text in events.seen)
        results = files.read_json(tmp_path / "run" / "results.json")
        assert results["model"]["parts"] == ["body"]
        assert results["verification"]["passed"]
        assert results["whole"]["passed"]
        assert results["whole"]["movement"] > 0
        assert results["accuracy"]["n"] == 60  # of the whole model, which alone has ten outputs
        outside = files.read_json(tmp_path / "run" / "plan.json")["shapes"]
        assert set(outside) == {"body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"}
        dense = compress.load(tmp_path / "run" / "dense")
        assert dense(torch.zeros(3, 1, 28, 28))[0].shape == (3, 200)
        assert "The whole model around" in (tmp_path / "run" / "report.html").read_text()
        again = start(tmp_path)
        assert {status for _, status, _ in again.stages} == {"cached"}

    @pytest.mark.slow
    def test_stopped_and_gone_on_with_it_ends_with_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("straight", "stopped"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine.py").write_text(DECIDES)
        self.run(tmp_path / "straight", RUN, until="finetune")
        for calls in (5, 8, 3):  # in the midst of training, and of pruning
            with pytest.raises(Interrupted):
                self.run(tmp_path / "stopped", RUN, until="finetune", should_stop=stop_after(calls))
        self.run(tmp_path / "stopped", RUN, until="finetune")
        for name in ("dense.safetensors", "plan.json"):
            ours, theirs = (tmp_path / folder / "run" / name for folder in ("straight", "stopped"))
            assert ours.read_bytes() == theirs.read_bytes()

    def test_learning_from_the_original_is_refused_before_training(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(DECIDES)
        text = RUN.replace("lr: 0.01}", "lr: 0.01, distill: {alpha: 0.5}}")
        with pytest.raises(
            CompressError, match="only a model that is traced whole can learn from the original"
        ) as no:
            self.run(tmp_path, text)
        assert no.value.exit_code == 3
        assert not (tmp_path / "run" / "train.json").exists()

    @pytest.mark.slow
    def test_a_detector(self, tmp_path: Path) -> None:
        text = RUN.replace("mine:net", "tests.test_parts:detector").replace(
            "mnist5k", "tests.test_part_runs:spots"
        )
        text = text.replace("part: body", "part: [backbone, rpn.head]").replace(
            "train: {epochs: 1, lr: 0.02}", ""
        )
        assert self.run(tmp_path, text).exit_code == 0
        results = files.read_json(tmp_path / "run" / "results.json")
        assert results["model"]["parts"] == ["backbone", "rpn.head"]
        assert results["whole"]["passed"]
        assert results["accuracy"]["metric"] == "minus loss"
        assert results["cost"]["macs"]["after"] <= 0.7 * results["cost"]["macs"]["before"]
        assert all(row["passed"] for row in results["parity"])
