"""What is handed over: a folder that others can serve, with a model card and checksums.

The same run gives the same bytes: nothing in it comes from the clock, the folder's name or the machine.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from deploy import report, triton
from deploy.tables import Table
from deploy.values import entries, number, rows, section, text

SUMS = "SHA256SUMS"
CARD = "README.md"
MODEL = "dense.onnx"
ENGINES = (".engine", ".plan")
WEIGHTS = ("dense.graph.json", "dense.safetensors", "dense.pt2")
PLAIN_FILES = (*WEIGHTS, "plan.json", "report.html", "results.json", "gate.json")
CARD_LIMITS = (60, 300)  # most rows of a table, most characters of a text
ABOUT = {
    MODEL: "the model, for ONNX Runtime and for building engines; its batch size is open",
    "dense.graph.json": "the model for PyTorch, with dense.safetensors: neither code nor pickle",
    "dense.safetensors": "its weights",
    "dense.pt2": "the same, for torch.export.load and AOTInductor",
    "plan.json": "which channels of the original stay",
    "report.html": "how it was made and measured",
    "results.json": "every figure; the baseline of a later release",
    "gate.json": "the verdict",
    SUMS: f"checksums of all of this: sha256sum -c {SUMS}",
}


def files_of(outputs: Sequence[str]) -> list[str]:
    """Those of a run's files that are handed over: models, engines with sidecars, plan, report, figures."""
    found = [name for name in outputs if name in PLAIN_FILES]
    ours = [name for name in outputs if not PurePosixPath(name).name.startswith("original.")]
    found += [name for name in ours if name.endswith(".onnx")]
    for name in ours:
        if name.endswith(ENGINES) and f"{name}.json" in outputs:
            found += [name, f"{name}.json"]
    return sorted(found)


def write(
    folder: Path,
    run: Path,
    outputs: Sequence[str],
    results: Mapping[str, Any],
    *,
    name: str = "",
    forced: bool = False,
) -> list[str]:
    """Fill an empty ``folder`` from a run's ``outputs`` (paths in ``run``); returns what is in it, sorted.

    ``results`` is results.json with the verdict that counts; ``name``: the model's, for its folder in the
    Triton repository; ``forced``: it is handed over although that verdict is no pass, and the card says so.
    Raises ArtifactError for a damaged ONNX file, MeasureError for results of another version, OSError.
    """
    listed = files_of(outputs)
    for source in listed:
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / source, folder / source)
    name = triton.model_name(name or text(section(results, "model").get("name"), "model"))
    model = shipped(results)
    ports = triton.read_ports(folder / model)
    place = folder / "models" / name
    (place / "1").mkdir(parents=True)
    shutil.copyfile(folder / model, place / "1" / "model.onnx")
    _write(place / "config.pbtxt", triton.config(name, ports, *triton.batch_sizes(results)))
    _write(folder / CARD, card(results, name, ports, listed, forced=forced))
    _write(folder / SUMS, sums(folder))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def shipped(results: Mapping[str, Any]) -> str:
    """The file that was judged: the pruned model in the precision of the target."""
    precision = section(results, "target").get("precision")
    for row in rows(results, "variants"):
        if (row.get("model"), row.get("precision")) == ("dense", precision):
            return f"dense.{precision}.onnx"
    return MODEL


def card(
    results: Mapping[str, Any], name: str, ports: triton.Ports, listed: Sequence[str], *, forced: bool
) -> str:
    """The model card in Markdown. What only the model's owner can say has a marked place in it."""
    most_rows, most_text = CARD_LIMITS
    view = report.view(results) | {
        "name": name,
        "forced": forced,
        "ports": _ports(ports),
        "files": _files(listed, name),
        "preparation": _preparation(results),
        "torch": WEIGHTS[0] in listed,
    }
    return report.environment(True, most_text).get_template("card.md.j2").render(view, max_rows=most_rows)


def sums(folder: Path) -> str:
    """A line for each file under ``folder``, as sha256sum writes and checks them, in the order of paths."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return "".join(f"{_sha256(folder / path)}  {path}\n" for path in paths if path != SUMS)


def _ports(ports: triton.Ports) -> Table:
    body = [
        (which, tensor.name, tensor.type.removeprefix("TYPE_"), _shape(tensor))
        for which, tensors in (("input", ports.inputs), ("output", ports.outputs))
        for tensor in tensors
    ]
    return Table(("", "Name", "Type", "Shape"), "tctt", tuple(body))


def _preparation(results: Mapping[str, Any]) -> str:
    """What was done to images before the model got them; what a config does not say is told as such."""
    data = section(section(section(results, "provenance"), "config"), "data")
    mean, std = (_numbers(entries(data, key)) for key in ("mean", "std"))
    if mean and std:
        return f"Values in 0 to 1, minus {mean}, over {std}, per channel (data.mean, data.std)."
    name = text(data.get("name"), "of the run")
    return f"Prepared as the data set {name} prepares them: the config has no mean and std."


def _numbers(values: Sequence[Any]) -> str:
    """`(0.485, 0.456, 0.406)`; "" where there is none or one is no number."""
    found = [number(value) for value in values]
    return f"({', '.join(f'{one:g}' for one in found)})" if found and None not in found else ""


def _shape(tensor: triton.Tensor) -> str:
    sizes = ["any" if size is None else str(size) for size in tensor.shape]
    return " × ".join(["batch", *sizes[1:]] if sizes[:1] == ["any"] else sizes) or "a single value"


def _files(listed: Sequence[str], name: str) -> Table:
    body = [(path, ABOUT.get(path) or _about(path)) for path in listed]
    body += [
        (f"models/{name}", "the model that was judged, as a Triton model repository has it"),
        (SUMS, ABOUT[SUMS]),
    ]
    return Table(("File", "What it is"), "ct", tuple(body))


def _about(path: str) -> str:
    if path.endswith(ENGINES):
        return "an engine, for the GPU and library in the file beside it only"
    return "what that engine is tied to" if path.endswith(".json") else "the model in another precision"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: str) -> None:
    path.write_bytes(content.encode("utf-8", errors="backslashreplace"))
