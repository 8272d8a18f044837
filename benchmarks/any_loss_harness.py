"""What the four any-loss examples share: prune by three criteria, fine-tune alike, measure, write a row.

An example is a `Job`: a trained model, its batches, its loss, its measure. `experiment` prunes it by
Taylor importance, by weight magnitude and at random to the same share of its MACs, with the same loss,
batches and steps, once per seed, and fine-tunes each the same way: if the loss told Taylor nothing, its
figures would not be better than the others'.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, note, provenance, write

CRITERIA = ("taylor", "magnitude", "random")
Batch = Any


@dataclass(frozen=True)
class Job:
    """A trained model and what its pruning needs.

    batches(number): the batches of epoch `number`, the same whenever they are asked for. quality(model):
    figures by name, `measure` the one that counts. loss: a scalar of (model, batch). prune: options of
    `compress.prune`. facts: what a reader must know, for the row.
    """

    name: str
    model: nn.Module
    example: Tensor
    batches: Callable[[int], Sequence[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    quality: Callable[[nn.Module], dict[str, float]]
    measure: str
    larger_is_better: bool
    prune: dict[str, Any]
    finetune_epochs: int
    finetune_lr: float
    facts: dict[str, Any] = field(default_factory=dict)


def experiment(job: Job, seeds: Sequence[int], training_cpu_s: float) -> dict[str, Any]:
    """One row: the model before, and per criterion and seed directly after pruning and after fine-tuning."""
    started = time.process_time()
    before = job.quality(job.model)
    note(f"{job.name} before: {shown(before)}")
    runs = [run(job, criterion, seed) for seed in seeds for criterion in CRITERIA]
    taylor = [r for r in runs if r["criterion"] == "taylor"]
    return {
        "task": job.name,
        **job.facts,
        "measure": job.measure,
        "larger_is_better": job.larger_is_better,
        "before": before,
        "after_pruning": mean(taylor, "after_pruning"),
        "after_finetuning": mean(taylor, "after_finetuning"),
        "baselines": {
            name: {
                when: mean([r for r in runs if r["criterion"] == name], when)
                for when in ("after_pruning", "after_finetuning")
            }
            for name in CRITERIA[1:]
        },
        "macs": taylor[0]["macs"],
        "macs_ratio": statistics.fmean(r["macs_ratio"] for r in taylor),
        "params_ratio": statistics.fmean(r["params_ratio"] for r in taylor),
        "verified": all(r["verification"]["passed"] for r in runs),
        "prune_options": job.prune,
        "finetune": {"epochs": job.finetune_epochs, "optimizer": "Adam, cosine to 0", "lr": job.finetune_lr},
        "seeds": list(seeds),
        "training_cpu_s": training_cpu_s,
        "pruning_cpu_s": statistics.fmean(r["pruning_cpu_s"] for r in taylor),
        "finetuning_cpu_s": statistics.fmean(r["finetuning_cpu_s"] for r in taylor),
        "all_runs_cpu_s": time.process_time() - started,
        "runs": runs,
    }


def run(job: Job, criterion: str, seed: int) -> dict[str, Any]:
    """Prune by one criterion, measure, fine-tune, measure."""
    import compress

    offset = 10_000 * (seed + 1)  # every seed has batches of its own, the same ones for every criterion
    clock = [time.process_time()]
    dense, result = compress.prune(
        job.model,
        job.example,
        lambda epoch: job.batches(offset + epoch),
        job.loss,
        criterion=criterion,
        seed=seed,
        **job.prune,
    )
    clock.append(time.process_time())
    pruned = job.quality(dense)
    clock.append(time.process_time())
    last_loss = fit(dense, job.batches, job.loss, job.finetune_epochs, job.finetune_lr, offset + 5_000)
    clock.append(time.process_time())
    tuned = job.quality(dense)
    note(f"{job.name} {criterion} seed {seed}: pruned {shown(pruned)} | fine-tuned {shown(tuned)}")
    proof = result.verification
    return {
        "criterion": criterion,
        "seed": seed,
        "reached": result.reached,
        "macs": list(result.macs),
        "params": list(result.params),
        "macs_ratio": result.macs[1] / result.macs[0],
        "params_ratio": result.params[1] / result.params[0],
        "after_pruning": pruned,
        "after_finetuning": tuned,
        "last_loss": last_loss,
        "verification": {
            "relative_error": proof.relative_error,
            "movement": proof.movement,
            "passed": proof.passed,
        },
        "removals": len(result.history),
        "pruning_cpu_s": clock[1] - clock[0],
        "finetuning_cpu_s": clock[3] - clock[2],
        "widths": {layer.name: [layer.before, layer.after] for layer in result.layers},
    }


def fit(
    model: nn.Module,
    batches: Callable[[int], Sequence[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    epochs: int,
    lr: float,
    first: int = 0,
) -> float:
    """Train with Adam, its rate falling to 0 as a cosine; the mean loss of the last epoch.

    Training and fine-tuning are this same loop.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr)
    steps = epochs * len(batches(first))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    for epoch in range(first, first + epochs):
        losses = []
        for batch in batches(epoch):
            model.train()
            value = loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            schedule.step()
            losses.append(float(value.detach()))
    model.eval()
    return statistics.fmean(losses)


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode that takes no gradients: a teacher or a critic."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def mean(runs: Sequence[dict[str, Any]], when: str) -> dict[str, float]:
    """Each figure's mean over the runs."""
    return {key: statistics.fmean(r[when][key] for r in runs) for key in runs[0][when]}


def shown(figures: dict[str, float]) -> str:
    """Figures on one line."""
    return " ".join(f"{key} {value:.4g}" for key, value in figures.items())


def merge(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the result file; rows of tasks that did not run this time stay as they are."""
    made = provenance()
    stamp = {key: made[key] for key in ("date", "commit", "command")}
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {row["task"]: {**row, "measured": stamp} for row in rows}
    kept = {row["task"]: row for row in old} | fresh
    ordered = [kept[task] for task in sorted(kept)]
    write(name, {row["task"]: brief(row) for row in ordered}, ordered)


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """A row in a few figures, for the summary."""
    measure = row["measure"]
    return {
        "measure": measure,
        "before": row["before"][measure],
        "after_pruning": row["after_pruning"][measure],
        "after_finetuning": row["after_finetuning"][measure],
        **{
            f"{name}_after_finetuning": figures["after_finetuning"][measure]
            for name, figures in row["baselines"].items()
        },
        "macs_ratio": row["macs_ratio"],
        "params_ratio": row["params_ratio"],
        "verified": row["verified"],
    }
