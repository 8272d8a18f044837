"""Draw what `accuracy.py`, `correlation.py` and `joint.py` found, for the README and docs/criteria.md.

python benchmarks/figures.py
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, note

DOCS = RESULTS.parent.parent / "docs"
COLOURS = {
    "compress taylor": "C0",
    "compress logits": "C3",
    "compress taylor, rank importance": "C5",
    "compress logits, rank importance": "C6",
    "compress magnitude": "C2",
    "compress random": "0.6",
    "torch-pruning 1.6.1 taylor": "C1",
    "torch-pruning 1.6.1 magnitude": "C4",
}
SAMPLED = {
    "the truth": "k",
    "logits, all classes": "C1",
    "logits": "C3",
    "taylor": "C0",
    "taylor per example": "C2",
    "taylor second order": "C4",
}


def accuracy(rows: list[dict[str, Any]]) -> Any:
    """Accuracy after fine-tuning against the share of MACs left: mean and range over the seeds."""
    figure, (whole, last) = _axes(1, 2, (9, 3.8))
    for axes, key in ((whole, "accuracy"), (last, "before")):
        for name, colour in COLOURS.items():
            own = [row for row in rows if f"{row['tool']} {row['criterion']}" == name]
            if not own:
                continue
            targets = sorted({row["target"] for row in own})
            at = [[row for row in own if row["target"] == target] for target in targets]
            x = [statistics.mean(row["macs_ratio"] for row in runs) for runs in at]
            y = [[row[key] for row in runs] for runs in at]
            middle = [statistics.mean(values) for values in y]
            axes.plot(x, middle, "o-", color=colour, label=name, markersize=3)
            axes.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=colour, alpha=0.15)
        axes.set(xlabel="share of the MACs left", ylabel="top-1 on 10,000 test images")
        axes.invert_xaxis()
    whole.set_title("after fine-tuning")
    last.set_title("right after pruning")
    whole.legend(fontsize=7, frameon=False, loc="lower left")
    return figure


def correlation(rows: list[dict[str, Any]]) -> Any:
    """Spearman with the truth against the number of images, a panel per network."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = _axes(1, len(models), (1.5 + 3.2 * len(models), 3.4))
    for axes, model in zip(panels, models, strict=True):
        for name, colour in SAMPLED.items():
            own = [r for r in rows if (r["model"], r["criterion"]) == (model, name) and "minibatches" in r]
            axes.semilogx(
                [r["images"] for r in own], [r["spearman"] for r in own], "-", color=colour, label=name
            )
        axes.set(xlabel="images", title=model, ylim=(0, 1.02))
    panels[0].set_ylabel("Spearman with the truth, all units")
    panels[0].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def joint(rows: list[dict[str, Any]]) -> Any:
    """Accuracy against the share of units removed, re-scored, without fine-tuning."""
    models = list(dict.fromkeys(row["model"] for row in rows if "accuracy" in row))
    figure, panels = _axes(1, len(models), (1.5 + 3.2 * len(models), 3.4))
    for axes, model in zip(panels, models, strict=True):
        own = [row for row in rows if row["model"] == model and "accuracy" in row]
        for number, name in enumerate(dict.fromkeys(row["criterion"] for row in own)):
            runs = [row["accuracy"] for row in own if row["criterion"] == name]
            shares = list(runs[0])
            y = [statistics.mean(run[share] for run in runs) for share in shares]
            axes.plot([float(s) for s in shares], y, "o-", color=f"C{number}", label=name, markersize=3)
        axes.set(xlabel="share of the units removed", title=model)
    panels[0].set_ylabel("top-1 on 2,000 test images")
    panels[0].legend(fontsize=7, frameon=False, loc="lower left")
    return figure


def _axes(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    drawings: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
        "accuracy": accuracy,
        "correlation": correlation,
        "joint": joint,
    }
    for name, draw in drawings.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            note(f"{name}: not measured yet")
            continue
        draw(json.loads(path.read_text())["rows"]).savefig(DOCS / f"{name}.png", dpi=130)
        note(f"docs/{name}.png")


if __name__ == "__main__":
    main()
