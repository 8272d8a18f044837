"""What a config leaves to its target: runners, precision, batch sizes, threads, alignment, budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.config import Config
from compress.errors import ConfigError, TargetError, did_you_mean

if TYPE_CHECKING:
    from compress.schema import BudgetConfig
    from deploy.targets import Target


@dataclass(frozen=True)
class Place:
    """Where and how latency is measured: a target's runner in a precision, with threads, at a batch size."""

    target: Target
    precision: str
    threads: int
    batch: int


ON_CPU = ("torch", "torch_compile", "onnxruntime")


def target(config: Config) -> Target:
    """The target of `bench.target`. Raises MeasureError (exit 3) for one that does not exist."""
    from deploy import targets

    return targets.load(config.bench.target)


def aimed(config: Config) -> Config:
    """The config with the target's values where it has none. The filled-in config is the config.

    Raises ConfigError where a gate looks at what is not measured then.
    """
    chosen = target(config)
    bench, gates = config.bench, config.gates
    runners = bench.runners or _runners(chosen)
    filled: dict[str, Any] = {
        "runners": runners,
        "precision": bench.precision or chosen.precision,
        "batches": bench.batches or list(chosen.batches),
        "threads": bench.threads or chosen.threads,
    }
    own: dict[str, Any] = {
        "runner": gates.runner or (chosen.runner if chosen.runner in runners else runners[-1])
    }
    budget = _budget(config, filled["batches"])
    limits = vars(chosen.budget) | _asked(budget, config.bench.target)
    for key, limit in limits.items():
        if limit is not None and key not in gates.model_fields_set:
            own[key] = limit
    found = config.model_copy(
        update={
            "bench": bench.model_copy(update=filled),
            "gates": gates.model_copy(update=own),
            "budget": budget,
        }
    )
    _check_gates(found)
    return found


def _budget(config: Config, batches: list[int]) -> BudgetConfig | None:
    """The budget with its target and batch size."""
    if config.budget is None or not config.budget.has_latency:
        return config.budget
    name = config.budget.target or config.bench.target
    batch = _batch(config, batches)
    if name == config.bench.target and batch not in batches:
        what = f"this batch size is not measured, found {batch}"
        raise ConfigError(what, "budget.batch", "add it to bench.batches")
    return config.budget.model_copy(update={"target": name, "batch": batch})


def _batch(config: Config, batches: list[int]) -> int:
    """The batch size at which latency counts most."""
    given = None if config.budget is None else config.budget.batch
    return given or config.gates.batch or max(batches)


def _asked(budget: BudgetConfig | None, target: str) -> dict[str, Any]:
    """What the gates ask where the budget is for the target that is benched: the same, at the same batch."""
    if budget is None or not budget.has_latency or budget.target != target:
        return {}
    speedup = None if budget.latency_ratio is None else 1 / budget.latency_ratio
    return {"batch": budget.batch, "latency_ms": budget.latency_ms, "speedup": speedup}


def _runners(chosen: Target) -> list[str]:
    torch = "torch_cuda" if chosen.gpu else "torch"
    return list(dict.fromkeys([torch, chosen.runner]))


def _check_gates(config: Config) -> None:
    gates, bench = config.gates, config.bench
    if gates.speedup is None and gates.latency_ms is None:
        return
    if gates.runner not in (bench.runners or ()):
        what = f'no runner of this name is measured, found "{gates.runner}"'
        raise ConfigError(what, "gates.runner", "add it to bench.runners")
    if gates.batch is not None and gates.batch not in (bench.batches or ()):
        what = f"this batch size is not measured, found {gates.batch}"
        raise ConfigError(what, "gates.batch", "add it to bench.batches")


def align(config: Config, at: Place | None = None) -> int:
    """The multiple that kept channels must be of: as given, or by the target that they are to be fast on."""
    from deploy import targets

    given = config.prune.align
    if given != "auto":
        return given
    at = place(config) if at is None and _has_latency(config) else at
    return targets.resolve_align(target(config) if at is None else at.target)


def _has_latency(config: Config) -> bool:
    return config.budget is not None and config.budget.has_latency


def place(config: Config, name: str = "") -> Place:
    """Where latency is measured: on the target of this name, else on the budget's. `config` is aimed."""
    from deploy import targets

    budget, bench = config.budget, config.bench
    assert bench.batches is not None
    name = name or (budget.target if budget is not None else None) or bench.target
    chosen, same = targets.load(name), name == bench.target
    precision = bench.precision if same and bench.precision not in (None, "auto") else chosen.precision
    threads = (bench.threads if same else None) or chosen.threads
    return Place(chosen, str(precision), threads, _batch(config, bench.batches))


def check(config: Config, *, here: bool) -> None:
    """Raises where the target or a runner is unknown; here: or needs a device that this machine lacks."""
    import torch

    from deploy import runners

    for kind in aimed(config).bench.runners or ():
        if kind not in runners.KINDS:
            raise ConfigError(f"unknown runner {kind}", "bench.runners", did_you_mean(kind, runners.KINDS))
        if here:
            check_device(kind, "bench.runners")
    if here and torch.cuda.is_available():
        chosen, found = target(config), torch.cuda.get_device_name()
        if chosen.gpu.lower() not in found.lower():
            what = f"the target {chosen.name} is for {chosen.gpu}, here is {found}"
            raise TargetError(what, "bench.target", "measure it there, or take a target for this GPU")


def check_device(kind: str, where: str) -> None:
    """Raises TargetError where a runner needs a device that this machine lacks."""
    import torch

    if kind not in ON_CPU and not torch.cuda.is_available():
        raise TargetError(f"{kind} needs a CUDA device", where, "see compress doctor")
