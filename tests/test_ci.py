"""The options of `compress run` and `compress gate` for CI servers, and faults marked at their lines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compress import ci
from compress.errors import CompressError, ConfigError, ConfigErrors, ResourceError
from deploy.errors import RunnerError
from tests.test_ci_files import parse
from tests.test_cli import RESULTS, Capture, Fake, _here, call, call_json, fake

__all__ = ["_here", "fake"]  # fixtures

EVERYTHING = (
    "--junit",
    "j.xml",
    "--metrics",
    "m.txt",
    "--summary",
    "s.md",
    "--code-quality",
    "q.json",
    "--annotate",
)


@pytest.mark.parametrize("command", ["run", "gate"])
def test_a_verdict_is_written_for_the_server(capfd: Capture, fake: Fake, command: str) -> None:
    fake.results, fake.exit_code = RESULTS, 5
    code, out, err = call(capfd, command, *EVERYTHING)
    assert code == 5
    assert out.startswith("FAIL  1 of 2 gates pass")
    assert "::error" not in err
    assert ElementTree.parse("j.xml").getroot().attrib["failures"] == "1"
    assert parse(Path("m.txt").read_text())["compress_verdict"]['compress_verdict="fail"'] == 1
    assert Path("s.md").read_text().startswith("# Compression report: FAIL")
    assert json.loads(Path("q.json").read_text()) == []
    assert fake.asked["earlier"] is None


def test_a_run_that_is_not_judged_says_so(capfd: Capture, fake: Fake) -> None:
    assert call(capfd, "run", "--until", "prune", *EVERYTHING)[0] == 0
    assert ElementTree.parse("j.xml").getroot().attrib["skipped"] == "1"
    assert Path("s.md").read_text().endswith("| train | done |\n| prune | cached |\n")
    assert not Path("m.txt").exists()


def test_a_dry_run_writes_nothing(capfd: Capture, fake: Fake) -> None:
    assert call(capfd, "run", "--dry-run", *EVERYTHING)[0] == 0
    assert not Path("j.xml").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            ResourceError("no space left", "run/a.onnx", "make room"),
            7,
            "run/a.onnx: no space left; make room",
        ),
        (RunnerError("no GPU", "bench"), 6, "bench: no GPU"),
        (MemoryError(), 7, "memory ran out"),
        (ValueError("odd\x1b"), 1, "bug in compress: ValueError: odd\\x1b"),
    ],
)
def test_what_ends_a_run_early_is_in_every_file(
    capfd: Capture, fake: Fake, error: BaseException, code: int, said: str
) -> None:
    fake.error = error
    found, _, err = call(capfd, "run", *EVERYTHING)
    assert found == code
    (case,) = ElementTree.parse("j.xml").getroot().iter("error")
    assert case.attrib["message"].startswith(said)
    assert case.attrib["type"] == f"exit code {code}"
    assert said in Path("s.md").read_text()
    assert f"exit code {code}" in Path("s.md").read_text()
    assert f"::error::{said}" in err
    assert not Path("m.txt").exists()


FAULTY = """version: 1
model: {name: "m:f", input_shape: [3, 8, 8]}
data: {name: none}
prune:
  macs_ratoi: 0.5
gates: {speedup: -1}
"""


def test_every_fault_of_a_config_is_marked_at_its_line(capfd: Capture) -> None:
    Path("compress.yaml").write_text(FAULTY)
    code, _, err = call(capfd, "run", *EVERYTHING)
    assert code == 3
    commands = [line for line in err.splitlines() if line.startswith("::")]
    assert commands[0].startswith("::error file=compress.yaml,line=5,col=3::prune.macs_ratoi: ")
    assert commands[1].startswith("::error file=compress.yaml,line=6,col=")
    assert "did you mean macs_ratio?" in commands[0]
    first, second = json.loads(Path("q.json").read_text())
    assert first["location"] == {"path": "compress.yaml", "lines": {"begin": 5}}
    assert set(first) == {"description", "check_name", "fingerprint", "severity", "location"}
    assert first["fingerprint"] != second["fingerprint"]
    assert re.fullmatch(r"[0-9a-f]{64}", first["fingerprint"])
    assert call(capfd, "run")[2].count("::error") == 0


def test_with_json_the_annotations_leave_stdout_alone(capfd: Capture) -> None:
    Path("compress.yaml").write_text(FAULTY)
    assert call_json(capfd, "run", "--annotate")["exit_code"] == 3


@pytest.mark.parametrize(
    ("where", "what", "command"),
    [
        ("a,b:c.yaml:1:2 k", "50% of\nit::", "::error file=a%2Cb%3Ac.yaml,line=1,col=2::k: 50%25 of\\nit::"),
        ("c.yaml:7", "not UTF-8", "::error file=c.yaml,line=7,col=1::not UTF-8"),
        ("--set x", "bad", "::error::--set x: bad"),
        ("", "\r::warning::", "::error::\\r::warning::"),
        ("x\x1b.yaml:1:1", "a", "::error file=x\\x1b.yaml,line=1,col=1::a"),
    ],
)
def test_a_command_to_github_cannot_be_broken_out_of(where: str, what: str, command: str) -> None:
    (fault,) = ci.faults(CompressError(what, where))
    assert ci.github_command(fault) == command
    assert "\n" not in command


def test_a_name_that_looks_like_a_place_is_taken_for_its_longest_reading() -> None:
    both = ConfigErrors([ConfigError("x", "a.yaml:1:2 b"), ConfigError("y", "c")])
    assert ci.faults(both) == [ci.Fault("b: x", "a.yaml", 1, 2), ci.Fault("c: y")]


def test_gate_takes_a_baseline_and_its_tolerances(capfd: Capture, fake: Fake) -> None:
    Path("old").mkdir()
    Path("old/results.json").write_text('{"schema_version": 1}')
    fake.results = RESULTS
    assert call(capfd, "gate", "--baseline", "old", "--tolerate", "latency=0.1")[0] == 0
    against: Any = fake.asked["earlier"]
    assert (against.results, against.tolerated.latency) == ({"schema_version": 1}, 0.1)
    assert fake.asked["only"] == "gate"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--tolerate", "size=1"), 2, "--tolerate goes with --baseline"),
        (("--baseline", "old", "--tolerate", "speed=1"), 3, "there is nothing called 'speed' to tolerate"),
        (
            ("--baseline", "run"),
            3,
            "--baseline run: is the run that is to be judged; give the run, release or",
        ),
    ],
)
def test_a_wrong_baseline_is_one_line(
    capfd: Capture, fake: Fake, arguments: tuple[str, ...], code: int, said: str
) -> None:
    Path("run").mkdir()
    Path("run/results.json").write_text("{}")
    found, _, err = call(capfd, "run", *arguments)
    assert found == code
    assert said in err


def test_a_file_that_cannot_be_written_is_one_line(capfd: Capture, fake: Fake) -> None:
    fake.results = RESULTS
    Path("file").write_text("")
    code, _, err = call(capfd, "run", "--junit", "file/j.xml")
    assert code == 3
    assert err.splitlines()[-1].startswith("error: file/j.xml: cannot be written")
