"""The latency that was asked for, in plans and reports; and plans under budgets."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pipelines import LOOKED_AT, Silent
from report_example import example
from rich.console import Console
from test_front import outlook

from compress import budgeting, config, pipeline
from compress.budget import close, corrected
from compress.channelmap import ChannelMap
from compress.config import Config
from compress.cost import class_counts, cost_model
from compress.errors import TargetError
from compress.latency import LatencyModel
from compress.select import Space, Target
from compress.show import show_plan
from deploy import budget_view, report
from deploy.latency_table import Setting

LATENCY: dict[str, Any] = {
    "target": "cpu-ort", "runner": "onnxruntime", "version": "1.23", "hardware": "a CPU", "precision": "fp32",
    "threads": 1, "batch": 8, "original_ms": 20.0, "asked_ms": 12.0, "asked_ratio": 0.6, "model_error": 0.043,
    "networks": 9, "within": 0.03, "measured_ratio": 0.606,
    "looks": [
        {"asked": 0.6, "predicted": 0.59, "measured": 0.69, "fits": False},
        {"asked": 0.6, "predicted": 0.595, "measured": 0.606, "fits": False},
    ],
}  # fmt: skip


def plain(said: str) -> str:
    return said.replace("\xa0", " ")


def test_what_was_asked_and_what_came_of_it() -> None:
    asked, outcome, model = map(plain, budget_view.sentences({"latency": LATENCY}))
    place = "cpu-ort (onnxruntime 1.23, fp32, batch 8, 1 thread, a CPU)"
    assert asked == f"Asked for: 12.00 ms, 60.0 % of the original's 20.00 ms, on {place}."
    assert outcome == "The network that was taken takes 12.12 ms there, within 3 % of it."
    assert model.startswith(
        "The latency model is fitted to 9 measured networks; at one that is left out it is"
    )
    assert model.endswith("it is 4.3 % off (root mean square).")
    first, last = ([plain(cell) for cell in row] for row in budget_view.table({"latency": LATENCY}).rows)
    assert first == ["1", "12.00 ms", "11.80 ms", "13.80 ms", "69.0 %", "15.0 %", "on the way"]
    assert last == ["2", "12.00 ms", "11.90 ms", "12.12 ms", "60.6 %", "1.0 %", "taken"]


def test_what_is_not_known_is_said() -> None:
    assert budget_view.sentences({}) == []
    _, outcome, model = budget_view.sentences(
        {"latency": LATENCY | {"measured_ratio": None, "model_error": None}}
    )
    assert outcome == "The network that pruning ends with was not measured there."
    assert model.endswith("too few to say how far it is off.")
    assert {row[-1] for row in budget_view.table({"latency": LATENCY | {"measured_ratio": None}}).rows} == {
        "on the way"
    }
    missed = LATENCY | {"measured_ratio": 0.69}
    assert plain(budget_view.sentences({"latency": missed})[1]).endswith(
        "takes 13.80 ms there, 15.0 % more than asked."
    )
    faster = LATENCY | {"measured_ratio": 0.3}
    said = "takes 6.000 ms there, 50.0 % less than asked: the widths allowed have nothing nearer."
    assert plain(budget_view.sentences({"latency": faster})[1]).endswith(said)


def test_the_report_has_a_section_where_there_is_a_budget() -> None:
    without = report.render(example())
    assert "asked, predicted, measured" not in without.html + without.markdown
    results = example()
    results["pruning"]["budget"] = {"asked": {}, "gap": 0.0, "latency": LATENCY}
    for row in results["pruning"]["history"]:
        row["latency_ratio"] = row["macs_ratio"]
    found = report.render(results)
    for page in map(plain, (found.html, found.markdown)):
        assert "Latency: asked, predicted, measured" in page
        assert "12.12 ms there, within 3 % of it" in page
        assert "13.80 ms" in page
    assert "Latency kept, predicted" in found.html


@pytest.mark.parametrize(
    "strange",
    [
        "x", 1e400, [], {"looks": 3}, {"looks": ["y", {"measured": "z", "asked": True}], "within": "3"},
        LATENCY | {"original_ms": -1, "asked_ratio": None, "threads": [2], "hardware": "<script>"},
    ],
)  # fmt: skip
def test_a_strange_budget_is_rendered_and_harmless(strange: Any) -> None:
    results = example()
    results["pruning"]["budget"] = {"latency": strange}
    found = report.render(results)
    assert "<script" not in found.html
    assert "<script" not in found.markdown
    assert ("asked, predicted, measured" in found.html) == (isinstance(strange, dict))


# -- steps and plans ----------------------------------------------------------------------------------


def test_a_network_may_turn_out_to_be_slower_than_the_unpruned_one() -> None:
    found = outlook()
    target = Target("latency", 0.97)
    where = Space(found.cmap, found.cost, found.levels, target, budgets=(target,))

    def measure(keep: np.ndarray) -> float:
        return 1.5 * found.cost.ratio("latency", class_counts(found.cmap, keep))

    closed = close(found.scores, np.ones(found.cmap.units, dtype=bool), where, 0.05, measure)
    looks = list(closed.looks)
    assert corrected(where, looks).cost.ratio("latency", found.cost.full) > 1
    for _ in range(100):
        if closed.ends or not closed.selection.removed:
            break
        closed = close(found.scores, closed.selection.keep, where, 0.05, measure, looks)
        looks += closed.looks
    counts = class_counts(found.cmap, closed.selection.keep)
    said = corrected(where, looks).cost.ratio("latency", counts)
    assert said == pytest.approx(measure(closed.selection.keep))


def planned(folder: Path, budget: str) -> dict[str, Any]:
    (folder / "compress.yaml").write_text(LOOKED_AT + f"budget: {budget}\n")
    loaded = config.load(folder / "compress.yaml", ())
    return pipeline.plan(loaded, folder, events=Silent())


def shown(found: dict[str, Any]) -> list[str]:
    file = io.StringIO()
    show_plan(Console(file=file, width=160, color_system=None), found)
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


def test_a_plan_under_budgets_without_latency(tmp_path: Path) -> None:
    found = planned(tmp_path, "{macs_ratio: 0.7, params_ratio: 0.5}")
    assert found["reachable"]
    assert found["target"] == {"kind": "macs_ratio", "value": 0.7}
    assert found["budget"] == {
        "asked": {"macs_ratio": 0.7, "params_ratio": 0.5},
        "gap": None,
        "latency": None,
        "energy": None,
        "memory": None,
    }
    assert found["macs"]["after"] <= 0.7 * found["macs"]["before"]
    assert found["params"]["after"] <= 0.5 * found["params"]["before"]
    assert shown(found)[0].startswith("OK 70.0 % of the MACs can be kept")


@dataclass
class FakeMeter:
    """Measures what the model predicts, but the first network as slower than that."""

    cmap: ChannelMap
    latency: LatencyModel
    looks: int = 0

    bench = SimpleNamespace(place=SimpleNamespace(target=SimpleNamespace(name="cpu-ort")))
    table = SimpleNamespace(setting=Setting("onnxruntime", "1.23", "a CPU", "fp32", 1, 32))

    def ratio(self, keep: np.ndarray) -> float:
        self.looks += 1
        right = self.latency.ms(class_counts(self.cmap, keep)) / self.latency.original_ms
        return right * (1.2 if self.looks == 1 else 1.0)


def test_a_plan_under_latency_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meters = []

    def measured(_config: Config, _place: Any, _net: Any, cmap: ChannelMap, *_: Any, **__: Any) -> Any:
        cost = cost_model(cmap)
        products = replace(cost.macs, factor=cost.macs.factor * 1e-6)
        latency = LatencyModel(products, (), products.total(cost.full), 0.04, 9)
        meters.append(FakeMeter(cmap, latency))
        return meters[0], latency

    monkeypatch.setattr(budgeting, "measured", measured)
    found = planned(tmp_path, "{latency_ratio: 0.6}")
    latency = found["budget"]["latency"]
    assert found["target"] == {"kind": "latency_ratio", "value": pytest.approx(0.6)}
    assert latency["model_error"] == 0.04
    assert len(latency["looks"]) == meters[0].looks > 1
    last = latency["looks"][-1]
    assert found["reachable"]
    assert last["measured"] == latency["measured_ratio"] == pytest.approx(0.6, rel=0.03)
    assert last["measured"] == pytest.approx(found["macs"]["after"] / found["macs"]["before"])
    lines = shown(found)
    assert lines[0].startswith("OK 60.0 % of the latency can be kept")
    assert lines[1].startswith("Asked for: ")
    assert lines[2].endswith("there, within 3 % of it.")
    assert lines[3].startswith("The latency model is fitted to 9 measured networks")
    assert [line.split()[-1] for line in lines if line.endswith((" on the way", " taken"))][-1] == "taken"


def test_a_plan_for_a_device_that_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="h100 needs a CUDA device: latency is measured while pruning"):
        planned(tmp_path, "{latency_ratio: 0.6, target: h100}")
