"""A run's manifest: which stages are done, with what key, and the sha256 of every file they wrote.

``manifest.json`` is written last, after the outputs are on the disk, so a stage that is listed is whole.
Freshness goes by hashes, never by file times. The file carries a checksum of its own and is compared with
its canonical text when read: a single flipped bit anywhere in it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12; it brings it along

from compress.errors import IntegrityError
from compress.files import dump_json, parse_json, read_bytes, sha256, write_text

MANIFEST_NAME = "manifest.json"
MANIFEST_BYTES = 16 * 2**20
SCHEMA_VERSION = 1

_EXACT = ConfigDict(extra="forbid", allow_inf_nan=False)


@with_config(_EXACT)
class FileFacts(TypedDict):
    """What a file was when it was written: hexadecimal SHA-256 and size in bytes."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


@with_config(_EXACT)
@dataclass(frozen=True)
class StageRecord:
    """One finished stage. ``outputs`` maps paths relative to the run folder to their facts.

    ``key`` is a hash of everything the stage depends on; ``started`` is UTC in ISO form, for people only;
    ``seconds`` is the time it took.
    """

    stage: str
    key: str
    outputs: dict[str, FileFacts]
    versions: dict[str, str]
    started: str
    seconds: float


@dataclass(frozen=True)
class Problem:
    """An output that is not what its stage wrote. ``str()`` is one line."""

    stage: str
    path: str
    what: str
    fix: str

    def __str__(self) -> str:
        return str(IntegrityError(self.what, self.path, self.fix))


_RECORDS = TypeAdapter(dict[str, StageRecord])


def load(run: str | os.PathLike[str]) -> dict[str, StageRecord]:
    """The finished stages of a run folder, by name, in the order of their commits; empty without a manifest.

    Raises IntegrityError when the manifest is not exactly what `commit` wrote.
    """
    path = Path(run, MANIFEST_NAME)
    try:
        data = read_bytes(path, MANIFEST_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}", str(path)) from error
    if len(data) > MANIFEST_BYTES:
        raise IntegrityError(f"is larger than {MANIFEST_BYTES} bytes", str(path))
    return _parse(data, path)


def _parse(data: bytes, path: Path) -> dict[str, StageRecord]:
    fix = "start again with: compress run --fresh"
    found = parse_json(data, str(path))
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        what = f"is not a manifest of version {SCHEMA_VERSION} (found {version!r})"
        raise IntegrityError(what, str(path), fix)
    try:
        records = _RECORDS.validate_python(found.get("stages"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in ("stages", *first["loc"]))
        raise IntegrityError(f"is damaged at {place}", str(path), fix) from error
    if _render(records).encode("utf-8", errors="backslashreplace") != data:
        raise IntegrityError("was changed after it was written (its checksum does not fit)", str(path), fix)
    for record in records.values():
        for name in record.outputs:
            _locate(path.parent, name)
    return records


def _render(records: Mapping[str, StageRecord]) -> str:
    stages = {name: asdict(record) for name, record in records.items()}
    compact = json.dumps(stages, allow_nan=False, separators=(",", ":"))
    checksum = hashlib.sha256(compact.encode("ascii")).hexdigest()
    return dump_json({"schema_version": SCHEMA_VERSION, "checksum": checksum, "stages": stages})


def commit(run: str | os.PathLike[str], record: StageRecord) -> None:
    """Add ``record`` (in place of an earlier one of the same stage) to the manifest, atomically.

    Call it last, when every output is on the disk. Raises IntegrityError when an output is missing, has
    another size than the record says, or lies outside the run folder.
    """
    folder = Path(run)
    for name, facts in record.outputs.items():
        path = _locate(folder, name)
        size = path.stat().st_size if path.is_file() else None
        if size != facts["bytes"]:
            found = "no such file" if size is None else f"{size} bytes"
            what = f"stage {record.stage} recorded {facts['bytes']} bytes, found {found}"
            raise IntegrityError(what, str(path))
    records = load(folder)
    records.pop(record.stage, None)  # a stage done again moves to the end
    records |= _RECORDS.validate_python({record.stage: asdict(record)})  # types as `load` will find them
    write_text(folder / MANIFEST_NAME, _render(records))


def facts(run: str | os.PathLike[str], outputs: Iterable[str | os.PathLike[str]]) -> dict[str, FileFacts]:
    """Hash files of a run folder for a StageRecord; ``outputs`` are paths relative to the folder.

    Raises IntegrityError for a missing file and for a path outside the folder.
    """
    found: dict[str, FileFacts] = {}
    for output in outputs:
        name = PurePosixPath(output).as_posix()
        path = _locate(Path(run), name)
        digest = sha256(path)
        found[name] = {"sha256": digest, "bytes": path.stat().st_size}
    return found


def is_done(run: str | os.PathLike[str], stage: str, key: str) -> bool:
    """Whether ``stage`` was committed with this ``key`` and all its outputs are still there, unchanged.

    A missing output means not done. A changed one raises IntegrityError with both hashes: it was damaged or
    edited, and going on from it, or silently replacing it, would both be wrong.
    """
    record = load(run).get(stage)
    if record is None or record.key != key:
        return False
    if any(not _locate(Path(run), name).is_file() for name in record.outputs):
        return False
    for name, wanted in record.outputs.items():
        problem = _check(Path(run), record.stage, name, wanted)
        if problem:
            raise IntegrityError(problem.what, str(Path(run, name)), problem.fix)
    return True


def verify(run: str | os.PathLike[str]) -> list[Problem]:
    """Every output of every stage that is missing or changed. Files that no stage lists are fine.

    A folder without a manifest is a problem too. Raises IntegrityError when the manifest itself is damaged.
    """
    if not Path(run, MANIFEST_NAME).is_file():
        return [Problem("", MANIFEST_NAME, "there is no manifest in this folder", "give the folder of a run")]
    return [
        problem
        for record in load(run).values()
        for name, wanted in record.outputs.items()
        if (problem := _check(Path(run), record.stage, name, wanted))
    ]


def _check(run: Path, stage: str, name: str, wanted: FileFacts) -> Problem | None:
    return check(
        run, stage, name, wanted["sha256"], f"stage {stage} wrote it", f"compress run --from {stage}"
    )


def check(folder: Path, stage: str, name: str, wanted: str, since: str, fix: str) -> Problem | None:
    """What is wrong with the file `name` of a folder, whose hexadecimal SHA-256 is to be `wanted`.

    since: when it had that, for the message. Raises IntegrityError unless `name` is a plain path inside.
    """
    path = _locate(folder, name)
    if not path.is_file():
        return Problem(stage, name, "is missing", fix)
    found = sha256(path)
    if found == wanted:
        return None
    what = f"changed since {since}: sha256 expected {wanted}, found {found}"
    return Problem(stage, name, what, fix)


def _locate(run: Path, name: str) -> Path:
    """The file ``name`` of a folder. Raises IntegrityError unless it is a plain path inside."""
    pure = PurePosixPath(name)
    plain = name not in {"", "."} and name == pure.as_posix() and name.isprintable() and "\\" not in name
    if not plain or pure.is_absolute() or ".." in pure.parts:
        raise IntegrityError("is not a plain path inside the run folder", name)
    path = run / name
    try:
        inside = path.resolve().is_relative_to(run.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise IntegrityError("cannot be followed", str(path)) from error
    if not inside:
        raise IntegrityError("leads out of the run folder through a link", str(path))
    return path
