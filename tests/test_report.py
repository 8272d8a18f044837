"""The report: its numbers are the results' numbers, it reaches for nothing outside, the same bytes twice."""

from __future__ import annotations

import html
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_example import Page, change, example, latency_row, light, results, seen

from deploy import report, streams_view, tables
from deploy.errors import MeasureError
from deploy.values import NBSP, milliseconds, percent, points, significant, text, times, visible

__all__ = ["results"]  # a fixture


def with_targets() -> dict[str, Any]:
    """The example beside what a GPU elsewhere measured of it."""
    found = example()
    rng = random.Random(8)
    rows = [latency_row("tensorrt", model, 32, ms, rng) for model, ms in (("original", 1.9), ("dense", 1.0))]
    ratio = {"runner": "tensorrt", "batch": 32, "ratio": 1.9, "low": 1.88, "high": 1.93, "pairs": 20}
    other = {
        "target": {"name": "h100-fp16", "precision": "fp16", "runner": "tensorrt"},
        "machine": {"cpu": "Example CPU 9000", "gpus": [{"name": "Example <GPU> 80GB"}]},
        "latency": rows,
        "speedup": [ratio | {"verdict": "faster"}],
    }
    return found | {"target": {"name": "cpu-ort", "precision": "fp32"}, "others": [other]}


def test_several_targets_stand_in_one_table() -> None:
    found = with_targets()
    table = tables.targets(found)
    assert len(table.rows) == 5
    assert {row[:3] for row in table.rows} == {
        ("cpu-ort", "{'model': 'Example CPU 9000', 'cores': 8, 'flags': ['avx2', 'avx512f']}", "fp32"),
        ("h100-fp16", "Example <GPU> 80GB", "fp16"),
    }
    assert table.rows[-1][3:5] == ("tensorrt", "32")
    assert table.rows[-1][7] == "1.90×"
    pages = report.render(found)
    for page in (pages.html, pages.markdown):
        assert "On every target" in page
        assert "Example &lt;GPU&gt; 80GB" in page
    assert tables.targets(example()).rows == ()
    assert "On every target" not in report.render(example()).html


def test_files_that_only_another_target_timed_stand_among_the_precisions() -> None:
    found = with_targets()
    row = {"model": "dense", "precision": "int8", "bytes": 7000, "accuracy": {"value": 0.9}}
    own, apart = row | {"file": "dense.int8.onnx"}, row | {"file": "variants/dense.int8-gpu.onnx"}
    found |= {"variants": [own], "choice": {"why": {"int8": "the fastest inside, 1 ms"}}}
    found["others"][0]["variants"] = [own | {"bytes": 1}, apart | {"accuracy": {"value": 0.8}}]
    shown = [(line[0], line[3], line[4], line[-1]) for line in tables.precisions(found).rows]
    assert shown == [
        ("dense.int8.onnx", "7,000", "90.00\u00a0%", "the fastest inside, 1 ms"),
        ("variants/dense.int8-gpu.onnx", "7,000", "80.00\u00a0%", ""),
    ]


@pytest.mark.slow
def test_throughput_stands_apart_from_latency() -> None:
    found = with_targets()
    assert "over several streams" not in report.render(found).html
    row = {"runner": "tensorrt", "precision": "fp16", "batch": 32, "streams": 4, "failure": ""}
    found["others"][0]["streams"] = [
        row | {"model": "original", "per_s": 2000.0},
        row | {"model": "dense", "per_s": 5000.0},
        row | {"model": "dense", "runner": "onnxruntime_cuda", "per_s": None, "failure": "no <stream>"},
    ]
    assert streams_view.table(found).rows == (
        ("h100-fp16", "tensorrt", "fp16", "32", "4", "2000", "5000", ""),
        ("h100-fp16", "onnxruntime_cuda", "fp16", "32", "4", "not measured", "not measured", "no <stream>"),
    )
    pages = report.render(found)
    for page in (pages.html, pages.markdown):
        assert "Throughput over several streams" in page
        assert "no &lt;stream&gt;" in page


