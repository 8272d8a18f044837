"""The steps in action.yml and ci/gitlab.yml: their own shell text, with the variables that servers set."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from compress.stages import STAGES
from tests.pipelines import CONFIG

ROOT = Path(__file__).parent.parent
GITHUB = ("bash", "--noprofile", "--norc", "-eo", "pipefail")  # what `shell: bash` means
GITLAB = ("sh", "-e")


def action() -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "action.yml").read_text())
    assert isinstance(found, dict)
    return found


def template() -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "ci" / "gitlab.yml").read_text())
    assert list(found) == [".compress"]
    job = found[".compress"]
    assert isinstance(job, dict)
    return job


def step(name: str) -> dict[str, Any]:
    return next(step for step in action()["runs"]["steps"] if step["name"] == name)


def github_environment(folder: Path, **inputs: str) -> dict[str, str]:
    """The step's env with the inputs filled in, and what a runner adds."""
    given = {name: str(spec["default"]) for name, spec in action()["inputs"].items()} | inputs
    env = {"GITHUB_STEP_SUMMARY": str(folder / ".summary"), "GITHUB_OUTPUT": str(folder / ".output")}
    env |= {"GITHUB_ACTIONS": "true", "CI": "true"}
    for name, value in step("Run compress")["env"].items():
        found = re.fullmatch(r"\$\{\{ inputs\.([a-z-]+) \}\}", value)
        assert found
        env[name] = given[found[1]]
    return env


