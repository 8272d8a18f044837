from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from compress import manifest
from compress.errors import IntegrityError
from compress.manifest import StageRecord

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "prune").mkdir(parents=True)
    (folder / "prune" / "plan.json").write_text("{}")
    (folder / "dense.onnx").write_bytes(b"onnx" * 100)
    return folder


def record(run: Path, stage: str = "prune", *outputs: str) -> StageRecord:
    facts = manifest.facts(run, outputs or ("prune/plan.json", "dense.onnx"))
    return StageRecord(stage, "key-1", facts, {"torch": "2.14.1"}, "2026-11-22T10:00:00Z", 3)


def test_a_record_goes_round(run: Path) -> None:
    assert manifest.load(run) == {}
    wanted = record(run)
    manifest.commit(run, wanted)
    assert manifest.load(run) == {"prune": wanted}
    assert wanted.outputs["dense.onnx"]["bytes"] == 400
    with pytest.raises(FrozenInstanceError):
        wanted.stage = "other"  # type: ignore[misc]  # that it is refused is the point


def test_stages_keep_the_order_of_their_commits(run: Path) -> None:
    for stage in ("train", "prune", "export", "prune"):
        manifest.commit(run, record(run, stage))
    assert list(manifest.load(run)) == ["train", "export", "prune"]


def test_done_only_with_the_same_key_and_all_outputs(run: Path) -> None:
    assert not manifest.is_done(run, "prune", "key-1")
    manifest.commit(run, record(run))
    assert manifest.is_done(run, "prune", "key-1")
    assert not manifest.is_done(run, "prune", "key-2")
    assert not manifest.is_done(run, "export", "key-1")
    (run / "dense.onnx").unlink()
    assert not manifest.is_done(run, "prune", "key-1")


def test_a_flipped_bit_in_an_output_is_named_with_both_hashes(run: Path) -> None:
    wanted = record(run)
    manifest.commit(run, wanted)
    data = bytearray((run / "dense.onnx").read_bytes())
    data[123] ^= 4
    (run / "dense.onnx").write_bytes(data)
    found = manifest.facts(run, ["dense.onnx"])["dense.onnx"]["sha256"]
    with pytest.raises(IntegrityError) as caught:
        manifest.is_done(run, "prune", "key-1")
    assert str(caught.value) == (
        f"{run / 'dense.onnx'}: changed since stage prune wrote it: sha256 expected "
        f"{wanted.outputs['dense.onnx']['sha256']}, found {found}; compress run --from prune"
    )


def test_verify_lists_every_problem(run: Path) -> None:
    assert [str(p) for p in manifest.verify(run)] == [
        "manifest.json: there is no manifest in this folder; give the folder of a run"
    ]
    manifest.commit(run, record(run))
    (run / "unlisted.txt").write_text("fine")
    assert manifest.verify(run) == []
    (run / "prune" / "plan.json").unlink()
    (run / "dense.onnx").write_bytes(b"")
    first, second = manifest.verify(run)
    assert str(first) == "prune/plan.json: is missing; compress run --from prune"
    assert (second.stage, second.path) == ("prune", "dense.onnx")
    assert "changed since stage prune wrote it" in str(second)


def test_commit_refuses_outputs_that_are_not_there(run: Path) -> None:
    wanted = record(run)
    (run / "dense.onnx").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"dense\.onnx: stage prune recorded 400 bytes, found 1 bytes"):
        manifest.commit(run, wanted)
    (run / "dense.onnx").unlink()
    with pytest.raises(IntegrityError, match="found no such file"):
        manifest.commit(run, wanted)
    assert manifest.load(run) == {}


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "a//b", "./a", ".", "", "a\\b", "a\nb", "a/", ".."]
)
def test_paths_stay_in_the_run_folder(run: Path, name: str) -> None:
    facts = manifest.facts(run, ["dense.onnx"])["dense.onnx"]
    bad = StageRecord("prune", "key-1", {name: facts}, {}, "", 0.0)
    with pytest.raises(IntegrityError, match="not a plain path inside the run folder") as caught:
        manifest.commit(run, bad)
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 8


def test_links_do_not_lead_out_of_the_run_folder(run: Path) -> None:
    (run.parent / "secret").write_text("{}")
    (run / "inside").symlink_to("dense.onnx")
    (run / "outside").symlink_to("../secret")
    (run / "folder").symlink_to("..")
    (run / "loop").symlink_to("loop")
    assert manifest.facts(run, ["inside"])["inside"]["bytes"] == 400
    for name in ("outside", "folder/secret"):
        with pytest.raises(IntegrityError, match="leads out of the run folder through a link"):
            manifest.facts(run, [name])
    with pytest.raises(IntegrityError, match=r"cannot be (followed|read)"):
        manifest.facts(run, ["loop"])
    manifest.commit(run, record(run))
    (run / "dense.onnx").unlink()
    (run / "dense.onnx").symlink_to("../secret")  # swapped after the commit
    with pytest.raises(IntegrityError, match="through a link"):
        manifest.verify(run)


@pytest.mark.slow
def test_every_single_flipped_bit_of_the_manifest_is_refused(run: Path) -> None:
    manifest.commit(run, replace(record(run, "prune", "dense.onnx"), versions={"é": "2"}))
    path = run / manifest.MANIFEST_NAME
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(IntegrityError) as caught:
            manifest.load(run)
        assert str(caught.value).startswith(str(path))
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(IntegrityError):
            manifest.load(run)
    path.write_bytes(good)
    assert manifest.verify(run) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, r"not a manifest of version 1 \(found 2\)"),
        ({"stages": {"prune": {"stage": "prune"}}}, r"damaged at stages\.prune\.key"),
        ({"stages": []}, "damaged at stages"),
        ({"extra": 1}, "checksum does not fit"),
    ],
)
def test_a_foreign_manifest_is_refused(run: Path, change: dict[str, object], words: str) -> None:
    manifest.commit(run, record(run))
    path = run / manifest.MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}, indent=1) + "\n")
    with pytest.raises(IntegrityError, match=words):
        manifest.load(run)


def test_a_manifest_that_is_a_list_a_folder_or_too_big(run: Path) -> None:
    path = run / manifest.MANIFEST_NAME
    path.write_text("[]")
    with pytest.raises(IntegrityError, match="not a manifest"):
        manifest.load(run)
    path.write_bytes(b" " * (manifest.MANIFEST_BYTES + 1))
    with pytest.raises(IntegrityError, match="is larger than"):
        manifest.load(run)
    path.unlink()
    path.mkdir()
    with pytest.raises(IntegrityError, match="cannot be read"):
        manifest.load(run)


KILLED = """
import os, signal, sys
from compress import manifest
replace = os.replace
def kill(source, target):
    if sys.argv[2] == "after":
        replace(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
facts = manifest.facts(sys.argv[1], ["dense.onnx"])
manifest.commit(sys.argv[1], manifest.StageRecord("export", "k", facts, {}, "", 0.0))
"""


@pytest.mark.parametrize(("when", "done"), [("before", False), ("after", True)])
def test_a_commit_is_all_or_nothing_under_sigkill(run: Path, when: str, done: bool) -> None:
    manifest.commit(run, record(run))
    process = subprocess.run([sys.executable, "-c", KILLED, str(run), when], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    assert manifest.is_done(run, "prune", "key-1")
    assert manifest.is_done(run, "export", "k") is done


def test_an_impossible_time_is_refused_before_anything_is_written(run: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        manifest.commit(run, replace(record(run), seconds=float("nan")))
    assert manifest.MANIFEST_NAME not in os.listdir(run)