@pytest.fixture(scope="module")
def rendered(results: dict[str, Any]) -> report.Report:
    return report.render(results)


def test_the_verdict_and_the_main_numbers_come_first(
    results: dict[str, Any], rendered: report.Report
) -> None:
    row = results["speedup"][-1]
    lead = (
        f"The pruned model runs {times(row['ratio'])} as fast (95 % interval {times(row['low'])} to "
        f"{times(row['high'])}; onnxruntime, batch 32), loses 0.31 points of top-1 accuracy and has 50.1 % "
        "fewer MACs, 61.0 % fewer parameters and 60.9 % fewer ONNX bytes. All 4 gates pass."
    )
    body = seen(rendered.html[rendered.html.index("<body>") :])
    assert body.index("PASS") < body.index(lead) < body.index("Gates A gate passes")
    assert lead.removesuffix(" All 4 gates pass.") in rendered.markdown.replace(NBSP, " ")
    assert rendered.markdown.startswith("# Compression report: PASS\n")


def test_every_headline_number_is_the_results_number(
    results: dict[str, Any], rendered: report.Report
) -> None:
    page, cells = seen(rendered.html), spaced(rendered.html)
    before, after = (milliseconds(row["median"]).replace(NBSP, " ") for row in results["latency"][-2:])
    assert f"Latency p50 (onnxruntime, batch 32) {before} {after} −" in cells
    for pair in (results["cost"]["macs"], results["cost"]["params"], results["cost"]["onnx_bytes"]):
        kept = percent(pair["after"] / pair["before"], 1).replace(NBSP, " ")
        row_text = f"{pair['before']:,} {pair['after']:,} −{pair['before'] - pair['after']:,} {kept}"
        assert row_text in cells
        assert percent(pair["after"] / pair["before"] - 1, 1).replace(NBSP, " ") in page
    for key in ("before", "pruned", "after"):
        assert percent(results["accuracy"][key]).replace(NBSP, " ") in page
    for found in results["gates"]:
        assert found["message"].replace(NBSP, " ") in page
    for row in results["latency"]:
        for key in ("min", "median", "mean", "p90", "p95", "p99", "max", "first_ms", "throughput_per_s"):
            assert significant(row[key]) in page
    for row in results["speedup"]:
        assert f"{times(row['ratio'])} {times(row['low'])} to {times(row['high'])} 20 faster" in spaced(
            rendered.html
        )
    for row in results["provenance"]["artifacts"]:
        assert row["sha256"] in page
        assert row["sha256"] in rendered.markdown
    for row in results["pinned"]:
        assert row["source"] in page
        assert row["source"] in rendered.markdown
    assert results["command"] in page
    assert f"```\n{results['command']}\n```" in rendered.markdown


def spaced(page: str) -> str:
    """What a reader sees, with a space between the cells of a table."""
    return seen(page.replace("<td", " <td"))


def test_the_charts_have_their_numbers_in_tables(results: dict[str, Any], rendered: report.Report) -> None:
    cells = spaced(rendered.html)
    for row in results["layers"]:
        kept = percent(row["after"] / row["before"], 1).replace(NBSP, " ")
        assert f"{row['name']} {row['kind']} {row['before']:,} {row['after']:,} {kept}" in cells
    for row in results["pruning"]["history"]:
        assert f"{row['step']} {row['minibatches']} {row['units_kept']:,} " in cells
    for row in results["finetune"]["history"]:
        assert f"{row['epoch']} {significant(row['loss'])} {significant(row['validation_loss'])}" in cells
    assert rendered.html.count("<svg") == 5
    assert rendered.html.count("<details>") == 5


def test_the_page_is_closed_to_the_outside(rendered: report.Report) -> None:
    page = Page(rendered.html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "img", "form", "base", "foreignobject"}
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for _, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key.endswith(("href", "src")):
                assert (value or "").startswith("#")
    assert not re.search(r"url\((?!#)", rendered.html)
    assert "@import" not in rendered.html


