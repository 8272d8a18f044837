"""benchmarks/gpu.py without a GPU: the order of its rows, its budget, and a dry run on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu
from benchmarks.gpu import DRY, Cell, Settings, cells, run, summary
from deploy.errors import RunnerError


def test_rows_come_in_the_stated_order() -> None:
    found = cells(Settings())
    assert len(found) == len(set(found)) == 5 * 3 * (4 * 2 + 4 * 2 + 4) + 2 + 2
    late = [cell for cell in found if cell.runner == "torch_cuda_compile"]
    assert found[-len(late) :] == late
    first = found[: found.index(Cell("latency", "resnet18", "torch_cuda_graph", "fp32", 8))]
    assert {cell.batch for cell in first} == {1, 64}
    assert {cell.runner for cell in first} == set(Settings().runners)
    assert [cell.kind for cell in found[-len(late) - 4 : -len(late)]] == ["streams"] * 2 + ["buffers"] * 2


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_does_not_fit_the_budget_is_left_out_and_says_so() -> None:
    clock = Clock()

    def measure_cell(cell: Cell) -> dict[str, Any]:
        clock.now += 10.0
        return {"speedup": {"ratio": 2.0}}

    settings = Settings(models=("a",), late_batches=(), late_runners=(), several=(), buffers=())
    rows = run(settings, 55.0, measure_cell, clock)
    assert len(rows) == len(cells(settings)) == 24
    assert clock.now <= 55.0
    done = [row for row in rows if "speedup" in row]
    assert len(done) == 5
    assert {row["left_out"] for row in rows[5:]} == {"the budget of 55 s was used up"}
    assert summary(rows)["left_out"] == 19


def test_a_row_that_fails_says_why_and_costs_no_other() -> None:
    def measure_cell(cell: Cell) -> dict[str, Any]:
        if cell.runner == "onnxruntime":
            raise RunnerError("no CUDA device", "onnxruntime", "install one")
        if cell.batch == 2:
            raise ValueError("two\nlines")
        return {"speedup": {"ratio": 1.5}}

    rows = run(replace(DRY, buffers=()), 60.0, measure_cell)
    assert [row.get("why") for row in rows] == [
        None,
        "onnxruntime: no CUDA device; install one",
        "ValueError: two lines",
        "onnxruntime: no CUDA device; install one",
    ]
    assert summary(rows) == {
        "rows": 4,
        "measured": 1,
        "failed": 3,
        "left_out": 0,
        "median_speedup": {"torch fp32": 1.5},
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_the_file_says_so(tmp_path: Path) -> None:
    gpu.main(["--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["measured"] is False
    assert found["why"].startswith("no NVIDIA GPU at hand: torch.cuda.is_available() is False; install ")
    assert found["rows"] == []
    assert found["provenance"]["machine"]["gpus"] == []


@pytest.mark.slow
def test_a_dry_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str, size: int) -> tuple[dict[str, nn.Module], float]:
        torch.manual_seed(0)
        nets = (nn.Sequential(nn.Conv2d(3, w, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)) for w in (16, 8))
        made = [net.eval() for net in nets]
        for net in made:
            net(torch.zeros(2, 3, size, size))
        return dict(zip(("original", "dense"), made, strict=True)), 0.5

    monkeypatch.setattr(gpu, "halved", small)
    monkeypatch.setattr(gpu, "DRY", replace(DRY, size=8, buffers=()))
    gpu.main(["--dry-run", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["measured"], found["why"]) == (False, "dry run on the CPU")
    assert [(row["runner"], row["batch"]) for row in found["rows"]] == [
        ("torch", 1),
        ("onnxruntime", 1),
        ("torch", 2),
        ("onnxruntime", 2),
    ]
    for row in found["rows"]:
        assert row["macs_ratio"] == 0.5
        assert all(one["passed"] for one in row["parity"].values())
        assert set(row["latency"]) == {"original", "dense"}
        assert row["latency"]["original"]["samples_ms"] >= 10
        assert row["speedup"]["pairs"] == DRY.repeats


def test_a_model_that_computes_something_else_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = {name: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval() for name in ("original", "dense")}
    monkeypatch.setattr(gpu, "halved", lambda name, size: (nets, 0.5))
    settings = replace(DRY, size=8)
    pair = gpu.Pair("m", settings, tmp_path)
    cell = Cell("latency", "m", "torch", "fp32", 1)
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    monkeypatch.setattr(
        gpu.Pair, "artifact", lambda self, which, *_: nets[which] if which == "original" else other
    )
    found = gpu.latency_row(pair, cell, settings)
    assert found["why"] == "not timed: dense differs from PyTorch"
    assert "latency" not in found


@pytest.mark.slow
def test_real_models_are_halved() -> None:
    nets, ratio = gpu.halved("resnet18", 32)
    assert ratio == pytest.approx(0.5, abs=0.02)
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets.values()]
    assert sizes[1] < sizes[0]
