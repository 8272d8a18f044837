"""What a config leaves to its target: runners, precision, batch sizes, threads, alignment, budgets."""

from __future__ import annotations

import importlib.util
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
UNTOLD = ("onnxruntime_cuda", "onnxruntime_tensorrt", "onnxruntime_nvtensorrtrtx")
"""Runners that do not tell how long each layer takes, so that no latency can be modelled."""


def target(config: Config) -> Target:
    """The target of `bench.target`. Raises MeasureError (exit 3) for one that does not exist."""
    from deploy import targets

    return targets.load(config.bench.target)


def aimed(config: Config) -> Config:
    """The config with the target's values where it has none. The filled-in config is the config.

    Raises ConfigError where a gate looks at what is not measured then, or streams are asked of CPUs.
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
    if gates.metric_drop is not None and "accuracy_drop" not in gates.model_fields_set:
        own["accuracy_drop"] = None
    if gates.target is None:
        own["target"] = config.prune.max_accuracy_drop is None and config.prune.max_loss_increase is None
    budget = _budget(config, filled["batches"])
    limits = vars(chosen.budget) | _asked(budget, config)
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
    if bench.streams is not None and not on_gpu(found):
        what = f"streams are of GPUs, and {', '.join(runners)} run on the CPU"
        raise ConfigError(what, "bench.streams", "set it to null, or bench on a GPU target")
    return found


def on_gpu(config: Config) -> list[str]:
    """Those of an aimed config's runners that need a GPU."""
    return [kind for kind in config.bench.runners or () if kind not in ON_CPU]


def _budget(config: Config, batches: list[int]) -> BudgetConfig | None:
    """The budget with its target and batch size."""
    if config.budget is None or not config.budget.is_measured:
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


def _asked(budget: BudgetConfig | None, config: Config) -> dict[str, Any]:
    """What the gates ask where the budget is for the target that is benched: that it is met, at the same
    batch. What the target asks on its own besides still holds."""
    from compress.budget import WITHIN

    if budget is None or not budget.has_latency or budget.target != config.bench.target:
        return {}
    if config.gates.batch not in (None, budget.batch):
        return {}
    if budget.latency_ms is not None:
        return {"batch": budget.batch, "latency_ms": budget.latency_ms * (1 + WITHIN)}
    assert budget.latency_ratio is not None
    return {"batch": budget.batch, "speedup": 1 / (budget.latency_ratio * (1 + WITHIN))}


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

    given, budget = config.prune.align, config.budget
    if given != "auto":
        return given
    if at is not None:
        return targets.resolve_align(at.target)
    own = budget.target if budget is not None and budget.is_measured else None
    return targets.resolve_align(target(config) if own is None else _target_of(own))


def _target_of(name: str, key: str = "budget.target") -> Target:
    """The target that a key names. Raises ConfigError for one that does not exist."""
    from deploy import targets
    from deploy.errors import MeasureError

    try:
        return targets.load(name)
    except MeasureError as error:
        where = error.where if name.endswith(".toml") else key
        raise ConfigError(error.what, where, error.fix) from None


def place(config: Config, name: str = "") -> Place:
    """Where latency is measured: on the target of this name, else on the budget's. `config` is aimed."""
    budget, bench = config.budget, config.bench
    assert bench.batches is not None
    own = (budget.target if budget is not None else None) or bench.target
    chosen = _target_of(name, "--target") if name else _target_of(own)
    same = (name or own) == bench.target
    precision = bench.precision if same and bench.precision not in (None, "auto") else chosen.precision
    threads = (bench.threads if same else None) or chosen.threads
    return Place(chosen, str(precision), threads, _batch(config, bench.batches))


def check(config: Config, *, here: bool, prunes: bool = False) -> None:
    """Raises where a target or a runner is unknown; here: or needs a device that this machine lacks; prunes:
    or the budget's does, as its latency is measured while pruning."""
    import torch

    from deploy import runners

    config = aimed(config)
    _check_budget(config, prunes=prunes)
    for kind in config.bench.runners or ():
        if kind not in runners.KINDS:
            raise ConfigError(f"unknown runner {kind}", "bench.runners", did_you_mean(kind, runners.KINDS))
        if here and kind not in ON_CPU and not torch.cuda.is_available():
            raise TargetError(f"{kind} needs a CUDA device", "bench.runners", "see compress doctor")
    if here and config.bench.engine.buffers == "pycuda" and importlib.util.find_spec("pycuda") is None:
        fix = "pip install 'compress-release[pycuda]', or set it to torch"
        raise TargetError("pycuda is not installed", "bench.engine.buffers", fix)
    if here and torch.cuda.is_available():
        _check_gpu(target(config), "bench.target")


def _check_budget(config: Config, *, prunes: bool) -> None:
    """Raises where what a budget asks for cannot be measured; prunes: here."""
    budget = config.budget
    if budget is None or not budget.is_measured:
        return
    at = place(config)
    check_place(at, "budget.target", here=prunes)
    if prunes and budget.energy_ratio is not None:
        _check_counter(at)


def _check_counter(at: Place) -> None:
    """Raises where this machine does not count the energy of the place's device."""
    from deploy import energy
    from deploy.errors import RunnerError

    try:
        energy.open_counter(gpu=bool(at.target.gpu))
    except RunnerError as error:
        raise TargetError(error.what, "budget.energy_ratio", error.fix) from None


def check_place(at: Place, where: str, *, here: bool, when: str = "while pruning", do: str = "prune") -> None:
    """Raises where the latency of layers cannot be measured at a place; here: on this machine. when, do: in
    the error, when it is measured and what to do elsewhere."""
    import torch

    chosen = at.target
    if chosen.runner in UNTOLD:
        fix = "take a target of ONNX Runtime on the CPU, TensorRT or torch"
        raise ConfigError(f"{chosen.runner} does not tell how long each layer takes", where, fix)
    if chosen.runner in ON_CPU or not here:
        return
    if not torch.cuda.is_available():
        what = f"{chosen.name} needs a CUDA device: latency is measured {when}"
        raise TargetError(what, where, f"{do} where there is one; see compress doctor")
    _check_gpu(chosen, where)


def _check_gpu(chosen: Target, where: str) -> None:
    import torch

    found = torch.cuda.get_device_name()
    if chosen.gpu.lower() not in found.lower():
        what = f"the target {chosen.name} is for {chosen.gpu}, here is {found}"
        raise TargetError(what, where, "measure it there, or take a target for this GPU")
