"""The report: its numbers are the results' numbers, nothing hostile gets through, the same bytes twice.

`example` invents a whole results.json. It is a test fixture: none of its numbers were measured.
"""

from __future__ import annotations

import copy
import html
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, median, quantiles, stdev
from typing import Any

import pytest

from deploy import charts, gate, report, streams_view, tables
from deploy.errors import MeasureError
from deploy.values import NBSP, milliseconds, percent, points, significant, text, times, visible

GATES = {"accuracy_drop": 0.01, "speedup": 1.3, "size_ratio": 0.6, "parity": True, "runner": "onnxruntime"}


def resnet18_layers(rng: random.Random) -> list[dict[str, Any]]:
    """The 20 convolutions and the head of a ResNet-18, with invented kept counts."""
    found = [("conv1", 64, 118_013_952)]
    for stage, width in ((1, 64), (2, 128), (3, 256), (4, 512)):
        for block in (0, 1):
            found += [(f"layer{stage}.{block}.conv{i}", width, 115_605_504) for i in (1, 2)]
            if block == 0 and stage > 1:
                found.append((f"layer{stage}.0.downsample.0", width, 6_422_528))
    shared = {width: round(width * rng.uniform(0.55, 0.9) / 8) * 8 for width in (64, 128, 256, 512)}
    layers = []
    for name, width, macs in found:
        inner = name.endswith("conv1") and name != "conv1"
        after = max(8, round(width * rng.uniform(0.2, 0.7) / 8) * 8) if inner else shared[width]
        row = {"name": name, "kind": "conv2d", "before": width, "after": after, "macs_before": macs}
        layers.append(row | {"macs_after": int(macs * after / width * 0.7), "pinned": False})
    head = {"name": "fc", "kind": "linear", "before": 10, "after": 10, "macs_before": 5120}
    return [*layers, head | {"macs_after": 3200, "pinned": True}]


def latency_row(runner: str, model: str, batch: int, middle_ms: float, rng: random.Random) -> dict[str, Any]:
    samples = [
        round(middle_ms * (1 + abs(rng.gauss(0, 0.012)) + (rng.random() < 0.03) * 0.2), 5) for _ in range(900)
    ]
    cuts = quantiles(samples, n=100)
    cv = stdev(samples) / fmean(samples)
    return {
        "runner": runner,
        "model": model,
        "batch": batch,
        "threads": 1,
        "samples_ms": samples,
        "min": min(samples),
        "median": median(samples),
        "mean": fmean(samples),
        "p90": cuts[89],
        "p95": cuts[94],
        "p99": cuts[98],
        "max": max(samples),
        "cv": cv,
        "throughput_per_s": 1000 * batch / median(samples),
        "first_ms": samples[0] * 3.1,
        "warnings": ["coefficient of variation is 3.9 %, above 2.5 %"] if cv > 0.038 else [],
    }


