"""Runners of a run's models: the file for each kind and precision, engines built where they are missing."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import aim, files, further, variants
from compress.errors import ConfigError
from compress.steps import Work
from deploy.runners import ENGINE_KINDS

FOLDER = "engines"
TOLERANCES = {"fp32": 1e-2, "int8": 0.1}
"""Between two runtimes: other kernels, and in int8 other roundings of the same numbers."""


@dataclass
class Opener:
    """Opens runners for one measurement.

    engines: those that it needed, with the seconds to build each; None where it was there. variants: the
    files that it needed in other precisions than fp32, as `convert` measured them, with their sha256.
    """

    work: Work
    engines: list[dict[str, Any]] = field(default_factory=list)
    variants: list[dict[str, Any]] = field(default_factory=list)

    def open(self, opened: ExitStack, kind: str, model: str, precision: str) -> Any:
        """A runner of one model in one precision, closed with `opened`.

        Raises ConfigError where that precision cannot be made, RunnerError where the runner cannot run here
        or computes something else.
        """
        runner = self._unchecked(opened, kind, model, precision)
        if kind not in aim.ON_CPU:
            onnx = self.onnx(model, precision, kind)
            check_agreement(self.work, model, precision, onnx, runner)
        return runner

    def several(self, opened: ExitStack, kind: str, model: str, precision: str, count: int) -> list[Any]:
        """So many of them, each with a stream and buffers of its own; the first speaks for all."""
        first = self.open(opened, kind, model, precision)
        return [first, *(self._unchecked(opened, kind, model, precision) for _ in range(count - 1))]

    def _unchecked(self, opened: ExitStack, kind: str, model: str, precision: str) -> Any:
        from deploy import runners

        onnx, how = self.onnx(model, precision, kind), "fp32"
        path = self.engine(kind, onnx, precision) if kind in ENGINE_KINDS else onnx
        if kind not in ENGINE_KINDS and precision == "tf32":
            how = "tf32"
        artifact = self.work.load(model) if kind.startswith("torch") else path
        bench = self.work.config.bench
        runner = runners.open_runner(
            kind, artifact, bench.threads or 1, precision=how, buffers=bench.engine.buffers
        )
        opened.callback(runner.close)  # in reverse order: they restore the thread count
        return runner

    def onnx(self, model: str, precision: str, kind: str) -> Path:
        """The ONNX file of a model in a precision, for a kind of runner; made where it is missing.

        Raises RunnerError for a precision that the kind computes wrongly.
        """
        from deploy.errors import RunnerError

        plain = self.work.run / f"{model}.onnx"
        if not plain.is_file():
            raise ConfigError(f"there is no {plain.name}", "bench", "run the stages up to export first")
        if precision in variants.AS_THEY_ARE:
            return plain
        if precision in variants.WRONG_HERE and kind == "onnxruntime":
            raise RunnerError(variants.WRONG_HERE[precision], kind, "take another precision or target")
        row = further.find(self.work, model, precision, kind)
        path: Path = self.work.run / row["file"]
        if row["file"] not in [known["file"] for known in self.variants]:
            accuracy = {key: value for key, value in row["accuracy"].items() if key != "wrong"}
            self.variants.append(row | {"accuracy": accuracy, "sha256": files.sha256(path)})
        return path

    def engine(self, library: str, onnx: Path, precision: str) -> Path:
        """The engine of an ONNX file for this machine: the one that is there, else a new one."""
        from deploy import engines, to_tensorrt
        from deploy.errors import DeployError

        run, target = self.work.run, aim.target(self.work.config).name
        folder = run / FOLDER / target
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{onnx.stem}{'.tf32' if precision == 'tf32' else ''}.engine"
        options = self._options(precision)
        with contextlib.suppress(DeployError):  # none, or not for this machine: built below
            sidecar = engines.check(path, here=engines.this_machine(library))
            same = sidecar["onnx"]["sha256"] == files.sha256(onnx)
            if same and to_tensorrt.EngineOptions(**_as_given(sidecar["options"])) == options:
                return self._noted(path, library, None)
        self.work.events.note(f"building {path.name} with {library}")
        facts = {"plan": files.sha256(run / "plan.json"), "target": target}
        cache = folder / "timing.cache" if library == "tensorrt" else None
        seconds = to_tensorrt.build(onnx, path, library, options, timing_cache=cache, facts=facts).seconds
        return self._noted(path, library, seconds)

    def _options(self, precision: str) -> Any:
        from deploy.to_tensorrt import EngineOptions

        bench = self.work.config.bench
        batches = sorted(bench.batches or [1])
        spread = (batches[0], batches[len(batches) // 2], batches[-1])
        return EngineOptions(
            batches=spread, tf32=precision == "tf32", **bench.engine.model_dump(exclude={"buffers"})
        )

    def _noted(self, path: Path, library: str, seconds: float | None) -> Path:
        name = path.relative_to(self.work.run).as_posix()
        if name not in [row["file"] for row in self.engines]:
            size = path.stat().st_size
            row = {"file": name, "library": library, "bytes": size, "seconds": seconds}
            self.engines.append(row | {"buffers": self.work.config.bench.engine.buffers})
        return path


def _as_given(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"batches": tuple(options["batches"])}


def check_agreement(work: Work, model: str, precision: str, onnx: Path, runner: Any) -> None:
    """Nothing is timed that computes something else: a GPU that a library does not support may answer zeros.

    onnx: the file that the runner was made from. Held against ONNX Runtime on this CPU: in int8 the same
    file, else the fp32 file; fp8 cannot be held against anything here. Raises RunnerError (exit 6).
    """
    from deploy import parity, runners
    from deploy import precision as precisions
    from deploy.errors import RunnerError

    if precision in variants.WRONG_HERE:
        return
    same = precision == "int8"  # on random inputs its ranges do not hold, but they do so for both
    reference = runners.open_runner("onnxruntime", onnx if same else work.run / f"{model}.onnx")
    tolerance = TOLERANCES.get(precision) or precisions.TOLERANCES[precision]
    batch = min(work.config.bench.batches or [1])
    (found,) = parity.compare(reference.infer, runner.infer, work.shapes, [batch], tolerance)
    reference.close()
    if not found.passed:
        what = f"the {model} model in {precision} computes something else: {found.reason}"
        raise RunnerError(what, runner.name, "is this GPU supported by the library? see compress doctor")
