"""What ``compress run`` and the commands of the stages do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.cli_options import earlier, load, reproduce
from compress.command import Answer
from compress.console import Screen
from compress.failures import Stopper
from compress.launch import launched


def verdict(
    screen: Screen, config: str, overrides: Sequence[str], out: str | None, given: dict[str, Any], **how: Any
) -> Answer:
    """Run the pipeline as `verdict_options` ask, and write the files they name."""
    from compress.ci import Files

    baseline, tolerate = given.pop("baseline"), given.pop("tolerate")
    wanted = Files(**given)
    with wanted.telling(screen):
        answer = pipeline(screen, config, overrides, out, baseline=(baseline, tolerate), **how)
        if not how.get("dry_run"):
            stages = [(stage["name"], stage["status"], stage["seconds"]) for stage in answer.value["stages"]]
            wanted.judged(answer.value if "verdict" in answer.value else {}, stages)
    return answer


def pipeline(
    screen: Screen, config: str, overrides: Sequence[str], out: str | None,
    baseline: tuple[str | None, Sequence[str]] = (None, ()), **how: Any,
) -> Answer:  # fmt: skip
    """Run the pipeline under `Stopper` and with progress on stderr."""
    loaded, folder = load(config, overrides, out)
    how["earlier"] = earlier(*baseline, folder / loaded.out)
    screen.run = str(folder / loaded.out)
    stopper = Stopper(screen.warn if not launched().rank else lambda text: None)
    with screen.events("loading torch and the data") as events, stopper:
        from compress import pipeline as stages

        if how.get("dry_run"):
            events.verbosity = min(-1, events.verbosity)  # the table says it
        command = reproduce(config, overrides)
        outcome = stages.run(loaded, folder, events=events, should_stop=stopper, command=command, **how)
    show = _run_show(outcome, dry_run=bool(how.get("dry_run")))
    return Answer(_run_value(outcome), show, exit_code=outcome.exit_code)


def _run_value(outcome: Any) -> dict[str, Any]:
    stages = [{"name": name, "status": status, "seconds": s} for name, status, s in outcome.stages]
    names = ("report.html", "report.md", "results.json", "dense.onnx", "dense.pt2")
    paths = {name: str(outcome.run / name) for name in names if (outcome.run / name).is_file()}
    return {**outcome.results, "run": str(outcome.run), "stages": stages, "paths": paths}


def _run_show(outcome: Any, *, dry_run: bool) -> Callable[[Screen], None]:
    from compress import show

    if dry_run:
        return lambda screen: show.show_stages(screen.out, outcome.stages, outcome.run)
    if not outcome.results:
        return lambda screen: show.show_part(screen.out, outcome.stages, outcome.run)
    return lambda screen: show.show_run(
        screen.out, outcome.results, outcome.run, details=screen.verbosity > 0
    )


def bench_for(screen: Screen, config: str, overrides: Sequence[str], out: str | None, target: str) -> Answer:
    """Measure an exported run for another target than its config's."""
    loaded, folder = load(config, overrides, out)
    stopper = Stopper(screen.warn)
    with screen.events("loading torch") as events, stopper:
        from compress import pipeline as stages

        found = stages.bench_for(loaded, folder, target, events=events, should_stop=stopper)

    def show(screen: Screen) -> None:
        for row in found["speedup"]:
            interval = f"{row['low']:.2f} to {row['high']:.2f}"
            where = f"{found['target']['name']}: {row['runner']} {row['precision']}, batch {row['batch']}"
            screen.out.print(f"{where}: {row['ratio']:.2f}x ({interval}), {row['verdict']}", highlight=False)
        for row in found["streams"]:
            where = f"{row['model']}, {row['runner']} {row['precision']}, batch {row['batch']}"
            said = row["failure"] or f"{row['per_s']:,.0f} examples per second"
            screen.out.print(f"{where}, {row['streams']} streams: {said}", highlight=False)

    return Answer({"bench": found}, show)


def convert_for(
    screen: Screen, config: str, overrides: Sequence[str], out: str | None, target: str
) -> Answer:
    """Make the files that another target than the config's needs."""
    loaded, folder = load(config, overrides, out)
    with screen.events("loading torch") as events:
        from compress import pipeline as stages
        from compress.variants import described

        found = stages.convert_for(loaded, folder, target, events=events)
    lines = [*map(described, found)] or [f"{target} runs the fp32 files"]
    return Answer({"variants": found}, text="".join(f"{line}\n" for line in lines))


def bring(config: str, overrides: Sequence[str], out: str | None, documents: Sequence[str]) -> None:
    """Put measurements of other machines into the run's folder."""
    from compress import pipeline as stages

    loaded, folder = load(config, overrides, out)
    stages.bring(loaded, folder, [Path(document) for document in documents])
