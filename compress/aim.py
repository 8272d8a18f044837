"""What a config leaves to its target: runners, precision, batch sizes, threads, alignment, budgets."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from compress.config import Config
from compress.errors import ConfigError, TargetError, did_you_mean

if TYPE_CHECKING:
    from deploy.targets import Target

ON_CPU = ("torch", "torch_compile", "onnxruntime")


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
    for key, limit in vars(chosen.budget).items():
        if limit is not None and key not in gates.model_fields_set:
            own[key] = limit
    found = config.model_copy(
        update={"bench": bench.model_copy(update=filled), "gates": gates.model_copy(update=own)}
    )
    _check_gates(found)
    if bench.streams is not None and not on_gpu(found):
        what = f"streams are of GPUs, and {', '.join(runners)} run on the CPU"
        raise ConfigError(what, "bench.streams", "set it to null, or bench on a GPU target")
    return found


def on_gpu(config: Config) -> list[str]:
    """Those of an aimed config's runners that need a GPU."""
    return [kind for kind in config.bench.runners or () if kind not in ON_CPU]


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


def align(config: Config) -> int:
    """The multiple that kept channels must be of: as given, or by the target."""
    from deploy import targets

    given = config.prune.align
    return targets.resolve_align(target(config)) if given == "auto" else given


def check(config: Config, *, here: bool) -> None:
    """Raises where the target or a runner is unknown; here: or needs a device that this machine lacks."""
    import torch

    from deploy import runners

    for kind in aimed(config).bench.runners or ():
        if kind not in runners.KINDS:
            raise ConfigError(f"unknown runner {kind}", "bench.runners", did_you_mean(kind, runners.KINDS))
        if here and kind not in ON_CPU and not torch.cuda.is_available():
            raise TargetError(f"{kind} needs a CUDA device", "bench.runners", "see compress doctor")
    if here and config.bench.engine.buffers == "pycuda" and importlib.util.find_spec("pycuda") is None:
        fix = "pip install 'compress-release[pycuda]', or set it to torch"
        raise TargetError("pycuda is not installed", "bench.engine.buffers", fix)
    if here and torch.cuda.is_available():
        chosen, found = target(config), torch.cuda.get_device_name()
        if chosen.gpu.lower() not in found.lower():
            what = f"the target {chosen.name} is for {chosen.gpu}, here is {found}"
            raise TargetError(what, "bench.target", "measure it there, or take a target for this GPU")
