"""The commands that look or compare: inspect, study, plan, convert, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline
from tests.test_cli import Capture, Fake, _here, call, call_json, fake

__all__ = ["_here", "fake"]  # fixtures


def test_inspect_a_model_by_name(capfd: Capture) -> None:
    arguments = ("inspect", "compress.zoo:cifar_resnet", "--input-shape", "3,16,16")
    code, out, _ = call(capfd, *arguments)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert lines[0] == "compress.zoo:cifar_resnet"
    assert "layer1.0.conv1 conv2d 16 590 k 5.8 %" in lines
    assert "10 it is an output of the model output linear.weight, linear.bias" in lines
    document = call_json(capfd, *arguments)
    assert document["result"]["params"] == 269_722  # as counted by hand: He et al. (2016), table 6: 0.27 M


def test_inspect_takes_the_model_of_a_config(capfd: Capture) -> None:
    call(capfd, "init")
    found = call_json(capfd, "inspect")["result"]
    assert found["model"] == "compress.zoo:cifar_resnet"
    assert found["units"] > 0


@pytest.mark.slow
def test_study_of_a_config(capfd: Capture, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        'version: 1\nmodel: {name: "compress.zoo:cifar_resnet", input_shape: [1, 28, 28],\n'
        "  kwargs: {depth: 8, width: 4, channels: 1}}\ndata: {name: mnist5k, test_limit: 30}\n"
    )
    arguments = ("study", str(config), "--batch", "10", "--units", "8", "--plot", str(tmp_path / "s.png"))
    found = call_json(capfd, *arguments)["result"]
    assert (found["left_out"], found["images"]) == (8, 30)
    assert {row["truth"] for row in found["rows"]} == {"mean", "minibatch", "example"}
    assert len(found["scores"]["taylor"]) == len(found["truths"]["minibatch"]) == 8
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = call(capfd, *arguments)
    assert code == 0
    assert "8 of 44 units left out one by one, 30 test images" in out
    assert "within layers" in out
    code, _, err = call(capfd, "study", str(config), "--plot", "s.bmp")
    assert code == 2
    assert "s.bmp does not end in .png, .svg, .pdf" in err


def test_sensitivity_of_a_config(capfd: Capture, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        'version: 1\nmodel: {name: "compress.zoo:cifar_resnet", input_shape: [1, 28, 28],\n'
        "  kwargs: {depth: 8, width: 4, channels: 1}}\n"
        "data: {name: mnist5k, batch_size: 16, train_limit: 100, validation: 0.4}\n"
    )
    arguments = ("inspect", str(config), "--sensitivity", "--images", "30", "--plot", str(tmp_path / "s.svg"))
    found = call_json(capfd, *arguments, "--set", "prune.criterion=magnitude")["result"]
    assert (found["images"], found["metric"], found["criterion"]) == (30, "top1", "magnitude")
    assert sum(one["units"] for one in found["classes"]) == 44
    assert [p["share"] for p in found["classes"][0]["points"]] == found["shares"] == [0.9, 0.75, 0.5, 0.25]
    rises = [one["rise"] for one in found["classes"]]
    assert rises == sorted(rises, reverse=True)
    drawing = (tmp_path / "s.svg").read_text()
    assert "layer1.0.conv1" in drawing
    code, out, err = call(capfd, "inspect", str(config), "--sensitivity")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "with all channels, on 40 validation examples" in lines[1]
    assert "the least important (taylor) left out; most sensitive first" in out
    assert {line.split(" ")[0].rstrip(",") for line in lines[5:]} >= {"conv1", "layer2.0.conv1"}
    assert err == ""  # the model is not to be trained, so there is nothing to warn of


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["torchvision:resnet19"], "unknown torchvision model 'resnet19'; did you mean resnet18"),
        (["no.such:thing"], "no module named 'no'"),
        (["missing.yaml"], "there is no such file; make one with: compress init"),
        (["torchvision:resnet18", "--weights", "w.pt"], "w.pt: no such weights file"),
    ],
)
def test_inspect_of_what_is_not_there_is_one_line(capfd: Capture, arguments: list[str], said: str) -> None:
    code, out, err = call(capfd, "inspect", *arguments)
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1
    assert said in err


PLAN: dict[str, Any] = {
    "target": {"kind": "macs_ratio", "value": 0.5}, "reachable": True, "least": 0.216,
    "macs": {"before": 100, "after": 48}, "params": {"before": 10, "after": 5},
    "units": {"total": 176, "kept": 104},
    "layers": [{"name": "conv1", "before": 16, "after": 8, "pinned": False},
               {"name": "linear", "before": 10, "after": 10, "pinned": True}],
    "plan": {"version": 1},
}  # fmt: skip


def test_plan_shows_and_writes_the_plan(capfd: Capture, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "plan", lambda config, folder, events: PLAN)
    code, out, _ = call(capfd, "plan", "-o", "plan.json")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "OK 50.0 % of the MACs can be kept (the least possible is 21.6 %)"
    assert "conv1 16 8 50 %" in lines
    assert "linear 10 10 100 % stays" in lines
    assert json.loads(Path("plan.json").read_text()) == {"version": 1}
    monkeypatch.setattr(pipeline, "plan", lambda config, folder, events: {**PLAN, "reachable": False})
    assert call(capfd, "plan")[1].startswith("FAIL  50.0 % of the MACs is out of reach: 21.6 % must stay\n")


def test_files_for_another_target(capfd: Capture, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"file": "variants/dense.int8-gpu.onnx", "accuracy": {"value": 0.97}},
            {"file": "variants/dense.fp8.onnx", "accuracy": {"value": None}}]  # fmt: skip

    def convert_for(config: Any, folder: Path, target: str, *, events: Any) -> list[dict[str, Any]]:
        return rows if target == "h100-int8" else []

    monkeypatch.setattr(pipeline, "convert_for", convert_for)
    code, out, _ = call(capfd, "convert", "--target", "h100-int8")
    said = "variants/dense.int8-gpu.onnx 97.00%\nvariants/dense.fp8.onnx not measured\n"
    assert (code, out) == (0, said)
    assert call_json(capfd, "convert", "--target", "h100-int8")["result"] == {"variants": rows}
    assert call(capfd, "convert", "--target", "cpu-ort")[1] == "cpu-ort runs the fp32 files\n"


@pytest.mark.parametrize(("passed", "code", "word"), [(True, 0, "PASS"), (False, 5, "FAIL")])
def test_compare_is_judged_by_parity(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch, passed: bool, code: int, word: str
) -> None:
    def compare(a: Path, b: Path, **asked: Any) -> dict[str, Any]:
        assert (asked["batches"], asked["repeats"], asked["tolerance"]) == ((4, 2), 5, 0.01)
        return {
            "a": {"path": str(a), "bytes": 2000}, "b": {"path": str(b), "bytes": 1000},
            "parity": [{"batch": 4, "relative": 1e-6, "tolerance": 0.01, "argmax_agreement": 1.0,
                        "passed": passed}],
            "latency": [{"model": "a", "batch": 4, "median": 2.0}, {"model": "b", "batch": 4, "median": 1.0}],
            "speedup": [{"batch": 4, "ratio": 2.0, "low": 1.9, "high": 2.1, "verdict": "faster"}],
            "passed": passed,
        }  # fmt: skip

    monkeypatch.setattr(pipeline, "compare", compare)
    options = ("--batch", "4", "--batch", "2", "--repeats", "5", "--tolerance", "0.01")
    found, out, _ = call(capfd, "compare", "a.onnx", "b.onnx", *options)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert found == code
    assert lines[0].startswith(word)
    assert "b 1,000 b.onnx" in lines
    assert "4 2.000 ms 1.000 ms 2.00× 1.90× to 2.10× faster" in lines


def test_compare_of_what_is_not_there_is_one_line(capfd: Capture) -> None:
    code, out, err = call(capfd, "compare", "a.onnx", "b.onnx")
    assert (code, out) == (3, "")
    assert err.startswith("error: a.onnx: no such file")
