"""The bench stage, and the same measurement for other targets, here or on other machines.

One document per target: what was measured (by sha256), on which machine, every latency and speed-up.
`bench.json` is that of the config's target; those of others lie in the run's folder `targets/`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from compress import aim, files, profiling, variants
from compress.config import BenchConfig
from compress.errors import ConfigError, IntegrityError, Interrupted
from compress.opening import Opener
from compress.schema import EngineConfig
from compress.steps import Done, Work, finite
from compress.variants import MODELS
from deploy import targets
from deploy.runners import ENGINE_KINDS

SCHEMA_VERSION = 1
FOLDER = "targets"
TRIED = "tf32"  # by `precision: auto`, where an engine has it


def bench_stage(work: Work) -> Done:
    """Time the dense network against the original on the config's target."""
    document = measure(work)
    detail = ", ".join(f"{r['runner']} batch {r['batch']}: {r['ratio']:.2f}x" for r in document["speedup"])
    engines = [f"{row['file']}{more}" for row in document["engines"] for more in ("", ".json")]
    return Done([*engines, work.write("bench.json", document)], detail)


def measure(work: Work) -> dict[str, Any]:
    """The document of the config's target: both models, interleaved, on every runner and batch size.

    In another precision than fp32 the original in fp32 takes its turns too: `speedup` is what pruning gives
    in that precision, `overall` what both give.
    """
    from deploy import machine

    bench, opener = work.config.bench, Opener(work)
    kinds, batches = list(bench.runners or []), list(bench.batches or [])
    if torch.cuda.is_available() and "torch_cuda" not in kinds:
        kinds.append("torch_cuda")
    choice = _choose(opener) if bench.precision == "auto" else None
    precision = str(bench.precision) if choice is None else choice["name"]
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "target": _target(work, precision),
        "models": _hashes_of(work.run),
        "machine": machine.describe(),
        "choice": choice,
        "variants": opener.variants,
        "engines": opener.engines,
        "latency": [],
        "speedup": [],
        "overall": [],
        "streams": [],
    }
    for number, (kind, batch) in enumerate(itertools.product(kinds, batches)):
        _add(document, opener, kind, batch, precision, (number, len(kinds) * len(batches)))
    if bench.streams is not None:
        gpus = [kind for kind in kinds if kind not in aim.ON_CPU]
        document["streams"] = _streams(opener, gpus, precision)
    document["profile"] = _profile(opener, document, precision)
    return document


def _streams(opener: Opener, kinds: Sequence[str], precision: str) -> list[dict[str, Any]]:
    """Throughput of both models with `bench.streams` calls under way at once, after the latencies."""
    bench = opener.work.config.bench
    places = [*itertools.product(kinds, bench.batches or [1], MODELS)]
    found = []
    for number, (kind, batch, model) in enumerate(places):
        opener.work.events.progress(
            "bench", number, len(places), f"{kind}, batch {batch}, {bench.streams} streams"
        )
        _stop_between(opener.work)
        own = "fp32" if kind.startswith("torch") else precision
        found.append({"model": model, "precision": own, **_throughput(opener, kind, batch, model, own)})
    return found


def _throughput(opener: Opener, kind: str, batch: int, model: str, precision: str) -> dict[str, Any]:
    """One row; failure: why it could not be measured, with null for every figure."""
    from deploy import gpu_latency, parity, runners

    work, count = opener.work, opener.work.config.bench.streams or 1
    inputs = parity.normal_inputs(work.shapes, batch, work.config.seed)
    with ExitStack() as opened:
        several = opener.several(opened, kind, model, precision, count)
        if any(runner.stream is None for runner in several):
            why = "the runtime keeps its stream to itself, so its calls cannot overlap"
            nothing = {"calls": None, "seconds": None, "per_s": None, "failure": why}
            return {"runner": kind, "streams": count, "batch": batch, **nothing}
        for runner in several:
            runner.prepare(inputs)
            runners.check_outputs(runner)
        row = asdict(gpu_latency.throughput(several, batch, work.config.bench.seconds))
    return row | {"failure": ""}


def _profile(opener: Opener, document: Mapping[str, Any], precision: str) -> dict[str, Any] | None:
    work, kind = opener.work, aim.target(opener.work.config).runner
    with ExitStack() as opened:
        artifacts: dict[str, Any] = {}
        for name in MODELS:
            runner = opener.open(opened, kind, name, precision) if kind in ENGINE_KINDS else None
            artifacts[name] = (opener.onnx(name, precision, kind), runner)
        return profiling.profile(work, document, artifacts)


def _add(
    document: dict[str, Any], opener: Opener, kind: str, batch: int, precision: str, place: tuple[int, int]
) -> None:
    """Measure one runner at one batch size."""
    from deploy import latency

    own = "fp32" if kind.startswith("torch") else precision
    turns = {name: (name, own) for name in MODELS}
    if own != "fp32":
        turns["original fp32"] = ("original", "fp32")
    with ExitStack() as opened:
        pair = {name: opener.open(opened, kind, *turn) for name, turn in turns.items()}
        found = _timed(opener.work, pair, kind, batch, place)
    for row in found.latency:
        document["latency"].append(finite(row.as_dict()) | {"precision": turns[row.model][1]})
    document["speedup"].append(finite(asdict(found.speedup[0])) | {"precision": own})
    if own != "fp32":
        _, dense, plain = found.latency
        both = latency.speedup(plain.repeats_ms, dense.repeats_ms, runner=kind, batch=batch)
        document["overall"].append(finite(asdict(both)) | {"precision": own})


