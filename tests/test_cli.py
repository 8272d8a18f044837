"""The command line: every command, its output, its errors and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from compress import config, manifest, pipeline
from compress.cli import SECTIONS, cli, main
from compress.errors import Interrupted, LockedError, ModelError
from compress.pipeline import Outcome
from compress.stages import STAGES
from deploy.errors import ExportError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, and no colour settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)


def call(capfd: Capture, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = main(list(arguments))
    found = capfd.readouterr()
    return code, found.out, found.err


def call_json(capfd: Capture, *arguments: str) -> dict[str, Any]:
    """The document of a command with --json; checks what every such document must hold."""
    code, out, _ = call(capfd, *arguments, "--json")
    document: dict[str, Any] = json.loads(out)
    assert list(document) == ["schema_version", "command", "status", "exit_code", "result", "error"]
    assert document["schema_version"] == 1
    assert document["exit_code"] == code
    assert (document["error"] is not None) == (document["status"] == "error")
    assert (document["status"] == "ok") == (code == 0)
    return document


RESULTS: dict[str, Any] = {
    "schema_version": 1,
    "accuracy": {"metric": "top1", "before": 0.972, "after": 0.969, "n": 1000, "flips": None},
    "cost": {
        "macs": {"before": 9_150_000, "after": 4_400_000},
        "params": {"before": 75_002, "after": 33_200},
        "onnx_bytes": {"before": 304_341, "after": 140_000},
    },
    "speedup": [
        {"runner": "onnxruntime", "batch": 1, "ratio": 1.2, "low": 1.1, "high": 1.3},
        {"runner": "onnxruntime", "batch": 32, "ratio": 1.63, "low": 1.46, "high": 1.67},
    ],
    "gates": [
        {"name": "accuracy_drop", "verdict": "pass", "message": "It falls by 0.30\xa0points."},
        {"name": "speedup", "verdict": "fail", "message": "1.63\u00d7 as fast; the limit is 2\u00d7."},
    ],
    "verdict": "fail",
    "provenance": {"config": {"gates": {"runner": "onnxruntime"}, "bench": {"batches": [1, 32]}}},
}  # fmt: skip


@dataclass
class Fake:
    """Stands in for pipeline.run: keeps what it was asked, talks a little, gives an outcome."""

    exit_code: int = 0
    results: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    during: Callable[[dict[str, Any]], None] = lambda _: None
    asked: dict[str, Any] = field(default_factory=dict)

    def __call__(self, loaded: config.Config, folder: Path, **asked: Any) -> Outcome:
        self.asked = {"config": loaded, "folder": folder, **asked}
        asked["events"].stage("train", "start")
        asked["events"].stage("train", "done", "best 97 %")
        os.write(1, b"a native library\n")
        self.during(self.asked)
        if self.error is not None:
            raise self.error
        run = folder / loaded.out
        run.mkdir(exist_ok=True)
        for name in ("report.html", "dense.onnx"):
            (run / name).write_text("x")
        return Outcome(self.exit_code, run, self.results, (("train", "done", 1.5), ("prune", "cached", 0.0)))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> Fake:
    """A config file here, and a pipeline that only pretends."""
    assert main(["init"]) == 0
    capfd.readouterr()
    found = Fake()
    monkeypatch.setattr(pipeline, "run", found)
    return found


# -- help and start-up ----------------------------------------------------------------------------------


def test_help_names_every_command_and_needs_no_torch() -> None:
    code = (
        "import sys; from compress.cli import main; main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'pydantic', 'rich', 'matplotlib', 'scipy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 5  # half a second where nothing else runs
    assert done.returncode == 0, f"--help imports {done.stderr}"
    assert all(f"\n  {name} " in done.stdout for name in cli.commands)


@pytest.mark.parametrize("arguments", [["schema"], ["init"], ["verify", "."], ["completion", "zsh"], ["run"]])
def test_light_commands_and_config_errors_need_no_torch(arguments: list[str]) -> None:
    code = f"import sys; from compress.cli import main; main({arguments}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_every_command_is_in_one_section_of_the_help() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(cli.commands)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_and_the_common_options(capfd: Capture, name: str) -> None:
    code, out, _ = call(capfd, name, "--help")
    assert code == 0
    assert all(option in out for option in ("--json", "--verbose", "--quiet", "--no-color", "--debug"))
    assert "Usage: compress " + name in out


def test_python_m_compress_and_the_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compress", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("compress 0.")


# -- usage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runn"], "No such command 'runn'. (Did you mean one of: 'prune', 'run'?); see compress --help"),
        (["run", "--freshh"], "No such option '--freshh'. Did you mean '--fresh'?; see compress run --help"),
        (["run", "--until", "nothing"], "'nothing' is not one of 'train', 'prune'"),
        (["run", "--from", "gate", "--until", "prune"], "--from gate comes after --until prune"),
        (["compare", "a"], "Missing argument 'B'"),
        (["compare", "a", "b", "--batch", "0"], "0 is not in the range x>=1"),
        (["inspect", "m:f", "--input-shape", "3,x"], "'3,x' is not a list of sizes such as 3,224,224"),
        (["inspect", "m:f", "--input-shape", "3,0"], "'3,0' is not a list of sizes"),
        (["inspect", "--classes", "10"], "go with a MODEL, not a config"),
        (["inspect", "m:f", "--set", "seed=1"], "--set changes a config, and a MODEL has none"),
        (["inspect", "--images", "10"], "--images goes with --sensitivity"),
        (["inspect", "--plot", "s.png"], "--plot goes with --sensitivity or --target"),
        (["inspect", "--target", "--images", "9"], "--images goes with --sensitivity"),
        (["inspect", "--target", "--sensitivity"], "give one of --sensitivity and --target"),
        (["inspect", "--target", "a.yaml"], "the config goes first: compress inspect a.yaml --target"),
        (["inspect", "a.yaml", "--target", "--plot", "s.gif"], "s.gif does not end in .png, .svg, .pdf"),
        (["inspect", "m:f", "--sensitivity"], "--sensitivity measures on data: give a config, not m:f"),
        (["inspect", "--sensitivity", "--images", "0"], "0 is not in the range x>=1"),
        (["inspect", "--sensitivity", "--plot", "s.gif"], "s.gif does not end in .png, .svg, .pdf"),
        (["inspect", "--sensitivity", "--plot", "no/s.png"], "--plot: there is no folder no"),
        (["init", "--recipe", "modrn"], "'modrn' is not one of 'molchanov2019', 'modern'"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
        (["verify", "a\x1b[2J", "b"], "unexpected extra argument (b)"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(capfd: Capture, arguments: list[str], said: str) -> None:
    code, out, err = call(capfd, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert said in err
    assert "\x1b" not in err


def test_wrong_usage_with_json_is_a_document(capfd: Capture) -> None:
    document = call_json(capfd, "run", "--qqq")
    assert (document["command"], document["exit_code"], document["status"]) == ("run", 2, "error")
    assert document["error"] == {
        "what": "No such option '--qqq'",
        "where": "",
        "fix": "see compress run --help",
    }


def test_no_command_shows_the_help(capfd: Capture) -> None:
    code, out, err = call(capfd)
    assert (code, out) == (2, "")
    assert "Usage: compress" in err


@pytest.mark.parametrize(
    "arguments", [["--json", "schema"], ["schema", "--json"], ["--json", "schema", "--json"]]
)
def test_common_options_may_stand_before_or_after_the_command(capfd: Capture, arguments: list[str]) -> None:
    code, out, _ = call(capfd, *arguments)
    assert code == 0
    assert json.loads(out)["command"] == "schema"


# -- commands without a pipeline ------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, "modern"])
@pytest.mark.parametrize("template", ["mnist", "cifar10", "imagefolder"])
def test_init_writes_a_valid_config(capfd: Capture, template: str, recipe: str | None) -> None:
    more = ["--recipe", recipe] if recipe else []
    code, out, err = call(capfd, "init", "new.yaml", "--template", template, *more)
    assert (code, err) == (0, "")
    assert out.startswith("wrote new.yaml: ")
    assert "new.yaml" in out.splitlines()[1]
    loaded = config.load("new.yaml")
    jsonschema.validate(config.to_dict(loaded), config.json_schema())
    assert len(loaded.model.input_shape) == 3
    assert loaded.recipe == recipe


def test_init_keeps_a_file_that_is_there_unless_forced(capfd: Capture) -> None:
    Path("compress.yaml").write_text("mine")
    code, _, err = call(capfd, "init")
    assert code == 2
    assert "compress.yaml is there already; give another name, or --force to overwrite it" in err
    assert Path("compress.yaml").read_text() == "mine"
    assert call(capfd, "init", "--force")[0] == 0
    assert config.load("compress.yaml").version == 1


def test_init_does_not_write_through_a_dangling_link(capfd: Capture) -> None:
    Path("compress.yaml").symlink_to("elsewhere")
    assert call(capfd, "init")[0] == 2
    assert not Path("elsewhere").exists()


def test_schema_prints_or_writes_the_schema(capfd: Capture) -> None:
    code, out, _ = call(capfd, "schema")
    assert code == 0
    assert json.loads(out) == config.json_schema()
    assert call(capfd, "schema", "-o", "s.json")[:2] == (0, "wrote s.json\n")
    assert json.loads(Path("s.json").read_text()) == config.json_schema()
    assert call_json(capfd, "schema")["result"] == config.json_schema()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_clicks_script(capfd: Capture, shell: str) -> None:
    code, out, _ = call(capfd, "completion", shell)
    assert code == 0
    assert f"_COMPRESS_COMPLETE={shell}_complete" in out


def test_completion_completes_commands() -> None:
    env = {
        **os.environ,
        "_COMPRESS_COMPLETE": "zsh_complete",
        "COMP_WORDS": "compress fine",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv = ['compress']; from compress.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[:2] == ["plain", "finetune"]


def test_doctor_lists_what_is_here(capfd: Capture) -> None:
    code, out, _ = call(capfd, "doctor")
    assert code == 0
    assert out.splitlines()[-1] == "OK  compress can work here"
    assert all(f"  {name} " in out for name in ("torch", "onnxruntime", "memory", "disk"))
    result = call_json(capfd, "doctor")["result"]
    assert result["ready"] is True
    assert {"group", "name", "status", "detail", "fix"} == set(result["checks"][0])


def test_doctor_ends_with_6_when_something_required_is_missing(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import doctor

    monkeypatch.setattr(doctor, "REQUIRED", (doctor.Package("no-such", "no_such", "1"),))
    document = call_json(capfd, "doctor")
    assert (document["exit_code"], document["status"]) == (6, "failed")
    code, out, _ = call(capfd, "doctor")
    assert code == 6
    assert "fix: pip install 'no-such>=1'" in out
    assert out.splitlines()[-1] == "FAIL  missing: no-such"


def finished_run() -> Path:
    run = Path("done")
    run.mkdir()
    (run / "a.bin").write_bytes(b"abc")
    (run / "b.bin").write_bytes(b"def")
    outputs = manifest.facts(run, ["a.bin", "b.bin"])
    manifest.commit(run, manifest.StageRecord("train", "key", outputs, {}, "2026-01-01T00:00:00Z", 1.0))
    return run


def test_verify_of_a_whole_run(capfd: Capture) -> None:
    finished_run()
    assert call(capfd, "verify", "done") == (0, "OK  every file in done is what its stage wrote\n", "")
    assert call_json(capfd, "verify", "done")["result"] == {"run": "done", "problems": []}


def test_verify_names_every_problem_and_ends_with_8(capfd: Capture) -> None:
    run = finished_run()
    (run / "a.bin").write_bytes(b"abd")
    (run / "b.bin").unlink()
    code, out, _ = call(capfd, "verify", "done")
    assert code == 8
    first, second = out.splitlines()
    assert first.startswith("FAIL  a.bin: changed since stage train wrote it: sha256 expected ")
    assert second == "FAIL  b.bin: is missing; compress run --from train"
    document = call_json(capfd, "verify", "done")
    assert document["status"] == "failed"
    assert [problem["path"] for problem in document["result"]["problems"]] == ["a.bin", "b.bin"]


def test_verify_of_something_else_and_of_a_damaged_manifest(capfd: Capture) -> None:
    assert call(capfd, "verify", "nowhere")[0] == 8
    run = finished_run()
    (run / "manifest.json").write_text("{")
    code, out, err = call(capfd, "verify", "done")
    assert (code, out) == (8, "")
    assert err.startswith("error: done/manifest.json: is not whole JSON")


# -- run ------------------------------------------------------------------------------------------------


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


# -- commands that look or compare ----------------------------------------------------------------------


def test_inspect_a_model_by_name(capfd: Capture) -> None:
    arguments = ("inspect", "compress.zoo:cifar_resnet", "--input-shape", "3,16,16")
    code, out, _ = call(capfd, *arguments)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert lines[0] == "compress.zoo:cifar_resnet"
    assert "layer1.0.conv1 conv2d 16 590 k 5.8 %" in lines
    assert "10 it is an output of the model output linear.weight, linear.bias" in lines
    document = call_json(capfd, *arguments)
    assert document["result"]["params"] == 269_722  # as counted by hand: He et al. (2016), table 6: 0.27 M


def test_inspect_takes_the_model_of_a_config(capfd: Capture) -> None:
    call(capfd, "init")
    found = call_json(capfd, "inspect")["result"]
    assert found["model"] == "compress.zoo:cifar_resnet"
    assert found["units"] > 0


@pytest.mark.slow
def test_study_of_a_config(capfd: Capture, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        'version: 1\nmodel: {name: "compress.zoo:cifar_resnet", input_shape: [1, 28, 28],\n'
        "  kwargs: {depth: 8, width: 4, channels: 1}}\ndata: {name: mnist5k, test_limit: 30}\n"
    )
    arguments = ("study", str(config), "--batch", "10", "--units", "8", "--plot", str(tmp_path / "s.png"))
    found = call_json(capfd, *arguments)["result"]
    assert (found["left_out"], found["images"]) == (8, 30)
    assert {row["truth"] for row in found["rows"]} == {"mean", "minibatch", "example"}
    assert len(found["scores"]["taylor"]) == len(found["truths"]["minibatch"]) == 8
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = call(capfd, *arguments)
    assert code == 0
    assert "8 of 44 units left out one by one, 30 test images" in out
    assert "within layers" in out
    code, _, err = call(capfd, "study", str(config), "--plot", "s.bmp")
    assert code == 2
    assert "s.bmp does not end in .png, .svg, .pdf" in err


def test_sensitivity_of_a_config(capfd: Capture, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        'version: 1\nmodel: {name: "compress.zoo:cifar_resnet", input_shape: [1, 28, 28],\n'
        "  kwargs: {depth: 8, width: 4, channels: 1}}\n"
        "data: {name: mnist5k, batch_size: 16, train_limit: 100, validation: 0.4}\n"
    )
    arguments = ("inspect", str(config), "--sensitivity", "--images", "30", "--plot", str(tmp_path / "s.svg"))
    found = call_json(capfd, *arguments, "--set", "prune.criterion=magnitude")["result"]
    assert (found["images"], found["metric"], found["criterion"]) == (30, "top1", "magnitude")
    assert sum(one["units"] for one in found["classes"]) == 44
    assert [p["share"] for p in found["classes"][0]["points"]] == found["shares"] == [0.9, 0.75, 0.5, 0.25]
    rises = [one["rise"] for one in found["classes"]]
    assert rises == sorted(rises, reverse=True)
    drawing = (tmp_path / "s.svg").read_text()
    assert "layer1.0.conv1" in drawing
    code, out, err = call(capfd, "inspect", str(config), "--sensitivity")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "with all channels, on 40 validation examples" in lines[1]
    assert "the least important (taylor) left out; most sensitive first" in out
    assert {line.split(" ")[0].rstrip(",") for line in lines[5:]} >= {"conv1", "layer2.0.conv1"}
    assert err == ""  # the model is not to be trained, so there is nothing to warn of


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["torchvision:resnet19"], "unknown torchvision model 'resnet19'; did you mean resnet18"),
        (["no.such:thing"], "no module named 'no'"),
        (["missing.yaml"], "there is no such file; make one with: compress init"),
        (["torchvision:resnet18", "--weights", "w.pt"], "w.pt: no such weights file"),
    ],
)
def test_inspect_of_what_is_not_there_is_one_line(capfd: Capture, arguments: list[str], said: str) -> None:
    code, out, err = call(capfd, "inspect", *arguments)
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1
    assert said in err


PLAN: dict[str, Any] = {
    "target": {"kind": "macs_ratio", "value": 0.5}, "reachable": True, "least": 0.216,
    "macs": {"before": 100, "after": 48}, "params": {"before": 10, "after": 5},
    "units": {"total": 176, "kept": 104},
    "layers": [{"name": "conv1", "before": 16, "after": 8, "pinned": False},
               {"name": "linear", "before": 10, "after": 10, "pinned": True}],
    "plan": {"version": 1},
}  # fmt: skip


def test_plan_shows_and_writes_the_plan(capfd: Capture, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "plan", lambda config, folder, events: PLAN)
    code, out, _ = call(capfd, "plan", "-o", "plan.json")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "OK 50.0 % of the MACs can be kept (the least possible is 21.6 %)"
    assert "conv1 16 8 50 %" in lines
    assert "linear 10 10 100 % stays" in lines
    assert json.loads(Path("plan.json").read_text()) == {"version": 1}
    monkeypatch.setattr(pipeline, "plan", lambda config, folder, events: {**PLAN, "reachable": False})
    assert call(capfd, "plan")[1].startswith("FAIL  50.0 % of the MACs is out of reach: 21.6 % must stay\n")


def test_files_for_another_target(capfd: Capture, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"file": "variants/dense.int8-gpu.onnx", "accuracy": {"value": 0.97}},
            {"file": "variants/dense.fp8.onnx", "accuracy": {"value": None}}]  # fmt: skip

    def convert_for(config: Any, folder: Path, target: str, *, events: Any) -> list[dict[str, Any]]:
        return rows if target == "h100-int8" else []

    monkeypatch.setattr(pipeline, "convert_for", convert_for)
    code, out, _ = call(capfd, "convert", "--target", "h100-int8")
    said = "variants/dense.int8-gpu.onnx 97.00%\nvariants/dense.fp8.onnx not measured\n"
    assert (code, out) == (0, said)
    assert call_json(capfd, "convert", "--target", "h100-int8")["result"] == {"variants": rows}
    assert call(capfd, "convert", "--target", "cpu-ort")[1] == "cpu-ort runs the fp32 files\n"


@pytest.mark.parametrize(("passed", "code", "word"), [(True, 0, "PASS"), (False, 5, "FAIL")])
def test_compare_is_judged_by_parity(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch, passed: bool, code: int, word: str
) -> None:
    def compare(a: Path, b: Path, **asked: Any) -> dict[str, Any]:
        assert (asked["batches"], asked["repeats"], asked["tolerance"]) == ((4, 2), 5, 0.01)
        return {
            "a": {"path": str(a), "bytes": 2000}, "b": {"path": str(b), "bytes": 1000},
            "parity": [{"batch": 4, "relative": 1e-6, "tolerance": 0.01, "argmax_agreement": 1.0,
                        "passed": passed}],
            "latency": [{"model": "a", "batch": 4, "median": 2.0}, {"model": "b", "batch": 4, "median": 1.0}],
            "speedup": [{"batch": 4, "ratio": 2.0, "low": 1.9, "high": 2.1, "verdict": "faster"}],
            "passed": passed,
        }  # fmt: skip

    monkeypatch.setattr(pipeline, "compare", compare)
    options = ("--batch", "4", "--batch", "2", "--repeats", "5", "--tolerance", "0.01")
    found, out, _ = call(capfd, "compare", "a.onnx", "b.onnx", *options)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert found == code
    assert lines[0].startswith(word)
    assert "b 1,000 b.onnx" in lines
    assert "4 2.000 ms 1.000 ms 2.00× 1.90× to 2.10× faster" in lines


def test_compare_of_what_is_not_there_is_one_line(capfd: Capture) -> None:
    code, out, err = call(capfd, "compare", "a.onnx", "b.onnx")
    assert (code, out) == (3, "")
    assert err.startswith("error: a.onnx: no such file")


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
    assert out.startswith("PASS  1 of 1 gates pass")
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
