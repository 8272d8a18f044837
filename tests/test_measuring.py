"""Documents of other targets: kept only where they are of the run's own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress import files, measuring
from compress.errors import CompressError, ConfigError, IntegrityError


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
