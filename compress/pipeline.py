"""A run: stages in order, each skipped when its files are there, committed when they are whole.

A stage's key says what it depends on, in hashes: its part of the config, the files of the stages before it,
the data, and the versions of this tool and of torch. Run again, finished stages are skipped; an
interrupted one goes on from its last checkpoint. `start` and `only` take the stages before as they are, if
config and files fit: so the last stages of a run can be done on another machine, without data and weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress import aim, distributed, files, further, manifest, measuring, preview, variants
from compress.budgeting import brought
from compress.comparison import compare
from compress.config import Config, section_hash
from compress.data import is_user_code
from compress.earlier import Earlier
from compress.errors import ConfigError, Interrupted
from compress.inspection import inspect
from compress.manifest import StageRecord, verify
from compress.measuring import bench_stage
from compress.meter import setting_of
from compress.release import export_stage, gate_stage, report_stage
from compress.stages import STAGES
from compress.steps import Done, Events, Work, finetune_stage, preflight, prune_stage, train_stage
from compress.task import build_task
from compress.trace import Traced
from compress.variants import convert_stage

__all__ = [
    "STAGES",
    "Events",
    "Outcome",
    "bench_for",
    "bring",
    "compare",
    "convert_for",
    "front",
    "inspect",
    "look",
    "plan",
    "run",
    "sensitivity",
]
__all__ += ["study", "verify"]


STAGE_FUNCTIONS: dict[str, Callable[[Work], Done]] = {
    "train": train_stage,
    "prune": prune_stage,
    "finetune": finetune_stage,
    "export": export_stage,
    "convert": convert_stage,
    "bench": bench_stage,
    "report": report_stage,
    "gate": gate_stage,
}
SECTIONS: dict[str, tuple[str, ...]] = {
    "train": ("model", "data", "train", "seed", "device"),
    "prune": ("prune", "budget", "data", "seed", "device"),
    "finetune": ("finetune", "data", "seed", "device"),
    "export": ("export", "seed"),
    "convert": ("export",),
    "bench": ("bench", "seed"),
    "report": ("gates", "recipe"),
    "gate": ("gates",),
}
"""Parts of the config that each stage reads; what else it depends on are the files of the stages before."""
SHARED = ("train", "prune", "finetune")
"""Stages that several processes do together; of the others one does all."""
SEEN_SECONDS = 90.0
NO_DATA = "none"
"""What `data.name` is for a model that is looked at without data."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. exit_code: 0, or 5 when a gate did not pass. stages: (name, status, seconds)."""

    exit_code: int
    run: Path
    results: dict[str, Any]
    stages: tuple[tuple[str, str, float], ...]


def run(
    config: Config,
    folder: Path,
    *,
    events: Events,
    until: str | None = None,
    start: str | None = None,
    only: str | None = None,
    dry_run: bool = False,
    fresh: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    command: str = "",
    earlier: Earlier | None = None,
) -> Outcome:
    """Run the stages of `config`; relative paths in it start at `folder`.

    until: the last stage to run. start: this stage and all later ones are done again. only: this stage
    alone; the ones before it must be done. dry_run: say what would happen, change nothing.
    fresh: forget what an earlier run left. earlier: the release to hold this one against. Of several
    processes (see `compress.distributed`) all call this; the first alone writes, exports, measures and
    judges. Raises CompressError or DeployError; LockedError when another run works in the same folder.
    """
    place, config = folder / config.out, aim.aimed(config)
    work = Work(config, folder, place, events, should_stop, command, earlier=earlier)
    preflight(work, _to_do(place, until, start, only, fresh))
    if dry_run:
        return Outcome(0, place, {}, _walk(work, until, start, only, dry=True))
    with files.lock(place) if distributed.is_main() else nullcontext():
        if distributed.is_main():
            if fresh:
                _forget(place)
            files.clean(place)
        distributed.barrier()
        done = _walk(work, until, start, only, dry=False)
        results = _results(place, done)
    failed = results.get("verdict", "no gates") not in ("pass", "no gates")
    return Outcome(5 if failed else 0, place, results, done)


