"""What `compress inspect` measures: the loss without channels, and latency against importance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compress.command import Answer
from compress.console import Screen

if TYPE_CHECKING:
    from compress.config import Config

CONFIG_ENDINGS = (".yaml", ".yml")
PICTURES = (".png", ".svg", ".pdf")


def show_loss(screen: Screen, config: Config, folder: Path, images: int, plot: str | None) -> Answer:
    """The loss when each layer's least important channels are left out."""
    from compress.show_inspect import show_sensitivity

    with screen.events("loading torch, the model and the data") as events:
        from compress import pipeline

        found = pipeline.sensitivity(config, folder, images=images, events=events)
    if plot is not None:
        from deploy.charts import draw_sensitivity

        draw_sensitivity(found, Path(plot))
    return Answer(found, lambda screen: show_sensitivity(screen.out, found))


def show_latency(screen: Screen, config: Config, folder: Path, target: str, plot: str | None) -> Answer:
    """Importance kept against latency on a target, "" for the config's, and what each layer takes of both."""
    from compress.show_inspect import show_front

    with screen.events("loading torch, the model and the data") as events:
        from compress import pipeline

        found = pipeline.front(config, folder, target, events=events)
    if plot is not None:
        from deploy.front_chart import draw_front

        draw_front(found, Path(plot))
    return Answer(found, lambda screen: show_front(screen.out, found))


def check_picture(plot: str | None) -> None:
    """Refuse before any work a file that a drawing cannot be written to."""
    if plot is None:
        return
    if Path(plot).suffix not in PICTURES:
        raise click.BadParameter(f"{plot} does not end in {', '.join(PICTURES)}", param_hint="--plot")
    if not Path(plot).parent.is_dir():
        raise click.BadParameter(f"there is no folder {Path(plot).parent}", param_hint="--plot")


def without_data(name: str, shape: list[int] | None, weights: str | None, classes: int | None) -> Config:
    """A config for a model that is named on the command line; what matters in it is the size of weights,
    and how long one input takes."""
    from compress.config import loads

    model = {
        "name": name,
        "weights": weights,
        "kwargs": {} if classes is None else {"num_classes": classes},
        "input_shape": shape or [3, 224, 224],
    }
    given = {"version": 1, "model": model, "data": {"name": "none"}}
    given |= {"prune": {"criterion": "magnitude"}, "bench": {"batches": [1]}}
    return loads(json.dumps(given), "MODEL")
