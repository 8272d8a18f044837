"""ONNX files that other targets need: made beside the run's own, from the same examples, measured alike.

The run's own files are those of its config's target: they are judged and ship. A runner of another family
(int8 for ONNX Runtime's CPU kernels is not int8 for TensorRT) or a precision that the config does not ask for
gets a file in the run's folder `variants/`. It is kept, and made anew when what it was made from changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress import aim, files, variants
from compress.errors import CompressError, ConfigError
from compress.steps import Work

FOLDER = "variants"
RECORD = "made.json"


def find(work: Work, model: str, precision: str, kind: str) -> dict[str, Any]:
    """The row of a model's file in a precision, for a kind of runner: the run's own, else a further one.

    `file` is its path in the run. Raises ConfigError where it is missing and cannot be made here.
    """
    return (
        _own(work.run, model, precision, kind)
        or _kept(work, model, precision, kind)
        or _made(work, model, precision, kind)
    )


def prepare(work: Work) -> list[dict[str, Any]]:
    """The files of both models that the config's target needs; none where it runs the fp32 files."""
    precision, kind = str(work.config.bench.precision), aim.target(work.config).runner
    if precision in variants.AS_THEY_ARE:
        return []
    return [find(work, model, precision, kind) for model in variants.MODELS]


def _own(run: Path, model: str, precision: str, kind: str) -> dict[str, Any] | None:
    """What the convert stage made, if it is for this kind of runner too."""
    from deploy.precision import family

    path = run / "convert.json"
    rows: list[dict[str, Any]] = files.read_json(path)["variants"] if path.is_file() else []
    for row in rows:
        made_for = family(precision, row.get("runner", ""))
        if (row["model"], row["precision"], made_for) == (model, precision, family(precision, kind)):
            return row
    return None


def _name(model: str, precision: str, kind: str) -> str:
    from deploy.precision import family

    whose = family(precision, kind)
    return f"{FOLDER}/{model}.{precision}{whose and '-'}{whose}.onnx"


def _origin(work: Work, model: str) -> dict[str, Any]:
    """What a further file depends on; the data are those of the run."""
    export = work.config.export
    return {
        "data": work.read("train.json")["data"],
        "onnx": files.sha256(work.run / f"{model}.onnx"),
        "calibration_images": export.calibration_images,
        "keep_fp32": export.keep_fp32,
    }


def _records(run: Path) -> dict[str, Any]:
    path = run / FOLDER / RECORD
    return dict(files.read_json(path)) if path.is_file() else {}


def _kept(work: Work, model: str, precision: str, kind: str) -> dict[str, Any] | None:
    """A further file that was made before, of this model and with these settings."""
    name = _name(model, precision, kind)
    record = _records(work.run).get(name)
    if record is None or record["origin"] != _origin(work, model) or not (work.run / name).is_file():
        return None
    row: dict[str, Any] = record["row"]
    return row if files.sha256(work.run / name) == record["sha256"] else None


def _made(work: Work, model: str, precision: str, kind: str) -> dict[str, Any]:
    name = _name(model, precision, kind)
    origin = _origin(work, model)
    _check_data(work, name)
    work.events.note(f"making {name}: the run has no {precision} for {kind}")
    row = variants.variant(work, variants.source(work, model), precision, name, kind)
    record = {"sha256": files.sha256(work.run / name), "origin": origin, "row": row}
    files.write_json(work.run / FOLDER / RECORD, _records(work.run) | {name: record})
    return row


def _check_data(work: Work, name: str) -> None:
    """It is calibrated and measured on the run's data, so they must be here."""
    fix = f"make it where they are, compress convert --target {work.config.bench.target}, and bring the run"
    known: Mapping[str, Any] = work.read("train.json")["data"]
    try:
        found = work.data.fingerprint
    except CompressError as error:
        what = f"is not there, and the data to make it from are not here: {error.what}"
        raise ConfigError(what, name, fix) from error
    if found != known["fingerprint"]:
        raise ConfigError("is not there, and the data here are not those of the run", name, fix)
