"""A run's stages, their files, resuming, and what a stop in the middle leaves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress import config, earlier, files, manifest, pipeline
from compress.errors import (
    CompressError,
    ConfigError,
    DataError,
    IntegrityError,
    Interrupted,
    LockedError,
    ModelError,
)
from compress.handover import hand_over
from compress.steps import Work
from deploy import targets
from deploy.baseline import GATES
from deploy.errors import DeployError
from tests.pipelines import CONFIG, Silent, start, stop_after

WEIGHTS = ("dense.safetensors", "dense.onnx", "plan.json", "pruned.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run, never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = start(folder)
    assert outcome.exit_code == 0, outcome.results["gates"]
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {name: files.sha256(folder / "run" / name) for name in WEIGHTS}


def test_a_run_leaves_a_smaller_proved_model_and_a_report(finished: Path) -> None:
    results = files.read_json(finished / "run" / "results.json")
    assert results["verdict"] == "pass"
    assert results["cost"]["macs"]["after"] <= 0.6 * results["cost"]["macs"]["before"]
    assert results["cost"]["onnx_bytes"]["after"] < results["cost"]["onnx_bytes"]["before"]
    assert results["verification"]["relative_error"] <= 1e-12
    assert results["verification"]["movement"] > 1000 * results["verification"]["relative_error"]
    assert all(row["passed"] and row["relative"] <= 1e-4 for row in results["parity"])
    assert {row["batch"] for row in results["parity"]} == {1, 2, 7}
    assert results["accuracy"]["before"] > 0.5
    found = results["recalibration"]
    assert (found["minibatches"], found["norms"]) == (3, 7)
    assert found == files.read_json(finished / "run" / "finetune.json")["recalibration"]
    assert found["kept"] or found["after"] <= found["before"]
    page = (finished / "run" / "report.html").read_text()
    assert "PASS" in page
    assert f"{results['accuracy']['after'] * 100:.2f}" in page


def test_every_artifact_is_in_the_manifest_with_its_hash(finished: Path) -> None:
    results = files.read_json(finished / "run" / "results.json")
    for artifact in results["provenance"]["artifacts"]:
        assert files.sha256(finished / "run" / artifact["path"]) == artifact["sha256"]
    assert {a["path"] for a in results["provenance"]["artifacts"]} >= {*WEIGHTS, "dense.pt2", "original.onnx"}
    assert pipeline.verify(finished / "run") == []


def test_no_artifact_names_a_folder_of_this_machine(finished: Path) -> None:
    home = str(finished).encode()
    source = str(Path(pipeline.__file__).parent).encode()
    for path in (finished / "run").iterdir():
        if path.is_file() and path.suffix != ".pt2":  # torch writes its own stack traces there
            content = path.read_bytes()
            assert home not in content, path.name
            assert source not in content, path.name


def test_run_again_does_nothing(finished: Path) -> None:
    before = {
        p.name: p.stat().st_mtime_ns for p in (finished / "run").iterdir() if p.suffix in (".onnx", ".json")
    }
    events = Silent()
    outcome = start(finished, events=events)
    assert [status for _, status in events.stages] == ["cached"] * len(pipeline.STAGES)
    assert outcome.exit_code == 0
    after = {
        p.name: p.stat().st_mtime_ns for p in (finished / "run").iterdir() if p.suffix in (".onnx", ".json")
    }
    assert after == before


def test_a_changed_gate_repeats_only_the_report(finished: Path) -> None:
    events = Silent()
    outcome = start(finished, ["gates.size_ratio=0.0001"], events=events, dry_run=True)
    assert [name for name, status, _ in outcome.stages if status != "cached"] == ["report", "gate"]


@pytest.mark.slow
def test_another_target_stands_in_the_report(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    board = (targets.FOLDER / "cpu-ort.toml").read_text().replace("[1, 32]", "[2]")
    (tmp_path / "board.toml").write_text(board)
    own = config.load(tmp_path / "compress.yaml")
    document = pipeline.bench_for(own, tmp_path, str(tmp_path / "board.toml"), events=Silent())
    assert {(row["runner"], row["batch"]) for row in document["latency"]} == {
        ("torch", 2),
        ("onnxruntime", 2),
    }
    events = Silent()
    outcome = start(tmp_path, events=events)
    assert [name for name, status in events.stages if status == "done"] == ["report", "gate"]
    assert [other["target"]["name"] for other in outcome.results["others"]] == ["board"]
    assert outcome.results["target"]["name"] == "cpu-ort"
    assert "On every target" in (tmp_path / "run" / "report.html").read_text()
    files.write_json(tmp_path / "there.json", document | {"target": {"name": "there"}})
    pipeline.bring(own, tmp_path, [tmp_path / "there.json"])
    assert [o["target"]["name"] for o in start(tmp_path).results["others"]] == ["board", "there"]


@pytest.mark.parametrize(
    "calls", [5, *(pytest.param(calls, marks=pytest.mark.slow) for calls in (1, 58, 80))]
)
def test_stopped_and_resumed_ends_with_the_same_bytes(finished: Path, tmp_path: Path, calls: int) -> None:
    with pytest.raises(Interrupted) as stopped:
        start(tmp_path, should_stop=stop_after(calls))
    assert stopped.value.exit_code == 130
    assert calls != 58 or "stopped after removal" in str(stopped.value)
    start(tmp_path, until="export")
    assert hashes(tmp_path) == hashes(finished)


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text(CONFIG)
    script = "from pathlib import Path; from tests.pipelines import start; import sys, torch; "
    script += "torch.set_num_threads(1); start(Path(sys.argv[1]), until='export')"
    for delay in (6.0, 8.0, 10.0, 12.0):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": "."}
        )
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        if (tmp_path / "run" / manifest.MANIFEST_NAME).exists():
            assert pipeline.verify(tmp_path / "run") == []
    start(tmp_path, until="export")
    assert hashes(tmp_path) == hashes(finished)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    outcome = start(tmp_path, dry_run=True)
    assert [status for _, status, _ in outcome.stages] == ["would run"] * len(pipeline.STAGES)
    assert not (tmp_path / "run").exists()


def test_one_stage_needs_the_ones_before(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage train has not been run.*compress run --until train"):
        start(tmp_path, only="prune")


def moved(finished: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run as it is found on another machine: no data, no weights, another build and release of torch."""
    shutil.copytree(finished, place)
    releases = {"compress-release": "0.1.0", "torch": "99.1+cu130"}
    monkeypatch.setattr(pipeline, "_versions", lambda: releases)
    monkeypatch.setattr(Work, "data", property(lambda work: pytest.fail("the data were looked at")))
    monkeypatch.setattr(Work, "align", property(lambda work: pytest.fail("another CPU was asked")))
    return place


