"""Further precisions in a run: written, measured, chosen, reported; and what cannot be is said."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from compress import aim, config, files, measuring, opening, pipeline, variants
from compress.errors import ConfigError
from compress.schema import EngineConfig
from compress.steps import Work
from deploy import engines, runners, targets, to_tensorrt
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
        files_of = {m: work.run / variants.file_name(m, precision) for m in variants.MODELS}
        right = open_runner("onnxruntime", files_of["dense"])
        opening.check_agreement(work, "dense", precision, files_of["dense"], right)
        with pytest.raises(RunnerError, match=r"the original model in .* computes something else") as caught:
            opening.check_agreement(work, "original", precision, files_of["original"], right)
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


def test_what_the_convert_stage_refuses(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    with pytest.raises((ConfigError, DeployError)) as caught:
        start(tmp_path, [*ASKED, "export.keep_fp32=[conv9]"], until="convert")
    assert str(caught.value).startswith("keep conv9: no node or module of the model has this name; did you")


# -- files for other targets --------------------------------------------------------------------------


def zero_points(path: Path) -> set[str]:
    """The types that a model is quantised to."""
    graph = onnx.load(path).graph
    names = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    return {onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer if t.name in names}


@pytest.fixture(scope="module")
def for_gpus(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A copy of the run, with files for a target whose runner is of another family, and their rows."""
    folder = tmp_path_factory.mktemp("for_gpus")
    shutil.copytree(converted, folder, dirs_exist_ok=True)
    own = config.load(folder / "compress.yaml", ASKED)
    return folder, pipeline.convert_for(own, folder, "rtx4090-int8", events=Silent())


