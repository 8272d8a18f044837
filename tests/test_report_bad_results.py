"""Results that are hostile, incomplete, failing, wrong or huge: a whole page that says what is amiss."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
from report_example import GATES, HOSTILE, Page, change, judged, light, poisoned, results, seen

from deploy import charts, report, tables
from deploy.values import visible

__all__ = ["results"]  # a fixture

# What the template and matplotlib write.
TAGS = """html head meta title style body main header section nav footer details summary figure figcaption
    div span p a h1 h2 h3 i strong code pre ul li dl dt dd table thead tbody tr th td
    svg g path text rect defs clippath use"""


@pytest.mark.parametrize("poison", HOSTILE)
def test_hostile_texts_are_escaped_in_both_renderings(results: dict[str, Any], poison: str) -> None:
    bad = poisoned(light(results), poison)
    bad["provenance"]["versions"] = {f"package{poison}": f"1.0{poison}"}
    for row, model in zip(bad["latency"], ["original", "dense"], strict=True):
        row["model"] = model
    found = report.render(bad)
    for text_ in (found.html, found.markdown):
        assert all(c.isprintable() or c in "\n\xa0" for c in text_)
        text_.encode()
    page = Page(found.html)
    assert {tag for tag, _ in page.tags} <= {*TAGS.split()}
    assert all(not key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert visible(poison.strip())[:20].split(" ")[0] in page.text
    check_markdown(found.markdown)


def check_markdown(markdown: str) -> None:
    """No cell boundary, tag, image, link or heading but the template's own."""
    plain = re.sub(r"```+\n.*?\n```+\n", "", markdown, flags=re.S)
    plain = re.sub(r"</?(details|summary|code)>", "", plain)
    outside = re.sub(r"`[^`\n]*`", "", plain)  # template-made code spans hold no backtick, pipe or bracket
    assert not re.search(r"(?<!\\)[<>](?! \*\*Note)", re.sub(r"^> ", "", outside, flags=re.M))
    assert not re.search(r"(?<!\\)[\[`~$]", outside)
    assert not re.search(r"://|www\.\w|@\w", outside)
    widths: list[int] = []
    for line in plain.splitlines():
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths:
            assert len(set(widths)) == 1
            widths = []
    headings = [line for line in plain.splitlines() if line.startswith("#")]
    assert len(headings) == len([h for h in headings if re.match(r"#{1,2} [A-Z]", h)]) == 9


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("accuracy", "Accuracy"),
        ("cost", "MACs"),
        ("speedup", "Speed-up"),
        ("latency", "Latency p50"),
        ("parity", "Parity"),
        ("verification", "Exactness"),
        ("pruning", "Along the pruning"),
        ("finetune", "Fine-tuning"),
        ("layers", "Channels kept in each layer"),
        ("gates", "Gates"),
        ("provenance", "Provenance"),
        ("model", "Provenance"),
        ("data", "Provenance"),
        ("pinned", "Pinned"),
        ("unreached", "Pinned"),
        ("folded", "Pinned"),
        ("train", "Fine-tuning"),
        ("command", "Provenance"),
    ],
)
@pytest.mark.parametrize("absent", [None, "gone"])
def test_a_missing_part_is_said_to_be_missing(
    results: dict[str, Any], key: str, where: str, absent: Any
) -> None:
    few = light(results)
    if absent == "gone":
        found = report.render({name: value for name, value in few.items() if name != key})
    else:
        found = report.render({**few, key: absent})
    page = seen(found.html)
    assert where in page
    quiet = {"unreached", "folded", "train", "pinned", "gates", "provenance"}
    assert key in quiet or "not measured" in page or "not recorded" in page
    if key == "gates":
        assert "NO GATES" in page


def test_nothing_measured_is_still_a_page() -> None:
    found = report.render({"schema_version": 1})
    page = seen(found.html)
    assert "NO GATES No number was measured. No gate was set, so nothing was judged." in page
    assert page.count("not measured") > 15
    assert "_not measured_" in found.markdown
    assert "<svg" not in found.html


def test_a_failed_gate_shows_whatever_the_file_claims(results: dict[str, Any]) -> None:
    failed = judged(light(results), {**GATES, "speedup": 3.0, "accuracy_drop": 0.0005}) | {"verdict": "pass"}
    page = seen(report.render(failed).html)
    assert "✗ FAIL" in page.replace("✗FAIL", "✗ FAIL")
    assert "Fail: Speed-up. Inconclusive: Accuracy drop. 2 of 4 gates pass." in page
    assert "The results file says “pass”, but its gates say “fail”. This page follows the gates." in page
    strange = change(light(results), "gates", 0, "verdict", to="splendid")
    assert "INCONCLUSIVE" in seen(report.render(strange).html)