def test_the_last_stages_can_be_done_on_another_machine(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, events = moved(finished, tmp_path / "gpu", monkeypatch), Silent()
    outcome = start(there, ["device=cuda:7"], events=Silent(), until="export", dry_run=True, start="export")
    assert [status for _, status, _ in outcome.stages[:1]] == ["would run"]  # the config is another one
    outcome = start(there, events=events, start="bench")
    assert [status for _, status, _ in outcome.stages] == ["cached"] * 5 + ["done"] * 3
    assert outcome.exit_code == 0
    assert outcome.results["data"] == files.read_json(finished / "run" / "results.json")["data"]
    told = [text for text in events.seen if "kept" in text]
    assert len(told) == 5
    assert re.fullmatch(
        r"stage train was done elsewhere and is kept: torch was [\d.]+, here it is 99\.1", told[0]
    )


def test_without_from_other_versions_mean_doing_it_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    events = Silent()
    build = pipeline._versions()
    monkeypatch.setattr(pipeline, "_versions", lambda: {**build, "torch": build["torch"] + ".cu130"})
    assert start(tmp_path / "copy", dry_run=True).stages[0][1] == "cached" or "+" not in build["torch"]
    monkeypatch.setattr(pipeline, "_versions", lambda: {**build, "torch": "99.1"})
    outcome = start(tmp_path / "copy", ["finetune.epochs=1"], dry_run=True, events=events)
    assert {status for _, status, _ in outcome.stages} == {"would run"}
    (told,) = [text for text in events.seen if "again: torch was" in text]
    assert told.endswith("here it is 99.1")


def test_what_is_done_again_and_why(finished: Path) -> None:
    events = Silent()
    start(finished, ["finetune.epochs=1"], dry_run=True, events=events)
    assert "stage finetune is done again: its part of the config changed" in events.seen


def test_a_stage_alone_takes_the_others_as_they_are(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = moved(finished, tmp_path / "gpu", monkeypatch)
    assert start(there, only="gate").exit_code == 0
    with pytest.raises(ConfigError, match="stage prune has not been run with this config"):
        start(there, ["prune.macs_ratio=0.7"], only="gate")


def test_a_release_is_held_against_an_earlier_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy"
    tolerated = earlier.tolerances(["latency=999", "accuracy=0.5"])
    against = earlier.read(str(finished / "run"), tolerated, folder / "run")
    outcome = start(folder, only="gate", earlier=against)
    assert [gate["name"] for gate in outcome.results["gates"]] == ["target", "parity", *GATES]
    assert (outcome.exit_code, outcome.results["verdict"]) == (0, "pass")
    assert outcome.results["baseline"]["tolerated"]["latency"] == 999
    assert "baseline_size" in (folder / "run" / "gate.json").read_text()
    nothing = earlier.read(str(tmp_path / "nothing"), tolerated, folder / "run")
    outcome = start(folder, only="gate", earlier=nothing)
    assert (outcome.exit_code, outcome.results["verdict"]) == (5, "inconclusive")
    events = Silent()
    outcome = start(folder, earlier=against, events=events)
    assert "stage report is done again: the baseline changed" in events.seen
    assert outcome.exit_code == 0
    page = (folder / "run" / "report.md").read_text()
    assert "ONNX size over the baseline's" in page
    assert {status for _, status, _ in start(folder, earlier=against).stages} == {"cached"}


def test_a_run_can_be_handed_over_and_served(finished: Path, tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime

    handed = hand_over(finished / "run", tmp_path / "release")
    place = tmp_path / "release" / "models" / "compress_zoo_cifar_resnet"
    session = onnxruntime.InferenceSession(place / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (got,) = session.get_inputs(), session.get_outputs()
    text = (place / "config.pbtxt").read_text()
    assert re.findall(r"dims: \[ (.+) \]", text) == ["1, 28, 28", "10"]
    assert re.findall(r'^    name: "(.+)"$', text, flags=re.M) == [given.name, got.name]
    assert session.run(None, {given.name: np.zeros((3, 1, 28, 28), np.float32)})[0].shape == (3, 10)
    assert str(tmp_path) not in "".join(
        (tmp_path / "release" / name).read_text() for name in handed.paths if name.endswith((".md", ".pbtxt"))
    )
    against = earlier.read(str(tmp_path / "release"), earlier.tolerances(["latency=999"]), finished / "run")
    shutil.copytree(finished, tmp_path / "next")
    assert start(tmp_path / "next", only="gate", earlier=against).exit_code == 0
    gates = files.read_json(tmp_path / "next" / "run" / "gate.json")["gates"]
    assert "0 answers lost, 0 gained" in next(g["message"] for g in gates if g["name"] == "baseline_accuracy")


def test_a_failed_gate_is_exit_5(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    outcome = start(tmp_path / "copy", ["gates.size_ratio=0.0001"])
    assert outcome.exit_code == 5
    assert outcome.results["verdict"] == "fail"


def test_an_original_that_knows_nothing_is_told_before_it_is_pruned(tmp_path: Path) -> None:
    heard = Silent()
    start(tmp_path, ["train.epochs=0"], until="train", events=heard)
    assert not heard.seen
    start(tmp_path, ["train.epochs=0"], until="prune", events=heard)
    assert heard.seen[0].startswith("the original's ")
    assert "cannot be told from always giving the most frequent answer (" in heard.seen[0]
    assert heard.seen[1] == "prune"


def test_a_changed_artifact_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    path = tmp_path / "copy" / "run" / "dense.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert [problem.path for problem in pipeline.verify(tmp_path / "copy" / "run")] == ["dense.onnx"]
    with pytest.raises(IntegrityError, match=r"dense\.onnx"):
        start(tmp_path / "copy")


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code = "from compress import files; import sys, time\n"
    code += "with files.lock(sys.argv[1]):\n print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError) as locked:
            start(tmp_path)
        assert locked.value.exit_code == 9
        assert str(holder.pid) in str(locked.value)
    finally:
        holder.kill()
        holder.wait()


def test_a_loss_that_is_not_a_number_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"loss.*finite") as diverged:
        start(tmp_path, ["train.lr=1e30", "train.epochs=3"])
    assert diverged.value.exit_code == 4
    assert "train" not in manifest.load(tmp_path / "run")
    assert not (tmp_path / "run" / "original.safetensors").exists()


def test_wrong_input_shape_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1, 28, 28") as wrong:
        start(tmp_path, ["model.input_shape=[3, 28, 28]"])
    assert wrong.value.exit_code == 3
    assert "\n" not in str(wrong.value)


def test_an_unreachable_target_names_the_least(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"macs_ratio 0\.01 cannot be reached: 0\.\d+ is the least"):
        start(tmp_path, ["prune.macs_ratio=0.01", "train.epochs=0"])


def test_a_model_without_prunable_units(tmp_path: Path) -> None:
    (tmp_path / "fixed_model.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    )
    with pytest.raises(ModelError, match="no prunable unit") as nothing:
        start(tmp_path, ["model.name=fixed_model:make", "model.kwargs={}", "train.epochs=0"])
    assert nothing.value.exit_code == 4


def test_tolerance_stops_at_the_last_good_point(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    events = Silent()
    start(tmp_path / "copy", ["prune.max_loss_increase=0.0", "prune.lr=1e-9"], until="prune", events=events)
    document = files.read_json(tmp_path / "copy" / "run" / "prune.json")
    assert not document["reached"]
    assert "max_loss_increase 0" in document["stop_reason"]
    assert document["units"]["kept"] > files.read_json(finished / "run" / "prune.json")["units"]["kept"]
    assert document["verification"]["passed"]


@pytest.mark.slow
def test_a_pt2_file_goes_through_like_a_module(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "run" / "dense.pt2", tmp_path / "small.pt2")
    outcome = start(tmp_path, ["model.name=small.pt2", "model.kwargs={}", "train=null", "finetune.epochs=1"])
    before = files.read_json(finished / "run" / "results.json")
    assert outcome.results["accuracy"]["before"] == before["accuracy"]["after"]
    assert outcome.results["cost"]["macs"]["before"] == before["cost"]["macs"]["after"]
    assert outcome.results["cost"]["macs"]["after"] < outcome.results["cost"]["macs"]["before"]


def test_compare_sees_equal_and_different_models(finished: Path) -> None:
    run = finished / "run"
    quick = {"batches": [2], "repeats": 5, "seconds": 0.01, "events": Silent()}
    same = pipeline.compare(run / "dense.pt2", run, **quick)
    assert same["passed"]
    assert same["b"]["path"].endswith("dense.onnx")
    other = pipeline.compare(run / "original.onnx", run / "dense.graph.json", **quick)
    assert not other["passed"]
    assert other["size"]["ratio"] < 1
    with pytest.raises(ConfigError, match="no such file"):
        pipeline.compare(run / "nothing.onnx", run, **quick)


def test_inspect_and_plan_say_what_would_go(finished: Path) -> None:
    settings = config.load(finished / "compress.yaml")
    seen = pipeline.inspect(settings.model, finished)
    assert seen["units"] == 88
    assert seen["pinned"][0]["reason"] == "it is an output of the model"
    assert {row["macs_ratio"]: row["reachable"] for row in seen["ratios"]} == {
        0.75: True,
        0.5: True,
        0.25: True,
    }
    assert max(len(row["layers"]) for row in seen["couplings"]) == 4
    wanted = pipeline.plan(settings, finished, events=Silent())
    assert wanted["reachable"]
    assert wanted["macs"]["after"] <= 0.6 * wanted["macs"]["before"]
    assert wanted["plan"]["axes"]


@pytest.mark.parametrize(
    ("override", "code", "text"),
    [
        ("bench.target=cpu-otr", 3, "unknown target 'cpu-otr'; use cpu-ort"),
        ("bench.runners=[onnxruntim]", 3, "unknown runner onnxruntim; did you mean onnxruntime?"),
        ("device=cuda:7", 6, "device"),
        ("prune.keep=[nosuch]", 3, "'nosuch' names no parameter"),
    ],
)
def test_what_cannot_end_well_is_told_first(tmp_path: Path, override: str, code: int, text: str) -> None:
    overrides = [override] if "runners" not in override else [override, "gates.runner=onnxruntim"]
    with pytest.raises((CompressError, DeployError), match=re.escape(text)) as refused:
        start(tmp_path, overrides)
    assert refused.value.exit_code == code
    assert not (tmp_path / "run" / "train.json").exists()


def test_an_output_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(CompressError, match="taken"):
        start(tmp_path, ["out=taken"])


def test_sections_cover_the_config() -> None:
    used = {name for names in pipeline.SECTIONS.values() for name in names}
    assert used == set(config.to_dict(config.loads(CONFIG))) - {"version", "out"}
