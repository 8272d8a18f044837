"""Documents of other targets: kept only where they are of the run's own models."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from compress import aim, config, files, measuring, opening
from compress.errors import CompressError, ConfigError, IntegrityError, Interrupted
from compress.opening import Opener
from compress.steps import Work
from deploy import gpu_latency, runners
from tests.cuda_doubles import FakeCuda
from tests.pipelines import Silent
from tests.runner_doubles import Staged

BASE = "version: 1\nmodel: {name: x:y, input_shape: [1, 4, 4]}\ndata: {name: mnist5k}\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in measuring.MODELS:
        (folder / f"{name}.onnx").write_bytes(name.encode())
    return folder


def document(run: Path, name: str = "h100") -> dict[str, Any]:
    return {
        "schema_version": 1,
        "target": {"name": name},
        "models": {model: files.sha256(run / f"{model}.onnx") for model in measuring.MODELS},
        "machine": {},
        "latency": [],
        "speedup": [],
    }


class Doubles(Opener):
    """Opens runners that compute nothing; those of ONNX Runtime have no stream."""

    def several(self, opened: ExitStack, kind: str, model: str, precision: str, count: int) -> list[Any]:
        cuda = FakeCuda()
        runners = [Staged(cuda, compute=0.002 if model == "dense" else 0.004) for _ in range(count)]
        for runner in runners if kind == "onnxruntime_cuda" else ():
            runner.stream = None
        self.asked = [*getattr(self, "asked", []), (kind, model, precision, count)]
        return list(runners)


def test_throughput_of_both_models_on_every_gpu_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_latency, "_cuda", lambda given: FakeCuda())
    own = aim.aimed(config.loads(BASE + "bench: {target: h100, batches: [2], streams: 3, seconds: 0.01}"))
    work = Work(own, tmp_path, tmp_path, Silent(), lambda: False)
    work.shapes = [[1, 4, 4]]
    opener = Doubles(work)
    rows = measuring._streams(opener, ["torch_cuda", "onnxruntime_cuda"], "int8")
    assert opener.asked == [
        (kind, model, precision, 3)
        for kind, precision in (("torch_cuda", "fp32"), ("onnxruntime_cuda", "int8"))
        for model in ("original", "dense")
    ]
    for row in rows[:2]:
        assert (row["streams"], row["batch"], row["failure"]) == (3, 2, "")
        assert row["per_s"] == pytest.approx(2 * row["calls"] / row["seconds"])
        assert row["calls"] >= 3
    why = "the runtime keeps its stream to itself, so its calls cannot overlap"
    assert [(row["per_s"], row["failure"]) for row in rows[2:]] == [(None, why)] * 2
    work.should_stop = lambda: True
    with pytest.raises(Interrupted, match="stopped while measuring"):
        measuring._streams(opener, ["torch_cuda"], "fp32")


def test_another_target_measures_streams_where_it_has_a_gpu(tmp_path: Path) -> None:
    engine = "engine: {buffers: pycuda, workspace_mib: 64}"
    own = aim.aimed(config.loads(BASE + f"bench: {{target: h100, streams: 3, {engine}}}"))
    work = Work(own, tmp_path, tmp_path, Silent(), lambda: False)
    other = measuring.aimed_at(work, "l4-int8").config.bench
    assert (other.streams, other.engine.buffers, other.engine.workspace_mib) == (3, "pycuda", None)
    assert measuring.aimed_at(work, "cpu-ort").config.bench.streams is None


def test_the_gates_of_the_own_target_do_not_stop_a_bench_for_another(tmp_path: Path) -> None:
    gates = "gates: {speedup: 1.5, latency_ms: 9, runner: torch, batch: 32}\n"
    gates += "budget: {target: l4, batch: 7, latency_ms: 9}"
    own = aim.aimed(config.loads(BASE + f"bench: {{target: cpu-ort}}\n{gates}"))
    other = measuring.aimed_at(Work(own, tmp_path, tmp_path, Silent(), lambda: False), "l4")
    assert other.config.bench.runners == ["torch_cuda", "tensorrt"]
    assert (other.config.gates.speedup, other.config.gates.batch) == (None, None)


def test_engines_get_the_buffers_that_the_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = aim.aimed(config.loads(BASE + "bench: {target: h100-fp32, engine: {buffers: pycuda, refit: true}}"))
    (tmp_path / "dense.onnx").touch()
    opener, asked = Opener(Work(own, tmp_path, tmp_path, Silent(), lambda: False)), []

    def open_runner(kind: str, artifact: Path, threads: int, **given: Any) -> Staged:
        asked.append((kind, artifact.name, threads, given))
        return Staged(FakeCuda())

    monkeypatch.setattr(opener, "engine", lambda kind, path, precision: path.with_suffix(".engine"))
    monkeypatch.setattr(opening, "check_agreement", lambda *given: None)
    monkeypatch.setattr(runners, "open_runner", open_runner)
    with ExitStack() as opened:
        assert len(opener.several(opened, "tensorrt", "dense", "fp32", 2)) == 2
    assert asked == [("tensorrt", "dense.engine", 1, {"precision": "fp32", "buffers": "pycuda"})] * 2
    options = opener._options("fp32")
    assert (options.refit, options.batches) == (True, (1, 32, 256))


def test_a_document_from_elsewhere_is_brought_in(run: Path, tmp_path: Path) -> None:
    own = document(run)
    for place, content in (
        ("bare.json", own),
        ("answer.json", {"command": "bench", "result": {"bench": own}}),
    ):
        files.write_json(tmp_path / place, content)
        kept = measuring.bring(run, tmp_path / place)
        assert kept == run / "targets" / "h100.json"
        assert files.read_json(kept) == own
    before = measuring.hashes(run)
    files.write_json(tmp_path / "again.json", own | {"machine": {"cpu": "another"}})
    measuring.bring(run, tmp_path / "again.json")
    assert measuring.hashes(run) != before


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"models": {"original": "0" * 64}}, ConfigError, "h100 was measured with another original model"),
        ({"target": {"name": "../../x"}}, IntegrityError, "the target's name is no plain name"),
        ({"target": {}}, IntegrityError, "the target's name is no plain name"),
        ({"target": 3}, IntegrityError, "is no measurement; give what compress bench --json printed"),
        ({"schema_version": 2}, IntegrityError, "is no measurement"),
    ],
)
def test_what_is_not_of_this_run_is_refused(
    run: Path, tmp_path: Path, change: dict[str, Any], kind: type[CompressError], said: str
) -> None:
    files.write_json(tmp_path / "found.json", document(run) | change)
    with pytest.raises(kind) as caught:
        measuring.bring(run, tmp_path / "found.json")
    assert said in str(caught.value)
    assert not (run / "targets").exists()


def test_a_run_without_models(tmp_path: Path, run: Path) -> None:
    files.write_json(tmp_path / "found.json", document(run))
    (run / "dense.onnx").unlink()
    with pytest.raises(ConfigError, match=r"has no dense\.onnx; run the stages up to export first"):
        measuring.bring(run, tmp_path / "found.json")