def test_what_must_be_known_is_next_to_the_verdict(results: dict[str, Any]) -> None:
    bad = change(light(results), "verification", "passed", to=False)
    bad["pruning"] |= {"reached": False, "stop_reason": "every layer is at its floor"}
    bad["parity"][0] |= {"passed": False}
    bad["latency"][0]["warnings"] = ["too few samples"]
    bad["unreached"] = ["aux.weight"]
    bad["folded"] = ["stem.weight"]
    page = report.render(bad).html
    banner = seen(page[page.index("<header") : page.index("</header>")])
    assert "does not compute what the masked original computes. Do not ship it." in banner
    assert "Pruning stopped before its target: every layer is at its floor." in banner
    assert "Parity checks that fail: 1." in banner
    assert "Latency measurements with a warning: 1 of 2." in banner
    assert "Parameters outside the traced graph: 1." in banner
    assert "Weights that the model computed and that were fine-tuned as plain ones: 1." in banner
    assert seen(page).count("stem.weight") == 1
    assert "torch, batch 1, original: too few samples" in seen(page)
    assert "aux.weight" in seen(page)


def repr_short(value: Any) -> str:
    return repr(value)[:8]


@pytest.mark.parametrize(
    "junk", [None, {}, "x", -1, True, [None], ["a"], [{}], math.nan, 10**400, 5e-324], ids=repr_short
)
def test_values_of_the_wrong_type_are_never_a_crash(
    results: dict[str, Any], junk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "draw", lambda _: dict.fromkeys(CHARTS, ""))
    few = light(results)
    for key in few.keys() - {"schema_version"}:
        report.render({**few, key: junk})
    for path in BREAKABLE:
        assert len(report.render(change(few, *path, to=junk)).html) > 10_000


CHARTS = ("layers", "latency", "speedup", "pruning", "train", "finetune")
BREAKABLE: tuple[tuple[Any, ...], ...] = (
    ("accuracy", "flips"),
    ("accuracy", "n"),
    ("cost", "macs"),
    ("latency", 0, "samples_ms"),
    ("latency", 0, "warnings"),
    ("latency", 0, "batch"),
    ("speedup", 0, "ratio"),
    ("speedup", 0, "runner"),
    ("pinned", 0, "parameters"),
    ("layers", 0, "before"),
    ("pruning", "units"),
    ("provenance", "machine", "cpu"),
    ("provenance", "config", "gates"),
    ("provenance", "config", "bench", "batches"),
    ("gates", 0, "value"),
    ("gates", 0, "name"),
)


def test_values_at_the_edge_of_what_floats_hold_are_drawn(results: dict[str, Any]) -> None:
    few = light(results)
    few["layers"][0] |= {"before": 10**18, "after": 0}
    few["latency"][0]["samples_ms"] = [5e-324, 1e300, 7.0]
    few["speedup"][0] |= {"ratio": 1e-300, "low": 0.0, "high": 9e11}
    few["pruning"]["history"] = [
        {"step": i, "macs_ratio": x, "loss": x} for i, x in enumerate((1e308, -1e308, 0))
    ]
    assert report.render(few).html.count("<svg") == 4


def densenet_layers() -> list[dict[str, Any]]:
    rng = random.Random(3)
    names = [
        f"features.denseblock{block}.denselayer{i}.conv{conv}"
        for block, count in enumerate((6, 12, 24, 16), 1)
        for i in range(1, count + 1)
        for conv in (1, 2)
    ]
    row = {"kind": "conv2d", "before": 128, "macs_before": 10**8, "macs_after": 10**7, "pinned": False}
    return [{"name": name, "after": rng.randint(1, 16) * 8, **row} for name in names]


def test_a_deep_network_and_many_samples_stay_small(results: dict[str, Any]) -> None:
    deep = {**results, "layers": densenet_layers() * 6, "pinned": results["pinned"] * 400}
    deep["pruning"] = {**deep["pruning"], "history": deep["pruning"]["history"] * 20}
    deep["latency"] = [{**row, "samples_ms": row["samples_ms"] * 20} for row in results["latency"]]
    deep["unreached"] = [f"aux.{i}.{'x' * 500}" for i in range(3000)]
    found = report.render(deep)
    assert len(found.html.encode()) < 500 * 1024
    assert len(found.markdown.encode()) <= 60_000
    assert "rows are shown. results.json has all of them." in seen(found.html)


def test_each_layer_of_a_deep_network_keeps_a_name_of_its_own(results: dict[str, Any]) -> None:
    bars = charts.layer_bars({**results, "layers": densenet_layers()})
    assert len(bars) == 116
    svg = charts.layers(bars)
    labels = {label for label in re.findall(r">([^<]+)</text>", svg) if "denselayer" in label}
    assert len(labels) == 116


def test_of_very_many_layers_the_chart_shows_the_costliest_in_order(results: dict[str, Any]) -> None:
    rows = [{"name": f"l{i}", "before": 8, "after": 4, "macs_before": i} for i in range(300)]
    bars = charts.layer_bars({**results, "layers": rows})
    assert [bar.name for bar in bars] == [f"l{i}" for i in range(140, 300)]


def test_a_long_history_is_thinned_evenly_with_both_ends() -> None:
    table = tables.Table(("Step",), "r", tuple((str(i),) for i in range(1000)), evenly=True)
    cut = table.cut(11)
    assert [row[0] for row in cut.rows] == [
        "0",
        "100",
        "200",
        "300",
        "400",
        "500",
        "599",
        "699",
        "799",
        "899",
        "999",
    ]
    assert table.cut(1000) == table
