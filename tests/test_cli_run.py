"""`compress run`: what it asks of the pipeline and says at the end, every failure, a whole first run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress.errors import Interrupted, LockedError, ModelError
from compress.stages import STAGES
from deploy.errors import ExportError
from tests.test_cli import RESULTS, Capture, Fake, _here, call, call_json, fake

__all__ = ["_here", "fake"]  # fixtures


def test_run_hands_everything_to_the_pipeline(capfd: Capture, fake: Fake) -> None:
    code, _, _ = call(
        capfd, "run", "--until", "bench", "--from", "prune", "--fresh", "--set", "prune.macs_ratio=0.4"
    )
    asked = fake.asked
    assert code == 0
    assert asked["config"].prune.macs_ratio == 0.4
    assert (asked["until"], asked["start"], asked["fresh"], asked["dry_run"]) == (
        "bench",
        "prune",
        True,
        False,
    )
    assert asked["command"] == "compress run compress.yaml --set prune.macs_ratio=0.4"
    assert asked["should_stop"]() is False


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_a_command(capfd: Capture, fake: Fake, stage: str) -> None:
    code, out, _ = call(capfd, stage, "compress.yaml")
    assert (code, fake.asked["only"]) == (0, stage)
    assert out == "stage prune was done already; the files are in run\n"


def test_out_starts_where_the_user_is_and_the_config_where_it_lies(capfd: Capture, fake: Fake) -> None:
    Path("sub").mkdir()
    Path("compress.yaml").rename("sub/my.yaml")
    assert call(capfd, "run", "sub/my.yaml", "-o", "elsewhere")[0] == 0
    assert fake.asked["folder"] == Path("sub")
    assert (Path("sub") / fake.asked["config"].out).resolve() == Path("elsewhere").resolve()
    assert fake.asked["command"] == "compress run my.yaml"


def test_the_end_of_a_run_says_what_matters(capfd: Capture, fake: Fake) -> None:
    fake.results, fake.exit_code = RESULTS, 5
    code, out, err = call(capfd, "run")
    assert code == 5
    assert out.splitlines() == [
        "FAIL  1 of 2 gates pass",
        "",
        "  accuracy    97.20 % → 96.90 %  −0.30 points, on 1,000 test examples",
        "  MACs        9.15 M → 4.40 M    48.1 % of the original",
        "  parameters  75.0 k → 33.2 k    44.3 % of the original",
        "  ONNX file   304 kB → 140 kB    46.0 % of the original",
        "  speed       1.63× as fast      onnxruntime, batch 32 (95 % interval 1.46× to 1.67×)",
        "",
        "  FAIL  speedup  1.63× as fast; the limit is 2×.",
        "",
        "  report  run/report.html",
        "  model   run/dense.onnx",
    ]
    assert "a native library" in err
    assert [line.split()[:2] for line in err.splitlines()[:2]] == [["start", "train"], ["done", "train"]]


def test_verbose_shows_the_gates_that_pass_too(capfd: Capture, fake: Fake) -> None:
    fake.results = RESULTS
    assert "  PASS  accuracy_drop  It falls by 0.30 points." in call(capfd, "run", "-v")[1]


def test_missing_figures_are_said_to_be_missing(capfd: Capture, fake: Fake) -> None:
    fake.results = {"verdict": "no gates", "gates": []}
    _, out, _ = call(capfd, "run")
    assert out.startswith("DONE  no gates are set\n")
    assert out.count("not measured") == 5


def test_json_holds_results_stages_and_paths(capfd: Capture, fake: Fake) -> None:
    fake.results, fake.exit_code = RESULTS, 5
    document = call_json(capfd, "run")
    result = document["result"]
    assert (document["command"], document["status"], document["exit_code"]) == ("run", "failed", 5)
    assert result["accuracy"] == RESULTS["accuracy"]
    assert result["run"] == "run"
    assert result["stages"][0] == {"name": "train", "status": "done", "seconds": 1.5}
    assert result["paths"] == {"report.html": "run/report.html", "dense.onnx": "run/dense.onnx"}


def test_a_dry_run_is_a_table(capfd: Capture, fake: Fake) -> None:
    code, out, err = call(capfd, "run", "--dry-run")
    assert (code, fake.asked["dry_run"]) == (0, True)
    assert out.splitlines()[1:3] == ["train  done", "prune  cached"]
    assert out.splitlines()[-1] == "dry run: nothing was changed in run"
    assert "done      train" not in err


def test_quiet_leaves_the_result_alone(capfd: Capture, fake: Fake) -> None:
    fake.results = RESULTS
    _, out, err = call(capfd, "run", "-q")
    assert out.startswith("FAIL  1 of 2 gates pass")
    assert err == "a native library\n"


def test_colour_only_when_asked_for(capfd: Capture, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.results = RESULTS
    assert "\x1b" not in "".join(call(capfd, "run")[1:])
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;31mFAIL\x1b[0m" in call(capfd, "run")[1]
    assert "\x1b" not in "".join(call(capfd, "run", "--no-color")[1:])
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in "".join(call(capfd, "run")[1:])


# -- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            ModelError("cannot be traced", "model", "export it"),
            4,
            "error: model: cannot be traced; export it",
        ),
        (LockedError("another run holds this folder", "run"), 9, "error: run: another run holds this folder"),
        (ExportError("no ONNX operator", "dense"), 4, "error: dense: no ONNX operator"),
        (MemoryError(), 7, "error: memory ran out; "),
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), 7, "error: run/x: no space left"),
        (KeyboardInterrupt(), 130, "stopped at once"),
        (
            Interrupted("stopped at epoch 2", "train", "run it again"),
            130,
            "train: stopped at epoch 2; run it",
        ),
    ],
)
def test_a_failed_run_is_one_line_with_its_code(
    capfd: Capture, fake: Fake, error: BaseException, code: int, said: str
) -> None:
    fake.error = error
    found, out, err = call(capfd, "run", "-q")
    assert (found, out) == (code, "")
    lines = [line for line in err.splitlines() if line != "a native library"]
    assert len(lines) == 1
    assert lines[0].startswith(said)
    assert call_json(capfd, "run")["exit_code"] == code


def test_every_fault_of_a_config_is_told(capfd: Capture) -> None:
    call(capfd, "init")
    arguments = ("run", "--set", "prune.mac_ratio=0.5", "--set", "bench.repeats=0")
    code, out, err = call(capfd, *arguments)
    assert (code, out) == (3, "")
    assert err.splitlines() == [
        "error: --set prune.mac_ratio: unknown key; did you mean macs_ratio?",
        "error: --set bench.repeats: must be at least 3, found 0",
    ]
    error = call_json(capfd, *arguments)["error"]
    assert error["where"] == "--set prune.mac_ratio"
    assert [more["where"] for more in error["more"]] == ["--set bench.repeats"]


def test_a_missing_config_says_how_to_make_one(capfd: Capture) -> None:
    code, _, err = call(capfd, "run")
    assert (code, err) == (3, "error: compress.yaml: there is no such file; make one with: compress init\n")


def test_a_bug_is_one_line_and_a_log_in_the_run(capfd: Capture, fake: Fake) -> None:
    Path("run").mkdir()
    fake.error = ZeroDivisionError("oops")
    code, out, err = call(capfd, "run", "-q")
    (log,) = Path("run").glob("crash-*.log")
    assert (code, out) == (1, "")
    said = f"error: bug in compress: ZeroDivisionError: oops; please report it with {log}"
    assert said in err.splitlines()
    assert "Traceback" not in err
    assert "stage train done best 97 %" in log.read_text()
    assert "command: compress run -q" in log.read_text()


def test_debug_shows_the_traceback(capfd: Capture, fake: Fake) -> None:
    fake.error = ModelError("cannot be traced")
    code, _, err = call(capfd, "run", "--debug")
    assert code == 4
    assert "Traceback (most recent call last)" in err
    assert "error: cannot be traced" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_at_a_safe_point(
    capfd: Capture, fake: Fake, number: signal.Signals, code: int
) -> None:
    def during(asked: dict[str, Any]) -> None:
        os.kill(os.getpid(), number)
        assert asked["should_stop"]()
        raise Interrupted("stopped at step 3", "train", "run the same command again")

    fake.during = during
    found, out, err = call(capfd, "run")
    assert (found, out) == (code, "")
    assert "warning: stopping at the next safe point; press again to stop now" in err
    assert "train: stopped at step 3; run the same command again" in err


def test_a_second_signal_stops_at_once(capfd: Capture, fake: Fake) -> None:
    def during(_: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    fake.during = during
    code, _, err = call(capfd, "run")
    assert code == 143
    assert err.splitlines()[-1] == "stopped at once; the same command goes on from the last safe point"


def test_a_reader_that_goes_away_is_no_failure() -> None:
    command = f'"{sys.executable}" -m compress schema | head -c 1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


# -- the real thing -------------------------------------------------------------------------------------

TINY = (
    "data.train_limit=256", "data.test_limit=128", "model.kwargs={depth: 8, width: 8, channels: 1}",
    "train.epochs=1", "finetune.epochs=1", "prune.align=2", "prune.units_per_step=16",
    "bench.batches=[1]", "bench.runners=[onnxruntime]", "bench.repeats=5", "bench.seconds=0.01",
    "gates.accuracy_drop=null", "gates.speedup=null", "export.batches=[2]",
)  # fmt: skip


@pytest.mark.slow
def test_a_new_user_gets_a_report(capfd: Capture) -> None:
    """init and run in an empty folder; again: all cached; a damaged file: exit 8."""
    changes = [part for item in TINY for part in ("--set", item)]
    assert call(capfd, "init")[0] == 0
    code, out, err = call(capfd, "run", *changes)
    assert code == 0, err
    assert out.startswith("PASS  2 of 2 gates pass")
    assert Path("run/report.html").is_file()
    assert call(capfd, "verify", "run")[0] == 0
    result = call_json(capfd, "run", *changes)["result"]
    assert {stage["status"] for stage in result["stages"]} == {"cached"}
    assert result["cost"]["macs"]["after"] <= 0.5 * result["cost"]["macs"]["before"]
    Path("run/dense.onnx").write_bytes(b"damaged")
    assert call(capfd, "verify", "run")[0] == 8
    code, _, err = call(capfd, "run", *changes)
    assert code == 8
    assert "run/dense.onnx" in err
