"""From a finished run to a release folder: whole files, with a verdict; and its check afterwards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from compress import files, manifest
from compress.earlier import SUMS, SUMS_BYTES
from compress.errors import ConfigError, IntegrityError, VerdictError
from compress.manifest import MANIFEST_NAME, Problem

_AGAIN = "get the release again from where it came from"


@dataclass(frozen=True)
class Handed:
    """What was handed over: the paths in ``folder``, and the ``verdict`` of the run."""

    folder: Path
    paths: list[str]
    verdict: str
    forced: bool


def hand_over(run: Path, folder: Path, *, name: str = "", force: bool = False) -> Handed:
    """Write the release ``folder`` (not there yet, or empty) of a finished run; all of it or nothing.

    Raises IntegrityError when a file of the run is missing or changed, ConfigError when the run is not judged
    or ``folder`` holds something, VerdictError when the verdict is no pass and ``force`` is not given.
    """
    from deploy import handover

    problems = manifest.verify(run)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise IntegrityError(f"{problems[0].what}{more}", str(run / problems[0].path), problems[0].fix)
    records = manifest.load(run)
    order = list(records)
    if "gate" not in order or "report" in order[order.index("gate") :]:
        raise ConfigError("the run is not judged", str(run), "finish it first: compress run")
    results = files.read_json(run / "results.json") | files.read_json(run / "gate.json")
    passed = results["verdict"] == "pass"
    if not passed and not force:
        names = [str(gate["name"]) for gate in results["gates"] if gate["verdict"] != "pass"]
        what = f"the verdict is {results['verdict']}" + (f" ({', '.join(names)})" if names else "")
        raise VerdictError(what, str(run), "--force hands it over all the same, and its model card says so")
    outputs = [path for record in records.values() for path in record.outputs]
    with files.whole_folder(folder) as temporary:
        written = handover.write(temporary, run, outputs, results, name=name, forced=not passed)
    return Handed(folder, written, results["verdict"], not passed)


def verify(folder: Path) -> list[Problem]:
    """Every file of a run, or of a release, that is missing or not what was written.

    Raises ConfigError (exit 3) where it is neither, IntegrityError (exit 8) where its list is damaged.
    """
    if (folder / MANIFEST_NAME).is_file():
        return manifest.verify(folder)
    if not (folder / SUMS).is_file():
        what = "is neither a run nor a release" if folder.is_dir() else "there is no such folder"
        raise ConfigError(what, str(folder), f"give a folder with a {MANIFEST_NAME} or a {SUMS}")
    return [
        problem
        for name, wanted in _listed(folder).items()
        if (problem := manifest.check(folder, "release", name, wanted, "it was released", _AGAIN))
    ]


def _listed(folder: Path) -> dict[str, str]:
    """Path -> hexadecimal SHA-256 of every file that a release lists."""
    text = files.read_bytes(folder / SUMS, SUMS_BYTES).decode("utf-8", errors="replace")
    listed = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None:
            what = f"line {number} is no checksum and path"
            raise IntegrityError(what, str(folder / SUMS), _AGAIN)
        listed[match[2]] = match[1]
    return listed
