"""Measuring networks of other widths: nothing twice, nothing damaged believed, the same plans always."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import Mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress import aim, budgeting, config, files
from compress.aim import Place
from compress.budget import AIM
from compress.budgeting import TABLE, Budgeted, budgeted, chosen
from compress.channelmap import ChannelMap, channel_map
from compress.cost import class_counts
from compress.errors import CompressError, ConfigError, ModelError
from compress.latency import LatencyModel
from compress.meter import (
    NETWORKS,
    RUNS,
    SILENT,
    TRIES,
    Listener,
    Meter,
    _Artifact,
    _Bench,
    _run_ms,
    designs,
    setting_of,
)
from compress.select import levels_of, widths
from compress.trace import Traced, trace
from deploy import latency_table
from deploy.errors import ArtifactError, MeasureError
from deploy.profile import LayerTime, Profile

BASE = "version: 1\nmodel: {name: x:y, input_shape: [4]}\ndata: {name: mnist5k}\nprune: {align: 1}\n"
RATIO = "budget: {latency_ratio: 0.6}\n"


@dataclass
class Bench:
    """A target where each weight of n numbers takes 1e-4 n + 0.01 ms, and 0.02 ms pass besides."""

    place: Place
    example: tuple[torch.Tensor, ...]
    fails_after: ClassVar[int] = 10**6
    measured: ClassVar[list[tuple[int, ...]]] = []
    slow_turns: ClassVar[Sequence[int]] = ()  # in these the machine does something else too
    kind: str = field(default="torch", init=False)

    def exported(self, net: nn.Module, path: Path) -> Path:
        return path

    def artifact(self, net: nn.Module, onnx: Path) -> dict[str, float]:
        weights = {n.removesuffix(".weight"): p for n, p in net.named_parameters() if n.endswith("weight")}
        return {name: 0.01 + 1e-4 * p.numel() for name, p in weights.items()}

    def latencies(self, artifacts: Mapping[str, dict[str, float]]) -> dict[str, float]:
        if len(self.measured) >= self.fails_after:
            raise KeyboardInterrupt
        self.measured.append(tuple(round(ms * 1e6) for ms in list(artifacts.values())[-1].values()))
        found = {name: sum(layers.values()) + 0.02 for name, layers in artifacts.items()}
        if len(self.measured) - 1 not in self.slow_turns:
            return found
        return {name: ms * (1.1 if name == "original" else 1.32) for name, ms in found.items()}

    def profile(self, artifact: dict[str, float]) -> Profile:
        run = sum(artifact.values()) + 0.02
        layers = (LayerTime(name, "Linear", 1, ms, ms / run) for name, ms in artifact.items())
        return Profile("fake", tuple(layers), run, 0.0, 1)

    def kinds(self, artifact: Any) -> dict[str, str]:
        return {}


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(Bench, "measured", [])
    if "slow" not in request.keywords:
        monkeypatch.setattr("compress.meter._Bench", Bench)
        monkeypatch.setattr("deploy.targets.resolve_align", lambda target: 1)  # it has no blocks of channels


@cache
def traced(inputs: int = 4) -> Traced:
    return trace(Mlp((inputs, 48, 40, 32, 3)), (torch.randn(2, inputs),))


@cache
def map_of(inputs: int = 4) -> ChannelMap:
    return channel_map(traced(inputs))


def read(text: str = RATIO) -> config.Config:
    return aim.aimed(config.loads(BASE + text))


def meter_at(path: Path, inputs: int = 4, align: int = 1) -> Meter:
    net, cmap = traced(inputs), map_of(inputs)
    place, levels = aim.place(read()), levels_of(cmap, align, 0.1)
    return Meter(net.net, cmap, levels, net.example, place, path, block=1)


def half(cmap: ChannelMap) -> np.ndarray:
    keep = np.zeros(cmap.units, dtype=bool)
    for own in cmap.members():
        keep[own[::2]] = True
    return keep


def same(a: LatencyModel, b: LatencyModel) -> bool:
    return bool(
        np.array_equal(a.products.factor, b.products.factor)
        and (a.products.power, a.error, a.networks) == (b.products.power, b.error, b.networks)
    )


class TestMeter:
    def test_nothing_is_measured_twice(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "table.json"
        meter = meter_at(path)
        model = meter.calibrated()
        assert len(Bench.measured) == NETWORKS + 1
        assert len({*Bench.measured}) == NETWORKS + 1
        assert model.networks == NETWORKS + 1
        again = meter.calibrated()
        other = meter_at(path).calibrated()
        assert len(Bench.measured) == NETWORKS + 1
        assert same(again, model)
        assert same(other, model)

    def test_the_model_is_right_about_others(self, tmp_path: Path) -> None:
        meter = meter_at(tmp_path / "table.json")
        model, keep = meter.calibrated(), half(map_of())
        counts = class_counts(map_of(), keep)
        measured = meter.ratio(keep)
        assert model.ms(counts) / model.original_ms == pytest.approx(measured, rel=0.01)
        assert model.error < 0.01
        sizes = [c * o + 0 for c, o in ((24, 4), (20, 24), (16, 20), (3, 16))]
        assert measured == pytest.approx((0.06 + 1e-4 * sum(sizes)) / model.original_ms, rel=1e-6)

    def test_a_look_is_kept_and_does_not_change_the_model(self, tmp_path: Path) -> None:
        path = tmp_path / "table.json"
        meter = meter_at(path)
        model, ratio = meter.calibrated(), meter.ratio(half(map_of()))
        count = len(Bench.measured)
        other = meter_at(path)
        assert other.ratio(half(map_of())) == ratio
        assert same(other.calibrated(), model)
        assert len(Bench.measured) == count
        assert (len(other.table.entries), len(other.table.looks)) == (NETWORKS + 1, 1)

    def test_while_the_unpruned_network_is_slower_than_before_it_waits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, keep = tmp_path / "table.json", half(map_of())
        quiet = meter_at(tmp_path / "other.json").ratio(keep)
        monkeypatch.setattr("deploy.quiet.time.sleep", lambda seconds: None)
        monkeypatch.setattr(Bench, "measured", [])
        monkeypatch.setattr(Bench, "slow_turns", (1, 2))
        meter_at(path).ratio(np.ones_like(keep))
        assert meter_at(path).ratio(keep) == quiet  # the table knows how fast the unpruned one is
        assert len(Bench.measured) == 4

    def test_stopped_in_the_middle_it_goes_on_from_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "table.json"
        monkeypatch.setattr(Bench, "fails_after", 4)
        with pytest.raises(KeyboardInterrupt):
            meter_at(path).calibrated()
        assert len(latency_table.read(path, setting_of(aim.place(read()))).entries) == 4
        monkeypatch.setattr(Bench, "fails_after", 10**6)
        model = meter_at(path).calibrated()
        assert len(Bench.measured) == NETWORKS + 1
        whole = meter_at(tmp_path / "whole.json").calibrated()
        assert same(model, whole)

    def test_networks_of_one_table_do_not_mix(self, tmp_path: Path) -> None:
        path = tmp_path / "table.json"
        meter_at(path).calibrated()
        other = meter_at(path, inputs=6)
        assert other.calibrated().networks == NETWORKS + 1
        assert len(Bench.measured) == 2 * (NETWORKS + 1)
        assert len({entry.model for entry in other.table.entries}) == 2

    def test_few_widths_need_few_networks(self, tmp_path: Path) -> None:
        path = tmp_path / "table.json"
        model = meter_at(path, align=32).calibrated()
        assert len(Bench.measured) == len({*Bench.measured}) < NETWORKS
        assert same(meter_at(path, align=32).calibrated(), model)
        assert len(Bench.measured) < NETWORKS

    def test_the_net_is_left_as_it_is(self, tmp_path: Path) -> None:
        net = traced().net
        before = {name: value.clone() for name, value in net.state_dict().items()}
        meter_at(tmp_path / "table.json").calibrated()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


levels = st.lists(
    st.builds(
        widths, st.integers(1, 96), st.sampled_from([1, 4, 16]), st.just(1), st.sampled_from([0.1, 0.6, 1.0])
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(levels, st.integers(2, 12))
def test_designs_are_allowed_widths_always_the_same(allowed: list[np.ndarray], count: int) -> None:
    plans = designs(allowed, count)
    assert len(plans) == count
    for plan in plans:
        assert all(n in own for n, own in zip(plan, allowed, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(plans, designs(allowed, count), strict=True))
    for group, own in enumerate(allowed):
        if count > 3 and len(own) > 1 and own[0] <= 0.5 * own[-1]:
            assert len({int(plan[group]) for plan in plans}) > 1


def of(text: str, folder: Path, run: Path | None = None, listener: Listener = SILENT) -> Budgeted:
    return budgeted(
        read(text), traced().net, map_of(), traced().example, run=run, folder=folder, listener=listener
    )


class TestBudgeted:
    def test_it_says_what_it_waits_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        monkeypatch.setattr("deploy.quiet.time.sleep", lambda seconds: None)
        monkeypatch.setattr(Bench, "slow_turns", (2, 3))
        of(RATIO, tmp_path, listener=Listener(note=said.append))
        assert said == ["waiting for a quiet machine: the original network takes 10% longer than before"]

    def test_a_run_shares_what_it_measures(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        one.mkdir(), two.mkdir()
        found = of(RATIO, tmp_path, one)
        assert found.measure is not None
        found.measure(half(map_of()))
        count = len(Bench.measured)
        assert len(files.read_json(one / TABLE)["looks"]) == 1
        again = of(RATIO, tmp_path, one)  # a run that goes on decides as before
        assert again.latency is not None
        assert found.latency is not None
        assert same(again.latency, found.latency)
        other = of(RATIO, tmp_path, two)
        assert len(Bench.measured) == count
        assert other.latency is not None
        assert other.latency.networks == NETWORKS + 2  # the look of the first, too
        assert of(RATIO, tmp_path).latency is not None
        assert len(Bench.measured) == count

    @pytest.mark.parametrize("run", ["run", None])
    def test_a_damaged_cache_is_measured_anew(self, tmp_path: Path, run: str | None) -> None:
        place = tmp_path / "run" if run else None
        (tmp_path / "run").mkdir()
        of(RATIO, tmp_path)
        cached = list((tmp_path / "cache" / "compress").iterdir())
        assert len(cached) == 1
        cached[0].write_text("{")
        count = len(Bench.measured)
        of(RATIO, tmp_path, place)
        assert len(Bench.measured) == 2 * count
        assert json.loads(cached[0].read_text())["entries"]

    def test_a_damaged_table_of_the_run_is_measured_anew(self, tmp_path: Path) -> None:
        (tmp_path / TABLE).write_text("7")
        of(RATIO, tmp_path, tmp_path)
        assert len(files.read_json(tmp_path / TABLE)["entries"]) == NETWORKS + 1

    def test_a_cache_that_cannot_be_written_is_no_cache(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file where a folder should be")
        run = tmp_path / "run"
        run.mkdir()
        assert of(RATIO, tmp_path, run).latency is not None

    def test_a_table_of_the_config(self, tmp_path: Path) -> None:
        text = "budget: {latency_ratio: 0.6, table: shared.json}\n"
        (tmp_path / "run").mkdir()
        of(text, tmp_path, tmp_path / "run")
        assert len(files.read_json(tmp_path / "shared.json")["entries"]) == NETWORKS + 1
        assert not (tmp_path / "cache").exists()
        (tmp_path / "again").mkdir()
        of(text, tmp_path, tmp_path / "again")
        assert len(Bench.measured) == NETWORKS + 1
        (tmp_path / "shared.json").write_text("{}")
        with pytest.raises(ArtifactError, match=r"^shared\.json: is no table of latencies: ") as caught:
            of(text, tmp_path, tmp_path / "run")
        assert caught.value.exit_code == 8
        assert (tmp_path / "shared.json").read_text() == "{}"

    def test_a_table_of_another_machine(self, tmp_path: Path) -> None:
        text = "budget: {latency_ratio: 0.6, table: shared.json}\n"
        of(text, tmp_path)
        document = files.read_json(tmp_path / "shared.json")
        document["setting"]["hardware"] = "a board"
        files.write_json(tmp_path / "shared.json", document)
        with pytest.raises(
            MeasureError, match=r"^shared\.json: was measured elsewhere: hardware is a board, here "
        ):
            of(text, tmp_path)

    @pytest.mark.parametrize(
        ("text", "kind", "said"),
        [
            (
                "budget: {latency_ms: 900}",
                ConfigError,
                "budget.latency_ms: the model takes 0.409 ms on cpu-ort as it is; ask for less than that, "
                "found 900",
            ),
            ("budget: {latency_ratio: 0.1}", ModelError, "budget: 0.0409 ms cannot be reached: 0.0"),
            ("budget: {latency_ms: 0.01}", ModelError, "budget: 0.01 ms cannot be reached: 0.0"),
            (
                "budget: {latency_ratio: 0.9, macs_ratio: 0.001}",
                ModelError,
                "macs_ratio 0.001 cannot be reached",
            ),
        ],
    )
    def test_what_cannot_be_had(
        self, tmp_path: Path, text: str, kind: type[CompressError], said: str
    ) -> None:
        with pytest.raises(kind) as caught:
            of(text, tmp_path)
        assert str(caught.value).startswith(said)
        assert len(str(caught.value).splitlines()) == 1
        if kind is ModelError:
            assert "lower prune.min_keep (0.1) or prune.align (1)" in str(caught.value)

    def test_all_steps_at_once_end_where_they_should(self, tmp_path: Path) -> None:
        found = of("budget: {latency_ratio: 0.6, macs_ratio: 0.8, params_ratio: 0.9}\n", tmp_path)
        assert {t.kind: t.ratio for t in found.where.targets} == {
            "latency": 0.6 * AIM,
            "macs": 0.8,
            "params": 0.9,
        }
        scores = np.random.default_rng(0).random(map_of().units)
        keep, reached, looks = chosen(found, scores)
        assert reached
        assert looks[-1].fits
        facts = found.as_dict(keep, looks, looks[-1], 0.0)
        assert facts["asked"] == {"macs_ratio": 0.8, "params_ratio": 0.9}
        latency = facts["latency"]
        assert latency["measured_ratio"] == looks[-1].measured
        assert latency["asked_ratio"] == pytest.approx(0.6)
        assert latency["asked_ms"] == pytest.approx(0.6 * latency["original_ms"])
        assert latency["looks"][-1] == {
            "asked": pytest.approx(0.6), "predicted": looks[-1].predicted,
            "measured": looks[-1].measured, "fits": True, "near": True, "on_the_way": False,
        }  # fmt: skip
        json.dumps(facts, allow_nan=False)
        counts = class_counts(map_of(), keep)
        assert found.where.cost.ratio("macs", counts) <= 0.8

    def test_without_latency_nothing_is_measured(self, tmp_path: Path) -> None:
        found = of("budget: {macs_ratio: 0.5, params_ratio: 0.6}\n", tmp_path, tmp_path)
        assert (found.measure, found.latency, Bench.measured) == (None, None, [])
        keep, reached, looks = chosen(found, np.random.default_rng(0).random(map_of().units))
        assert found.as_dict(keep, (), None, 0.1) == {
            "asked": {"macs_ratio": 0.5, "params_ratio": 0.6}, "gap": 0.1, "latency": None, "energy": None,
            "memory": None,
        }  # fmt: skip
        assert (reached, looks) == (True, ())
        assert found.where.cost.ratio("params", class_counts(map_of(), keep)) <= 0.6
        assert not (tmp_path / budgeting.TABLE).exists()


def test_the_setting_tells_targets_apart() -> None:
    own = setting_of(aim.place(read()))
    assert (own.runner, own.precision, own.threads, own.batch) == ("onnxruntime", "fp32", 1, 32)
    assert own.version[0].isdigit()
    assert (
        own.differs(setting_of(aim.place(read("budget: {latency_ratio: 0.6, batch: 1}\n"))))
        == "batch is 1, here 32"
    )


def test_a_disturbed_profile_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that take longer than their run, on a busy machine; three times, and then it is told."""
    asked: list[int] = []
    quiet = Bench(aim.place(read()), ()).profile({"conv": 1.0})

    def profile(models: Any, inputs: Any, *, runs: int, threads: int) -> dict[str, Profile]:
        asked.append(runs)
        if len(asked) < good:
            raise MeasureError("18 kernels take 30 ms of a run of 28 ms", "profile", "profile more runs")
        return {"": quiet}

    monkeypatch.setattr("deploy.profilers.profile_onnx", profile)
    own, artifact = _Bench(aim.place(read()), (torch.zeros(2, 4),)), _Artifact("a file")
    good = 3
    assert own.profile(artifact) is quiet
    assert asked == [RUNS, 2 * RUNS, 3 * RUNS]
    asked.clear()
    good = 99
    with pytest.raises(MeasureError, match="profile more runs"):
        own.profile(artifact)
    assert len(asked) == TRIES


def test_an_interrupted_profile_puts_nothing_outside_the_layers() -> None:
    """Kernels of 3 ms in a run of 9 ms, where the network takes 3.2 ms undisturbed."""
    layers = (LayerTime("a", "Conv", 1, 2.0, 0.2), LayerTime("b", "Conv", 1, 1.0, 0.1))
    assert _run_ms(Profile("fake", layers, 9.0, 0.0, 1), 3.2) == 3.2
    assert _run_ms(Profile("fake", layers, 3.1, 0.0, 1), 3.2) == 3.1
    assert _run_ms(Profile("fake", layers, 9.0, 0.0, 1), 2.5) == 3.0
