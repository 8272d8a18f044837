"""The release folder: whole, checkable, the same bytes each time, and only for a verdict that passes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from onnx import TensorProto, helper

from compress import files, manifest
from compress.cli import SECTIONS
from compress.earlier import read
from compress.errors import ConfigError, IntegrityError, VerdictError
from compress.handover import hand_over, verify
from deploy import handover, triton
from deploy.baseline import Tolerances
from deploy.errors import ArtifactError, ExportError
from tests.report_example import GATES, HOSTILE, example, judged, poisoned
from tests.test_cli import Capture, _here, call, call_json

__all__ = ["_here"]  # a fixture


def network(
    path: Path, given: list[Any] | None = None, out: list[Any] | None = None, name: str = "x"
) -> Path:
    """An ONNX file that hands its input on; `out` is the shape it states for its output."""
    shape = ["batch", 3, 8, "width"] if given is None else given
    first = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    last = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape if out is None else out)
    nodes = [helper.make_node("Add", [name, "w"], ["y"])]
    listed = [first, helper.make_tensor_value_info("w", TensorProto.FLOAT, [1])]
    path.write_bytes(
        helper.make_model(helper.make_graph(nodes, "g", listed, [last], [weight])).SerializeToString()
    )
    return path


def finished(folder: Path, **changes: Any) -> Path:
    """A run as the pipeline leaves it, with two engines, one of them without a sidecar."""
    folder.mkdir(parents=True)
    results = {**judged(example(), GATES), **changes}
    made = {
        "train": {"original.onnx": b"not handed over", "optimizer.safetensors": b"neither"},
        "export": {"dense.engine": b"engine", "dense.engine.json": b"{}", "other.engine": b"engine"},
        "finetune": {"dense.graph.json": b"{}", "dense.safetensors": b"weights", "dense.pt2": b"program"},
        "report": {"plan.json": b"{}", "report.html": b"<html>"},
        "gate": {},
    }
    network(folder / "dense.onnx")
    files.write_json(folder / "results.json", results)
    files.write_json(folder / "gate.json", {key: results[key] for key in ("verdict", "gates")})
    more = {"export": ["dense.onnx"], "report": ["results.json"], "gate": ["gate.json"]}
    for stage, contents in made.items():
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        outputs = manifest.facts(folder, [*contents, *more.get(stage, [])])
        manifest.commit(folder, manifest.StageRecord(stage, "key", outputs, {}, "2026-01-01T00:00:00Z", 1.0))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


PLACE = "models/torchvision_resnet18"


def test_the_folder_has_everything_to_serve_and_nothing_else(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    found = hand_over(run, tmp_path / "out")
    assert found.paths == sorted([
        "README.md", "SHA256SUMS", "dense.engine", "dense.engine.json", "dense.graph.json", "dense.onnx",
        "dense.pt2", "dense.safetensors", "gate.json",
        f"{PLACE}/1/model.onnx", f"{PLACE}/config.pbtxt", "plan.json", "report.html", "results.json",
    ])  # fmt: skip
    assert list(tree(tmp_path / "out")) == found.paths
    assert (tmp_path / "out" / PLACE / "1" / "model.onnx").read_bytes() == (run / "dense.onnx").read_bytes()
    assert (found.verdict, found.forced) == ("pass", False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_served_is_the_file_that_was_judged(tmp_path: Path) -> None:
    variants = [{"model": m, "precision": "int8", "file": f"{m}.int8.onnx"} for m in ("original", "dense")]
    run = finished(tmp_path / "run", target={"precision": "int8"}, variants=variants)
    (run / "dense.int8.onnx").write_bytes((run / "dense.onnx").read_bytes())
    for name in ("original.int8.onnx", "engines/t4/original.engine", "engines/t4/original.engine.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"the original's")
    names = ["dense.int8.onnx", *(str(p.relative_to(run)) for p in run.rglob("original.*"))]
    record = manifest.StageRecord("bench", "key", manifest.facts(run, names), {}, "2026-01-01T00:00:00Z", 1.0)
    manifest.commit(run, record)
    gate = manifest.load(run)["gate"]
    manifest.commit(run, gate)  # judged after it
    found = hand_over(run, tmp_path / "out")
    assert "dense.int8.onnx" in found.paths
    assert not [path for path in found.paths if "original" in path]
    served = (tmp_path / "out" / PLACE / "1" / "model.onnx").read_bytes()
    assert served == (run / "dense.int8.onnx").read_bytes()


def test_sha256sum_checks_every_file(tmp_path: Path) -> None:
    hand_over(finished(tmp_path / "run"), tmp_path / "out")
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=tmp_path / "out", capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(tree(tmp_path / "out")) - 1
    (tmp_path / "out" / "dense.onnx").write_bytes(b"other")
    done = subprocess.run(check, cwd=tmp_path / "out", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "dense.onnx: FAILED" in done.stdout


def test_verify_checks_a_release(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "out"
    hand_over(finished(tmp_path / "run"), out)
    assert verify(out) == []
    (out / "dense.safetensors").write_bytes(b"other")
    (out / "plan.json").unlink()
    changed, missing = verify(out)
    assert str(changed).startswith("dense.safetensors: changed since it was released: sha256 expected ")
    assert str(missing) == "plan.json: is missing; get the release again from where it came from"
    assert call(capfd, "verify", str(out))[0] == 8
    for line, said in (
        ("0" * 64 + "  ../run/plan.json", "not a plain path"),
        ("x  y", "line 1 is no checksum"),
    ):
        (out / "SHA256SUMS").write_text(line + "\n")
        with pytest.raises(IntegrityError, match=said):
            verify(out)


def test_verify_of_another_folder_says_what_it_wants(tmp_path: Path, capfd: Capture) -> None:
    code, _, err = call(capfd, "verify", str(tmp_path))
    assert code == 3
    assert f"{tmp_path}: is neither a run nor a release; give a folder with a manifest.json or" in err
    assert "there is no such folder" in call(capfd, "verify", str(tmp_path / "gone"))[2]


def test_the_same_run_gives_the_same_bytes_anywhere(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    shutil.copytree(run, tmp_path / "elsewhere" / "copy")
    hand_over(run, tmp_path / "a")
    hand_over(tmp_path / "elsewhere" / "copy", tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert str(tmp_path).encode() not in b"".join(tree(tmp_path / "a").values())


def test_a_release_can_be_the_next_ones_baseline(tmp_path: Path) -> None:
    hand_over(finished(tmp_path / "run"), tmp_path / "out")
    found = read(str(tmp_path / "out"), Tolerances(), tmp_path / "next")
    assert found.results == files.read_json(tmp_path / "run" / "results.json")
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(IntegrityError, match="changed since it was written"):
        read(str(tmp_path / "out"), Tolerances(), tmp_path / "next")


@pytest.mark.parametrize("verdict", ["fail", "inconclusive", "no gates"])
def test_without_a_pass_only_by_force_and_the_card_says_so(tmp_path: Path, verdict: str) -> None:
    gates = [] if verdict == "no gates" else [{"name": "speedup", "verdict": verdict, "message": "Too slow."}]
    run = finished(tmp_path / "run", verdict=verdict, gates=gates)
    with pytest.raises(VerdictError, match=f"the verdict is {verdict}") as refused:
        hand_over(run, tmp_path / "out")
    assert refused.value.exit_code == 5
    assert "--force hands it over all the same, and its model card says so" in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert hand_over(run, tmp_path / "out", force=True).forced
    said = (tmp_path / "out" / "README.md").read_text()
    assert f"was handed over by force: its verdict is {verdict.upper()}, not PASS." in said


def test_force_says_nothing_where_there_is_a_pass(tmp_path: Path) -> None:
    assert not hand_over(finished(tmp_path / "run"), tmp_path / "out", force=True).forced
    assert "by force" not in (tmp_path / "out" / "README.md").read_text()


def test_the_verdict_of_the_gate_counts_not_the_reports(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    files.write_json(
        run / "gate.json", {"verdict": "fail", "gates": [{"name": "baseline_size", "verdict": "fail"}]}
    )
    outputs = manifest.facts(run, ["gate.json"])
    manifest.commit(run, manifest.StageRecord("gate", "key", outputs, {}, "2026-01-01T00:00:00Z", 1.0))
    with pytest.raises(VerdictError, match=r"the verdict is fail \(baseline_size\)"):
        hand_over(run, tmp_path / "out")


def test_what_is_not_whole_is_not_handed_over(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    for place in (tmp_path / "taken", tmp_path / "taken" / "mine"):
        with pytest.raises(ConfigError, match="is there already; give the name of a new folder"):
            hand_over(run, place)
    stale = manifest.load(run)["report"]
    manifest.commit(run, stale)  # done again, and not judged since
    with pytest.raises(ConfigError, match="the run is not judged; finish it first: compress run"):
        hand_over(run, tmp_path / "out")
    (run / "plan.json").write_bytes(b"{ }")
    with pytest.raises(IntegrityError, match=r"plan\.json: changed since stage report wrote it"):
        hand_over(run, tmp_path / "out")
    with pytest.raises(IntegrityError, match="there is no manifest in this folder"):
        hand_over(tmp_path / "taken", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    hand_over(finished(tmp_path / "run"), tmp_path / "out", name="../my model")
    assert (tmp_path / "out" / "models" / "my_model" / "config.pbtxt").is_file()


# -- the card -------------------------------------------------------------------------------------------


def card(**changes: Any) -> str:
    ports = triton.Ports(
        (triton.Tensor("x", "TYPE_FP32", (None, 3, 32, 32)),), (triton.Tensor("y", "TYPE_FP32", (None, 10)),)
    )
    results = {**judged(example(), GATES), **changes}
    return handover.card(results, "small", ports, ["dense.onnx", "a.engine", "a.engine.json"], forced=False)


def test_the_card_has_the_figures_and_a_place_for_the_owner() -> None:
    said = card()
    results = judged(example(), GATES)
    assert said.startswith("# `small`\n\nThe pruned model ")
    assert "**PASS.** All 4 gates pass." in said
    marked = re.search(r"<!-- intended-use: .* -->\n(.*)<!-- /intended-use -->", said, flags=re.S)
    assert marked
    assert "Not described yet" in marked[1]
    assert f"{100 * results['accuracy']['after']:.2f}" in said
    assert "| input | `x` | FP32 | batch × 3 × 32 × 32 |" in said
    assert "| `a.engine` | an engine, for the GPU and library in the file beside it only |" in said
    assert "licen" not in said.lower()


def test_the_card_says_how_images_are_prepared_and_how_the_model_is_loaded() -> None:
    provenance = {"config": {"data": {"name": "cifar10", "mean": [0.485, 0.456, 0.406], "std": [0.5, 1, 2]}}}
    said = card(provenance=provenance)
    assert "Values in 0 to 1, minus (0.485, 0.456, 0.406), over (0.5, 1, 2), per channel" in said
    assert "compress.load" not in said  # this one has no weights for PyTorch
    said = card(provenance={"config": {"data": {"name": "mnist5k", "mean": None, "std": None}}})
    assert "Prepared as the data set mnist5k prepares them: the config has no mean and std." in said


def test_what_was_not_measured_is_not_in_the_card() -> None:
    said = card(speedup=[], latency=[], accuracy=None, parity=[])
    assert "_not measured_" in said
    assert "Not measured: speed-up, accuracy" in said


@pytest.mark.parametrize("poison", HOSTILE)
def test_hostile_texts_are_escaped_in_the_card(poison: str) -> None:
    results = poisoned(judged(example(), GATES), poison)
    ports = triton.Ports((triton.Tensor(f"x{poison}", "TYPE_FP32", (None,)),), ())
    said = handover.card(results, triton.model_name(poison), ports, [f"a{poison}.onnx"], forced=True)
    assert all(c.isprintable() or c in "\n\xa0" for c in said)
    outside = re.sub(r"^(```+)\w*\n.*?^\1\n", "", said, flags=re.M | re.S)
    marks = re.sub(r"<!-- /?intended-use.*? -->", "", outside)
    assert "<script" not in marks
    assert "<!--" not in marks


# -- config.pbtxt ---------------------------------------------------------------------------------------


def model_config() -> Any:
    """Triton's ModelConfig, the fields that we write, as its .proto has them."""
    file = descriptor_pb2.FileDescriptorProto(name="m.proto", package="m", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    names = "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16"
    for number, name in enumerate(names.split()):
        types.value.add(name=f"TYPE_{name}", number=number)
    text, small, big, inside, kind = 9, 5, 3, 11, 14
    for message, fields in {
        "Reshape": [("shape", big, 3, "")],
        "Tensor": [("name", text, 1, ""), ("data_type", kind, 1, ".m.DataType"), ("dims", big, 3, ""),
                   ("reshape", inside, 1, ".m.Reshape")],
        "Batching": [("preferred_batch_size", small, 3, ""), ("max_queue_delay_microseconds", 4, 1, "")],
        "Config": [("name", text, 1, ""), ("backend", text, 1, ""), ("default_model_filename", text, 1, ""),
                   ("max_batch_size", small, 1, ""), ("input", inside, 3, ".m.Tensor"),
                   ("output", inside, 3, ".m.Tensor"), ("dynamic_batching", inside, 1, ".m.Batching")],
    }.items():  # fmt: skip
        made = file.message_type.add(name=message)
        for number, (name, type_, label, type_name) in enumerate(fields, start=1):
            made.field.add(name=name, number=number, type=type_, label=label, type_name=type_name or None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("m.Config"))()


def served(path: Path, name: str = "net", largest: int = 32, best: int | None = 8) -> Any:
    return text_format.Parse(triton.config(name, triton.read_ports(path), largest, best), model_config())


def test_the_config_is_protobuf_text_with_the_files_own_types_and_sizes(tmp_path: Path) -> None:
    found = served(network(tmp_path / "a.onnx"))
    assert (found.name, found.backend, found.max_batch_size) == ("net", "onnxruntime", 32)
    assert [(t.name, t.data_type, [*t.dims]) for t in found.input] == [("x", 11, [3, 8, -1])]
    assert [(t.name, [*t.dims]) for t in found.output] == [("y", [3, 8, -1])]
    assert [*found.dynamic_batching.preferred_batch_size] == [8]
    assert found.dynamic_batching.max_queue_delay_microseconds == triton.QUEUE_MICROSECONDS


def test_a_fixed_batch_is_served_as_it_is(tmp_path: Path) -> None:
    found = served(network(tmp_path / "a.onnx", given=[4, 3]))
    assert (found.max_batch_size, [*found.input[0].dims], [*found.output[0].dims]) == (0, [4, 3], [4, 3])
    assert not found.HasField("dynamic_batching")


def test_one_value_per_example_is_reshaped(tmp_path: Path) -> None:
    found = served(network(tmp_path / "a.onnx", given=["batch"]), best=1)
    assert [*found.input[0].dims] == [1]
    assert found.input[0].HasField("reshape")
    assert [*found.input[0].reshape.shape] == []
    assert [*found.dynamic_batching.preferred_batch_size] == []
    assert not served(network(tmp_path / "b.onnx")).input[0].HasField("reshape")


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb\x1b", "é↯", 'x" } ] #', "%"])
def test_odd_names_of_tensors_stay_names(tmp_path: Path, name: str) -> None:
    assert served(network(tmp_path / "a.onnx", name=name)).input[0].name == name


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("torchvision:resnet18", "torchvision_resnet18"),
        ("../../x", "x"),
        ("\x1b", "model"),
        ("a" * 300, "a" * 100),
    ],
)
def test_a_models_folder_is_a_plain_name(name: str, folder: str) -> None:
    assert triton.model_name(name) == folder


