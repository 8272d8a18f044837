"""What can be had before training: the front, what each class costs, staircases; and that people see it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import images, randomise
from pipelines import LOOKED_AT
from rich.console import Console

from compress import aim, meter
from compress.channelmap import ChannelMap, channel_map
from compress.cli import main
from compress.cost import cost_model, in_blocks
from compress.front import Outlook
from compress.inspection import written_by
from compress.latency import LatencyModel
from compress.meter import setting_of
from compress.select import levels_of
from compress.show_inspect import show_front
from compress.trace import trace
from compress.zoo import cifar_resnet
from deploy import targets
from deploy.front_chart import draw_front
from deploy.latency_table import Entry, Table

BLOCK = 4
ERROR = 0.05


def outlook(error: float = ERROR) -> Outlook:
    """A small ResNet that takes a nanosecond per MAC, in blocks of four channels."""
    traced = trace(randomise(cifar_resnet(8, width=8, classes=4)).eval(), images(size=10))
    cmap = channel_map(traced)
    cost = cost_model(cmap)
    products = replace(cost.macs, factor=cost.macs.factor * 1e-6, block=BLOCK)
    names = tuple(term.weight.removesuffix(".weight") for term in cmap.terms)
    latency = LatencyModel(products, names, products.total(cost.full), error, 9)
    scores = np.random.default_rng(0).random(cmap.units) * (1 + cmap.classes)
    return Outlook(cmap, latency.added_to(cost), latency, levels_of(cmap, BLOCK, 0.1), scores)


def group(cmap: ChannelMap, layers: tuple[str, ...]) -> int:
    return written_by(cmap).index(list(layers))


def test_a_front_goes_from_the_whole_network_to_the_narrowest() -> None:
    found = outlook()
    points = found.front()
    assert (points[0].ratio, points[0].importance, points[0].macs_ratio) == (1.0, pytest.approx(1.0), 1.0)
    assert points[-1].units == found.narrowest.sum()
    assert points[-1].latency_ms == pytest.approx(found.latency.ms(found.narrowest))
    for earlier, later in pairwise(points):
        assert later.latency_ms < earlier.latency_ms
        assert later.units < earlier.units
        assert later.importance <= earlier.importance
        assert later.params_ratio < earlier.params_ratio


def test_a_point_keeps_the_most_important_units_of_its_widths() -> None:
    found = outlook()
    counts, kept = found.narrowest, 0.0
    for own, count in zip(found.cmap.members(), counts, strict=True):
        kept += np.sort(found.scores[own])[-count:].sum()
    assert found.importance(counts) == pytest.approx(kept / found.scores.sum())
    assert found.front()[-1].importance == pytest.approx(kept / found.scores.sum())


def test_scores_below_zero_are_worth_nothing() -> None:
    found = outlook()
    doubtful = replace(found, scores=found.scores - 1.0)
    positive = np.maximum(found.scores - 1.0, 0)
    counts = found.cost.full.copy()
    counts[0] -= 4
    gone = np.sort(positive[found.cmap.members()[0]])[:4].sum()
    assert doubtful.importance(counts) == pytest.approx(1 - gone / positive.sum())


def test_the_band_is_the_models_error_and_the_unpruned_network_has_none() -> None:
    first, second, *_ = outlook().front()
    assert first.low_ms == first.high_ms == first.latency_ms
    assert second.low_ms == pytest.approx(second.latency_ms * (1 - ERROR))
    assert second.high_ms == pytest.approx(second.latency_ms * (1 + ERROR))
    _, unknown, *_ = outlook(error=float("nan")).front()
    assert (unknown.low_ms, unknown.high_ms) == (None, None)


def test_a_network_that_cannot_become_faster_has_one_point() -> None:
    found = outlook()
    products = found.latency.products
    fixed = replace(products, base=np.ones_like(products.base), weight=np.zeros_like(products.weight))
    latency = replace(found.latency, products=fixed, original_ms=fixed.total(found.cost.full))
    same = replace(found, latency=latency, cost=latency.added_to(found.cost))
    assert [point.ratio for point in same.front()] == [1.0]
    assert all((one.saved_ms, one.ratio, one.layers_ms) == (0, 0, 0) for one in same.classes())
    assert same.staircases(same.levels) == []


def test_what_a_class_costs_and_is_worth() -> None:
    found = outlook()
    whole, classes = found.latency.ms(found.cost.full), found.classes()
    assert sum(one.units for one in classes) == found.cmap.units
    ratios = [one.ratio for one in classes if one.ratio is not None]
    assert ratios == sorted(ratios, reverse=True)
    for one in classes:
        number = group(found.cmap, one.layers)
        counts = found.cost.full.copy()
        counts[number] = one.narrowest
        assert one.saved_ms == pytest.approx(whole - found.latency.ms(counts))
        assert one.latency_share == pytest.approx(one.saved_ms / whole)
        assert one.importance_share == pytest.approx(1 - found.importance(counts))
        assert one.ratio == pytest.approx(one.latency_share / one.importance_share)


def test_a_class_touches_the_layers_that_write_and_read_it() -> None:
    found = outlook()
    (inner,) = (one for one in found.classes() if one.layers == ("layer1.0.conv1",))
    by_layer = found.latency.by_layer(found.cost.full)
    assert inner.layers_ms == pytest.approx(by_layer["layer1.0.conv1"] + by_layer["layer1.0.conv2"])
    assert 0 < inner.saved_ms < inner.layers_ms


def test_a_class_that_is_whole_already_comes_last() -> None:
    found = outlook()
    levels = (found.levels[0][-1:], *found.levels[1:])
    last = replace(found, levels=levels).classes()[-1]
    assert group(found.cmap, last.layers) == 0
    assert (last.saved_ms, last.importance_share, last.ratio) == (0, 0, None)


def test_a_staircase_has_a_step_for_every_block() -> None:
    found = outlook()
    first, *rest = found.staircases(found.levels, most=3)
    assert len(rest) == 2
    number = group(found.cmap, first.layers)
    assert first.channels == tuple(range(int(found.levels[number][0]), int(found.levels[number][-1]) + 1))
    assert first.good == tuple(found.levels[number].tolist())
    by = dict(zip(first.channels, first.ms, strict=True))
    for channels, ms in by.items():
        counts = found.cost.full.copy()
        counts[number] = channels
        assert ms == found.latency.ms(counts)
        assert ms == pytest.approx(by[int(in_blocks(np.array(float(channels)), BLOCK))])
    assert len(set(first.ms)) == len(first.good) > 1
    saved = [found.latency.original_ms - one.ms[0] for one in (first, *rest)]
    assert saved == sorted(saved, reverse=True)


# -- for people ---------------------------------------------------------------------------------------


def document(**given: Any) -> dict[str, Any]:
    found = outlook()
    measured = [
        Entry("m", tuple(counts.tolist()), found.latency.ms(counts), found.latency.original_ms, 0.0, ())
        for counts in (found.cost.full, found.narrowest)
    ]
    head = {
        "model": "some:net", "criterion": "taylor", "target": "cpu-ort", "runner": "onnxruntime",
        "version": "1", "hardware": "a CPU", "precision": "fp32", "threads": 1, "batch": 8,
        "asked_ratio": 0.5,
    }  # fmt: skip
    read: dict[str, Any] = json.loads(json.dumps(head | found.as_dict(found.levels, measured)))
    return read | given


def shown(found: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    show_front(console, found)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_terminal_says_where_how_well_and_what_is_asked() -> None:
    found = document()
    lines = shown(found)
    assert lines[0] == "some:net"
    assert lines[1] == "cpu-ort (onnxruntime 1, fp32, batch 8, 1 thread, a CPU)"
    assert lines[2].endswith(
        "unpruned; the model is fitted to 9 measured networks, 5.0 % off at one that it has not seen"
    )
    first = found["classes"][0]
    share = f"({100 * first['latency_share']:.1f} % of the latency for "
    assert first["latency_share"] > first["importance_share"]
    assert lines[3].startswith(f"cost much and matter little: {', '.join(first['layers'][:3])}")
    assert share in lines[3].replace("\xa0", " ")
    asked = [line for line in lines if line.endswith("the budget's 50.0 %")]
    expected = next(point for point in found["points"] if point["ratio"] <= 0.5)
    assert len(asked) == 1
    assert f"{100 * expected['importance']:.1f} %" in asked[0].replace("\xa0", " ")
    assert (
        sum(line.startswith(("conv1", "layer")) for line in lines) == len(found["classes"]) + 1
    )  # and the heads


def test_measured_networks_lie_on_or_below_the_front() -> None:
    found = document()
    whole, narrowest = found["measured"]
    assert whole == {"ratio": 1.0, "predicted_ratio": pytest.approx(1.0), "importance": pytest.approx(1.0)}
    last = found["points"][-1]
    assert narrowest["ratio"] == pytest.approx(last["ratio"]) == pytest.approx(narrowest["predicted_ratio"])
    assert narrowest["importance"] == pytest.approx(last["importance"])


def test_the_terminal_without_an_error_or_a_budget() -> None:
    points = [point | {"low_ms": None, "high_ms": None} for point in document()["points"]]
    lines = shown(document(model_error=None, asked_ratio=None, points=points))
    assert lines[2].endswith("measured networks, too few to say how well")
    assert not any("±" in line or "budget" in line for line in lines)


@pytest.mark.parametrize("ending", [pytest.param("svg", marks=pytest.mark.slow), "png"])
def test_a_drawing(tmp_path: Path, ending: str) -> None:
    draw_front(document(), tmp_path / f"f.{ending}")
    drawing = (tmp_path / f"f.{ending}").read_bytes()
    if ending == "png":
        assert drawing.startswith(b"\x89PNG")
        return
    said = drawing.decode()
    for wanted in ("some:net on cpu-ort", "model, ± 5.0", "budget", "layer2.0.conv1", "latency saved"):
        assert wanted in said


def test_a_drawing_without_what_is_not_known(tmp_path: Path) -> None:
    points = [point | {"low_ms": None, "high_ms": None} for point in document()["points"]]
    bare = document(model_error=None, asked_ratio=None, points=points, staircases=[], measured=[])
    draw_front(bare, tmp_path / "f.svg")
    said = (tmp_path / "f.svg").read_text()
    assert "model, ±" not in said
    assert "budget" not in said
    assert "whole blocks" not in said


# -- from the command line ----------------------------------------------------------------------------

CONFIG = LOOKED_AT + "bench: {batches: [1]}\n"


def called(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    found = capfd.readouterr()
    return code, found.out, found.err


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in an empty folder, a cache of its own, and measurements that are short."""
    for name, value in (("REPEATS", 3), ("SECONDS", 0.02), ("RUNS", 3)):
        monkeypatch.setattr(meter, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compress.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.slow
def test_a_look_measures_once_and_then_reads(quick: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("--set", "budget={latency_ratio: 0.7}")
    code, out, err = called(capfd, "inspect", "--target", "--json", "--plot", "f.svg", *asked)
    assert code == 0
    assert "measuring networks of other widths" in err
    found = json.loads(out)["result"]
    assert (found["target"], found["runner"], found["batch"]) == ("cpu-ort", "onnxruntime", 1)
    assert (found["asked_ratio"], found["criterion"]) == (0.7, "taylor")
    assert found["networks"] == len(found["measured"]) > 3
    assert found["points"][0]["importance"] == pytest.approx(1.0)
    assert found["points"][-1]["ratio"] < 0.9
    assert sum(one["units"] for one in found["classes"]) == 88
    assert "layer3.0.conv1" in (quick / "f.svg").read_text()
    code, again, err = called(capfd, "inspect", "--target", "--json", *asked)
    assert (code, "measuring" in err) == (0, False)
    assert json.loads(again)["result"] == found
    code, out, _ = called(capfd, "plan", *asked)
    assert code == 0
    assert "Asked for: " in out
    code, out, _ = called(capfd, "inspect", *asked)
    assert code == 0
    assert "what a target would leave" in out


@pytest.mark.slow
def test_a_look_at_a_model_without_data(quick: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = ("torchvision:squeezenet1_1", "--input-shape", "3,64,64", "--classes", "5", "--target")
    code, out, _ = called(capfd, "inspect", *model, "cpu-ort", "--json")
    assert code == 0
    found = json.loads(out)["result"]
    assert (found["criterion"], found["batch"], found["asked_ratio"]) == ("magnitude", 1, None)
    assert found["points"][-1]["importance"] < 0.9
    assert {"features.0"} in [set(one["layers"]) for one in found["classes"]]


def moved(table: Path, **setting: Any) -> None:
    """As if it had been measured elsewhere."""
    document = json.loads(table.read_text())
    table.write_text(json.dumps(document | {"setting": document["setting"] | setting}))


@pytest.mark.slow
def test_a_look_at_a_machine_that_is_elsewhere(quick: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("--set", "budget={latency_ratio: 0.7, table: there.json}")
    code, out, _ = called(capfd, "inspect", "--target", "--json", *asked)
    assert code == 0
    measured_here = json.loads(out)["result"]
    moved(quick / "there.json", hardware="Neoverse V2", version="1.99")
    code, out, err = called(capfd, "inspect", "--target", "--json", *asked)
    assert code == 0
    assert "there.json was measured on Neoverse V2; nothing is measured here" in err
    found = json.loads(out)["result"]
    assert (found["hardware"], found["version"]) == ("Neoverse V2", "1.99")
    assert found["points"] == measured_here["points"]
    code, _, err = called(capfd, "plan", *asked)  # what prunes is measured here
    assert code == 3
    assert "there.json: was measured elsewhere: version is 1.99, here " in err
    moved(quick / "there.json", hardware="NVIDIA H100 80GB HBM3", runner="tensorrt", precision="fp16")
    on_gpu = "budget={latency_ratio: 0.7, target: h100, batch: 1, table: there.json}"
    code, out, err = called(capfd, "inspect", "--target", "--json", "--set", on_gpu)
    assert (code, "needs a CUDA device" in err) == (0, False)
    assert json.loads(out)["result"]["hardware"] == "NVIDIA H100 80GB HBM3"
    code, _, err = called(capfd, "inspect", "--target", "h100-int8", "--set", on_gpu)
    assert code == 6
    assert "--target: h100-int8 needs a CUDA device" in err
    moved(quick / "there.json", threads=7)
    code, _, err = called(capfd, "inspect", "--target", "--set", on_gpu)
    assert code == 6


def test_a_table_from_elsewhere_without_this_model(quick: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setting = setting_of(aim.Place(targets.load("cpu-ort"), "fp32", 1, 1))
    there = replace(setting, hardware="Neoverse V2")
    (quick / "there.json").write_text(json.dumps(Table(there).as_dict()))
    asked = "budget={latency_ratio: 0.7, table: there.json}"
    code, _, err = called(capfd, "inspect", "--target", "--set", asked)
    assert code == 4
    assert "error: there.json: has no measurement of this model, as it is traced here; make it anew" in err


def test_a_look_at_a_target_that_is_not_there(quick: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = called(capfd, "inspect", "compress.yaml", "--target", "cpu-ortt")
    assert code == 3
    assert "error: --target: unknown target 'cpu-ortt'; use cpu-ort" in err
    code, _, err = called(capfd, "inspect", "compress.yaml", "--target", "h100")
    assert code == 6
    said = "h100 needs a CUDA device: latency is measured there; look where there is one; see compress doctor"
    assert f"error: --target: {said}" in err
