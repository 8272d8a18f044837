"""One ONNX file in six precisions, what each costs in accuracy, and which one to take.

Inputs and outputs stay fp32 in every file, and the batch stays dynamic. tf32 is the fp32 file: the difference
is a flag of the engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import files
from deploy.errors import ArtifactError, DeployError, ExportError, MeasureError
from deploy.half import at_opset, halved
from deploy.latency import MINIMUM_EFFECT
from deploy.quantize import WEIGHTED, Batches, peaks, quantized
from deploy.runners import Array, Runner
from deploy.to_onnx import empty

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

# From the most exact to the least, roughly; the order in which `choose` prefers them.
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
# The largest max|a - b| / max|a| of the outputs that a sound conversion shows, about three times what trained
# and random networks did. Accuracy on labels says more, where there are labels.
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.3, "fp8": 0.3}
_LOW_TYPES = ("FLOAT16", "BFLOAT16", "INT8", "UINT8", "FLOAT8E4M3FN")
_FP8_OPSET = 19


@dataclass(frozen=True)
class Converted:
    """A written file. `nodes_low` compute in `precision` and `nodes_kept` in fp32: of all nodes with floats
    for fp16 and bf16, of all layers with weights for int8 and fp8. `why_kept`: reason -> number of nodes."""

    precision: str
    bytes: int
    nodes_low: int
    nodes_kept: int
    why_kept: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def family(precision: str, runner: str) -> str:
    """Whom a file in `precision` is for: in int8 "cpu" (ONNX Runtime's kernels) or "gpu" (all others).

    "" where one file serves every kind of `deploy.runners.KINDS`.
    """
    if precision != "int8":
        return ""
    return "cpu" if runner == "onnxruntime" else "gpu"


def convert(
    onnx: Path,
    out: Path,
    precision: str,
    *,
    calibration: Batches | None = None,
    keep: Sequence[str] | str = "first_last",
    runner: str = "tensorrt",
) -> Converted:
    """Write the fp32 model `onnx` to `out` in `precision`, all or nothing; equal requests give equal bytes.

    `calibration`: batches, each a tuple of one array per input; int8 and fp8 need them for their ranges, and
    fp16 leaves what goes beyond its range in fp32 if it has them. `keep`: what stays in fp32, by name of a
    node or of a module ("layer1.0.conv1"); "first_last" means the first and the last layer of an int8 or fp8
    file, and nothing for the others. `runner` is who int8 is for (see `family`): ONNX Runtime's CPU kernels
    want it unsigned, all others signed. Raises ExportError for what cannot be converted as asked,
    ArtifactError for a missing, damaged or no longer fp32 model.
    """
    begin = time.perf_counter()
    if precision not in PRECISIONS:
        raise ExportError(f"unknown precision {precision}", fix=f"use one of {', '.join(PRECISIONS)}")
    if precision in ("int8", "fp8") and calibration is None:
        raise ExportError(
            f"{precision} needs batches to calibrate on", str(out.name), "give calibration data"
        )
    if out.resolve() == onnx.resolve():
        raise ExportError("would overwrite the fp32 model", str(out), "write to another file")
    model, content = _load(onnx)
    if precision in ("fp32", "tf32"):
        found = Converted(precision, len(content), 0, sum(n.op_type in WEIGHTED for n in model.graph.node))
    else:
        try:
            content, found = _converted(model, precision, calibration, keep, runner)
        except DeployError:
            raise
        except Exception as error:  # onnx and onnxruntime raise classes of private modules
            raise _explained(error, onnx, precision) from error
    _write(out, content)
    return Converted(**{**vars(found), "seconds": time.perf_counter() - begin})


def _load(path: Path) -> tuple[ModelProto, bytes]:
    import onnx

    if not path.is_file():
        raise ArtifactError("no such file", str(path), "export the model first")
    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # protobuf's and the checker's classes are private
        raise ArtifactError(
            f"is not valid ONNX: {_first_line(error)}", str(path), "export it again"
        ) from error
    low = {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer} & {*_LOW_TYPES}
    if low:
        raise ArtifactError(
            f"holds {sorted(low)[0]} weights already", str(path), "start from the fp32 export"
        )
    return model, content


def _converted(
    model: ModelProto, precision: str, batches: Batches | None, keep: Sequence[str] | str, runner: str
) -> tuple[bytes, Converted]:
    """The new file's content, and its description."""
    import onnx

    plain = _plain(model)
    before = (list(model.metadata_props), model.producer_name, model.producer_version)
    names = keep if isinstance(keep, str) else _nodes_named(plain, keep)
    done: Any
    if precision in ("fp16", "bf16"):
        found = {} if batches is None or precision == "bf16" else peaks(plain, batches)
        done = halved(plain, precision, () if isinstance(names, str) else names, found)
    else:
        plain = at_opset(plain, _FP8_OPSET, precision) if precision == "fp8" else plain
        done = quantized(plain, precision, batches or (), names, signed=family(precision, runner) != "cpu")
    made: ModelProto = done.model
    empty(made)
    made.metadata_props.extend(before[0])
    made.producer_name, made.producer_version = before[1:]
    onnx.checker.check_model(made, full_check=True)
    content = made.SerializeToString(deterministic=True)
    return content, Converted(precision, len(content), done.low, sum(done.why.values()), done.why)


def _plain(model: ModelProto) -> ModelProto:
    """A copy with functions inlined, and without weights among its inputs, as old exporters list them.

    Raises ExportError for nodes that hold graphs of their own.
    """
    import onnx.inliner

    copy = onnx.ModelProto()
    copy.CopyFrom(onnx.inliner.inline_local_functions(model) if model.functions else model)
    for node in copy.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ExportError(f"{node.op_type} holds a graph of its own", node.name, "use fp32 or tf32")
    weights = {tensor.name for tensor in copy.graph.initializer}
    inputs = [value for value in copy.graph.input if value.name not in weights]
    del copy.graph.input[:]
    copy.graph.input.extend(inputs)
    return copy


def _nodes_named(model: ModelProto, keep: Sequence[str]) -> list[str]:
    """The nodes that `keep` names, by their own name or by the module that their weights belong to."""
    import difflib

    parameters = _parameters(model.graph)
    found = []
    for wanted in keep:
        named = [
            name
            for name, read in parameters.items()
            if name == wanted or any(parameter.startswith(f"{wanted}.") for parameter in read)
        ]
        if not named:
            known = sorted({p.rpartition(".")[0] for read in parameters.values() for p in read})
            near = difflib.get_close_matches(wanted, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "give names of modules that have weights"
            raise ExportError("no node or module of the model has this name", f"keep {wanted}", fix)
        found += named
    return found


def _parameters(graph: GraphProto) -> dict[str, list[str]]:
    """The parameters that each node reads, by node name.

    The exporter transposes the weight of a product with more than two dimensions, and its name is lost; the
    bias that is added next still has its own.
    """
    names = {tensor.name for tensor in graph.initializer if "." in tensor.name}
    added = {name: node.input for node in graph.node if node.op_type == "Add" for name in node.input}
    return {
        node.name: [
            name
            for name in (*node.input, *(added.get(node.output[0], ()) if node.op_type == "MatMul" else ()))
            if name in names
        ]
        for node in graph.node
        if node.name
    }


def _explained(error: Exception, path: Path, precision: str) -> ExportError:
    return ExportError(
        f"cannot be converted to {precision}: {_first_line(error)}", path.name, "use another precision"
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _write(path: Path, content: bytes) -> None:
    try:
        files.write(path, content)
    except OSError as error:
        raise ArtifactError(f"cannot be written: {error.strerror}", str(path), "check the folder") from error


@dataclass(frozen=True)
class Evaluation:
    """One model against a reference on `images` inputs of real data.

    `relative`: max|a - b| / max|a| over all of them, the worst of all outputs, a being the reference;
    infinite where the model's outputs are not finite. `agreement`: share of equal top-1 (axis 1 of the first
    output). `correct` and `correct_reference`: right top-1 of either, None without labels.
    """

    images: int
    relative: float
    agreement: float
    correct: int | None = None
    correct_reference: int | None = None

    @property
    def drop(self) -> float:
        """Top-1 accuracy lost, as a share of all images; without labels the share of changed top-1."""
        if self.correct is None or self.correct_reference is None:
            return 1.0 - self.agreement
        return (self.correct_reference - self.correct) / self.images


def evaluate(
    reference: Runner, candidate: Runner, batches: Iterable[tuple[tuple[Array, ...], Array | None]]
) -> Evaluation:
    """Run both on `batches` of (inputs, labels); labels are integers of shape (batch,), or None in all.

    Raises MeasureError without batches, and where labels are missing for some or do not fit.
    """
    images = same = right = right_reference = 0
    labelled: set[bool] = set()
    worst: list[tuple[float, float]] = []  # per output: largest difference, largest reference
    for inputs, labels in batches:
        a, b = ([np.array(y, dtype=np.float64) for y in run.infer(inputs)] for run in (reference, candidate))
        worst = _widest(worst, a, b)
        tops = a[0].argmax(axis=1), b[0].argmax(axis=1)
        images += len(a[0])
        same += int((tops[0] == tops[1]).sum())
        labelled.add(labels is not None)
        if labels is not None:
            if labels.shape != tops[0].shape:
                what = f"labels of shape {list(labels.shape)} for {list(tops[0].shape)} predictions"
                raise MeasureError(what, "evaluation", "give one label per image")
            right_reference += int((tops[0] == labels).sum())
            right += int((tops[1] == labels).sum())
    if not images or len(labelled) > 1:
        what = "some batches have no labels" if images else "no batches to evaluate on"
        raise MeasureError(what, "evaluation", "give batches, with labels for all or for none")
    relative = max(_ratio(*pair) for pair in worst)
    counts = (right, right_reference) if labelled == {True} else (None, None)
    return Evaluation(images, relative, same / images, *counts)


def _widest(
    worst: Sequence[tuple[float, float]], a: Sequence[Array], b: Sequence[Array]
) -> list[tuple[float, float]]:
    shapes = [x.shape for x in a], [y.shape for y in b]
    if shapes[0] != shapes[1]:
        raise MeasureError(f"outputs {shapes[1]} instead of {shapes[0]}", "evaluation", "convert it again")
    found = []
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        difference, size = worst[index] if worst else (0.0, 0.0)
        # inf - inf is NaN, and max() would drop it: a model that overflows must not pass.
        change = float(np.abs(x - y).max(initial=0.0)) if np.isfinite(y).all() else np.inf
        found.append((max(difference, change), max(size, float(np.abs(x).max(initial=0.0)))))
    return found


def _ratio(difference: float, size: float) -> float:
    return difference / size if size > 0 else (0.0 if difference == 0 else np.inf)


@dataclass(frozen=True)
class Variant:
    """A precision that was tried. `latency_ms`: median; `failure`: why it could not be built or run."""

    name: str
    latency_ms: float = np.inf
    evaluation: Evaluation | None = None
    failure: str = ""


@dataclass(frozen=True)
class Choice:
    """The variant to take, and for each of them, by name, why it was taken or left out."""

    name: str
    why: dict[str, str]


def choose(rows: Sequence[Variant], tolerated_drop: float) -> Choice:
    """The fastest variant whose parity (`TOLERANCES`) and accuracy are inside; `precision: auto`.

    `tolerated_drop`: share of images, 0.01 is one point of top-1. A less exact variant has to be faster by
    `latency.MINIMUM_EFFECT` than a more exact one. Raises MeasureError where no variant is inside.
    """
    ordered = sorted(rows, key=lambda row: PRECISIONS.index(row.name))
    why = {row.name: _outside(row, tolerated_drop) for row in ordered}
    best: Variant | None = None
    for row in ordered:
        if not why[row.name] and (best is None or row.latency_ms * (1 + MINIMUM_EFFECT) <= best.latency_ms):
            best = row
    if best is None:
        told = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        raise MeasureError(f"no precision is inside ({told or 'none was tried'})", "precision", "allow more")
    for row in ordered:
        if row is best:
            why[row.name] = f"the fastest inside, {row.latency_ms:.3g} ms"
        elif not why[row.name]:
            why[row.name] = (
                f"{row.latency_ms:.3g} ms, not faster than {best.name} with {best.latency_ms:.3g} ms"
            )
    return Choice(best.name, why)


def _outside(row: Variant, tolerated_drop: float) -> str:
    """Why `row` cannot be chosen, "" if it can."""
    if row.failure:
        return row.failure
    if not np.isfinite(row.latency_ms) or row.evaluation is None:
        return "not measured"
    found = row.evaluation
    tolerance = TOLERANCES[row.name]
    if found.relative > tolerance:
        return f"outputs differ by {found.relative:.2g} of the largest, {tolerance:g} is tolerated"
    if found.drop > tolerated_drop + 1e-9:  # 1 - 0.98 is a little more than 0.02
        what = "of top-1 changed" if found.correct is None else "of top-1 lost"
        return f"{100 * found.drop:.2f} points {what}, {100 * tolerated_drop:.2f} are tolerated"
    return ""
