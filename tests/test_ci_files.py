"""What a CI server reads: JUnit, OpenMetrics, the job summary. Valid whatever the texts in them are."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest

from deploy import junit, openmetrics, summary
from tests.report_example import GATES, HOSTILE, example, judged, light, poisoned
from tests.test_report_bad_results import check_markdown

ALL_SORTS = "".join(map(chr, range(0x20))) + "\x7f\x85\u202e\ufffe\ud800]]>&\"'<\u00e9"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return judged(example(), GATES)


# -- JUnit ----------------------------------------------------------------------------------------------


def test_junit_has_one_case_per_gate(results: dict[str, Any]) -> None:
    root = ElementTree.fromstring(junit.render(results))
    (suite,) = root
    cases = suite.findall("testcase")
    assert len(cases) == len(results["gates"]) == int(suite.attrib["tests"])
    assert cases[1].attrib == {"classname": "compress.gates", "name": "Speed-up"}
    assert cases[1].findtext("system-out") == results["gates"][1]["message"]
    assert (root.attrib["failures"], root.attrib["errors"], root.attrib["skipped"]) == ("0", "0", "0")
    assert {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")} == {
        "model": results["model"]["name"],
        "verdict": "pass",
    }


@pytest.mark.parametrize("verdict", ["fail", "inconclusive", None, "Pass"])
def test_whatever_is_no_pass_is_a_failure_with_its_message(verdict: Any) -> None:
    said = '1.63\xa0× as fast & <not> "enough"'
    root = ElementTree.fromstring(
        junit.render({"gates": [{"name": "speedup", "verdict": verdict, "message": said}]})
    )
    (failure,) = root.iter("failure")
    assert failure.text == failure.attrib["message"] == said
    assert failure.attrib["type"] == ("fail" if verdict == "fail" else "inconclusive")
    assert root.attrib["failures"] == "1"


def test_without_gates_a_case_is_skipped() -> None:
    root = ElementTree.fromstring(junit.render({}))
    assert (root.attrib["tests"], root.attrib["skipped"]) == ("1", "1")
    assert next(root.iter("skipped")).attrib["message"] == "no gate was judged"


def test_an_error_is_a_case_with_all_its_lines() -> None:
    root = ElementTree.fromstring(junit.failed(["a.yaml:1:2 x: bad", "b"], 3))
    (error,) = root.iter("error")
    assert (error.text, error.attrib["message"]) == ("a.yaml:1:2 x: bad\nb", "a.yaml:1:2 x: bad")
    assert (error.attrib["type"], root.attrib["errors"]) == ("exit code 3", "1")


@pytest.mark.parametrize("poison", [*HOSTILE, ALL_SORTS])
def test_hostile_texts_stay_texts_in_junit(results: dict[str, Any], poison: str) -> None:
    bad = poisoned(light(results), poison)
    for gate in bad["gates"]:
        gate["verdict"] = "fail"
    for text in (junit.render(bad), junit.failed([poison, poison], 1)):
        root = ElementTree.fromstring(text.encode())
        assert {tag.tag for tag in root.iter()} <= {
            "testsuites", "testsuite", "testcase", "properties", "property", "failure", "error"
        }  # fmt: skip
        assert "\\u202e" in text or "\u202e" not in text


# -- OpenMetrics ----------------------------------------------------------------------------------------

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})\{{({LABEL}(?:,{LABEL})*)?\}} (\S+)")


def parse(text: str) -> dict[str, dict[str, float]]:
    """Samples by family, read strictly: descriptors first, families whole, units as suffixes, all once."""
    body, end = text[:-6], text[-6:]
    assert end == "# EOF\n"
    found: dict[str, dict[str, float]] = {}
    family = kind = ""
    for line in body.splitlines():
        described = re.fullmatch(rf"# (TYPE|UNIT|HELP) ({NAME}) (.+)", line)
        if described:
            word, name, rest = described.groups()
            if word == "TYPE":
                assert name not in found, "a family comes twice"
                family, kind, found[name] = name, rest, {}
                assert rest in ("gauge", "info", "stateset")
            assert name == family
            assert not found[family], "a descriptor after a sample"
            assert word != "UNIT" or name.endswith(f"_{rest}")
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        assert sample[1] == family + ("_info" if kind == "info" else "")
        assert sample[2] not in found[family], "a sample comes twice"
        found[family][sample[2] or ""] = float(sample[3])
    return found


def test_openmetrics_has_the_figures(results: dict[str, Any]) -> None:
    found = parse(openmetrics.render(results))
    assert found["compress_verdict"] == {
        'compress_verdict="pass"': 1, 'compress_verdict="fail"': 0, 'compress_verdict="inconclusive"': 0,
        'compress_verdict="no gates"': 0,
    }  # fmt: skip
    assert found["compress_onnx_bytes"]['model="pruned"'] == results["cost"]["onnx_bytes"]["after"]
    row = results["speedup"][0]
    place = f'runner="{row["runner"]}",batch="{row["batch"]}"'
    assert found["compress_speedup_ratio"][f'{place},end="value"'] == row["ratio"]
    middle = next(r for r in results["latency"] if r["runner"] == row["runner"] and r["model"] == "dense")
    calls = {
        k: v for k, v in found["compress_latency_seconds"].items() if 'model="pruned",statistic="median"' in k
    }
    assert middle["median"] / 1e3 in calls.values()
    assert set(found["compress_gate_passed"].values()) == {1.0}


@pytest.mark.parametrize("poison", [*HOSTILE, ALL_SORTS])
def test_openmetrics_stays_valid_with_hostile_texts(results: dict[str, Any], poison: str) -> None:
    bad = poisoned(light(results), poison)
    bad["latency"] += bad["latency"]
    bad["gates"] += bad["gates"]
    assert parse(openmetrics.render(bad))["compress_macs"]


def test_what_was_not_measured_has_no_sample() -> None:
    found = parse(openmetrics.render({"speedup": [{"runner": "a", "ratio": float("nan")}], "cost": None}))
    assert {name for name, samples in found.items() if samples} == {"compress_release", "compress_verdict"}
    assert found["compress_verdict"]['compress_verdict="no gates"'] == 1


def test_the_ci_files_need_no_heavy_library() -> None:
    heavy = {"torch", "numpy", "onnx", "matplotlib", "jinja2"}
    code = (
        f"import sys, deploy.junit, deploy.openmetrics, deploy.baseline; print({heavy!r} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# -- the summary ----------------------------------------------------------------------------------------


def test_the_summary_is_the_report_with_all_its_rows(results: dict[str, Any]) -> None:
    many = {**results, "layers": results["layers"] * 60}
    said = summary.render(many)
    assert said.startswith("# Compression report: PASS")
    assert sum(line.startswith("| ") for line in said.splitlines()) > len(many["layers"]) > 1000
    assert "rows are shown" not in said
    assert len(said.encode()) < summary.MOST_BYTES


@pytest.mark.parametrize("most", [2_000, 5_000, 9_000, 20_000])
def test_a_summary_that_is_too_long_is_cut_between_rows_and_says_so(
    results: dict[str, Any], most: int
) -> None:
    said = summary.render(results, most)
    assert len(said.encode()) <= most
    if "Cut here" in said:
        assert re.search(r"\n\n_Cut here, [\d,]+ lines before its end, to fit a job summary; ", said)
    assert said.count("<details>") == said.count("</details>")
    if "Cut here" not in said:
        check_markdown(said)


def test_every_length_of_cut_is_whole(results: dict[str, Any]) -> None:
    from deploy import report

    whole = report.render_markdown(results)
    for most in range(400, len(whole), 331):
        said = summary.cut(whole, most)
        assert len(said.encode()) <= most
        assert said.count("<details>") == said.count("</details>")
        assert len(re.findall(r"^```", said, flags=re.M)) % 2 == 0
        kept = said[: said.index("_Cut here")].replace("</details>", "").rstrip().splitlines()
        assert set(kept) <= {*whole.splitlines()}
    assert summary.cut(whole, len(whole.encode())) == whole


def test_a_failed_run_has_a_summary_too() -> None:
    said = summary.failed(["c.yaml:3:1 x: bad ```", "\x1b[31m <b>"], 3)
    assert said.startswith("# Compression: ERROR\n\nEnded with exit code 3, nothing was judged.\n\n````\n")
    assert "\x1b" not in said
    assert len(summary.failed(["x" * 10_000] * 300, 1).encode()) < summary.MOST_BYTES


def test_a_run_that_stops_earlier_lists_its_stages() -> None:
    said = summary.unfinished([("train", "cached"), ("prune", "done")])
    assert said.splitlines()[-2:] == ["| train | cached |", "| prune | done |"]
