"""What every benchmark shares: provenance, and one result file per script."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def data_folder() -> Path:
    """The folder that COMPRESS_DATA names; ends the script with the reason where it is not set."""
    folder = os.environ.get("COMPRESS_DATA")
    if not folder or not Path(folder).is_dir():
        sys.exit("skipped: COMPRESS_DATA does not name the folder with CIFAR-10 and pretrained weights")
    return Path(folder)


def provenance() -> dict[str, Any]:
    """Machine, versions, commit, date and command, without user, host or path names."""
    from deploy import machine

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": machine.commit(Path(__file__).parent),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_named, sys.argv[1:])]),
        "python": platform.python_version(),
        "machine": machine.describe(),
    }


def _named(argument: str) -> str:
    """An absolute path by its last part: the folders of a machine are nobody's business."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def write(name: str, summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Path:
    """benchmarks/results/NAME.json: provenance, summary, rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"provenance": provenance(), "summary": summary, "rows": list(rows)}
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    note(json.dumps(summary, indent=1))
    return path


def known_rows(name: str) -> list[dict[str, Any]]:
    """The rows that benchmarks/results/NAME.json has; none without the file."""
    path = RESULTS / f"{name}.json"
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def note(text: str) -> None:
    """One line to the person who waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
