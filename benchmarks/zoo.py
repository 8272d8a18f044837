"""Every architecture of torchvision, every family of timm: what is pruned, whether exactly, what stays.

    python benchmarks/zoo.py [--set torchvision|timm|all] [--only NAME ...] [--jobs 1] [--limit 300]
                             [--peer-python PATH] [--peer-only] [--out FILE.jsonl]

One row per model, each in a process of its own (`zoo_row.py`) with a time limit: traced, labelled, half of
the MACs removed by Taylor scores of one random minibatch, masked against dense in float32 and float64, a
training step, ONNX and ONNX Runtime. `--peer-python` names the Python of an environment with
Torch-Pruning, which then takes the same models (`zoo_peer.py`). Rows are appended to the JSON lines file as
they come, so that a stopped sweep goes on; `--only` measures its models again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import zoo_models
from benchmarks.common import RESULTS, note, provenance, write
from benchmarks.zoo_models import Spec
from deploy import machine

FOLDER = Path(__file__).resolve().parent
Rows = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One model and one tool: "compress" or "torch_pruning", and the Python that has it."""

    tool: str
    python: str
    spec: Spec

    @property
    def key(self) -> tuple[str, str]:
        return self.tool, self.spec.key


def main() -> None:
    options = _options()
    every = zoo_models.specs(options.set)
    chosen = [s for s in every if not options.only or s.name in options.only or s.key in options.only]
    if not chosen:
        sys.exit(f"no model of the sweep is called {' '.join(options.only)}")
    jobs = [] if options.peer_only else [Job("compress", sys.executable, spec) for spec in chosen]
    if options.peer_python:
        jobs += [Job("torch_pruning", options.peer_python, spec) for spec in chosen]
    rows = read(options.out)
    waiting = [job for job in jobs if options.only or job.key not in rows]
    lock = Lock()

    def work(job: Job) -> None:
        row = measure(job, options.limit)
        with lock:
            keep(row, options.out)
            rows[job.key] = row
            note(_line(row))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, waiting))
    if all(("compress", spec.key) in rows for spec in zoo_models.specs("all")):
        finish(rows)
    else:
        note("the sweep is not complete: no result file is written")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=("torchvision", "timm", "all"), default="all")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300, help="seconds per model")
    parser.add_argument("--peer-python", default="")
    parser.add_argument("--peer-only", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.jsonl")
    return parser.parse_args()


# -- one model --------------------------------------------------------------------------------------------


def measure(job: Job, limit: float) -> dict[str, Any]:
    """The row of one job: the last line its process printed, and how the process ended."""
    script = "zoo_row.py" if job.tool == "compress" else "zoo_peer.py"
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [job.python, str(FOLDER / script), job.spec.key],
            stdout=out,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        ended = _wait(process, limit)
        row = _last(out)
        tail = _last_text(err)
    row |= {"tool": job.tool, "key": job.spec.key, "seconds": round(time.monotonic() - start, 1)}
    row["commit"] = machine.commit(FOLDER)
    if row.get("stage") != "done":
        why = f"more than {limit:g} s" if ended is None else f"ended with {ended}: {tail}"
        row.setdefault("errors", {})[row.get("stage", "start")] = why
        row |= {"through": False, "removed_30_percent": False, "ok": False}
    return row


def _wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """The exit status, or None when the process had to be ended at its limit."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in the group
        process.wait()
        return None


def _last(out: Any) -> dict[str, Any]:
    """The last whole JSON object of a stream."""
    out.seek(0)
    for line in reversed(out.read().splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _last_text(err: Any) -> str:
    err.seek(0)
    lines = [line.strip() for line in err.read().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _line(row: dict[str, Any]) -> str:
    state = "ok" if row.get("ok") else "through" if row.get("through") else "FAILED"
    errors = "; ".join(f"{stage}: {text}" for stage, text in row["errors"].items())
    return f"{row['tool']} {row['key']} {state} macs {row.get('macs_ratio', '-')} {row['seconds']} s {errors}"


# -- the file of rows -------------------------------------------------------------------------------------


def read(path: Path) -> Rows:
    """The latest row of each tool and model; a line cut short by a stop is left out."""
    rows: Rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["tool"], row["key"]] = row
    return rows


def keep(row: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


# -- the result -------------------------------------------------------------------------------------------


def finish(rows: Rows) -> None:
    """benchmarks/results/zoo.json and zoo.md."""
    ours = [rows["compress", spec.key] for spec in zoo_models.specs("all")]
    peer = [row for (tool, _), row in rows.items() if tool == "torch_pruning"]
    found = summary(ours, peer)
    write("zoo", found, [*ours, *peer])
    page = header(found) + table(ours, {row["key"]: row for row in peer})
    (RESULTS / "zoo.md").write_text(page)


def summary(ours: Sequence[dict[str, Any]], peer: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts. ok: see `zoo_row.verdict` and `zoo_peer.verdict`."""
    names = ("classification", "timm", "timm_more")
    groups = {name: [r for r in ours if _group(r) == name] for name in names}
    other = [r for r in ours if _group(r) not in groups]
    seen = [r for r in ours if "label_s" in r and r.get("torch_export_s")]
    ratios = [r["label_s"] / r["torch_export_s"] for r in seen]
    torchvision = [r["label_s"] for r in seen if not _group(r).startswith("timm")]
    return {
        "torchvision_classification": _count("models", groups["classification"]),
        "torchvision_other": _count("models", other),
        "timm": _count("families", groups["timm"]),
        "timm_more": _count("models", groups["timm_more"]),
        "torch_pruning": {**_count("models", peer), "exact": sum(bool(r.get("exact")) for r in peer)},
        "removed_30_percent": sum(bool(r.get("removed_30_percent") and r["through"]) for r in ours),
        "label_over_export_median": round(statistics.median(ratios), 3),
        "label_seconds_worst": max(torchvision, default=0.0),
    }


def _group(row: dict[str, Any]) -> str:
    return str(row["key"]).partition(":")[0]


def _count(what: str, rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        what: len(rows),
        "ok": sum(bool(r.get("ok")) for r in rows),
    }


HEADER = """# Every architecture

Measured by `python benchmarks/zoo.py`, finished {date}, {cpu}, one thread per model, Python {python},
{versions};
the commit of each row is in `zoo.json`.

{counts}

ok: traced, cut, exact in float32 and float64, trained one step, exported, equal in ONNX Runtime, and at
most 70 % of the MACs left or the reason recorded. MACs kept: asked for 0.5. The last column is
Torch-Pruning's high-level API on the same model: the MACs it left, and whether the result computes what the
network with the same channels zeroed computes.

"""


def header(found: dict[str, Any]) -> str:
    """What was measured, where and when, and the counts, as Markdown."""
    told = provenance()
    versions = {**machine.versions(), "timm": version("timm")}
    return HEADER.format(
        date=told["date"],
        cpu=told["machine"].get("cpu", ""),
        python=told["python"],
        versions=", ".join(
            f"{name} {versions[name]}"
            for name in ("torch", "torchvision", "timm", "onnx", "onnxruntime")
            if versions.get(name)
        ),
        counts="\n".join(f"- {name.replace('_', ' ')}: {_told(value)}" for name, value in found.items()),
    )


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {count}" for key, count in value.items())
    return str(value)


def table(ours: Iterable[dict[str, Any]], peer: dict[str, dict[str, Any]]) -> str:
    """One line per model, as Markdown."""
    lines = [
        "| model | ok | MACs kept | units | most are pinned by | label s | torch.export s | Torch-Pruning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ours:
        cells = [
            row["key"],
            "yes" if row.get("ok") else "**no**",
            _number(row.get("macs_ratio")),
            str(row.get("units", "-")),
            _why(row),
            _number(row.get("label_s")),
            _number(row.get("torch_export_s")),
            _peer(peer.get(row["key"])),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _why(row: dict[str, Any]) -> str:
    """The first error, else what pins most channels apart from the model's output."""
    if row["errors"]:
        stage, text = next(iter(row["errors"].items()))
        return f"{stage}: {text[:100]}"
    inner = [pin for pin in row.get("pinned", []) if pin["op"] != "output"]
    return f"{inner[0]['channels']}: {inner[0]['reason']}" if inner else "the output only"


def _peer(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["errors"]:
        stage, text = next(iter(row["errors"].items()))
        return f"{stage}: {text[:60]}"
    state = "ok" if row.get("ok") else "through"
    return f"{state}, {_number(row.get('macs_ratio'))}, {'exact' if row.get('exact') else 'inexact'}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