def _to_do(run: Path, until: str | None, start: str | None, only: str | None, fresh: bool) -> Sequence[str]:
    """The stages of a run, as far as one can tell before; what measures latency and is on file is not done
    again."""
    first, last = only or start or STAGES[0], only or until or STAGES[-1]
    stages = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    if fresh or only or start or not run.exists():
        return stages
    on_file = {"prune", "bench"} & {*manifest.load(run)}
    return [name for name in stages if name not in on_file]


def bench_for(
    config: Config,
    folder: Path,
    target: str,
    *,
    events: Events,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure an exported run for another target than its own, for the report; the document."""
    config = aim.aimed(config)
    work = Work(config, folder, folder / config.out, events, should_stop)
    with files.lock(work.run):
        return measuring.measure_other(work, target)


def convert_for(config: Config, folder: Path, target: str, *, events: Events) -> list[dict[str, Any]]:
    """Make the files that another target needs of an exported run, where the data are; their rows."""
    config = aim.aimed(config)
    work = Work(config, folder, folder / config.out, events, lambda: False)
    with files.lock(work.run):
        return further.prepare(measuring.aimed_at(work, target))


def bring(config: Config, folder: Path, documents: Sequence[Path]) -> None:
    """Put what other machines measured of this run's models beside it, for the report."""
    run = folder / config.out
    with files.lock(run):
        for path in documents:
            measuring.bring(run, path)


def plan(config: Config, folder: Path, *, events: Events) -> dict[str, Any]:
    """What a run would remove: on the trained model if the train stage is done, else as it was built."""
    work = Work(aim.aimed(config), folder, folder / config.out, events, lambda: False)
    preflight(work)
    return preview.plan(work, _trained(work))


def _trained(work: Work) -> Traced | None:
    """The model that the train stage left, if it is done."""
    if work.run.exists() and manifest.is_done(work.run, "train", _key(work, "train")):
        return work.traced("original")
    if work.config.train is not None and work.config.train.epochs:
        what = "the model is not trained yet, so its scores mean little; compress run --until train first"
        work.events.warn(what)
    return None


def look(config: Config, folder: Path) -> dict[str, Any]:
    """`inspect` for a whole config: where its data are user code, they say what the model is called with."""
    example = None
    if is_user_code(config.data.name, folder):
        example = build_task(config.data, config.model, config.seed, folder).example
    return inspect(config.model, folder, prune=config.prune, example=example)


def study(
    config: Config, folder: Path, *, images: int, batch: int, units: int | None, events: Events
) -> dict[str, Any]:
    """Whether the criteria tell the truth about this model, on its test images. Nothing is written."""
    work = Work(config, folder, folder / config.out, events, lambda: False)
    return preview.study(work, _trained(work), images, batch, units)


def sensitivity(config: Config, folder: Path, *, images: int, events: Events) -> dict[str, Any]:
    """What each class of units is worth, on at most `images` validation examples. Nothing is written."""
    work = Work(config, folder, folder / config.out, events, lambda: False)
    return preview.sensitivity(work, _trained(work), images)


def front(config: Config, folder: Path, target: str, *, events: Events) -> dict[str, Any]:
    """What latency costs in importance on a target, "" for the config's; by weight magnitude without data.

    Nothing is written but the table of latencies.
    """
    config = aim.aimed(config)
    at = aim.place(config, target)
    elsewhere = brought(config, at, folder)
    aim.check_place(at, "--target", here=elsewhere is None, when="there", do="look")
    if elsewhere is not None and config.budget is not None:
        name = Path(str(config.budget.table)).name
        events.warn(f"{name} was measured on {elsewhere.setting.hardware}; nothing is measured here")
    work = Work(config, folder, folder / config.out, events, lambda: False)
    if config.data.name == NO_DATA:
        return preview.front_of_weights(work, target, elsewhere)
    return preview.front(work, _trained(work), target, elsewhere)


def _results(place: Path, done: tuple[tuple[str, str, float], ...]) -> dict[str, Any]:
    """results.json where this call came to the report, with the gate's verdict where it came to the gate."""
    came_to = {name for name, status, _ in done if status in ("done", "cached")}
    if not {"report", "gate"} & came_to:
        return {}
    found: dict[str, Any] = files.read_json(place / "results.json")
    return found | (files.read_json(place / "gate.json") if "gate" in came_to else {})


def _forget(place: Path) -> None:
    (place / manifest.MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(place / "checkpoints", ignore_errors=True)


def _walk(work: Work, until: str | None, start: str | None, only: str | None, *, dry: bool) -> Any:
    """Every stage in turn: (name, status, seconds)."""
    last = STAGES.index(only or until or STAGES[-1])
    again = STAGES.index(only or start or STAGES[-1]) if only or start else len(STAGES)
    report: list[tuple[str, str, float]] = []
    stale = False
    for number, name in enumerate(STAGES[: last + 1]):
        before = manifest.load(work.run).get(name) if work.run.exists() else None
        taken = before if (only or start) and number < again else None
        key = "" if stale and dry else _key(work, name, taken)
        distributed.agree(key, f"what stage {name} starts from")
        maybe = distributed.is_main() and not stale and number < again
        if distributed.any_of(maybe and manifest.is_done(work.run, name, key)):
            if taken is not None:
                _tell_versions(work, taken)
            work.events.stage(name, "cached")
            report.append((name, "cached", 0.0))
            continue
        if only and name != only:
            raise ConfigError(
                f"stage {name} has not been run with this config and these --set values",
                str(work.run),
                f"run it first: compress run --until {name}, with the same ones",
            )
        if not stale and before is not None and number < again:
            work.events.note(f"stage {name} is done again: {_changed(before, key)}")
        stale = True
        if dry:
            work.events.stage(name, "skipped", "would run")
            report.append((name, "would run", 0.0))
        else:
            report.append((name, "done", _do(work, name, key)))
    return tuple(report)


def _do(work: Work, name: str, key: str) -> float:
    """Run one stage and commit it; its checkpoints are removed then."""
    work.events.stage(name, "start")
    if name == "prune":
        _doubt(work)
    started, clock = datetime.now(UTC), time.monotonic()
    if distributed.any_of(work.should_stop()):
        raise Interrupted(
            f"stopped before stage {name}", "run", "run the same command again to go on from there"
        )
    try:
        made = STAGE_FUNCTIONS[name](work) if name in SHARED or distributed.is_main() else Done([])
    except Interrupted:
        work.events.stage(name, "stopped")
        raise
    seconds = time.monotonic() - clock
    if distributed.is_main():
        when = started.strftime("%Y-%m-%dT%H:%M:%SZ")
        outputs = manifest.facts(work.run, made.outputs)
        manifest.commit(work.run, StageRecord(name, key, outputs, _versions(), when, seconds))
        shutil.rmtree(work.run / "checkpoints" / name, ignore_errors=True)
    distributed.barrier()
    _await_commit(work, name, key)
    work.events.stage(name, "done", made.detail)
    return seconds


def _doubt(work: Work) -> None:
    """Warn where the original's accuracy will say nothing of what pruning loses."""
    from deploy import gate

    found = work.read("train.json")["accuracy"]
    why = gate.untold(found | {"before": found["value"]})
    if why:
        work.events.warn(why)


def _await_commit(work: Work, name: str, key: str) -> None:
    """Wait until this process too sees what process 0 wrote: network file systems are late."""
    until = time.monotonic() + SEEN_SECONDS
    while not distributed.is_main():
        found = manifest.load(work.run).get(name) if work.run.exists() else None
        if found is not None and found.key == key:
            return
        if time.monotonic() > until:
            what = f"process {distributed.rank()} does not see what process 0 writes"
            raise ConfigError(what, str(work.run), "use a folder on a disk that all machines share")
        time.sleep(0.2)


def _key(work: Work, name: str, taken: StageRecord | None = None) -> str:
    """Everything the stage depends on, as JSON. taken: the stage done before, maybe elsewhere; what only the
    machine that did it can tell (its versions, the data) is believed."""
    before = manifest.load(work.run) if work.run.exists() else {}
    earlier = STAGES[: STAGES.index(name)]
    files_before = {s: {n: f["sha256"] for n, f in before[s].outputs.items()} for s in earlier if s in before}
    known = {} if taken is None else _parts(taken)
    facts = {
        "stage": name,
        "config": section_hash(work.config, SECTIONS[name]),
        "inputs": hashlib.sha256(json.dumps(files_before, sort_keys=True).encode()).hexdigest(),
    }
    for part, find in _around(work, name).items():
        facts[part] = known[part] if part in known else find()
    return json.dumps(facts, sort_keys=True)


def _around(work: Work, name: str) -> dict[str, Callable[[], Any]]:
    """What else the stage depends on than its config and the files before it."""
    found: dict[str, Callable[[], Any]] = {"versions": _releases}
    if name in SHARED or (name == "convert" and variants.wanted(work.config)):
        found["data"] = lambda: work.data.fingerprint
    if name == "convert":
        found["precisions"] = lambda: [*variants.wanted(work.config), aim.target(work.config).runner]
    if name == "train":
        found["weights"] = lambda: _weights_hash(work)
    if name == "prune":
        found["align"] = lambda: work.align
        if work.config.budget is not None and work.config.budget.is_measured:
            found["place"] = lambda: asdict(setting_of(aim.place(work.config)))
    if name == "report":
        found["targets"] = lambda: measuring.hashes(work.run)
    if name in ("report", "gate"):
        found["baseline"] = lambda: work.earlier and work.earlier.as_dict()
    return found


def _parts(record: StageRecord) -> dict[str, Any]:
    """What a stage depended on when it was done."""
    try:
        found = json.loads(record.key)
    except ValueError:  # a release of this tool that hashed it all
        return {}
    return found if isinstance(found, dict) else {}


WHAT = {"config": "its part of the config", "inputs": "a file of a stage before it", "data": "the data"}
WHAT |= {"weights": "the model's weights", "align": "the alignment", "baseline": "the baseline"}
WHAT |= {"place": "where latency is measured"}
WHAT |= {"targets": "what other targets measured", "precisions": "the precisions"}


def _changed(record: StageRecord, key: str) -> str:
    """Why a stage that was done has to be done again."""
    if not key:
        return "one before it is"
    then, now = _parts(record), json.loads(key)
    if then == now:
        return "a file of it is missing"
    said = [f"{what} changed" for part, what in WHAT.items() if then.get(part) != now.get(part)]
    return ", ".join([*said, *_other_versions(then, now["versions"])])


def _tell_versions(work: Work, record: StageRecord) -> None:
    other = _other_versions(_parts(record), _releases())
    if other:
        work.events.note(f"stage {record.stage} was done elsewhere and is kept: {', '.join(other)}")


def _other_versions(then: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    found = then.get("versions")
    old = found if isinstance(found, dict) else {}
    return [f"{name} was {old.get(name)}, here it is {v}" for name, v in now.items() if old.get(name) != v]


def _weights_hash(work: Work) -> str:
    """sha256 of the weights file or .pt2, where there is one."""
    names = [n for n in (work.config.model.weights, work.config.model.name) if n]
    paths = [work.folder / n for n in names if (work.folder / n).is_file()]
    return files.sha256(paths[0]) if paths else ""


def _releases() -> dict[str, str]:
    """The same without what a build says of its machine: 2.11.0+cpu and 2.11.0+cu130 are one release."""
    return {name: found.partition("+")[0] for name, found in _versions().items()}


def _versions() -> dict[str, str]:
    found = {}
    for package in ("compress-release", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
