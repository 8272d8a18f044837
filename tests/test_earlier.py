"""The release to compare with: where it is looked for, what is refused, and the tolerances."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from compress import earlier, files, manifest
from compress.errors import ConfigError, IntegrityError
from deploy.baseline import Tolerances

RESULTS: dict[str, Any] = {"schema_version": 1, "created": "2026-01-01T00:00:00Z", "verdict": "pass"}


def release(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    files.write_json(folder / "results.json", {**RESULTS, **changes})
    return folder


def read(place: Path, run: str = "run") -> earlier.Earlier:
    return earlier.read(str(place), Tolerances(), place.parent / run)


def test_a_folder_and_its_file_are_the_same_release(tmp_path: Path) -> None:
    folder = release(tmp_path / "old")
    found = read(folder)
    assert found.results == RESULTS
    assert found.hash == earlier.read(str(folder / "results.json"), Tolerances(), tmp_path / "run").hash
    assert found.as_dict()["created"] == RESULTS["created"]
    assert str(tmp_path) not in str(found.as_dict())


def test_a_missing_one_is_a_gate_that_does_not_pass(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "nowhere", tmp_path / "empty"):
        (gate,) = read(place).judge({}, {})
        assert (gate.name, gate.verdict) == ("baseline", "inconclusive")
        assert str(place) in gate.message


def test_the_run_itself_is_refused(tmp_path: Path) -> None:
    folder = release(tmp_path / "run")
    for place in (folder, folder / "results.json", tmp_path / "run" / ".." / "run"):
        with pytest.raises(ConfigError, match="is the run that is to be judged") as refused:
            earlier.read(str(place), Tolerances(), folder)
        assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[]", 3, "is no results.json of version 1 (found None)"),
        ('{"schema_version": 2}', 3, "(found 2); make the baseline again with this release"),
        ("{", 8, "is not whole JSON"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str, code: int, words: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises((ConfigError, IntegrityError)) as refused:
        read(tmp_path / "results.json")
    assert refused.value.exit_code == code
    assert words in str(refused.value)


def test_a_changed_baseline_is_refused_by_its_manifest_or_checksums(tmp_path: Path) -> None:
    run, handed = release(tmp_path / "old"), release(tmp_path / "handed")
    outputs = manifest.facts(run, ["results.json"])
    manifest.commit(run, manifest.StageRecord("report", "key", outputs, {}, "2026-01-01T00:00:00Z", 1.0))
    digest = hashlib.sha256((handed / "results.json").read_bytes()).hexdigest()
    (handed / "SHA256SUMS").write_text(f"{'0' * 64}  dense.onnx\n{digest}  results.json\n")
    for folder in (run, handed):
        assert read(folder).results == RESULTS
        release(folder, verdict="fail")
        with pytest.raises(IntegrityError, match="changed since it was written") as refused:
            read(folder)
        assert refused.value.exit_code == 8


def test_tolerances_are_read_and_checked() -> None:
    assert earlier.tolerances([]) == Tolerances()
    assert earlier.tolerances(["latency=0.1", "size=0", "latency=0.2"]) == Tolerances(latency=0.2, size=0.0)
    for text, words in (
        ("latncy=1", "did you mean latency?"),
        ("latency", "'' is no share of 0 or more; for example latency=0.05"),
        ("size=-1", "'-1' is no share"),
        ("size=nan", "'nan' is no share"),
        ("size=inf", "'inf' is no share"),
    ):
        with pytest.raises(ConfigError) as refused:
            earlier.tolerances([text])
        assert words in str(refused.value)
