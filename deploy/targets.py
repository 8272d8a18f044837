"""Hardware targets: one TOML file each, so that a new target is a file and no code.

The files lie in the folder `targets/` beside this module; that folder is data, not a package.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.errors import MeasureError

FOLDER = Path(__file__).with_suffix("")
RUNNERS = (
    *("torch", "torch_compile", "torch_cuda", "torch_cuda_graph", "torch_cuda_compile"),
    *("onnxruntime", "onnxruntime_cuda", "onnxruntime_tensorrt", "onnxruntime_nvtensorrtrtx"),
    *("tensorrt", "tensorrt_rtx"),
)
"""`deploy.runners.KINDS`, here too so that reading a target loads nothing heavy; a test compares them."""
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
_LARGEST_FILE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Budget:
    """What the target asks of the pruned model, at its largest batch size; None: nothing."""

    latency_ms: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Target:
    """Where a model will run.

    `align`: channels are kept in multiples of this; "auto" asks the CPU at hand. `threads`: CPU threads per
    operator. `gpu`: a part of the device name as the driver reports it, `compute_capability`: NVIDIA's
    number for it; both are empty for a CPU. `budget`: limits that hold where a config sets none.
    """

    name: str
    description: str
    runner: str
    precision: str
    align: int | str
    threads: int
    batches: tuple[int, ...]
    gpu: str = ""
    compute_capability: str = ""
    budget: Budget = Budget()


def _positive(value: object) -> bool:
    return type(value) is int and value >= 1


def _text(value: object) -> bool:
    return isinstance(value, str)


def _is_budget(value: object) -> bool:
    return isinstance(value, dict) and all(
        key in ("latency_ms", "speedup") and type(limit) in (int, float) and 0 < limit < float("inf")
        for key, limit in value.items()
    )


# key -> (is the value fine?, what it should be). `name` is the file's name.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "description": (_text, "a text"),
    "runner": (RUNNERS.__contains__, f"one of {', '.join(RUNNERS)}"),
    "precision": (PRECISIONS.__contains__, f"one of {', '.join(PRECISIONS)}"),
    "align": (lambda value: value == "auto" or _positive(value), 'a whole number of 1 or more, or "auto"'),
    "threads": (_positive, "a whole number of 1 or more"),
    "batches": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_positive, value)),
        "a list of whole numbers of 1 or more",
    ),
    "gpu": (_text, "a text"),
    "compute_capability": (_text, "a text"),
    "budget": (_is_budget, "a table of latency_ms and speedup, numbers above 0"),
}
_OPTIONAL = {"gpu", "compute_capability", "budget"}


def names() -> tuple[str, ...]:
    """The targets that come with the package, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load(name_or_path: str) -> Target:
    """A target by name, by name and precision ("h100-int8"), or from the path of a `.toml` file.

    Raises MeasureError naming file and key.
    """
    if name_or_path.endswith(".toml"):
        return _read(Path(name_or_path))
    base, _, precision = name_or_path.rpartition("-")
    if precision in PRECISIONS and base in names():
        return replace(load(base), name=name_or_path, precision=precision)
    if name_or_path not in names():
        near = difflib.get_close_matches(name_or_path, names(), n=3, cutoff=0.5) or names()
        raise MeasureError(
            f"unknown target {name_or_path!r}",
            "bench.target",
            f"use {', '.join(near)}, or the path of a .toml file",
        )
    return _read(FOLDER / f"{name_or_path}.toml")


def _read(path: Path) -> Target:
    # Only the file name goes into messages and results: folders are nobody's business.
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
        if len(content) > _LARGEST_FILE_BYTES:
            raise MeasureError("is larger than 64 KiB", path.name, "give a target file")
        values = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise MeasureError(f"cannot read it: {error.strerror}", path.name, "check the path") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise MeasureError(f"is not TOML: {error}", path.name, "correct the file") from error
    _check(values, path.name)
    batches, budget = tuple(values.pop("batches")), Budget(**values.pop("budget", {}))
    return Target(name=path.stem, batches=batches, budget=budget, **values)


def _check(values: dict[str, Any], file: str) -> None:
    for key in values:
        if key not in _CHECKS:
            near = difflib.get_close_matches(key, _CHECKS, n=1)
            fix = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(_CHECKS)}"
            raise MeasureError(f"unknown key {key}", file, fix)
    for key, (fine, wanted) in _CHECKS.items():
        if key in values:
            value = values[key]
            if not fine(value):
                raise MeasureError(f"{key} is {value!r}", file, f"it must be {wanted}")
        elif key not in _OPTIONAL:
            raise MeasureError(f"{key} is missing", file, f"it must be {wanted}")


def resolve_align(target: Target, cpu_flags: Set[str] | None = None) -> int:
    """The number of channels to keep multiples of.

    "auto" is 16 with AVX-512, else 8: ONNX Runtime's convolution works in blocks of that many channels, and
    one channel more costs a third of the gain (measured on CIFAR ResNet-20). `cpu_flags` None: this CPU's.
    """
    if isinstance(target.align, int):
        return target.align
    if cpu_flags is None:
        from deploy.machine import cpu_flags as read_flags

        cpu_flags = read_flags()
    return 16 if "avx512f" in cpu_flags else 8
