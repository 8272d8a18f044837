"""Taylor pruning of networks that are no classifiers: a generator, a policy, a detector, a segmenter.

    python benchmarks/any_loss.py [generator policy policy_gradient detector segmenter] [--quick]

Each is trained here on real data, pruned through `compress.prune` with the loss of its own task, and
fine-tuned with that loss; so are copies cut to the same MACs by magnitude and at random. A task's
row may be measured again alone. --quick runs tiny versions in seconds and writes no result.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import note

TASKS = ("generator", "policy", "policy_gradient", "detector", "segmenter")
SEEDS = (0, 1, 2)


def measure(task: str, *, quick: bool = False) -> dict[str, Any]:
    """The row of one task."""
    import torch

    from benchmarks.any_loss_harness import experiment

    torch.set_num_threads(1)
    job, training_cpu_s = importlib.import_module(f"benchmarks.any_loss_{task}").job(quick)
    return experiment(job, SEEDS[:1] if quick else SEEDS, training_cpu_s)


def main() -> None:
    from benchmarks.any_loss_harness import merge

    quick = "--quick" in sys.argv
    names = [name for name in sys.argv[1:] if name != "--quick"] or list(TASKS)
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        sys.exit(f"any_loss: no task {unknown[0]!r}; give some of {', '.join(TASKS)}")
    for name in names:
        row = measure(name, quick=quick)
        if not quick:
            merge("any_loss", [row])
        note(f"{name}: {row['all_runs_cpu_s'] + row['training_cpu_s']:.0f} CPU s")


if __name__ == "__main__":
    main()