def test_every_reference_inside_the_page_leads_somewhere_once(rendered: report.Report) -> None:
    page = Page(rendered.html)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {(a.get("href") or a.get("xlink:href") or "#")[1:] for _, a in page.tags} - {""}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", rendered.html))
    assert wanted <= set(ids)


def test_the_same_results_give_the_same_bytes(results: dict[str, Any], rendered: report.Report) -> None:
    assert report.render(json.loads(json.dumps(results))) == rendered
    code = "import sys, json, hashlib; from deploy import report; r = report.render(json.load(sys.stdin)); "
    code += "print(hashlib.sha256((r.html + r.markdown).encode()).hexdigest())"
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(results),
            env={"PYTHONHASHSEED": seed, "PATH": "", "MATPLOTLIBRC": "/dev/null"},
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(report.__file__).parents[1],
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1


def test_charts_are_legible_on_light_and_dark(rendered: report.Report) -> None:
    drawings = re.findall(r"<svg.*?</svg>", rendered.html, flags=re.S)
    for drawing in drawings:
        assert "var(--ink," in drawing
        bare = re.sub(r"var\(--\w+,#[0-9a-f]{6}\)", "", drawing)
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", bare)  # no colour that ignores the scheme
        assert "font-family" not in drawing
        assert "<title>" not in drawing
    assert "prefers-color-scheme: dark" in rendered.html
    assert "@media print" in rendered.html


@pytest.mark.parametrize("scheme", [0, 1])
def test_texts_contrast_with_their_background(rendered: report.Report, scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", rendered.html, flags=re.S)
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", blocks[scheme]))
    checked = [
        ("ink", "card"),
        ("muted", "card"),
        ("muted", "page"),
        ("blue", "blue-soft"),
        ("orange", "orange-soft"),
        ("muted", "grey-soft"),
    ]
    for front, back in checked:
        assert contrast(colour[front], colour[back]) >= 4.5, (front, back)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.2, section 1.4.3."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_results_of_another_format_are_refused() -> None:
    with pytest.raises(
        MeasureError, match=r"results\.json: schema_version is 2, this release reads 1; write"
    ):
        report.render({"schema_version": 2})


def test_numbers_are_written_for_people() -> None:
    assert (points(0.0031), points(-0.0031, signed=True), points(-1e-9, signed=True)) == (
        f"0.31{NBSP}points",
        f"−0.31{NBSP}points",
        f"0.00{NBSP}points",
    )
    assert [significant(x) for x in (0.0, 0.012345, 1.2345, 1234.5, -5.0)] == [
        "0",
        "0.01235",
        "1.234",
        "1234",
        "−5.000",
    ]
    assert text(None) == "not measured"
    assert visible("a\x1b\u202e\n\xa0") == "a\\x1b\\u202e\\n\xa0"


def test_an_unchanged_accuracy_is_kept_and_a_better_one_is_gained(results: dict[str, Any]) -> None:
    few = light(results)
    few["accuracy"] |= {"after": few["accuracy"]["before"], "flips": {"lost": 5, "gained": 5}}
    assert "loses" not in report.render(few).markdown
    assert "keeps its top-1 accuracy and has 50.1" in report.render(few).markdown
    few["accuracy"] |= {"after": 0.9522, "flips": {"lost": 5, "gained": 15}}
    assert f"gains 0.10{NBSP}points of top-1 accuracy" in report.render(few).markdown


def test_the_headline_is_the_gated_measurement(results: dict[str, Any]) -> None:
    few = {**light(results), "speedup": results["speedup"]}
    other = change(few, "provenance", "config", "gates", to={"runner": "torch", "batch": 1})
    row = tables.headline_speedup(other)
    assert row is not None
    assert (row["runner"], row["batch"]) == ("torch", 1)
    page = html.unescape(report.render(other).html)
    assert f"{times(row['ratio'])} as fast" in page
