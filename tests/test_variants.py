"""Further precisions in a run: written, measured, chosen, reported; and what cannot be is said."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress import aim, config, files, opening, pipeline, variants
from compress.errors import ConfigError
from compress.schema import EngineConfig
from compress.steps import Work
from deploy import engines
from deploy.errors import DeployError, RunnerError
from deploy.runners import open_runner
from tests.pipelines import Silent, start

pytestmark = pytest.mark.slow

ASKED = ["export.precisions=[fp16, int8]", "export.calibration_images=64", "bench.runners=[onnxruntime]"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that made two further precisions and let the fastest be chosen."""
    folder = tmp_path_factory.mktemp("converted")
    start(folder, [*ASKED, "bench.precision=auto"])
    return folder


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = files.read_json(folder / "run" / "results.json")
    return found


def test_every_variant_is_measured_on_the_test_examples(converted: Path) -> None:
    found = results(converted)
    rows = {(row["model"], row["precision"]): row for row in found["variants"]}
    assert set(rows) == {(m, p) for m in ("original", "dense") for p in ("fp16", "int8")}
    plain = found["accuracy"]["before"]
    for (model, precision), row in rows.items():
        path = converted / "run" / row["file"]
        assert path.stat().st_size == row["bytes"]
        assert row["accuracy"]["n"] == 200
        assert row["compared"] >= 200
        assert 0 < row["relative"] < {"fp16": 0.01, "int8": 0.3}[precision]
        assert row["agreement"] > 0.9
        if model == "original":
            assert abs(row["accuracy"]["value"] - plain) <= 0.03
    assert rows["dense", "fp16"]["bytes"] < (converted / "run" / "dense.onnx").stat().st_size
    assert rows["dense", "int8"]["why_kept"] == {"first or last layer": 2}


def test_the_choice_is_one_of_them_with_a_reason_for_each(converted: Path) -> None:
    found = results(converted)
    choice = found["choice"]
    assert set(choice["why"]) == {"fp32", "fp16", "int8"}
    assert choice["name"] in choice["why"]
    assert choice["why"][choice["name"]].startswith("the fastest inside")
    assert found["target"]["precision"] == choice["name"]
    assert {row["precision"] for row in found["speedup"]} == {choice["name"]}


def test_what_is_judged_is_the_file_that_ships(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    events = Silent()
    found = start(tmp_path, [*ASKED, "bench.precision=int8"], events=events).results
    assert [name for name, status in events.stages if status == "done"] == ["bench", "report", "gate"]
    int8 = next(r for r in found["variants"] if (r["model"], r["precision"]) == ("dense", "int8"))
    assert found["accuracy"]["after"] == int8["accuracy"]["value"]
    assert found["cost"]["onnx_bytes"]["after"] == int8["bytes"]
    models = {(row["model"], row["precision"]) for row in found["latency"]}
    assert models == {("original", "int8"), ("dense", "int8"), ("original fp32", "fp32")}
    assert [row["precision"] for row in found["overall"]] == ["int8"]
    page = (tmp_path / "run" / "report.html").read_text()
    for said in ("Pruning and precision together", "Where the time goes", "dense.int8.onnx"):
        assert said in page


def test_the_same_run_gives_the_same_files(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    names = [f"dense.{p}.onnx" for p in ("fp16", "int8")] + ["convert.json"]
    before = [files.sha256(tmp_path / "run" / name) for name in names]
    start(tmp_path, [*ASKED, "bench.precision=auto"], start="convert", until="convert")
    assert [files.sha256(tmp_path / "run" / name) for name in names] == before


def test_what_cannot_be_measured_here_says_so(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    asked = ["export.precisions=[bf16, fp8]", "export.calibration_images=64", "bench.runners=[onnxruntime]"]
    start(tmp_path, asked, until="convert")
    for row in files.read_json(tmp_path / "run" / "convert.json")["variants"]:
        assert row["failure"]
        assert str(tmp_path) not in row["failure"]
        assert (row["relative"], row["accuracy"]["value"]) == (None, None)


def test_nothing_is_timed_that_computes_something_else(converted: Path) -> None:
    own = aim.aimed(config.load(converted / "compress.yaml", ASKED))
    work = Work(own, converted, converted / "run", Silent(), lambda: False)
    for precision in ("fp16", "int8", "fp32"):
        right = open_runner("onnxruntime", converted / "run" / variants.file_name("dense", precision))
        opening.check_agreement(work, "dense", precision, right)
        with pytest.raises(RunnerError, match=r"the original model in .* computes something else") as caught:
            opening.check_agreement(work, "original", precision, right)
        assert caught.value.exit_code == 6
        right.close()


def test_an_engine_is_built_once_for_a_machine(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines are built with tensorrt-rtx-cu13")
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    here = engines.this_machine("tensorrt_rtx")
    gpu = {"gpu": "NVIDIA Example", "compute_capability": "8.9", "driver": None}
    monkeypatch.setattr(engines, "this_machine", lambda library: here | gpu)
    own = aim.aimed(config.load(tmp_path / "compress.yaml", [*ASKED, "bench.batches=[1, 4, 8]"]))
    work = Work(own, tmp_path, tmp_path / "run", Silent(), lambda: False)
    built, found, again = (opening.Opener(work) for _ in range(3))
    onnx = tmp_path / "run" / "dense.fp16.onnx"
    paths = [opener.engine("tensorrt_rtx", onnx, "fp16") for opener in (built, found, found)]
    assert paths == [tmp_path / "run" / "engines" / "cpu-ort" / "dense.fp16.engine"] * 3
    for opener, there in ((built, False), (found, True)):
        (row,) = opener.engines
        assert (row["file"], row["library"]) == ("engines/cpu-ort/dense.fp16.engine", "tensorrt_rtx")
        assert (row["seconds"] is None) == there
    sidecar = engines.read_sidecar(paths[0])
    assert sidecar["options"]["batches"] == [1, 4, 8]
    assert sidecar["facts"] == {"plan": files.sha256(tmp_path / "run" / "plan.json"), "target": "cpu-ort"}
    harder = own.bench.model_copy(update={"engine": EngineConfig(builder_level=0)})
    other = opening.Opener(replace(work, config=own.model_copy(update={"bench": harder})))
    other.engine("tensorrt_rtx", onnx, "fp16")
    assert other.engines[0]["seconds"] > 0  # built with other options
    shutil.copyfile(tmp_path / "run" / "original.fp16.onnx", onnx)
    again.engine("tensorrt_rtx", onnx, "fp16")
    assert again.engines[0]["seconds"] > 0
    assert engines.read_sidecar(paths[0])["onnx"]["sha256"] == files.sha256(onnx)


def test_a_target_in_a_precision_that_was_not_made(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    own = config.load(tmp_path / "compress.yaml", ASKED)
    with pytest.raises(ConfigError, match=r"^bench: there is no dense\.fp8\.onnx|original\.fp8\.onnx"):
        pipeline.bench_for(own, tmp_path, "cpu-ort-fp8", events=Silent())
    with pytest.raises((ConfigError, DeployError)) as caught:
        start(tmp_path, [*ASKED, "export.keep_fp32=[conv9]"], until="convert")
    assert str(caught.value).startswith("keep conv9: no node or module of the model has this name; did you")
