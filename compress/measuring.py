"""The bench stage, and the same measurement for other targets, here or on other machines.

One document per target: what was measured (by sha256), on which machine, every latency and speed-up.
`bench.json` is that of the config's target; those of others lie in the run's folder `targets/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress import aim, files
from compress.config import BenchConfig
from compress.errors import ConfigError, IntegrityError, Interrupted
from compress.steps import Done, Work, finite

SCHEMA_VERSION = 1
FOLDER = "targets"
MODELS = ("original", "dense")


def bench_stage(work: Work) -> Done:
    """Time the dense network against the original on the config's target."""
    document = measure(work)
    detail = ", ".join(f"{r['runner']} batch {r['batch']}: {r['ratio']:.2f}x" for r in document["speedup"])
    return Done([work.write("bench.json", document)], detail)


def measure(work: Work) -> dict[str, Any]:
    """The document of the config's target: both models, interleaved, on every runner and batch size."""
    from deploy import latency, machine

    config = work.config.bench
    kinds, batches, threads = config.runners or [], config.batches or [], config.threads or 1
    if torch.cuda.is_available() and "torch_cuda" not in kinds:
        kinds = [*kinds, "torch_cuda"]
    rows: list[Any] = []
    ratios: list[Any] = []
    for kind in kinds:
        for batch in batches:
            place = len(ratios)

            def show(done: int, of: int, place: int = place, kind: str = kind, batch: int = batch) -> None:
                work.events.progress(
                    "bench", place + done / of, len(kinds) * len(batches), f"{kind}, batch {batch}"
                )
                _stop_between(work)

            with ExitStack() as opened:
                pair = {name: _open(work, opened, kind, name, threads) for name in MODELS}
                found = latency.measure(
                    pair, work.shapes, batch, config.repeats, config.seconds,
                    seed=work.config.seed, progress=show,
                )  # fmt: skip
            rows += [finite(row.as_dict()) for row in found.latency]
            ratios += [finite(asdict(ratio)) for ratio in found.speedup]
    return {
        "schema_version": SCHEMA_VERSION,
        "target": _target(work),
        "models": {name: files.sha256(work.run / f"{name}.onnx") for name in MODELS},
        "machine": machine.describe(),
        "latency": rows,
        "speedup": ratios,
    }


def _open(work: Work, opened: ExitStack, kind: str, name: str, threads: int) -> Any:
    from deploy import runners

    artifact = work.run / f"{name}.onnx" if kind.startswith("onnxruntime") else work.load(name)
    runner = runners.open_runner(kind, artifact, threads)
    opened.callback(runner.close)  # in reverse order: they restore the thread count
    return runner


def _target(work: Work) -> dict[str, Any]:
    chosen, bench = aim.target(work.config), work.config.bench
    return {
        "name": chosen.name,
        "description": chosen.description,
        "runner": chosen.runner,
        "precision": bench.precision,
        "gpu": chosen.gpu,
    }


def _stop_between(work: Work) -> None:
    if work.should_stop():
        raise Interrupted("stopped while measuring", "bench", "run the same command again: it measures anew")


# -- other targets ------------------------------------------------------------------------------------


def measure_other(work: Work, name: str) -> dict[str, Any]:
    """Measure for another target than the config's, and keep the document in the run's folder."""
    bench = BenchConfig(target=name, repeats=work.config.bench.repeats, seconds=work.config.bench.seconds)
    other = Work(
        aim.aimed(work.config.model_copy(update={"bench": bench})),
        work.folder, work.run, work.events, work.should_stop, work.command,
    )  # fmt: skip
    aim.check(other.config, here=True)
    document = measure(other)
    keep(work.run, document)
    return document


def keep(run: Path, document: Mapping[str, Any]) -> Path:
    """Put a document among those of other targets. Raises where it is of other models than the run's."""
    name = str(document["target"].get("name", ""))
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise IntegrityError("the target's name is no plain name", "bench", "measure it again")
    for model in MODELS:
        path = run / f"{model}.onnx"
        if not path.is_file():
            raise ConfigError(f"{run} has no {path.name}", "bench", "run the stages up to export first")
        if document["models"].get(model) != files.sha256(path):
            what = f"{name} was measured with another {model} model than this run's"
            raise ConfigError(what, "bench", "measure it again from a copy of this run's folder")
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    files.write_json(folder / f"{name}.json", document)
    return folder / f"{name}.json"


def bring(run: Path, path: Path) -> Path:
    """Bring in what `compress bench --json` printed on another machine."""
    document = files.read_json(path)
    found = document.get("bench", document) if isinstance(document, dict) else {}
    parts = [found.get(key) for key in ("target", "models", "machine")] if isinstance(found, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or found.get("schema_version") != SCHEMA_VERSION:
        raise IntegrityError("is no measurement", str(path), "give what compress bench --json printed")
    return keep(run, found)


def others(work: Work) -> list[dict[str, Any]]:
    """The documents of other targets that are of this run's models, by name."""
    found = [files.read_json(path) for path in sorted((work.run / FOLDER).glob("*.json"))]
    models = {name: files.sha256(work.run / f"{name}.onnx") for name in MODELS}
    return [document for document in found if document["models"] == models]


def hashes(run: Path) -> dict[str, str]:
    """What the report depends on beside the stages' files."""
    return {path.name: files.sha256(path) for path in sorted((run / FOLDER).glob("*.json"))}