def execute(
    shell: tuple[str, ...], text: str, folder: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a step's text in `folder`, with this tree's compress as the one on the path."""
    tools = folder / ".tools"
    tools.mkdir(exist_ok=True)
    (tools / "compress").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m compress "$@"\n')
    (tools / "compress").chmod(0o755)
    (tools / "step.sh").write_text(text)
    around = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    around |= {key: os.environ[key] for key in ("OMP_NUM_THREADS", "TMPDIR") if key in os.environ}
    command = [*shell, str(tools / "step.sh")]
    return subprocess.run(
        command, cwd=folder, env=around | env, capture_output=True, text=True, check=False, timeout=300
    )


def on_github(folder: Path, **inputs: str) -> tuple[int, str, dict[str, str], str]:
    """Exit code, log, outputs and summary of the step."""
    env = github_environment(folder, **inputs)
    done = execute(GITHUB, step("Run compress")["run"], folder, env)
    said = Path(env["GITHUB_OUTPUT"])
    pairs = dict(line.split("=", 1) for line in said.read_text().splitlines()) if said.exists() else {}
    summary = Path(env["GITHUB_STEP_SUMMARY"])
    return done.returncode, done.stdout + done.stderr, pairs, summary.read_text() if summary.exists() else ""


# -- the files themselves -------------------------------------------------------------------------------


def test_the_action_is_what_github_reads() -> None:
    found = action()
    assert set(found) == {"name", "description", "branding", "inputs", "outputs", "runs"}
    assert all(set(spec) == {"description", "default"} for spec in found["inputs"].values())
    assert all(isinstance(spec["default"], str) for spec in found["inputs"].values())
    assert found["runs"]["using"] == "composite"
    ids = {step.get("id") for step in found["runs"]["steps"]}
    for spec in found["outputs"].values():
        named = re.fullmatch(r"\$\{\{ steps\.([a-z]+)\.outputs\.([a-z-]+) \}\}", spec["value"])
        assert named
        assert named[1] in ids
        assert f'echo "{named[2]}=' in step("Run compress")["run"]
    for one in found["runs"]["steps"]:
        assert ("uses" in one) != ("run" in one)
        assert set(one) <= {"name", "id", "if", "uses", "with", "shell", "env", "run"}
        assert "run" not in one or one["shell"] == "bash"
        assert "uses" not in one or re.fullmatch(r"actions/[a-z-]+@v\d+", one["uses"])
        assert "${{" not in one.get("run", ""), "an input in a script's text is code"
    asked = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text()))
    assert asked == set(found["inputs"])


def test_the_template_is_what_gitlab_reads() -> None:
    job = template()
    assert set(job) == {"image", "variables", "before_script", "script", "artifacts"}
    assert all(isinstance(value, str) for value in job["variables"].values())
    assert set(job["artifacts"]["reports"]) == {"junit", "metrics", "codequality"}
    for path in job["artifacts"]["reports"].values():
        assert path in job["script"][0]
    assert set(step("Run compress")["env"]) == set(job["variables"]) - {"COMPRESS_PACKAGE"}


def test_both_steps_call_compress_alike() -> None:
    ours, theirs = (text.splitlines() for text in (step("Run compress")["run"], template()["script"][0]))
    until = ours.index("status=0") + 2
    different = [pair for pair in zip(ours[:until], theirs[:until], strict=True) if pair[0] != pair[1]]
    assert different == [
        (
            'set -- "$@" --summary compress-ci/summary.md --annotate',
            'set -- "$@" --summary compress-ci/summary.md --code-quality compress-ci/code-quality.json',
        )
    ]


@pytest.mark.parametrize(
    "text", [step("Run compress")["run"], template()["script"][0]], ids=["github", "gitlab"]
)
def test_the_shell_is_clean(text: str, tmp_path: Path) -> None:
    assert subprocess.run(["sh", "-n"], input=text, text=True, check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "-s", "sh", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


# -- executed -------------------------------------------------------------------------------------------


def test_a_fault_in_the_config_is_annotated_and_its_code_passed_on(tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text("version: 1\nmodle: x\n")
    code, log, outputs, summary = on_github(tmp_path)
    assert code == 3
    assert outputs == {"verdict": "none", "exit-code": "3"}
    assert "::error file=compress.yaml,line=2,col=1::modle: " in log
    assert summary.startswith("# Compression: ERROR\n\nEnded with exit code 3")
    assert "error" in (tmp_path / "compress-ci" / "junit.xml").read_text()


def test_wrong_usage_has_a_summary_too(tmp_path: Path) -> None:
    code, _, outputs, summary = on_github(tmp_path, **{"from": "nothing"})
    assert code == 2
    assert outputs["exit-code"] == "2"
    assert summary == "compress ended with exit code 2 before it could write a summary.\n"


HOSTILE = "$(touch pwned) `touch pwned`; touch pwned #'\" --help\u202e"


@pytest.mark.parametrize(
    "name", ["config", "run-folder", "set", "baseline", "tolerate", "from", "until", "command"]
)
def test_a_hostile_input_is_a_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "compress.yaml").write_text("version: 1\n")
    code, log, outputs, summary = on_github(tmp_path, **{name: HOSTILE})
    assert code in (2, 3)
    assert outputs["exit-code"] == str(code)
    assert summary
    assert not (tmp_path / "pwned").exists()
    assert "\u202e" not in log.replace(HOSTILE, "")


def test_a_file_left_by_another_job_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "compress-ci").mkdir()
    (tmp_path / "compress-ci" / "metrics.txt").write_text('compress_verdict{compress_verdict="pass"} 1.0\n')
    assert on_github(tmp_path)[2] == {"verdict": "none", "exit-code": "3"}


def test_the_gitlab_job_reports_a_fault(tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text("version: 1\nmodle: x\n")
    job = template()
    env = {**job["variables"], "COMPRESS_PACKAGE": "installed", "GITLAB_CI": "true", "CI": "true"}
    done = execute(GITLAB, "\n".join([*job["before_script"], *job["script"]]), tmp_path, env)
    assert done.returncode == 3
    entries = json.loads((tmp_path / "compress-ci" / "code-quality.json").read_text())
    assert {"path": "compress.yaml", "lines": {"begin": 2}} in [entry["location"] for entry in entries]


@pytest.mark.slow
def test_a_pipeline_over_two_runners_and_a_baseline(tmp_path: Path) -> None:
    """Up to the export here, the rest in another folder without the data's cache; then gates that fail."""
    cpu, gpu = tmp_path / "a cpu's $HOME", tmp_path / "gpu"
    for folder in (cpu, gpu):
        folder.mkdir()
        (folder / "a b'.yaml").write_text(
            CONFIG.replace("epochs: 3", "epochs: 1").replace("epochs: 2", "epochs: 1")
        )
    given = {
        "config": "a b'.yaml",
        "run-folder": "the run",
        "set": "prune.macs_ratio=0.7\nfinetune.recalibrate=0",
    }
    code, log, outputs, summary = on_github(cpu, until="export", **given)
    assert code == 0, log
    assert outputs == {"verdict": "none", "exit-code": "0"}
    assert summary.startswith("# Compression: not judged yet")
    shutil.move(cpu / "the run", gpu / "the run")
    code, log, outputs, summary = on_github(gpu, **{"from": "bench"}, **given)
    assert code == 0, log
    assert outputs == {"verdict": "pass", "exit-code": "0"}
    assert [name for name in STAGES if re.search(rf"^done +{name}\b", log, flags=re.M)] == [*STAGES[4:]]
    assert summary.startswith("# Compression report: PASS")
    assert ElementTree.parse(gpu / "compress-ci" / "junit.xml").getroot().attrib["failures"] == "0"
    (gpu / ".summary").unlink()
    given["set"] += "\ngates.size_ratio=0.0001"
    code, log, outputs, summary = on_github(gpu, **given)
    assert (code, outputs["verdict"], outputs["exit-code"]) == (5, "fail", "5")
    assert summary.startswith("# Compression report: FAIL")
    (gpu / ".summary").unlink()
    code, log, outputs, summary = on_github(gpu, command="gate", baseline="no/such", **given)
    assert (code, outputs["verdict"]) == (5, "fail")
    assert "There is no baseline at no/such" in summary