def test_batch_sizes_come_from_what_was_measured() -> None:
    def row(runner: str, batch: Any, speed: Any, model: str = "dense") -> dict[str, Any]:
        return {"runner": runner, "batch": batch, "throughput_per_s": speed, "model": model}

    measured = [row("onnxruntime", 1, 100.0), row("onnxruntime", 8, 400.0), row("onnxruntime", 32, 390.0)]
    measured += [
        row("onnxruntime", 64, 999.0, "original"),
        row("torch", 128, 999.0),
        row("onnxruntime", True, 1e9),
    ]
    assert triton.batch_sizes({"latency": measured}) == (32, 8)
    assert triton.batch_sizes({"latency": [*measured, row("onnxruntime_cuda", 16, 5.0)]}) == (16, 16)
    assert triton.batch_sizes({}) == (1, None)


def test_what_triton_cannot_serve_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ArtifactError, match="cannot be read as ONNX") as refused:
        triton.read_ports(tmp_path / "a.onnx")
    assert refused.value.exit_code == 8
    model = onnx.load(network(tmp_path / "b.onnx"))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.COMPLEX64
    (tmp_path / "b.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="x: Triton has no type for COMPLEX64"):
        triton.read_ports(tmp_path / "b.onnx")


# -- the command ----------------------------------------------------------------------------------------


def test_the_command_hands_over(capfd: Capture) -> None:
    finished(Path("run"))
    code, out, err = call(capfd, "release", "run", "-o", "out")
    assert (code, err) == (0, "")
    assert out == "PASS  handed over to out: 14 files; describe the model's use in its README.md\n"
    assert call_json(capfd, "release", "run", "-o", "again")["result"]["files"] == sorted(tree(Path("again")))
    assert "release" in SECTIONS["Results"]


def test_the_command_without_a_pass_ends_with_5(capfd: Capture) -> None:
    finished(Path("run"), verdict="fail", gates=[{"name": "speedup", "verdict": "fail"}])
    code, out, err = call(capfd, "release", "run", "-o", "out")
    assert (code, out) == (5, "")
    assert err.startswith("error: run: the verdict is fail (speedup); --force hands it over")
    code, out, _ = call(capfd, "release", "run", "-o", "out", "--force")
    assert code == 0
    assert out.startswith("FAIL  handed over to out")
