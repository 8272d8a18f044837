"""Energy of calls: counters (doubles of them), turns from tick to tick, and runs that are led by it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress import config, files
from compress.errors import ConfigError, TargetError
from deploy import budget_view, energy, telemetry
from deploy.energy import CpuCounter, GpuCounter, open_counter, per_call
from deploy.errors import ArtifactError, MeasureError, RunnerError
from deploy.latency_table import Energy, Setting, Table, read
from tests.pipelines import CONFIG, Silent, start
from tests.runner_doubles import Idle
from tests.test_budget_view import LATENCY, plain


def zone(folder: Path, name: str, uj: int, most: int = 1000) -> Path:
    folder.mkdir()
    for file, value in (("name", name), ("energy_uj", str(uj)), ("max_energy_range_uj", str(most))):
        (folder / file).write_text(value + "\n")
    return folder


class TestCounters:
    def test_a_cpu_is_the_sum_of_its_packages(self, tmp_path: Path) -> None:
        first, second = (zone(tmp_path / f"intel-rapl:{n}", f"package-{n}", 900) for n in range(2))
        zone(tmp_path / "intel-rapl:0:0", "core", 10)
        counter = open_counter(gpu=False, powercap=tmp_path)
        assert counter.joules() == 0
        (first / "energy_uj").write_text("950")
        (second / "energy_uj").write_text("907")
        assert counter.joules() == pytest.approx(57e-6)

    def test_a_package_that_begins_at_0_again_goes_on(self, tmp_path: Path) -> None:
        own = zone(tmp_path / "intel-rapl:0", "package-0", 900, most=1000)
        counter = CpuCounter([own])
        counter.joules()
        (own / "energy_uj").write_text("100")
        assert counter.joules() == pytest.approx(200e-6)

    def test_a_gpu_tells_millijoules(self) -> None:
        nvml = SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1500 if handle == 7 else 0)
        assert GpuCounter(nvml, 7).joules() == 1.5

    def test_no_counter_is_one_line(self, tmp_path: Path) -> None:
        zone(tmp_path / "intel-rapl:0:0", "core", 10)
        with pytest.raises(
            RunnerError, match=r"^energy: this machine has no energy counter: .*; measure where"
        ):
            open_counter(gpu=False, powercap=tmp_path)

    def test_a_counter_that_may_not_be_read(self, tmp_path: Path) -> None:
        own = zone(tmp_path / "intel-rapl:0", "package-0", 1)
        (own / "energy_uj").unlink()
        (own / "energy_uj").mkdir()  # root may read any file
        with pytest.raises(RunnerError, match=r"^energy: cannot read intel-rapl:0/energy_uj: .*; chmod a\+r"):
            open_counter(gpu=False, powercap=tmp_path)

    def test_a_gpu_without_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(handle: object) -> int:
            raise OSError("Not Supported")

        nvml = SimpleNamespace(
            NVMLError=OSError, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda n: n,
            nvmlDeviceGetTotalEnergyConsumption=refuse,
        )  # fmt: skip
        with pytest.raises(RunnerError, match=r"^energy: this GPU has no energy counter: Not Supported; ask"):
            open_counter(gpu=True, nvml=nvml)
        nvml.nvmlInit = lambda: refuse(0)
        with pytest.raises(RunnerError, match=r"^energy: the NVIDIA driver does not answer"):
            open_counter(gpu=True, nvml=nvml)
        monkeypatch.setattr(telemetry, "nvml_module", lambda: None)
        with pytest.raises(RunnerError, match=r"^energy: nvidia-ml-py is not installed; pip install"):
            open_counter(gpu=True)


@dataclass
class World:
    """A device whose counter moves on every `tick` seconds; idle: watts."""

    tick: float = 0.05
    idle: float = 0.0
    now: float = 0.0
    used: float = 0.0
    told: float = 0.0
    last: int = 0
    name: str = "a double"

    def joules(self) -> float:
        if math.floor(self.now / self.tick) > self.last:
            self.last, self.told = math.floor(self.now / self.tick), self.used
        return self.told

    def spend(self, seconds: float, joules: float) -> None:
        self.now += seconds
        self.used += joules + self.idle * seconds


class Call(Idle):
    """Takes so much of a world; first: what its first calls take more, in J."""

    def __init__(self, world: World, seconds: float, joules: float, first: float = 0.0) -> None:
        self.world, self.seconds, self.joules, self.first = world, seconds, joules, first
        self.calls = 0

    def __call__(self) -> Sequence[Any]:
        self.calls += 1
        self.world.spend(self.seconds, self.joules + (self.first if self.calls < 20 else 0.0))
        return ()


def measured(world: World, **runners: Any) -> dict[str, float]:
    return per_call(runners, [[3]], 1, world, rounds=4, seconds=1.0, clock=lambda: world.now)


class TestPerCall:
    def test_a_call_takes_what_it_takes_whatever_the_tick(self) -> None:
        for tick in (0.001, 0.05, 0.1):
            world = World(tick, idle=5.0)
            found = measured(world, original=Call(world, 0.004, 0.2), pruned=Call(world, 0.0013, 0.1))
            # a tick lies up to one call before the reading of it: in a turn of a second, 0.4 %
            assert found["original"] == pytest.approx(1e3 * (0.2 + 5 * 0.004), rel=0.005)
            assert found["pruned"] == pytest.approx(1e3 * (0.1 + 5 * 0.0013), rel=0.005)

    def test_a_device_that_warms_up_is_not_counted(self) -> None:
        world = World()
        assert measured(world, one=Call(world, 0.01, 0.1, first=9.0))["one"] == pytest.approx(100, rel=0.01)

    def test_a_counter_that_stands_still(self) -> None:
        world = World(tick=1e9)
        with pytest.raises(MeasureError, match=r"^energy: the energy counter stands still \(a double\); ask"):
            measured(world, one=Call(world, 0.01, 0.1))


class TestTables:
    setting = Setting("onnxruntime", "1", "a CPU", "fp32", 1, 1)

    def test_energies_are_kept_and_shared(self, tmp_path: Path) -> None:
        table = Table(self.setting, energies=[Energy("m", (3, 4), 2.0, 5.0)])
        files.write_json(tmp_path / "t.json", table.as_dict())
        found = read(tmp_path / "t.json", self.setting)
        assert found == table
        known = found.energy("m", [3, 4])
        assert known is not None
        assert known.ratio == 0.4
        assert found.energy("m", [3, 5]) is None
        assert found.energy("other", [3, 4]) is None
        other = Table(self.setting)
        assert other.add(found)
        assert not other.add(found)
        assert other.energies == found.energies

    def test_a_table_from_before_has_none(self, tmp_path: Path) -> None:
        document = Table(self.setting).as_dict()
        del document["energies"]
        files.write_json(tmp_path / "t.json", document)
        assert read(tmp_path / "t.json").energies == []

    @pytest.mark.parametrize("mj", [0, -1, float("nan"), "2", None])
    def test_what_is_no_energy_is_refused(self, mj: object, tmp_path: Path) -> None:
        document = Table(self.setting, energies=[Energy("m", (3,), 2.0, 5.0)]).as_dict()
        document["energies"][0]["mj"] = mj
        (tmp_path / "t.json").write_text(json.dumps(document))
        with pytest.raises(ArtifactError, match=r"^t\.json: is no table of latencies: .*energy"):
            read(tmp_path / "t.json")


def test_one_measurement_leads() -> None:
    text = "version: 1\nmodel: {name: x:y, input_shape: [3, 32, 32]}\ndata: {name: mnist5k}\n"
    with pytest.raises(ConfigError, match=r"give only one of .*; found latency_ratio and energy_ratio"):
        config.loads(text + "budget: {latency_ratio: 0.5, energy_ratio: 0.5}\n")
    config.loads(text + "budget: {energy_ratio: 0.5, macs_ratio: 0.5, memory_ratio: 0.5}\n")


def test_what_was_asked_and_what_came_of_it() -> None:
    own = {key: value for key, value in LATENCY.items() if not key.endswith("_ms")}
    facts = {"energy": own | {"original_mj": 50.0, "counter": "NVML, the whole GPU"}, "latency": None}
    asked, outcome, model = map(plain, budget_view.sentences(facts))
    assert asked.startswith("Asked for: 30.00 mJ, 60.0 % of the original's 50.00 mJ a call, on cpu-ort (")
    assert asked.endswith("), by NVML, the whole GPU.")
    assert outcome == "The network that was taken takes 30.30 mJ there, within 3 % of it."
    assert "and energy is taken to go with it; at one that is left out" in model
    assert [plain(cell) for cell in budget_view.table(facts).rows[0]][1:4] == [
        "30.00 mJ",
        "29.50 mJ",
        "34.50 mJ",
    ]


class Worked:
    """Of a CPU that draws 20 W while this process works, and else nothing."""

    name = "a double"

    def joules(self) -> float:
        return 20 * time.process_time()


@pytest.mark.slow
def test_a_run_that_is_led_by_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "open_counter", lambda *, gpu: Worked())
    monkeypatch.setattr(energy, "per_call", partial(per_call, rounds=6, seconds=0.1))
    text = CONFIG.replace("macs_ratio: 0.6, ", "").replace("width: 8", "width: 32")
    (tmp_path / "compress.yaml").write_text(text + "budget: {energy_ratio: 0.6, params_ratio: 0.9}\n")
    outcome = start(tmp_path)
    assert outcome.exit_code in (0, 5)
    document = files.read_json(tmp_path / "run" / "prune.json")
    found = document["budget"]["energy"]
    assert document["budget"]["latency"] is None
    assert document["target"] == {"kind": "energy_ratio", "value": pytest.approx(0.6)}
    assert found["looks"]
    assert found["measured_ratio"] == found["looks"][-1]["measured"]
    assert document["reached"] == (found["measured_ratio"] <= 0.6 * 1.03)
    assert found["measured_ratio"] < 0.9
    assert all(step["energy_ratio"] < 1 for step in document["history"])
    assert all(step["latency_ratio"] is None for step in document["history"])
    table = read(tmp_path / "run" / "latency.json")
    assert [e.ratio for e in table.energies] == [look["measured"] for look in found["looks"]]
    assert found["original_mj"] == table.energies[-1].original_mj
    said = (tmp_path / "run" / "report.md").read_text()
    assert "mJ a call" in plain(said)
    events = Silent()
    start(tmp_path, events=events)
    assert {status for _, status in events.stages} == {"cached"}


def test_without_a_counter_it_ends_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    text = CONFIG.replace("macs_ratio: 0.6, ", "")
    (tmp_path / "compress.yaml").write_text(text + "budget: {energy_ratio: 0.6}\n")
    events = Silent()
    with pytest.raises(
        TargetError, match=r"^budget\.energy_ratio: this machine has no energy counter"
    ) as caught:
        start(tmp_path, events=events)
    assert caught.value.exit_code == 6
    assert events.stages == []
    assert not (tmp_path / "run").exists()