def _timed(work: Work, pair: Mapping[str, Any], kind: str, batch: int, place: tuple[int, int]) -> Any:
    """Measurements of open runners of one kind that take turns, by name."""
    from deploy import latency

    config = work.config.bench

    def show(done: int, of: int) -> None:
        work.events.progress("bench", place[0] + done / of, place[1], f"{kind}, batch {batch}")
        _stop_between(work)

    return latency.measure(
        pair, work.shapes, batch, config.repeats, config.seconds, seed=work.config.seed, progress=show
    )


def _choose(opener: Opener) -> dict[str, Any]:
    """`precision: auto`: the dense model in every precision there is, on the target's runner."""
    from deploy import precision as precisions
    from deploy.errors import DeployError

    work, config = opener.work, opener.work.config
    kind = aim.target(config).runner
    batch = config.gates.batch or max(config.bench.batches or [1])
    names = ["fp32", *([TRIED] if kind in ENGINE_KINDS else []), *variants.wanted(config)]
    known = {
        row["precision"]: row for row in work.read("convert.json")["variants"] if row["model"] == "dense"
    }
    before = work.read("finetune.json")["accuracy"]
    failures: dict[str, str] = {}
    with ExitStack() as opened:
        able = {}
        for name in names:
            try:
                able[name] = opener.open(opened, kind, "dense", name)
            except DeployError as error:
                failures[name] = error.what
        found = _timed(work, able, kind, batch, (0, 1))
    medians = {row.model: row.median for row in found.latency}
    rows = [
        precisions.Variant(
            name,
            medians.get(name, math.inf),
            _judged(known.get(name), before),
            failures.get(name) or known.get(name, {}).get("failure", ""),
        )
        for name in names
    ]
    tolerated = config.gates.accuracy_drop if config.gates.accuracy_drop is not None else 0.01
    chosen = precisions.choose(rows, tolerated)
    return {"name": chosen.name, "why": chosen.why, "runner": kind, "batch": batch, "median_ms": medians}


def _judged(row: Mapping[str, Any] | None, before: Mapping[str, Any]) -> Any:
    """A variant beside the dense network in fp32, as `deploy.precision` judges it."""
    from deploy.precision import Evaluation

    n = int(before["n"])
    right = round(before["value"] * n)
    if row is None:  # the fp32 file itself
        return Evaluation(n, 0.0, 1.0, right, right)
    if row["failure"]:
        return None
    relative = math.inf if row["relative"] is None else row["relative"]
    return Evaluation(n, relative, row["agreement"], round(row["accuracy"]["value"] * n), right)


def _hashes_of(run: Path) -> dict[str, str]:
    return {name: files.sha256(run / f"{name}.onnx") for name in MODELS}


def _target(work: Work, precision: str) -> dict[str, Any]:
    chosen = aim.target(work.config)
    return {
        "name": chosen.name,
        "description": chosen.description,
        "runner": chosen.runner,
        "precision": precision,
        "gpu": chosen.gpu,
    }


def _stop_between(work: Work) -> None:
    if work.should_stop():
        raise Interrupted("stopped while measuring", "bench", "run the same command again: it measures anew")


# -- other targets ------------------------------------------------------------------------------------


def aimed_at(work: Work, name: str) -> Work:
    """The same run for another target than its config's."""
    own, on_cpu = work.config.bench, targets.load(name).runner in aim.ON_CPU
    streams = None if on_cpu else own.streams
    engine = EngineConfig(buffers=own.engine.buffers)  # how to build is a matter of the target
    bench = BenchConfig(target=name, repeats=own.repeats, seconds=own.seconds, streams=streams, engine=engine)
    # What is measured here is not judged: the gates and the budget are the own target's.
    ungated = dict.fromkeys(("runner", "batch", "speedup", "latency_ms"))
    gates = work.config.gates.model_copy(update=ungated)
    other = aim.aimed(work.config.model_copy(update={"bench": bench, "gates": gates, "budget": None}))
    return replace(work, config=other)


def measure_other(work: Work, name: str) -> dict[str, Any]:
    """Measure for another target than the config's, and keep the document in the run's folder."""
    other = aimed_at(work, name)
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
    answer = document.get("result", {}) if isinstance(document, dict) else {}
    found = answer.get("bench", document) if isinstance(answer, dict) else document
    parts = [found.get(key) for key in ("target", "models", "machine")] if isinstance(found, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or found.get("schema_version") != SCHEMA_VERSION:
        raise IntegrityError("is no measurement", str(path), "give what compress bench --json printed")
    return keep(run, found)


def others(work: Work) -> list[dict[str, Any]]:
    """The documents of other targets that are of this run's models, by name."""
    found = [files.read_json(path) for path in sorted((work.run / FOLDER).glob("*.json"))]
    models = _hashes_of(work.run)
    return [document for document in found if document["models"] == models]


def hashes(run: Path) -> dict[str, str]:
    """What the report depends on beside the stages' files."""
    return {path.name: files.sha256(path) for path in sorted((run / FOLDER).glob("*.json"))}
