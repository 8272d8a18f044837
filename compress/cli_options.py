"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compress.config import Config
    from compress.earlier import Earlier

DEFAULT_CONFIG = "compress.yaml"
Decorator = Callable[[Any], Any]


def config_argument(function: Any) -> Any:
    return click.argument("config", default=DEFAULT_CONFIG, type=click.Path())(function)


def set_option(function: Any) -> Any:
    say = "Change a value of the config for this call, e.g. prune.macs_ratio=0.4; may be repeated."
    return click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help=say)(function)


def run_options(function: Any) -> Any:
    """Where a run works, and with what changes."""
    say = "Work in this folder, not in the config's out."
    return set_option(click.option("-o", "--out", metavar="DIR", type=click.Path(), help=say)(function))


def verdict_options(function: Any) -> Any:
    """What the commands that end with a verdict may hold it against, and write it to."""
    for option in reversed(_VERDICT):
        function = option(function)
    return function


def _file(name: str, say: str) -> Decorator:
    return click.option(name, metavar="FILE", type=click.Path(), help=say)


_VERDICT = (
    click.option("--baseline", metavar="PATH", type=click.Path(), help="Also judge against an earlier "
                 "release: the folder of its run, its release folder or its results.json."),
    click.option("--tolerate", metavar="NAME=SHARE", multiple=True, help="How much worse than the baseline "
                 "it may be: accuracy=0.01 (absolute), latency=0.05, size=0.02 (relative) if not given."),
    _file("--junit", "Write the gates as JUnit XML."),
    _file("--metrics", "Write the figures as OpenMetrics text."),
    _file("--summary", "Write the report as Markdown that fits a job summary."),
    _file("--code-quality", "Write faults of the config as GitLab's Code Quality report."),
    click.option("--annotate", is_flag=True, help="Print faults of the config as GitHub's annotations."),
)  # fmt: skip


def load(config: str, overrides: Sequence[str] = (), out: str | None = None) -> tuple[Config, Path]:
    """The config and its folder, which its relative paths start at; ``out`` starts where the user is."""
    from compress.config import load as read

    folder = Path(config).parent
    if out is not None:
        overrides = [*overrides, f"out={json.dumps(os.path.relpath(out, folder))}"]
    return read(config, overrides), folder


def earlier(baseline: str | None, tolerate: Sequence[str], run: Path) -> Earlier | None:
    """The release that --baseline names."""
    if baseline is None:
        if tolerate:
            raise click.UsageError("--tolerate goes with --baseline")
        return None
    from compress.earlier import read, tolerances

    return read(baseline, tolerances(tolerate), run)


def reproduce(config: str, overrides: Sequence[str]) -> str:
    """The command to put into the report: without folders and without what only changes the talk."""
    changes = [part for item in overrides for part in ("--set", item)]
    return shlex.join(["compress", "run", Path(config).name, *changes])