def example() -> dict[str, Any]:
    """An invented but complete results.json: a ResNet-18 on CIFAR-10."""
    rng = random.Random(7)
    measured = {("torch", 1): (9.1, 6.4), ("torch", 32): (212.0, 118.0)}
    measured |= {("onnxruntime", 1): (6.2, 3.45), ("onnxruntime", 32): (171.0, 87.0)}
    latency, speedup = [], []
    for (runner, batch), (before, after) in measured.items():
        latency.append(latency_row(runner, "original", batch, before, rng))
        latency.append(latency_row(runner, "dense", batch, after, rng))
        ratio = latency[-2]["median"] / latency[-1]["median"]
        row = {"runner": runner, "batch": batch, "ratio": ratio, "low": ratio * 0.988, "high": ratio * 1.011}
        speedup.append(row | {"pairs": 20, "verdict": "faster"})
    steps = range(60)
    history = [
        {
            "step": i + 1,
            "minibatches": 10 * (i + 1),
            "units_kept": 2368 - 20 * (i + 1),
            "macs_ratio": 1 - 0.5 * ((i + 1) / 60) ** 0.9,
            "params_ratio": 1 - 0.61 * ((i + 1) / 60) ** 0.8,
            "loss": 0.11 + 0.25 * (i / 60) ** 2 + rng.uniform(0, 0.05),
            "accuracy": 0.951 - 0.06 * (i / 60) ** 2 - rng.uniform(0, 0.004) if i % 5 == 4 else None,
        }
        for i in steps
    ]
    epochs = [
        {
            "epoch": i + 1,
            "loss": 0.31 - 0.012 * i,
            "validation": 0.925 + 0.002 * i - 0.0008 * (i % 3),
            "validation_loss": 0.26 - 0.003 * i + 0.004 * (i % 2),
            "lr": 0.01 * (1 - i / 12),
            "seconds": 41.5,
        }
        for i in range(12)
    ]
    results: dict[str, Any] = {
        "schema_version": 1,
        "created": "2026-03-01T12:00:00Z",
        "command": "compress run compress.yaml --set prune.macs_ratio=0.5",
        "model": {"name": "torchvision:resnet18", "input_shape": [3, 32, 32], "parameters": 11_181_642},
        "data": {"name": "torchvision:CIFAR10", "train": 45_000, "validation": 5_000, "test": 10_000},
        "accuracy": {"metric": "top1", "before": 0.9512, "pruned": 0.8944, "after": 0.9481, "n": 10_000},
        "cost": {
            "macs": {"before": 1_814_073_344, "after": 905_101_312},
            "params": {"before": 11_181_642, "after": 4_360_802},
            "onnx_bytes": {"before": 44_781_223, "after": 17_501_006},
            "peak_rss_bytes": 1_402_331_136,
        },
        "pruning": {
            "criterion": "taylor",
            "target": {"kind": "macs_ratio", "value": 0.5},
            "align": 8,
            "reached": True,
            "stop_reason": "49.9 % of the MACs are left",
            "units": {"total": 2368, "kept": 1168, "pinned_channels": 13},
            "seconds": 214.5,
            "history": history,
        },
        "train": None,
        "finetune": {"history": epochs, "best_epoch": 12},
        "layers": resnet18_layers(rng),
        "pinned": [
            {
                "reason": "the channel dimension is the model's output",
                "op": "aten.linear",
                "source": "resnet.py:280 x = self.fc(x)",
                "channels": 10,
                "parameters": ["fc.weight", "fc.bias"],
            },
            {
                "reason": "the channel dimension is the model's input",
                "op": "aten.conv2d",
                "source": "resnet.py:268 x = self.conv1(x)",
                "channels": 3,
                "parameters": ["conv1.weight"],
            },
        ],
        "unreached": [],
        "folded": [],
        "verification": {
            "relative_error": 3.1e-15,
            "movement": 0.412,
            "dtype": "float64",
            "passed": True,
            "tolerance": 1e-5,
        },
        "parity": [
            {
                "model": model,
                "batch": batch,
                "max_abs": 2.1e-5,
                "relative": 1.4e-6 * batch,
                "tolerance": 1e-4,
                "argmax_agreement": 1.0,
                "passed": True,
            }
            for model in ("original", "dense")
            for batch in (1, 2, 7)
        ],
        "latency": latency,
        "speedup": speedup,
        "provenance": {
            "versions": {
                "compress-release": "0.1.0",
                "torch": "2.14.1",
                "onnx": "1.22.0",
                "onnxruntime": "1.27.0",
            },
            "machine": {
                "cpu": {"model": "Example CPU 9000", "cores": 8, "flags": ["avx2", "avx512f"]},
                "memory_bytes": 34_359_738_368,
                "os": "Linux 6.8",
                "gpu": None,
            },
            "seed": 0,
            "config": {"version": 1, "gates": GATES, "bench": {"batches": [1, 32], "repeats": 20}},
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "artifacts": [
                {"path": "original.onnx", "sha256": "4f" * 32, "bytes": 44_781_223},
                {"path": "dense.onnx", "sha256": "a9" * 32, "bytes": 17_501_006},
                {"path": "dense.pt2", "sha256": "07" * 32, "bytes": 17_900_112},
            ],
        },
    }
    results["data"]["fingerprint"] = "c3" * 32
    results["accuracy"] |= {"split": "test", "flips": {"lost": 131, "gained": 100}}
    return judged(results, GATES)


def judged(results: dict[str, Any], gates: dict[str, Any]) -> dict[str, Any]:
    found = gate.judge(results, gates)
    return results | {"gates": [asdict(one) for one in found], "verdict": gate.verdict(found)}


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
def results() -> dict[str, Any]:
    return example()


@pytest.fixture(scope="module")
def rendered(results: dict[str, Any]) -> report.Report:
    return report.render(results)


class Page(HTMLParser):
    """The tags with their attributes, and the text a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def seen(page: str) -> str:
    return Page(page).text.replace(NBSP, " ")


def change(results: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    """A copy of the results with the value at ``path`` replaced."""
    changed = copy.deepcopy(results)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return changed


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


def light(results: dict[str, Any]) -> dict[str, Any]:
    """The results with few rows and samples, quick to draw."""
    few = copy.deepcopy({**results, "latency": results["latency"][:2], "speedup": results["speedup"][-1:]})
    few["layers"] = few["layers"][:2]
    few["pruning"]["history"] = few["finetune"]["history"] = []
    for row in few["latency"]:
        row["samples_ms"] = row["samples_ms"][:20]
    return few


# What the template and matplotlib write.
TAGS = """html head meta title style body main header section nav footer details summary figure figcaption
    div span p a h1 h2 h3 i strong code pre ul li dl dt dd table thead tbody tr th td
    svg g path text rect defs clippath use"""

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</code></td></svg><script>alert(1)</script>",
    '" onload="alert(1)',
    "\x1b[31mred\x1b[0m\x07",
    "line\nbreak\r\n# heading | pipe\n---",
    "a | b | c",
    "`code` ``two`` ```three```",
    "[link](https://evil.example) ![i](https://evil.example/x.png)",
    "*bold* _it_ ~no~ $x^2$ $",
    "\u202eright to left\u2066 \ud800 \x00",
    "{{ 7 * 7 }} {% raw %}",
    "<!-- comment -->",
    'font-family:a;url(#x)" id="y',
    "@everyone www.evil.example #1",
    "C:\\path\\*.onnx",
    "-->]]>",
    "=cmd()",
]


def poisoned(value: Any, poison: str) -> Any:
    """Every text in the results, keys of free mappings included, carries the poison."""
    if isinstance(value, dict):
        return {key: poisoned(found, poison) for key, found in value.items()}
    if isinstance(value, list):
        return [poisoned(found, poison) for found in value]
    return value + poison if isinstance(value, str) else value


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
