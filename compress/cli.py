"""The command line: ``compress COMMAND``. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from compress.cli_inspect import CONFIG_ENDINGS, check_picture, show_latency, show_loss, without_data
from compress.cli_options import (
    DEFAULT_CONFIG,
    config_argument,
    load,
    run_options,
    set_option,
    verdict_options,
)
from compress.cli_run import bench_for, bring, convert_for, pipeline, verdict
from compress.command import Answer, Common, Program
from compress.console import Screen, document
from compress.errors import escape
from compress.launch import launched
from compress.recipes import RECIPES
from compress.stages import STAGES

SECTIONS = {
    "Start": ("init", "doctor", "inspect", "plan", "study"),
    "Everything at once": ("run",),
    "One stage (those before it must be done)": STAGES,
    "Results": ("compare", "verify", "release"),
    "Tools": ("schema", "completion"),
}


@click.group(
    cls=Program,
    sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Begin with: compress init && compress run",
)
@click.version_option(package_name="compress-release", prog_name="compress", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, /, **given: Any) -> None:
    """From a trained model to a smaller one that is measured, judged and ready to ship."""
    context.obj = (list(context.obj or ()), Common.take(given))


# -- commands -----------------------------------------------------------------------------------------


@cli.answering("init")
@click.argument("path", default=DEFAULT_CONFIG, type=click.Path())
@click.option("--template", type=click.Choice(["mnist", "cifar10", "imagefolder"]), default="mnist",
              show_default=True, help="What to start from.")  # fmt: skip
@click.option("--recipe", type=click.Choice(list(RECIPES)), help="Prune and fine-tune with these values.")
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
def init(screen: Screen, path: str, template: str, recipe: str | None, force: bool) -> Answer:
    """Write a commented config file to start from."""
    from compress.files import write_text
    from compress.starters import STARTERS, starter_text

    if os.path.lexists(path) and not force:
        raise click.UsageError(f"{path} is there already; give another name, or --force to overwrite it")
    write_text(path, starter_text(template, recipe))
    starter = STARTERS[template]
    config = "" if path == DEFAULT_CONFIG else f" {shlex.quote(path)}"
    said = f"wrote {path}: {starter.about}\nnext: {starter.next}{config}\n"
    return Answer({"path": path, "template": template, "recipe": recipe}, text=said)


@cli.answering("doctor")
def doctor(screen: Screen) -> Answer:
    """Look at what this machine can do, and how to mend what it cannot."""
    from compress import doctor as checks
    from compress.show import show_checks

    found = checks.examine()
    code = checks.exit_code(found)
    return Answer(checks.as_dict(found), lambda screen: show_checks(screen.out, found), exit_code=code)


def _shape(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of sizes such as 3,224,224")
    return [int(part) for part in parts]


@cli.answering("inspect")
@click.argument("subject", default=DEFAULT_CONFIG, metavar="[CONFIG|MODEL]")
@click.option("--input-shape", callback=_shape, metavar="C,H,W", help="One input of MODEL, without the "
              "batch; 3,224,224 if not given.")  # fmt: skip
@click.option("--weights", help="A file with MODEL's weights, or a name such as DEFAULT.")
@click.option("--classes", type=click.IntRange(1), help="MODEL's outputs (num_classes=N for its function).")
@click.option("--sensitivity", is_flag=True, help="Show instead what the loss becomes when the least "
              "important channels of one layer are left out (takes a CONFIG).")  # fmt: skip
@click.option("--images", type=click.IntRange(1), help="With --sensitivity: use so many validation images at "
              "most; 500 if not given.")  # fmt: skip
@click.option("--target", is_flag=False, flag_value="", metavar="[NAME]", help="Show instead what can be had "
              "at which latency: on the config's target, or on NAME.")  # fmt: skip
@click.option("--plot", type=click.Path(), metavar="FILE", help="With --sensitivity or --target: draw it "
              "(.png, .svg, .pdf).")  # fmt: skip
@set_option
def inspect(
    screen: Screen, subject: str, input_shape: list[int] | None, weights: str | None, classes: int | None,
    sensitivity: bool, images: int | None, target: str | None, plot: str | None, overrides: tuple[str, ...],
) -> Answer:  # fmt: skip
    """Show what can be removed from a model, what cannot and why.

    MODEL is torchvision:resnet18, timm:NAME, package.module:function or file.pt2.
    """
    from compress.show import show_inspect

    is_config = subject.endswith(CONFIG_ENDINGS)
    if is_config and (input_shape or weights or classes):
        raise click.UsageError("--input-shape, --weights and --classes go with a MODEL, not a config")
    if overrides and not is_config:
        raise click.UsageError("--set changes a config, and a MODEL has none")
    if not sensitivity and images:
        raise click.UsageError("--images goes with --sensitivity")
    if sensitivity and target is not None:
        raise click.UsageError("give one of --sensitivity and --target")
    if plot is not None and not sensitivity and target is None:
        raise click.UsageError("--plot goes with --sensitivity or --target")
    if sensitivity and not is_config:
        raise click.UsageError(f"--sensitivity measures on data: give a config, not {subject}")
    if target is not None and target.endswith(CONFIG_ENDINGS):
        fix = f"the config goes first: compress inspect {target} --target"
        raise click.UsageError(f"--target takes the name of a target; {fix}")
    check_picture(plot)
    if is_config:
        loaded, folder = load(subject, overrides)
    else:
        loaded, folder = without_data(subject, input_shape, weights, classes), Path()
    if sensitivity:
        return show_loss(screen, loaded, folder, images or 500, plot)
    if target is not None:
        return show_latency(screen, loaded, folder, target, plot)
    with screen.events("loading torch and the model"):
        from compress import pipeline

        found = pipeline.look(loaded, folder)
    return Answer(found, lambda screen: show_inspect(screen.out, found))


@cli.answering("plan")
@config_argument
@set_option
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="Write the plan, as JSON, to a file.")
def plan(screen: Screen, config: str, overrides: tuple[str, ...], output: str | None) -> Answer:
    """Show what would be removed, without training.

    Scores the model once as it is. Nothing is written but FILE.
    """
    from compress.files import write_json
    from compress.show import show_plan

    loaded, folder = load(config, overrides)
    with screen.events("loading torch, the model and the data") as events:
        from compress import pipeline

        found = pipeline.plan(loaded, folder, events=events)
    if output is not None:
        write_json(output, found["plan"])
    return Answer(found, lambda screen: show_plan(screen.out, found))


@cli.answering("study")
@config_argument
@set_option
@click.option("--images", type=click.IntRange(3), default=1000, show_default=True, help="Test images to use.")
@click.option("--batch", type=click.IntRange(2), default=50, show_default=True, help="Images of a minibatch.")
@click.option("--units", type=click.IntRange(3), metavar="N", help="Leave out N random units only; all if "
              "not given.")  # fmt: skip
@click.option("--plot", type=click.Path(), metavar="FILE", help="Draw scores against the truth (.png, .svg, "
              ".pdf).")  # fmt: skip
def study(
    screen: Screen, config: str, overrides: tuple[str, ...], images: int, batch: int, units: int | None,
    plot: str | None,
) -> Answer:  # fmt: skip
    """Show whether the scores tell the truth.

    Leaves each unit of the model out, one at a time, and compares what that does to the loss with every
    criterion. Takes a forward pass over the images for each unit.
    """
    from compress.show import show_study

    check_picture(plot)
    loaded, folder = load(config, overrides)
    with screen.events("loading torch, the model and the data") as events:
        from compress import pipeline

        found = pipeline.study(loaded, folder, images=images, batch=batch, units=units, events=events)
    if plot is not None:
        from deploy.charts import draw_study

        draw_study(found, Path(plot))
    return Answer(found, lambda screen: show_study(screen.out, found))


@cli.answering("run")
@config_argument
@click.option("--until", type=click.Choice(STAGES), metavar="STAGE", help="Stop after this stage.")
@click.option("--from", "start", type=click.Choice(STAGES), metavar="STAGE", help="Do this stage and all "
              "after it again.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be done, change nothing.")
@click.option("--fresh", is_flag=True, help="Start over: forget what was done before.")
@run_options
@verdict_options
def run(
    screen: Screen, config: str, until: str | None, start: str | None, dry_run: bool, fresh: bool,
    overrides: tuple[str, ...], out: str | None, **given: Any,
) -> Answer:  # fmt: skip
    """Do all of it: train, prune, finetune, export, convert, bench, report, gate.

    What is done already, with the same config, is not done again; an interrupted run goes on where it was.
    With --from, what is before that stage is taken as it is, also from another machine.
    """
    if until and start and STAGES.index(start) > STAGES.index(until):
        raise click.UsageError(f"--from {start} comes after --until {until}")
    how = {"until": until, "start": start, "dry_run": dry_run, "fresh": fresh}
    return verdict(screen, config, overrides, out, given, **how)


STAGE_HELP = {
    "train": "Build the model, train it if the config says so, and measure it.",
    "prune": "Remove channels until the target is met.",
    "finetune": "Train the smaller model.",
    "export": "Write both models as ONNX and compare each with PyTorch.",
    "convert": "Write both models in other precisions, if any are asked for.",
    "bench": "Measure the latency of both models, in pairs.",
    "report": "Judge the gates and write the report.",
    "gate": "Exit with 5 unless every gate passes.",
}


OPTIONS: dict[str, Callable[[Any], Any]] = {
    "convert": click.option("--target", metavar="NAME", help="Make what `bench --target NAME` needs and "
                            "the run has not."),
    "bench": click.option("--target", metavar="NAME", help="Measure for this target, beside the config's "
                          "own: a name, NAME-int8 and the like, or a .toml file."),
    "report": click.option("--bench", "documents", metavar="FILE", multiple=True, type=click.Path(),
                           help="Bring in what `compress bench --target NAME --json` printed elsewhere."),
    "gate": verdict_options,
}  # fmt: skip


def _stage_command(stage: str) -> click.Command:
    """The command that does one stage; those before it must be done."""

    def only(
        screen: Screen, config: str, overrides: tuple[str, ...], out: str | None, **given: Any
    ) -> Answer:
        if given.get("target"):
            other = {"convert": convert_for, "bench": bench_for}[stage]
            return other(screen, config, overrides, out, given["target"])
        if given.get("documents"):
            bring(config, overrides, out, given["documents"])
        if stage == "gate":
            return verdict(screen, config, overrides, out, given, only=stage)
        return pipeline(screen, config, overrides, out, only=stage)

    function = OPTIONS.get(stage, lambda command: command)(only)
    only.__doc__ = f"{STAGE_HELP[stage]}\n\nThe stages before it must be done."
    return cli.answering(stage, short_help=STAGE_HELP[stage])(config_argument(run_options(function)))


for _stage in STAGES:
    _stage_command(_stage)


@cli.answering("compare")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True,
              help="Batch size; may be repeated.")  # fmt: skip
@click.option("--repeats", type=click.IntRange(3), default=10, show_default=True, help="Interleaved pairs.")
@click.option("--seconds", type=click.FloatRange(0, 3600, min_open=True), default=1.0, show_default=True,
              help="Least time per model and batch size.")  # fmt: skip
@click.option("--tolerance", type=click.FloatRange(0, min_open=True), default=1e-4, show_default=True,
              help="Largest relative error of the outputs.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads.")
def compare(
    screen: Screen, a: str, b: str, batches: tuple[int, ...], repeats: int, seconds: float,
    tolerance: float, threads: int,
) -> Answer:  # fmt: skip
    """Compare two models: outputs, size and speed. Exits with 5 when the outputs differ.

    A and B are .onnx, .pt2, .graph.json or .engine files, or the folders of runs. An engine needs its GPU.
    """
    from compress.show import show_compare

    with screen.events("loading torch") as events:
        from compress import pipeline

        found = pipeline.compare(
            Path(a), Path(b), batches=batches, repeats=repeats, seconds=seconds, tolerance=tolerance,
            threads=threads, events=events,
        )  # fmt: skip
    code = 0 if found["passed"] else 5
    return Answer(found, lambda screen: show_compare(screen.out, found), exit_code=code)


@cli.answering("verify")
@click.argument("folder", type=click.Path())
def verify(screen: Screen, folder: str) -> Answer:
    """Check that every file of a run, or of a release, is what was written. Exits with 8 when one is not."""
    from compress.handover import verify as check
    from compress.show import show_problems

    found = check(Path(folder))
    value = {"run": folder, "problems": [asdict(problem) for problem in found]}
    code = 8 if found else 0
    return Answer(value, lambda screen: show_problems(screen.out, found, Path(folder)), exit_code=code)


@cli.answering("release")
@click.argument("run", type=click.Path())
@click.option("-o", "--out", "folder", type=click.Path(), metavar="FOLDER", required=True, help="Where to.")
@click.option(
    "--name", default="", help="What the model is called there; by its name in the config if not given."
)
@click.option("--force", is_flag=True, help="Hand it over without a passing verdict; its model card says so.")
def release(screen: Screen, run: str, folder: str, name: str, force: bool) -> Answer:
    """Hand over a finished run as a folder that others can serve. Exits with 5 unless its verdict is a pass.

    FOLDER gets the ONNX file, engines, a Triton model repository, a model card and checksums.
    """
    from compress.handover import hand_over
    from compress.show import verdict_line

    with screen.events("reading the run"):
        found = hand_over(Path(run), Path(folder), name=name, force=force)
    said = f"handed over to {folder}: {len(found.paths)} files; describe the model's use in its README.md"
    value = {"folder": folder, "files": found.paths, "verdict": found.verdict, "forced": found.forced}
    return Answer(value, lambda screen: verdict_line(screen.out, found.verdict, said))


@cli.answering("schema")
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="Write it to a file.")
def schema(screen: Screen, output: str | None) -> Answer:
    """Print the JSON Schema of the config file, for editors."""
    from compress.config import json_schema
    from compress.files import dump_json, write_json

    found = json_schema()
    if output is None:
        return Answer(found, text=dump_json(found))
    write_json(output, found)
    return Answer(found, text=f"wrote {output}\n")


@cli.answering("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(screen: Screen, shell: str) -> Answer:
    """Print the script that completes commands and options in SHELL.

    For bash: eval "$(compress completion bash)" in ~/.bashrc.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # the three are click's own
    script = kind(cli, {}, "compress", "_COMPRESS_COMPLETE").source()
    return Answer({"shell": shell, "script": script}, text=script + "\n")


# -- entry --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(args=given, obj=given, prog_name="compress", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _usage(error, "--json" in given)
    except (click.Abort, KeyboardInterrupt):
        return 130
    return code if isinstance(code, int) else 0


def _usage(error: click.ClickException, as_json: bool) -> int:
    """One line for what was typed wrongly, and exit code 2."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "compress"
    what, fix = error.format_message().rstrip("."), f"see {path} --help"
    if launched().rank:
        return error.exit_code  # the first of several processes says it
    click.echo(f"error: {escape(what)}; {fix}", err=True)
    if as_json:
        facts = {"what": what, "where": "", "fix": fix}
        click.echo(document(path.partition(" ")[2], error.exit_code, None, facts), nl=False)
    return error.exit_code