def test_another_family_gets_a_file_of_its_own(for_gpus: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = for_gpus
    run = folder / "run"
    own = {row["file"]: row for row in results(folder)["variants"]}
    assert [row["file"] for row in rows] == [f"variants/{m}.int8-gpu.onnx" for m in variants.MODELS]
    for row in rows:
        assert row["bytes"] == (run / row["file"]).stat().st_size
        assert (row["accuracy"]["n"], row["failure"]) == (200, "")
        assert row["agreement"] > 0.9
        plain = own[f"{row['model']}.int8.onnx"]
        assert abs(row["accuracy"]["value"] - plain["accuracy"]["value"]) <= 0.03
        assert zero_points(run / row["file"]) == {"INT8"}
        assert "UINT8" in zero_points(run / plain["file"])


def test_a_file_is_made_once_and_again_when_its_model_changed(
    for_gpus: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shutil.copytree(for_gpus[0], tmp_path, dirs_exist_ok=True)
    own = config.load(tmp_path / "compress.yaml", ASKED)
    events, made = Silent(), tmp_path / "run" / "variants" / "dense.int8-gpu.onnx"
    before = made.stat().st_mtime_ns, files.sha256(made)
    assert pipeline.convert_for(own, tmp_path, "rtx4090-int8", events=events) == for_gpus[1]
    assert (made.stat().st_mtime_ns, events.seen) == (before[0], [])
    made.write_bytes(b"of somebody else")
    pipeline.convert_for(own, tmp_path, "rtx4090-int8", events=events)
    assert files.sha256(made) == before[1]
    assert events.seen == ["making variants/dense.int8-gpu.onnx: the run has no int8 for tensorrt"]
    shutil.copyfile(tmp_path / "run" / "original.onnx", tmp_path / "run" / "dense.onnx")
    pipeline.convert_for(own, tmp_path, "rtx4090-int8", events=events)
    assert len(events.seen) == 2
    assert pipeline.convert_for(own, tmp_path, "cpu-ort-int8", events=events) == [
        row for row in results(tmp_path)["variants"] if row["precision"] == "int8"
    ]
    assert pipeline.convert_for(own, tmp_path, "cpu-ort", events=events) == []


def test_a_bench_says_which_files_it_timed(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    other = tmp_path / "edge.toml"
    target = (targets.FOLDER / "cpu-ort.toml").read_text().replace("[1, 32]", "[1]")
    other.write_text(target.replace('"fp32"', '"bf16"'))
    with pytest.raises((ConfigError, RunnerError)):  # ONNX Runtime has no bf16 kernels
        pipeline.bench_for(
            config.load(tmp_path / "compress.yaml", ASKED), tmp_path, str(other), events=Silent()
        )
    other.write_text(target.replace('"fp32"', '"fp16"'))
    (tmp_path / "run" / "convert.json").unlink()  # as if it had not been asked for
    own = config.load(tmp_path / "compress.yaml", ASKED)
    document = pipeline.bench_for(own, tmp_path, str(other), events=Silent())
    rows = {row["model"]: row for row in document["variants"]}
    assert set(rows) == set(variants.MODELS)
    dense = tmp_path / "run" / "variants" / "dense.fp16.onnx"
    assert rows["dense"]["file"] == "variants/dense.fp16.onnx"
    assert rows["dense"]["sha256"] == files.sha256(dense)
    assert rows["dense"]["accuracy"]["n"] == 200
    assert {(row["runner"], row["precision"]) for row in document["speedup"]} >= {("onnxruntime", "fp16")}


def test_where_the_data_are_not_a_file_cannot_be_made(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    fix = "make it where they are, compress convert --target h100-int8, and bring the run"
    cases = {
        "data.name=nowhere": "the data to make it from are not here: unknown data 'nowhere'",
        "data.train_limit=600": "the data here are not those of the run",
    }
    for change, said in cases.items():
        own = config.load(tmp_path / "compress.yaml", [*ASKED, change])
        with pytest.raises(ConfigError) as caught:
            pipeline.convert_for(own, tmp_path, "h100-int8", events=Silent())
        assert str(caught.value).startswith("variants/original.int8-gpu.onnx: is not there, and " + said)
        assert str(caught.value).endswith(fix)


def test_a_precision_that_the_runner_computes_wrongly_is_not_timed(converted: Path) -> None:
    own = config.load(converted / "compress.yaml", ASKED)
    with pytest.raises(RunnerError) as caught:
        pipeline.bench_for(own, converted, "cpu-ort-fp8", events=Silent())
    said = "ONNX Runtime's CPU kernels compute fp8 pairs wrongly; measure it on the target"
    assert str(caught.value) == f"onnxruntime: {said}; take another precision or target"
    assert caught.value.exit_code == 6


def test_a_bench_for_another_family_as_a_machine_with_a_gpu_does_it(
    for_gpus: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines are really built; ONNX Runtime on the CPU stands in for what would run them."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built with tensorrt-rtx-cu13")
    shutil.copytree(for_gpus[0], tmp_path, dirs_exist_ok=True)
    rtx = (targets.FOLDER / "rtx4090.toml").read_text().replace('"tensorrt"', '"tensorrt_rtx"')
    (tmp_path / "rtx.toml").write_text(re.sub(r"batches = .*", "batches = [2]", rtx).replace("fp16", "int8"))
    real, sources = runners.open_runner, []

    def open_runner(kind: str, artifact: Any, threads: int = 1, **given: Any) -> Any:
        if kind != "tensorrt_rtx":
            return real(kind.removesuffix("_cuda"), artifact, threads)
        sidecar = engines.read_sidecar(artifact)
        (onnx_file,) = (p for p in run.rglob("*.onnx") if files.sha256(p) == sidecar["onnx"]["sha256"])
        sources.append(onnx_file.relative_to(run).as_posix())
        return real("onnxruntime", onnx_file, threads)

    run = tmp_path / "run"
    monkeypatch.setattr(runners, "open_runner", open_runner)
    monkeypatch.setattr(aim, "check", lambda config, **given: None)
    monkeypatch.setattr(measuring, "_profile", lambda opener, document, precision: None)
    own = config.load(tmp_path / "compress.yaml", ASKED)
    found = pipeline.bench_for(own, tmp_path, str(tmp_path / "rtx.toml"), events=Silent())
    files_of = {f"variants/{name}.int8-gpu.onnx" for name in variants.MODELS}
    assert set(sources) == {*files_of, "original.onnx"}  # the original in fp32 takes its turns
    assert {row["file"] for row in found["variants"]} == files_of
    assert all(row["accuracy"]["n"] == 200 for row in found["variants"])
    assert {row["file"] for row in found["engines"]} == {
        f"engines/rtx/{name}.engine" for name in ("original.int8-gpu", "dense.int8-gpu", "original")
    }
    results = start(tmp_path, [*ASKED, "bench.precision=auto"], start="report").results
    assert {row["file"] for row in results["variants"]} & files_of == set()
    page = (run / "report.md").read_text()
    assert "variants/dense.int8-gpu.onnx" in page


def test_tensorrt_rtx_builds_from_the_file_that_is_for_it(
    for_gpus: tuple[Path, list[dict[str, Any]]],
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines are built with tensorrt-rtx-cu13")
    run = for_gpus[0] / "run"
    own = aim.aimed(config.load(for_gpus[0] / "compress.yaml", [*ASKED, "bench.target=rtx4090-int8"]))
    opener = opening.Opener(Work(own, for_gpus[0], run, Silent(), lambda: False))
    path = opener.onnx("dense", "int8", "tensorrt_rtx")
    assert path == run / "variants" / "dense.int8-gpu.onnx"
    engine = opener.engine("tensorrt_rtx", path, "int8")
    assert engine == run / "engines" / "rtx4090-int8" / "dense.int8-gpu.engine"
    assert engines.read_sidecar(engine)["onnx"]["sha256"] == files.sha256(path)
    refused = run / "refused.engine"
    with pytest.raises(DeployError):  # unsigned: why there are two files
        to_tensorrt.build(run / "dense.int8.onnx", refused, "tensorrt_rtx", to_tensorrt.EngineOptions())
    assert not refused.exists()
