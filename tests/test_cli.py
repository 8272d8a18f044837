"""The command line: help, usage, and the commands that need no pipeline; their output and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from compress import config, failures, manifest, pipeline
from compress.cli import SECTIONS, cli, main
from compress.pipeline import Outcome

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
    # What the pretended pipeline raises is this package's, not that of code which the config names.
    monkeypatch.setattr(failures, "users_line", lambda error: "")
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
    assert call(capfd, "verify", "done") == (0, "OK  every file in done is what was written\n", "")
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
    assert call(capfd, "verify", "nowhere")[0] == 3
    run = finished_run()
    (run / "manifest.json").write_text("{")
    code, out, err = call(capfd, "verify", "done")
    assert (code, out) == (8, "")
    assert err.startswith("error: done/manifest.json: is not whole JSON")
