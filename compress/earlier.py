"""The release that this one is held against: found, checked to be what it was, and judged with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import manifest
from compress.errors import ConfigError, IntegrityError, did_you_mean
from compress.files import read_bytes, read_json, sha256
from deploy.baseline import Tolerances, judge, missing

if TYPE_CHECKING:
    from deploy.gate import Gate

RESULTS = "results.json"
SUMS = "SHA256SUMS"
SUMS_BYTES = 2**20
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Earlier:
    """An earlier release. ``place``: as the user wrote it; ``results``: its results.json, None if missing."""

    place: str
    results: Mapping[str, Any] | None
    tolerated: Tolerances

    def judge(self, results: Mapping[str, Any], gates: Mapping[str, Any]) -> tuple[Gate, ...]:
        """The gates of a release against this one; a missing baseline is one gate, which does not pass."""
        if self.results is None:
            return (missing(self.place),)
        return judge(results, self.results, gates, self.tolerated)

    def as_dict(self) -> dict[str, Any]:
        """What a verdict says it was held against; no path, for folders are nobody's business."""
        found = {} if self.results is None else self.results
        return {"created": found.get("created"), "sha256": self.hash, "tolerated": asdict(self.tolerated)}

    @property
    def hash(self) -> str | None:
        """Of the results, whatever the file's layout."""
        if self.results is None:
            return None
        return hashlib.sha256(json.dumps(self.results, sort_keys=True).encode()).hexdigest()


def read(place: str, tolerated: Tolerances, run: Path) -> Earlier:
    """The release at ``place``: the folder of a run or of a release, or a results.json.

    Raises ConfigError when it is ``run`` itself or was written by another version of this tool, and
    IntegrityError when its results.json is not what its manifest or SHA256SUMS lists.
    """
    path = Path(place) / RESULTS if Path(place).is_dir() else Path(place)
    if not path.exists():
        return Earlier(place, None, tolerated)
    if path.resolve().parent == run.resolve():
        fix = "give the run, release or results.json of an earlier release"
        raise ConfigError("is the run that is to be judged", f"--baseline {place}", fix)
    _check_listed(path)
    found = read_json(path)
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        what = f"is no results.json of version {SCHEMA_VERSION} (found {version!r})"
        raise ConfigError(what, f"--baseline {place}", "make the baseline again with this release")
    return Earlier(place, found, tolerated)


def tolerances(given: Sequence[str]) -> Tolerances:
    """``accuracy=0.01`` and the like, the last of a name wins. Raises ConfigError."""
    found, known = Tolerances(), [field.name for field in fields(Tolerances)]
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(
                f"there is nothing called {name!r} to tolerate", "--tolerate", did_you_mean(name, known)
            )
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < 1e6:
            raise ConfigError(
                f"{value!r} is no share of 0 or more", f"--tolerate {name}", f"for example {name}=0.05"
            )
        found = replace(found, **{name: number})
    return found


def _check_listed(path: Path) -> None:
    """Raise IntegrityError when the manifest or the checksums beside a results.json list another one."""
    listed = _listed(path.parent)
    if listed is not None and path.name == RESULTS and sha256(path) != listed:
        what = "changed since it was written: its sha256 is not the listed one"
        raise IntegrityError(what, str(path), "get the baseline again from where it came from")


def _listed(folder: Path) -> str | None:
    for record in manifest.load(folder).values():
        if RESULTS in record.outputs:
            return record.outputs[RESULTS]["sha256"]
    try:
        text = read_bytes(folder / SUMS, SUMS_BYTES).decode("ascii", errors="replace")
    except OSError:
        return None
    pairs = [line.split("  ", 1) for line in text.splitlines()]
    return next((pair[0] for pair in pairs if pair[1:] == [RESULTS]), None)
